"The contrastive loss: float64 loops, the gradient formula, and the mutants of the known pitfalls."

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import caught, loop_contrastive_loss
from torch.testing import assert_close

from speechimg.sic import SicOutput, clamp_temperature, id_targets, sic_loss, similarity_logits

TAU = 0.07


def case(seed=0, batch=4, keys=9, dim=8):
    "Online and teacher embeddings of a batch, old keys behind it, and ids with repetitions."
    generator = torch.Generator().manual_seed(seed)

    def unit(n):
        return F.normalize(torch.randn(n, dim, generator=generator), dim=1)

    def near(ids):
        return F.normalize(meaning[ids] + 0.4 * unit(len(ids)), dim=1)

    meaning = unit(6)
    ids = torch.tensor([0, 1, 0, 3])[:batch]
    key_ids = torch.cat([ids, torch.tensor([0, 4, 5, 3, 2])[: keys - batch]])
    return near(ids), near(ids), near(key_ids), near(key_ids), ids, key_ids


# ---- targets ----


def check_targets(targets):
    y = targets(torch.tensor([5, 5, 8]), torch.tensor([5, 5, 8, 8, -1, 5, 5, -1]))
    assert_close(
        y, torch.tensor([[0.25, 0.25, 0, 0, 0, 0.25, 0.25, 0]] * 2 + [[0, 0, 0.5, 0.5, 0, 0, 0, 0]])
    )
    assert y.dtype == torch.float32


def ids_ignored(ids, key_ids):
    return torch.eye(len(ids), len(key_ids))


def multi_hot(ids, key_ids):
    return (ids[:, None] == key_ids).float()


def test_pitfall_05_same_image_is_no_negative():
    check_targets(id_targets)
    for mutant in (ids_ignored, multi_hot):
        caught(check_targets, mutant)


def check_loss_of_captions_of_one_image(targets):
    "A perfect network pays only the entropy of its targets and feels no gradient."
    ids = torch.tensor([0, 0, 1])
    perfect = torch.eye(2)[ids].requires_grad_()
    out = sic_loss(perfect, perfect, perfect.detach(), perfect.detach(), targets(ids, ids), 0.02)
    for gradient in torch.autograd.grad(out.loss, out[1:]):
        assert gradient.abs().max() < 1e-4
    assert abs(out.loss.item() - 2 / 3 * math.log(2)) < 1e-4


def test_pitfall_05_a_perfect_network_is_left_in_peace():
    check_loss_of_captions_of_one_image(id_targets)
    for mutant in (ids_ignored, multi_hot):
        caught(check_loss_of_captions_of_one_image, mutant)


def check_sentinel(targets):
    ids = torch.tensor([0, 7])
    empty = torch.full((5,), -1)
    assert torch.equal(targets(ids, torch.cat([ids, empty])), torch.eye(2, 7))
    with pytest.raises(ValueError, match="negative"):
        targets(torch.tensor([-1, 7]), torch.tensor([-1, 7]))


def matches_the_sentinel(ids, key_ids):
    same = (ids[:, None] == key_ids).float()
    return same / same.sum(1, keepdim=True)


def empty_slot_is_image_zero(ids, key_ids):
    return matches_the_sentinel(ids, key_ids.clamp_min(0))


def test_pitfall_08_empty_slots_never_match():
    check_sentinel(id_targets)
    for mutant in (matches_the_sentinel, empty_slot_is_image_zero):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check_sentinel(mutant)


def test_a_query_without_its_own_pair_is_an_error():
    with pytest.raises(ValueError, match="no key has the id 6 of row 1"):
        id_targets(torch.tensor([5, 6]), torch.tensor([5, -1, 7]))
    assert id_targets(torch.zeros(0, dtype=torch.long), torch.tensor([5])).shape == (0, 1)


@given(
    ids=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    old=st.lists(st.integers(-1, 5), max_size=12),
)
def test_targets_by_counting(ids, old):
    keys = [*ids, *old]
    y = id_targets(torch.tensor(ids), torch.tensor(keys))
    assert_close(y.sum(1), torch.ones(len(ids)))
    for b, own in enumerate(ids):
        for c, other in enumerate(keys):
            assert_close(float(y[b, c]), 1 / keys.count(own) if own == other else 0.0)


# ---- the loss ----


def check_loss(loss):
    for seed in range(3):
        speech, image, speech_keys, image_keys, ids, key_ids = case(seed)
        y = id_targets(ids, key_ids)
        out = loss(speech, image, speech_keys, image_keys, y, TAU)
        expected = loop_contrastive_loss(speech, image, speech_keys, image_keys, y, y, TAU)
        assert abs(float(out.loss) - expected) < 1e-3, (float(out.loss), expected)
        assert_close(out.speech_to_image, speech @ image_keys.T / TAU)
        assert_close(out.image_to_speech, image @ speech_keys.T / TAU)


