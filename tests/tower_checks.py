"""What every tower must do. A check raises AssertionError; the tests run it on the right tower and
on spoilt copies, where it must.
"""

import copy

import torch
from torch import nn
from torch.testing import assert_close

from speechimg.attention import Attention, clean
from speechimg.core import Config

TINY = Config(width=16, heads=2, speech_depth=2, image_depth=2, dropout=0.1)


def make(kind, **changes):
    torch.manual_seed(0)
    return kind(Config(**{**TINY.to_dict(), **changes})).eval()


def check_padding(tower, frames=40, tokens_of=lambda length: length):
    "Bit-equal whatever lies behind a length; alone as in company."
    generator = torch.Generator().manual_seed(1)
    width = tower.front_end.feature_dim
    x, lengths = (
        torch.randn(4, frames, width, generator=generator),
        torch.tensor([frames, frames - 11, 9, 1]),
    )
    for training in (False, True):
        tower.train(training)
        for module in (
            tower.modules()
        ):  # dropout draws anew in each call; here only padding may make a difference
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, Attention):
                module.dropout = 0.0
        expected = copy.deepcopy(tower)(x, lengths)
        assert expected.mask.sum(1).tolist() == [1 + tokens_of(int(length)) for length in lengths]
        assert not expected.tokens[~expected.mask].any(), "padded tokens are not zero"
        for garbage in (1e4, torch.inf, torch.nan):
            spoilt = x.clone()
            for clip, length in zip(spoilt, lengths):
                clip[length:] = garbage
            twin = copy.deepcopy(tower)
            assert torch.equal(twin(spoilt, lengths).tokens, expected.tokens), (
                f"{garbage} behind the end changes a result"
            )
            assert all(torch.isfinite(buffer).all() for buffer in twin.buffers()), (
                "statistics were spoilt"
            )
    tower.eval()
    together = tower(x, lengths)
    for index, length in enumerate(lengths.tolist()):
        alone = tower(x[index : index + 1, :length])
        assert_close(
            together.tokens[index, : alone.tokens.shape[1]], alone.tokens[0], rtol=0, atol=1e-5
        )


def check_order(tower, x, traded, least=0.035):
    "Things that trade places move [CLS] by far more than rounding does."
    with torch.no_grad():
        there, back = (tower(y).tokens[:, 0] for y in (x, traded))
    assert ((there - back).norm(dim=1) / there.norm(dim=1)).mean() > least, "order is not heard"


def check_gradients(tower, *inputs):
    tower.train()
    (
        tower(*inputs).tokens * torch.randn(tower.width, generator=torch.Generator().manual_seed(2))
    ).square().sum().backward()
    for name, parameter in tower.named_parameters():
        assert (
            parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
        ), f"{name} does not learn"


def check_copy(tower, *inputs):
    """A teacher is a deep copy made at any time; eval gives the same numbers twice; nothing hides
    outside the state.
    """
    tower.train()
    tower(*inputs).tokens.sum().backward()
    twin = copy.deepcopy(tower).eval()
    tower.eval()
    with torch.no_grad():
        first, second, copied = (t(*inputs).tokens for t in (tower, tower, twin))
    assert torch.equal(first, second) and torch.equal(first, copied)
    fresh = type(tower)(Config(**TINY.to_dict())).eval()
    fresh.load_state_dict(tower.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(*inputs).tokens, first)


class Deaf(nn.Module):
    "A spoilt block: attends to padding, too."

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, mask=None):
        return self.block(x)


def deafen(blocks):
    for index, block in enumerate(blocks):
        blocks[index] = Deaf(block)


class WaysBackThroughPadding(nn.Module):
    "A spoilt MaskedGRU: its way back starts in the padding, which is set to zero before and after."

    def __init__(self, gru):
        super().__init__()
        self.gru = gru

    def forward(self, x, mask):
        return clean(nn.GRU.forward(self.gru, clean(x, mask))[0], mask)


def leaky_peak(tokens, mask):
    "A spoilt peak: what a norm or a convolution makes of padding takes part; only garbage goes."
    return tokens.masked_fill(~(tokens.abs() < 1e3), 0.0).amax(1).relu()


def mean_peak(tokens, mask):
    return clean(tokens, mask).mean(1)


def no_peak(tokens, mask):
    return torch.zeros_like(tokens[:, 0])


def check_depth_0(kind, *inputs):
    "Without attention blocks a tower still works, and [CLS] still hears of the content."
    tower = make(kind, speech_depth=0, image_depth=0)
    check_gradients(tower, *inputs)
    cls = tower.eval()(*inputs).tokens[:, 0]
    assert (cls[0] - cls[1]).abs().max() > 1e-3
