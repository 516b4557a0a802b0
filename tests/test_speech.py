"Frames are counted exactly, padding reaches nothing, order is heard."

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from tower_checks import (
    TINY,
    WaysBackThroughPadding,
    check_copy,
    check_depth_0,
    check_gradients,
    check_order,
    check_padding,
    deafen,
    leaky_peak,
    make,
    mean_peak,
    no_peak,
)

from speechimg import speech
from speechimg.core import Config, InputError
from speechimg.speech import (
    ConvBlock,
    LogMel,
    MaskedBatchNorm,
    MaskedGRU,
    Reader,
    SpeechTower,
    frame_mask,
    peak,
    position_codes,
)

# ------------------------------------------------------------------------------------------------
# LogMel


@given(st.integers(0, 30_000))
def test_log_mel_frame_count(samples):
    features = LogMel()(torch.randn(samples, generator=torch.Generator().manual_seed(0)))
    assert features.shape == (LogMel().frames(samples), 64) == (samples // 160 + 1, 64)
    assert features.dtype == np.float16 and np.isfinite(features).all()


def without_floor(wave):
    return speech.mel_power()(wave).T.log().numpy()


def without_eps(wave):
    logs = speech.mel_power()(wave).T.clamp(min=1e-12).log()
    return ((logs - logs.mean(0)) / (logs - logs.mean(0)).square().mean().sqrt()).numpy()


def check_silence(front_end):
    for wave in (torch.zeros(8000), torch.zeros(1), torch.full((8000,), 1e-9)):
        assert np.isfinite(front_end(wave)).all()


def check_loudness(front_end):
    "Words are the same, however loud; the microphone's level is not heard."
    wave = torch.randn(8000, generator=torch.Generator().manual_seed(0)) * torch.linspace(
        0, 1, 8000
    )
    quiet, loud = (np.asarray(front_end(gain * wave), dtype=np.float32) for gain in (0.01, 1.0))
    assert np.abs(quiet - loud).max() < 0.02


@pytest.mark.parametrize("check", [check_silence, check_loudness])
def test_log_mel_normalises(check):
    check(LogMel())


@pytest.mark.parametrize(
    "check, mutant",
    [(check_silence, without_floor), (check_silence, without_eps), (check_loudness, without_floor)],
)
def test_log_mel_mutants(check, mutant):
    with pytest.raises(AssertionError):
        check(mutant)


def check_normalised_before_padding(front_end):
    "Statistics over the true length: zero mean in each band, variance 1 overall."
    features = np.asarray(
        front_end(torch.randn(5000, generator=torch.Generator().manual_seed(0))), dtype=np.float32
    )[: 5000 // 160 + 1]
    assert np.abs(features.mean(0)).max() < 0.01 and abs((features**2).mean() - 1) < 0.05


def padded_first(wave):
    return LogMel()(F.pad(wave, (0, 16_000)))


def test_log_mel_statistics_over_true_length():
    check_normalised_before_padding(LogMel())
    with pytest.raises(AssertionError):
        check_normalised_before_padding(padded_first)


def test_log_mel_five_minutes():
    assert LogMel()(torch.randn(300 * 16_000) / 10).shape == (30_001, 64)


def test_log_mel_is_an_object_that_travels():
    twin, wave = pickle.loads(pickle.dumps(LogMel())), torch.randn(3000)
    assert twin.params == LogMel().params and np.array_equal(twin(wave), LogMel()(wave.numpy()))


# ------------------------------------------------------------------------------------------------
# masks and norms


def test_frame_mask_by_hand():
    x = torch.zeros(2, 3, 5)
    assert frame_mask(torch.tensor([3, 1]), x).tolist() == [
        [True, True, True],
        [True, False, False],
    ]
    assert frame_mask(None, x).all()


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.booleans())
def test_masked_batch_norm_equals_batch_norm_on_valid_frames(lengths, training):
    generator = torch.Generator().manual_seed(sum(lengths))
    clips = [torch.randn(length, 3, generator=generator) for length in lengths]
    x = nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=torch.nan)
    masked, plain = MaskedBatchNorm(3).train(training), nn.BatchNorm1d(3).train(training)
    out, expected = masked(x, frame_mask(torch.tensor(lengths), x)), plain(torch.cat(clips))
    assert torch.equal(torch.cat([row[:length] for row, length in zip(out, lengths)]), expected)
    assert torch.equal(masked.running_mean, plain.running_mean) and torch.equal(
        masked.running_var, plain.running_var
    )
    assert all(not row[length:].any() for row, length in zip(out, lengths))