def replaced(**change):
    "sic_loss with some of its arguments made wrong."

    def mutant(speech, image, speech_keys, image_keys, targets, tau):
        given = dict(
            speech=speech,
            image=image,
            speech_keys=speech_keys,
            image_keys=image_keys,
            targets=targets,
            temperature=tau,
        )
        return sic_loss(**{**given, **{name: make(given) for name, make in change.items()}})

    return mutant


def sum_of_directions(*arguments):
    out = sic_loss(*arguments)
    return out._replace(loss=2 * out.loss)


def sum_over_batch(*arguments):
    out = sic_loss(*arguments)
    return out._replace(loss=out.loss * len(arguments[0]))


def one_direction(speech, image, speech_keys, image_keys, targets, tau):
    out = sic_loss(speech, image, speech_keys, image_keys, targets, tau)
    return out._replace(loss=-(targets * out.speech_to_image.log_softmax(1)).sum(1).mean())


def softmax_over_queries(speech, image, speech_keys, image_keys, targets, tau):
    out = sic_loss(speech, image, speech_keys, image_keys, targets, tau)
    return out._replace(loss=-sum((targets * z.log_softmax(0)).sum(1).mean() for z in out[1:]) / 2)


MUTANTS = {
    "online features as keys": replaced(
        image_keys=lambda a: torch.cat([a["image"], a["image_keys"][4:]]),
        speech_keys=lambda a: torch.cat([a["speech"], a["speech_keys"][4:]]),
    ),
    "keys swapped": replaced(
        image_keys=lambda a: a["speech_keys"], speech_keys=lambda a: a["image_keys"]
    ),
    "features not normalised": replaced(
        speech=lambda a: 2 * a["speech"], image=lambda a: 2 * a["image"]
    ),
    "multi-hot targets": replaced(targets=lambda a: (a["targets"] > 0).float()),
    "ids ignored": replaced(targets=lambda a: torch.eye(4, 9)),
    "multiplied by the temperature": replaced(temperature=lambda a: 1 / a["temperature"]),
    "no temperature": replaced(temperature=lambda a: 1.0),
    "sum of the directions": sum_of_directions,
    "sum over the batch": sum_over_batch,
    "one direction only": one_direction,
    "softmax over the queries": softmax_over_queries,
}


def test_pitfall_34_loss_equals_the_loops():
    check_loss(sic_loss)


@pytest.mark.parametrize("name", MUTANTS)
def test_pitfall_34_mutants(name):
    caught(check_loss, MUTANTS[name])


def test_targets_may_differ_between_the_directions():
    speech, image, speech_keys, image_keys, ids, key_ids = case()
    one, other = id_targets(ids, key_ids), torch.full((4, 9), 1 / 9)
    out = sic_loss(speech, image, speech_keys, image_keys, (one, other), TAU)
    expected = loop_contrastive_loss(speech, image, speech_keys, image_keys, one, other, TAU)
    assert abs(float(out.loss) - expected) < 1e-3
    assert isinstance(out, SicOutput)


def test_gradient_formulas():
    speech, image, speech_keys, image_keys, ids, key_ids = case()
    generator = torch.Generator().manual_seed(1)
    q = tuple(torch.rand(4, 9, generator=generator).softmax(1) for _ in range(2))
    tau = torch.nn.Parameter(torch.tensor(0.2))
    out = sic_loss(speech.requires_grad_(), image.requires_grad_(), speech_keys, image_keys, q, tau)
    out.speech_to_image.retain_grad(), out.image_to_speech.retain_grad()
    out.loss.backward()
    by_formula = 0.0
    for z, target in zip(out[1:], q):
        expected = (z.detach().double().softmax(1) - target) / (2 * 4)
        assert_close(z.grad.double(), expected, atol=1e-6, rtol=1e-5)
        by_formula -= float((expected * z.detach()).sum()) / 0.2
    assert abs(float(tau.grad) - by_formula) < 1e-4


def test_no_gradient_through_the_targets():
    speech, image, speech_keys, image_keys, ids, key_ids = case()
    raw = torch.randn(4, 9, requires_grad=True)
    out = sic_loss(speech.requires_grad_(), image, speech_keys, image_keys, raw.softmax(1), TAU)
    out.loss.backward()
    assert raw.grad is None and speech.grad is not None


@given(order=st.permutations(range(9)), shift=st.floats(-3, 3))
def test_the_order_of_the_keys_does_not_matter(order, shift):
    speech, image, speech_keys, image_keys, ids, key_ids = case()
    straight = sic_loss(speech, image, speech_keys, image_keys, id_targets(ids, key_ids), TAU).loss
    shuffled = sic_loss(
        speech,
        image,
        speech_keys[order],
        image_keys[order],
        id_targets(ids, key_ids[list(order)]),
        TAU,
    ).loss
    assert_close(straight, shuffled, atol=1e-4, rtol=1e-5)


