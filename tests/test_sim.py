"Speech-image matching: padding, order, the loss by hand, and the mutants of the known pitfalls."

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from oracles import caught, loop_matching_loss
from torch import nn
from torch.testing import assert_close

from speechimg.attention import Attention
from speechimg.sim import MultimodalEncoder, sim_loss


def batch(n=3, length=6, patches=5, dim=8):
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(length) < torch.tensor([length, 3, 1])[:n, None]
    return (
        torch.randn(n, length, dim, generator=generator),
        mask,
        torch.randn(n, patches, dim, generator=generator),
    )


def encoder(kind=MultimodalEncoder, dim=8, depth=2, heads=2):
    torch.manual_seed(0)
    return kind(dim, depth, heads).eval()


# ---- wrong versions ----


class NoMask(MultimodalEncoder):
    def forward(self, speech, mask, image):
        return super().forward(speech, torch.ones_like(mask), image)


class AnchorsMask(MultimodalEncoder):
    "Every recording gets the mask of the first one."

    def forward(self, speech, mask, image):
        return super().forward(speech, mask[:1].expand_as(mask), image)


class MeanOverPadding(MultimodalEncoder):
    "Reads the verdict from the mean of all tokens, padding included."

    def forward(self, speech, mask, image):
        x = speech
        for block in self.blocks:
            x = block(x, mask, context=image)
        return self.verdict(self.norm(x + speech).mean(1))


class BagOfWords(MultimodalEncoder):
    "Two averages, side by side."

    def forward(self, speech, mask, image):
        speech = (speech * mask[..., None]).nan_to_num().sum(1) / mask.sum(1, keepdim=True)
        return self.verdict(self.norm(speech * image.mean(1)))


class Deaf(MultimodalEncoder):
    "Looks at the picture only."

    def forward(self, speech, mask, image):
        return super().forward(torch.zeros_like(speech), mask, image)


class Blind(MultimodalEncoder):
    "Listens only."

    def forward(self, speech, mask, image):
        return super().forward(speech, mask, torch.zeros_like(image))


def soft_mask(self, x, context=None, mask=None, answers=None):
    "Attention with a finite constant added to the scores of padding, instead of no weight at all."
    context = x if context is None else context
    query, (key, value) = self.split(self.query(x)), answers or self.answers(context)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores - 5.0 * ~rearrange(mask, "b s -> b 1 1 s")
    return self.output(rearrange(scores.softmax(-1) @ value, "b h t d -> b t (h d)"))


# ---- padding ----


def check_padding(kind):
    "Whatever stands behind the end of an utterance: the same bits come out."
    model, (speech, mask, image) = encoder(kind), batch()
    clean = model(speech.masked_fill(~mask[..., None], 0.0), mask, image)
    for garbage in (1.0, 1e4, torch.nan, torch.inf):
        assert torch.equal(
            model(speech.masked_fill(~mask[..., None], garbage), mask, image), clean
        ), garbage
    noise = torch.where(
        mask[..., None],
        speech,
        torch.randn(speech.shape, generator=torch.Generator().manual_seed(1)),
    )
    assert torch.equal(model(noise, mask, image), clean)


def test_pitfall_24_padding_has_no_influence():
    check_padding(MultimodalEncoder)
    for mutant in (NoMask, MeanOverPadding, AnchorsMask):
        caught(check_padding, mutant)


def check_longer_padding(kind):
    "The same pair alone, and beside longer ones."
    model, (speech, mask, image) = encoder(kind), batch()
    together = model(speech, mask, image)
    for row in range(3):
        n = int(mask[row].sum())
        assert_close(
            model(speech[row : row + 1, :n], mask[row : row + 1, :n], image[row : row + 1]),
            together[row : row + 1],
            atol=1e-5,
            rtol=1e-4,
        )


def test_pitfall_24_each_recording_brings_its_own_mask():
    check_longer_padding(MultimodalEncoder)
    for mutant in (NoMask, AnchorsMask, MeanOverPadding):
        caught(check_longer_padding, mutant)


def test_pitfall_20_a_finite_mask_constant_leaks(monkeypatch):
    def check(forward):
        monkeypatch.setattr(Attention, "forward", forward)
        model, (speech, mask, image) = encoder(), batch()
        short = model(speech[1:2, :3], mask[1:2, :3], image[1:2])
        assert_close(model(speech[1:2], mask[1:2], image[1:2]), short, atol=1e-6, rtol=1e-5)

    check(Attention.forward)
    caught(check, soft_mask)