def test_masked_batch_norm_single_frame():
    norm = MaskedBatchNorm(3).train()
    assert_close(
        norm(torch.ones(1, 1, 3), torch.ones(1, 1, dtype=torch.bool)),
        torch.ones(1, 1, 3),
        rtol=0,
        atol=1e-4,
    )


# ------------------------------------------------------------------------------------------------
# frame arithmetic


def check_frame_count(count):
    """The rule for the number of tokens against a chain of real strided convolutions, asked which
    outputs a valid frame's own place reaches.
    """
    for length in range(1, 60):
        places = list(range(length))
        for _ in range(3):
            places = places[::2]
        assert count(length) == len(places)


def test_tokens_per_clip():
    check_frame_count(lambda length: math.ceil(length / 8))
    tower = make(SpeechTower)
    for length in (1, 2, 7, 8, 9, 16, 17, 33):
        assert tower(torch.randn(1, length, 64)).tokens.shape[1] == 1 + math.ceil(length / 8)


@pytest.mark.parametrize("mutant", [lambda n: round(n / 8), lambda n: n // 8, lambda n: n // 8 + 1])
def test_tokens_per_clip_mutants(mutant):
    with pytest.raises(AssertionError):
        check_frame_count(mutant)


@given(st.integers(1, 40), st.integers(0, 30))
def test_conv_block_padding(length, padding):
    torch.manual_seed(length)
    block, x = ConvBlock(4, 5).eval(), torch.randn(1, length, 4)
    alone, mask = block(x, frame_mask(None, x))
    longer = F.pad(x, (0, 0, 0, padding))
    company, company_mask = block(longer, frame_mask(torch.tensor([length]), longer))
    assert company_mask.sum() == mask.sum() == alone.shape[1]
    assert_close(company[:, : alone.shape[1]], alone, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# the recurrent layer


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 4))
def test_masked_gru_equals_a_gru_on_each_clip(lengths, padding):
    torch.manual_seed(sum(lengths))
    walker, clips = MaskedGRU(6), [torch.randn(length, 6) for length in lengths]
    x = F.pad(
        nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=torch.nan),
        (0, 0, 0, padding),
        value=torch.nan,
    )
    walked = walker(x, frame_mask(torch.tensor(lengths), x))
    assert walked.shape == x.shape
    for row, clip in zip(walked, clips):
        assert_close(
            row[: len(clip)], nn.GRU.forward(walker, clip[None])[0][0]
        )  # the oracle: one clip, no padding
        assert not row[len(clip) :].any()


def check_walk(walker):
    "Alone as in company, whatever the padding holds."
    x, mask = (
        torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[True] * 9, [True] * 3 + [False] * 6]),
    )
    with torch.no_grad():
        assert_close(walker(x, mask)[1:, :3], walker(x[1:, :3], mask[1:, :3]), rtol=0, atol=1e-6)


def test_way_back_starts_at_the_last_frame():
    torch.manual_seed(0)
    walker = MaskedGRU(4)
    check_walk(walker)
    with pytest.raises(AssertionError):
        check_walk(WaysBackThroughPadding(walker))


def test_masked_gru_stays_in_float32():
    walker, x = MaskedGRU(4), torch.randn(2, 5, 4)
    plain = walker(x, frame_mask(None, x))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = walker(x, frame_mask(None, x))
    assert mixed.dtype == torch.float32 and torch.equal(mixed, plain)
    assert walker(x.bfloat16(), frame_mask(None, x)).dtype == torch.float32


@pytest.mark.parametrize(
    "make_it", [lambda: MaskedGRU(7), lambda: SpeechTower(Config(width=9, heads=3))]
)
def test_odd_width_is_refused(make_it):
    with pytest.raises(InputError, match="is odd.*choose an even width"):
        make_it()


# ------------------------------------------------------------------------------------------------
# peak and reader


def test_peak_by_hand():
    tokens = torch.tensor([[[1.0, -5.0], [3.0, -2.0], [9.0, 9.0]]])
    assert peak(tokens, torch.tensor([[True, True, False]])).tolist() == [[3.0, 0.0]]
    assert peak(tokens * torch.nan, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0.0, 0.0]]