def test_equal_keys_cost_the_logarithm_of_their_number():
    same = F.normalize(torch.ones(9, 8), dim=1)
    out = sic_loss(same[:4], same[:4], same, same, torch.eye(4, 9), TAU)
    assert abs(float(out.loss) - math.log(9)) < 1e-5


# ---- temperature ----


def check_logits(logits):
    queries, keys = (
        torch.tensor([[1.0, 0.0], [0.6, 0.8]]),
        torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]),
    )
    assert_close(logits(queries, keys, 0.5), torch.tensor([[2.0, 0.0, -2.0], [1.2, 1.6, -1.2]]))
    assert logits(queries, keys, torch.tensor(0.5)).dtype == torch.float32


def test_pitfall_18_divide_by_the_temperature():
    check_logits(similarity_logits)
    caught(check_logits, lambda q, k, tau: q @ k.T * tau)
    caught(check_logits, lambda q, k, tau: q @ k.T * math.exp(1 / tau))


def check_clamp(clamp):
    for start, expected in ((0.9, 0.5), (0.0001, 0.001), (0.07, 0.07), (-1.0, 0.001)):
        tau = torch.nn.Parameter(torch.tensor(start))
        address = tau.data_ptr()
        clamp(tau)
        assert abs(tau.item() - expected) < 1e-7
        assert tau.data_ptr() == address and tau.requires_grad and tau.grad_fn is None


def test_pitfall_18_clamped():
    check_clamp(clamp_temperature)
    caught(check_clamp, lambda tau: None)
    tau = torch.tensor(0.9)
    clamp_temperature(tau, 0.1, 0.3)
    assert_close(tau, torch.tensor(0.3))


@pytest.mark.parametrize("tau", [0.0, -0.1, math.nan])
def test_an_impossible_temperature_is_refused(tau):
    with pytest.raises(ValueError, match="temperature"):
        similarity_logits(torch.ones(1, 2), torch.ones(1, 2), tau)


def test_wrong_shapes_are_refused():
    speech, image, speech_keys, image_keys, ids, key_ids = case()
    with pytest.raises(ValueError, match="similarity_logits"):
        similarity_logits(speech, image_keys[:, :3], TAU)
    with pytest.raises(ValueError, match="targets"):
        sic_loss(speech, image, speech_keys, image_keys, torch.eye(4), TAU)
    with pytest.raises(ValueError, match="targets"):
        sic_loss(speech, image, speech_keys, image_keys, (torch.eye(4, 9), torch.eye(4)), TAU)


# ---- precision ----


def check_precision(loss):
    "Half precision, inside and outside autocast: near the float64 loops over the same numbers."
    speech, image, speech_keys, image_keys, ids, key_ids = case()
    y = id_targets(ids, key_ids)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        inputs = [x.to(dtype) for x in (speech, image, speech_keys, image_keys)]
        expected = loop_contrastive_loss(*inputs, y, y, TAU)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = loss(*inputs, y, TAU)
            assert all(part.dtype == torch.float32 for part in out)
            assert abs(float(out.loss) - expected) < 1e-3, (
                dtype,
                autocast,
                float(out.loss),
                expected,
            )
            truth = inputs[0].double() @ inputs[3].double().T / TAU
            assert (out.speech_to_image - truth).abs().max() < 1e-4


def exponentials_in_half(speech, image, speech_keys, image_keys, targets, tau):
    losses = []
    for queries, keys in ((speech, image_keys), (image, speech_keys)):
        z = (queries.half() @ keys.half().T / tau).exp()
        losses.append(
            -(targets * (z / z.sum(1, keepdim=True)).log().float().clamp_min(-100)).sum(1).mean()
        )
    out = sic_loss(speech, image, speech_keys, image_keys, targets, tau)
    return out._replace(loss=(losses[0] + losses[1]).float() / 2)


def in_the_input_precision(speech, image, speech_keys, image_keys, targets, tau):
    z = [speech @ image_keys.T / tau, image @ speech_keys.T / tau]
    loss = -sum((targets * F.log_softmax(x, 1)).sum(1).mean() for x in z) / 2
    return SicOutput(loss.float(), z[0].float(), z[1].float())


def test_pitfall_19_float32_whatever_comes_in():
    check_precision(sic_loss)
    for mutant in (exponentials_in_half, in_the_input_precision):
        caught(check_precision, mutant)


def test_pitfall_19_good_pairs_at_a_low_temperature_stay_finite():
    same = torch.eye(4).half()
    out = sic_loss(same, same, same, same, torch.eye(4), 0.001)
    assert out.loss == 0 and out.loss.isfinite()
    wrong = sic_loss(same, same, same.flip(0), same.flip(0), torch.eye(4), 0.001)
    assert abs(float(wrong.loss) - 1000) < 1e-2