# ---- what the encoder must do ----


def check_order(kind):
    "The same tokens in another order, with position codes: another verdict."
    model = encoder(kind)
    generator = torch.Generator().manual_seed(2)
    cls, bee, left, frog = torch.randn(4, 8, generator=generator)
    place, image = (
        torch.randn(4, 8, generator=generator),
        torch.randn(2, 5, 8, generator=generator)[:1].expand(2, 5, 8),
    )
    speech = (
        torch.stack([torch.stack([cls, bee, left, frog]), torch.stack([cls, frog, left, bee])])
        + place
    )
    one, other = model(speech, torch.ones(2, 4, dtype=torch.bool), image)
    assert (one - other).abs().max() > 1e-4


def test_order_of_the_words_matters():
    check_order(MultimodalEncoder)
    for mutant in (BagOfWords, Deaf):
        caught(check_order, mutant)


def check_both_streams_count(kind):
    model, (speech, mask, image) = encoder(kind), batch()
    speech.requires_grad_(), image.requires_grad_()
    model(speech, mask, image)[:, 1].sum().backward()
    assert (
        speech.grad[mask].abs().min(-1).values.min() > 0
        and image.grad.abs().max(-1).values.min() > 0
    )
    assert not speech.grad[~mask].any()


def test_gradient_reaches_every_valid_token_of_both():
    check_both_streams_count(MultimodalEncoder)
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        check_both_streams_count(Deaf)
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        check_both_streams_count(Blind)


def test_rows_are_judged_one_by_one():
    model, (speech, mask, image) = encoder(), batch()
    together, order = model(speech, mask, image), [2, 0, 1]
    assert_close(
        model(speech[order], mask[order], image[order]), together[order], atol=1e-6, rtol=1e-5
    )


def test_patches_without_position_codes_are_a_set():
    model, (speech, mask, image) = encoder(), batch()
    assert_close(
        model(speech, mask, image.flip(1)), model(speech, mask, image), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_shapes_and_no_pairs(depth):
    model, (speech, mask, image) = encoder(depth=depth), batch()
    assert model(speech, mask, image).shape == (3, 2) and len(model.blocks) == depth
    nothing = model(speech[:0], mask[:0], image[:0])
    assert nothing.shape == (0, 2) and nothing.requires_grad


def test_pitfall_19_logits_are_float32():
    model, (speech, mask, image) = encoder(), batch()
    exact = model(speech, mask, image)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(speech, mask, image)
    assert low.dtype == torch.float32 and (low - exact).abs().max() < 0.05
    stored = model(speech.half(), mask, image.half())  # as the queue keeps them
    assert stored.dtype == torch.float32 and (stored - exact).abs().max() < 0.01


def test_dropout_only_in_training():
    torch.manual_seed(0)
    model, (speech, mask, image) = MultimodalEncoder(8, 2, 2, dropout=0.5), batch()
    assert not torch.equal(model(speech, mask, image), model(speech, mask, image))
    model.eval()
    assert torch.equal(model(speech, mask, image), model(speech, mask, image))


def test_attention_maps():
    model, (speech, mask, image) = encoder(), batch()
    before = model(speech, mask, image)
    maps = model.attention_maps(speech, mask, image)
    assert maps.shape == (3, 2, 2, 6, 5) and not maps.requires_grad
    assert_close(maps.sum(-1), torch.ones(3, 2, 2, 6))
    assert not any(block.attend_cross._forward_pre_hooks for block in model.blocks)
    assert torch.equal(model(speech, mask, image), before)
    with torch.no_grad():  # a layer whose keys are all alike looks everywhere
        model.blocks[0].attend_cross.key.weight.zero_()
    assert_close(model.attention_maps(speech, mask, image)[:, 0], torch.full((3, 2, 6, 5), 0.2))
    with pytest.raises(Exception):  # a call that fails leaves no hook behind
        model.attention_maps(speech, mask, image[..., :3])
    assert not any(block.attend_cross._forward_pre_hooks for block in model.blocks)


class Straight(nn.Module):
    "Every block whole, every pair anew: nothing is shared, nothing left out."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, speech, mask, image):
        for block in self.model.blocks:
            speech = block(speech, mask, context=image)
        return self.model.verdict(self.model.norm(speech[:, 0]))