def test_reader_without_blocks_by_hand():
    """Depth 0: [CLS] is its own start, plus the peak before codes are added, plus the peak after;
    the rest is token plus code.
    """
    torch.manual_seed(0)
    reader = Reader(Config(width=8, heads=2), 0)
    tokens, codes, mask = (
        torch.randn(2, 5, 8),
        torch.randn(5, 8),
        frame_mask(torch.tensor([5, 2]), torch.zeros(2, 5)),
    )
    out = reader(tokens.masked_fill(~mask[..., None], torch.nan), codes, mask)
    for row, length in enumerate((5, 2)):
        valid = tokens[row, :length]
        before, after = (x.max(0).values.clamp(min=0) for x in (valid, valid + codes[:length]))
        assert_close(
            out.tokens[row, 0],
            reader.norm(reader.cls + reader.before(before) + reader.after(after)),
        )
        assert_close(out.tokens[row, 1 : 1 + length], reader.norm(valid + codes[:length]))
        assert not out.tokens[row, 1 + length :].any() and out.mask[row].sum() == 1 + length


class Alone(nn.Module):
    "A reader as a tower, with codes of nothing."

    def __init__(self, config):
        super().__init__()
        self.reader = Reader(config, config.speech_depth)

    def forward(self, tokens):
        return self.reader(tokens, torch.zeros(tokens.shape[1:]), frame_mask(None, tokens))


def loud(n):
    return F.pad(
        torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(7)), (0, 0, 2, n - 3)
    )


def check_peak(tower):
    "[CLS] notices one loud token among zeros, and nearly as well in an input many times as long."
    with torch.no_grad():
        moved = [
            (tower(loud(n)).tokens[:, 0] - tower(torch.zeros(1, n, 16)).tokens[:, 0])
            .norm(dim=1)
            .mean()
            for n in (9, 250)
        ]
    assert moved[1] > 0.4 * moved[0] > 0.04, "what is there fades"


def test_peak_does_not_fade():
    check_peak(make(Alone))


@pytest.mark.parametrize("mutant", [mean_peak, no_peak])
def test_peak_mutants(mutant, monkeypatch):
    monkeypatch.setattr(speech, "peak", mutant)
    with pytest.raises(AssertionError):
        check_peak(make(Alone))


def test_a_cls_without_peak_is_noticed(monkeypatch):
    monkeypatch.setattr(speech, "peak", no_peak)
    with pytest.raises(AssertionError, match="reader.before.weight does not learn"):
        check_gradients(make(SpeechTower), torch.randn(3, 33, 64), torch.tensor([33, 20, 5]))


# ------------------------------------------------------------------------------------------------
# the tower


class PlainNorm(nn.Module):
    """Spoilt: a norm over all frames, padding included (GroupNorm over time, as in some pretrained
    models).
    """

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)

    def forward(self, x, mask):
        return rearrange(self.norm(rearrange(x, "b t c -> b c t")), "b c t -> b t c").masked_fill(
            ~mask[..., None], 0.0
        )


class PlainBatchNorm(nn.BatchNorm1d):
    "Spoilt: batch statistics that count padding."

    def forward(self, x, mask):
        return rearrange(
            super().forward(rearrange(x, "b t c -> b c t")), "b c t -> b t c"
        ).masked_fill(~mask[..., None], 0.0)


class LeakyNorm(MaskedBatchNorm):
    "Spoilt: padding leaves with the bias of the norm, so the next convolution sees it."

    def forward(self, x, mask):
        return torch.where(mask[..., None], super().forward(x, mask), 0.5)


def spoil(mutant):
    tower = make(SpeechTower)
    if mutant == "attention sees padding":
        deafen(tower.reader.blocks)
    elif mutant == "recurrence sees padding":
        tower.order = WaysBackThroughPadding(tower.order)
    else:
        kind = {
            "group norm over time": PlainNorm,
            "batch norm over padding": PlainBatchNorm,
            "convolution sees padding": LeakyNorm,
        }[mutant]
        for block in tower.stem:
            block.norm_down, block.norm_same = (
                kind(block.down.out_channels).eval(),
                kind(block.same.out_channels).eval(),
            )
    return tower


def tokens_of(length):
    return math.ceil(length / 8)


def test_padding_reaches_nothing():
    check_padding(make(SpeechTower), tokens_of=tokens_of)


@pytest.mark.parametrize(
    "mutant",
    [
        "group norm over time",
        "convolution sees padding",
        "attention sees padding",
        "recurrence sees padding",
    ],
)
def test_padding_mutants(mutant):
    with pytest.raises(AssertionError):
        check_padding(spoil(mutant), tokens_of=tokens_of)


