"The light towers' readers: no padding comes through, order is heard, every part learns."

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
from speechimg.towers.light import LightImageTower, LightSpeechTower

GENERATOR = torch.Generator().manual_seed(0)
FRAMES, LENGTHS, PATCHES = (
    torch.randn(3, 20, 384, generator=GENERATOR),
    torch.tensor([20, 7, 1]),
    torch.randn(3, 25, 320, generator=GENERATOR),
)


def half(length):
    return -(-length // 2)


# each frame twice: at half the rate the same ones are left, whichever end comes first
TWICE = FRAMES.repeat_interleave(2, 1)


def test_padding_reaches_nothing():
    check_padding(make(LightSpeechTower), tokens_of=half)


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
        check_padding(spoilt_tower(mutant), tokens_of=half)


def check_company(tower):
    "check_padding's last part alone."
    x, lengths = (
        torch.randn(2, 12, 384, generator=torch.Generator().manual_seed(5)),
        torch.tensor([12, 5]),
    )
    with torch.no_grad():
        assert_close(tower(x[1:, :5]).tokens[0], tower(x, lengths).tokens[1, :4], rtol=0, atol=1e-5)


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
    tower.even.usual.fill_(-1.0)  # padding becomes 1, not 0
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
        "even.usual",
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
        x = tower.even(clip[None, :length])
        for convolution in tower.convolutions:
            x = torch.nn.functional.gelu(convolution(x.mT).mT)
        x = tower.norm_words(x)
        x = x + tower.norm_order(torch.nn.GRU.forward(tower.order, x)[0])
        count = half(length)
        expected = tower.reader(
            x, pretrained.position_codes(count, 16), torch.ones(1, count, dtype=torch.bool)
        )
        assert_close(tokens[: 1 + count], expected.tokens[0], rtol=0, atol=1e-5)


def test_odd_width():
    with pytest.raises(InputError, match="is odd.*choose an even width"):
        LightSpeechTower(Config(width=9, heads=3))
    assert LightImageTower(Config(width=9, heads=3))(PATCHES).tokens.shape == (
        3,
        26,
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
    for tower, x in zip(without_order(size), (TWICE, PATCHES)):
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
    check_order(tower, TWICE, TWICE.flip(1))


def test_codes_are_as_loud_as_tokens():
    tower = LightImageTower(Config())
    assert 0.9 < tower.rows.std() < 1.1 and 0.9 < tower.columns.std() < 1.1
    assert abs(pretrained.position_codes(60, 192).square().mean() - 1) < 0.02


def test_twenty_seconds_and_more():
    for frames in (500, 1200):  # 25 a second
        assert make(LightSpeechTower)(torch.randn(1, frames, 384)).tokens.isfinite().all()


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_company_does_not_matter(lengths):
    torch.manual_seed(sum(lengths))
    tower, x = make(LightSpeechTower), torch.randn(len(lengths), max(lengths), 384)
    with torch.no_grad():
        together = tower(x, torch.tensor(lengths))
        for index, length in enumerate(lengths):
            assert_close(
                tower(x[index : index + 1, :length]).tokens[0],
                together.tokens[index, : 1 + half(length)],
                rtol=0,
                atol=1e-5,
            )