@pytest.mark.parametrize("depth", [1, 3])
def test_what_is_shared_changes_no_verdict(depth):
    "hear, see and judge, in pairs and in many, against the straight loop over the blocks."
    model, (speech, mask, image) = encoder(depth=depth), batch()
    told, shown = torch.tensor([0, 2, 2, 1, 0]), torch.tensor([1, 0, 2, 1, 0])
    right = Straight(model)(speech[told], mask[told], image[shown])
    assert_close(model(speech, mask, image, (told, shown)), right, atol=1e-5, rtol=1e-4)
    recordings = [tokens[valid] for tokens, valid in zip(speech, mask)]
    for room in (1, 2**28):  # a picture at a time, all at once
        many = model.judge_many(recordings, image, (told, shown), batch_size=2, room=room)
        assert_close(many, right.detach(), atol=1e-5, rtol=1e-4)


def test_it_learns_a_few_pairs():
    torch.manual_seed(0)
    model, generator = MultimodalEncoder(16, 1, 2), torch.Generator().manual_seed(0)
    speech, image = (
        torch.randn(6, 4, 16, generator=generator),
        torch.randn(6, 5, 16, generator=generator),
    )
    mask, optimizer = torch.ones(6, 4, dtype=torch.bool), torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        loss = sim_loss(
            model(speech, mask, image),
            model(speech, mask, image.roll(1, 0)),
            model(speech.roll(2, 0), mask, image),
        )
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss.item() < 0.3  # knowing nothing costs 0.6365


# ---- the loss ----


def check_loss(loss):
    hand = loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert abs(float(hand) - 0.3778) < 1e-4
    generator = torch.Generator().manual_seed(0)
    for sizes in ((4, 4, 4), (4, 2, 3), (5, 0, 1), (2, 0, 0), (0, 0, 3)):
        logits = [3 * torch.randn(n, 2, generator=generator) for n in sizes]
        assert abs(float(loss(*logits)) - loop_matching_loss(*logits)) < 1e-5, sizes


def other_class(positive, negative_image, negative_speech):
    return sim_loss(positive.flip(1), negative_image.flip(1), negative_speech.flip(1))


def mean_of_means(positive, negative_image, negative_speech):
    parts = [
        F.cross_entropy(x, torch.full((len(x),), label))
        for x, label in ((positive, 1), (negative_image, 0), (negative_speech, 0))
        if len(x)
    ]
    return sum(parts) / len(parts)


def no_speech_negatives(positive, negative_image, negative_speech):
    return sim_loss(positive, negative_image, negative_speech[:0])


def test_loss_by_hand_and_by_loops():
    check_loss(sim_loss)
    for mutant in (other_class, mean_of_means, no_speech_negatives):
        caught(check_loss, mutant)


def test_knowing_nothing_costs_h_of_a_third():
    shrug = torch.tensor([[math.log(2), 0.0]]).expand(8, 2)
    assert abs(float(sim_loss(shrug, shrug, shrug)) - 0.6365) < 1e-4


def check_empty(loss):
    nothing = nn.Linear(3, 2)(torch.zeros(0, 3))
    zero = loss(nothing, nothing, nothing)
    assert zero == 0 and zero.requires_grad
    zero.backward()


def plain_mean(positive, negative_image, negative_speech):
    logits = torch.cat([positive, negative_image, negative_speech])
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def detached_zero(positive, negative_image, negative_speech):
    return torch.zeros(())


def test_pitfall_01_no_pairs_at_all():
    check_empty(sim_loss)
    for mutant in (plain_mean, detached_zero):
        caught(check_empty, mutant)


@given(n=st.integers(1, 5), m=st.integers(0, 5), seed=st.integers(0, 99))
def test_the_order_of_the_rows_does_not_matter(n, m, seed):
    generator = torch.Generator().manual_seed(seed)
    positive, one, other = (torch.randn(k, 2, generator=generator) for k in (n, m, m))
    assert_close(sim_loss(positive, one, other), sim_loss(positive.flip(0), other, one.flip(0)))


def test_half_precision_logits():
    positive = torch.tensor([[-300.0, 300.0]]).half()
    loss = sim_loss(positive, positive, positive)
    assert loss.dtype == torch.float32 and abs(float(loss) - 400) < 1e-3