@pytest.mark.parametrize("mutant", [leaky_peak, lambda tokens, mask: tokens.mean(1)])
def test_peak_over_padding_is_noticed(mutant, monkeypatch):
    tower = make(SpeechTower)
    tower.norm_tokens.bias.data.fill_(1.0)  # after the norm, padding is 1, not 0
    check_padding(copy.deepcopy(tower), tokens_of=tokens_of)
    monkeypatch.setattr(speech, "peak", mutant)
    with pytest.raises(AssertionError):
        check_padding(tower, tokens_of=tokens_of)


def check_statistics(tower):
    "The running statistics of a batch are the same, however wide the batch is."
    generator = torch.Generator().manual_seed(3)
    x, lengths = torch.randn(3, 24, 64, generator=generator) + 2, torch.tensor([24, 10, 3])
    narrow, wide = copy.deepcopy(tower).train(), copy.deepcopy(tower).train()
    narrow(x, lengths)
    wide(F.pad(x, (0, 0, 0, 200)), lengths)
    for (name, a), (_, b) in zip(narrow.named_buffers(), wide.named_buffers()):
        assert_close(a, b, rtol=0, atol=1e-5, msg=name)


def test_statistics_ignore_padding():
    check_statistics(make(SpeechTower))
    with pytest.raises(AssertionError):
        check_statistics(spoil("batch norm over padding"))


def test_order_is_heard():
    check_order(make(SpeechTower), *two_sounds())


def two_sounds():
    """Sound A, long silence, sound B, and the same with B first: they lie further apart than the
    convolutions reach.
    """
    generator = torch.Generator().manual_seed(4)
    first, second = torch.randn(2, 4, 1, 64, generator=generator).expand(2, 4, 80, 64)
    silence = torch.zeros(4, 120, 64)
    edge = silence[:, :48]
    return torch.cat([edge, first, silence, second, edge], 1), torch.cat(
        [edge, second, silence, first, edge], 1
    )


def without_recurrence():
    tower = make(SpeechTower)
    tower.norm_order.weight.data.zero_()
    return tower


@pytest.mark.parametrize("size", [1.0, 0.02, 0.0])
def test_order_mutants(size, monkeypatch):
    "Without the recurrent layer all depends on the codes, and on how loud they are."
    monkeypatch.setattr(
        speech, "position_codes", lambda length, width: size * position_codes(length, width)
    )
    if size == 1.0:
        check_order(without_recurrence(), *two_sounds())
    else:
        with pytest.raises(AssertionError):
            check_order(without_recurrence(), *two_sounds())


def test_recurrent_layer_hears_order(monkeypatch):
    """Without codes it is all that hears it. In a fresh tower it has forgotten most after a second
    of silence, so little is asked for.
    """
    monkeypatch.setattr(speech, "position_codes", lambda length, width: torch.zeros(length, width))
    check_order(make(SpeechTower), *two_sounds(), least=0.005)
    with pytest.raises(AssertionError):
        check_order(without_recurrence(), *two_sounds(), least=0.005)


def test_position_codes():
    codes = position_codes(300, 192)
    assert codes.shape == (300, 192) and abs(codes.square().mean() - 1) < 0.01
    assert_close(
        codes[:50], position_codes(50, 192)
    )  # a place's code does not depend on the clip's length
    distance = torch.cdist(codes, codes) + 100 * torch.eye(300)
    assert distance.min() > 1  # no two places share a code
    assert position_codes(5, 7).shape == (5, 7)


def test_everything_learns():
    check_gradients(make(SpeechTower), torch.randn(3, 33, 64), torch.tensor([33, 20, 5]))


def test_teacher_can_be_copied():
    check_copy(make(SpeechTower), torch.randn(3, 33, 64), torch.tensor([33, 20, 5]))


def test_depth_0():
    check_depth_0(SpeechTower, torch.randn(3, 33, 64), torch.tensor([33, 20, 5]))


def test_nothing_of_the_front_end_is_saved():
    assert not [name for name in make(SpeechTower).state_dict() if "front_end" in name]


@pytest.mark.parametrize("seconds", [1 / 16_000, 0.01, 0.05, 0.23])
def test_short_clips_train(seconds):
    features = torch.tensor(LogMel()(torch.randn(max(1, round(seconds * 16_000))))).float()[None]
    check = make(SpeechTower).train()(features, torch.tensor([features.shape[1]]))
    assert check.tokens.isfinite().all() and check.mask.all()
    check.tokens.sum().backward()


def test_sizes():
    assert (
        1e6
        < sum(p.numel() for p in SpeechTower(Config(width=192, speech_depth=2)).parameters())
        < 2e6
    )
    assert SpeechTower(TINY).width == 16
