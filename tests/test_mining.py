"Hard negatives: the formula, the frequencies, and the mutants of the known pitfalls."

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import caught, loop_probabilities
from torch.testing import assert_close

from speechimg.mining import negative_probabilities, sample_negatives

# ---- wrong versions, as found in the wild ----


def softmax_then_zero(logits, ids, key_ids=None):
    "The own picture eats the mass, the rest underflows."
    return logits.softmax(1).masked_fill(ids[:, None] == (ids if key_ids is None else key_ids), 0)


def constant_inside(logits, ids, key_ids=None):
    "A small constant inside the softmax, for safety."
    return softmax_then_zero(logits + 1e-4, ids, key_ids)


def diagonal_only(logits, ids, key_ids=None):
    return (
        logits.masked_fill(torch.eye(*logits.shape, dtype=torch.bool), -torch.inf)
        .softmax(1)
        .nan_to_num()
    )


def large_constant(logits, ids, key_ids=None):
    return logits.masked_fill(
        ids[:, None] == (ids if key_ids is None else key_ids), -10_000.0
    ).softmax(1)


def empty_slots_count(logits, ids, key_ids=None):
    return (
        logits.masked_fill(ids[:, None] == (ids if key_ids is None else key_ids), -torch.inf)
        .softmax(1)
        .nan_to_num()
    )


def half_softmax(logits, ids, key_ids=None):
    masked = logits.half().masked_fill(
        ids[:, None] == (ids if key_ids is None else key_ids), -torch.inf
    )
    return masked.softmax(1).float().nan_to_num()


def drawn_with(probabilities):
    "A sampler on top of some probabilities."

    def sample(logits, ids, generator=None, key_ids=None):
        return torch.multinomial(probabilities(logits, ids, key_ids), 1, generator=generator)[:, 0]

    return sample


# ---- probabilities ----


def check_by_hand(probabilities):
    P = probabilities(
        torch.tensor([[5.0, 2.0, 1.0], [0.0, 4.0, 3.0], [1.0, 1.0, 6.0]]), torch.tensor([0, 1, 2])
    )
    assert_close(
        P,
        torch.tensor([[0, 0.7311, 0.2689], [0.0474, 0, 0.9526], [0.5, 0.5, 0]]),
        atol=1e-4,
        rtol=0,
    )


def test_by_hand():
    check_by_hand(negative_probabilities)
    caught(check_by_hand, softmax_then_zero)


def check_no_negative(probabilities):
    "A batch of one, a batch of one image, and what a low temperature leaves."
    assert probabilities(torch.tensor([[14.0]]), torch.tensor([5])).tolist() == [[0]]
    assert probabilities(torch.randn(4, 4), torch.tensor([5, 5, 5, 5])).tolist() == [[0] * 4] * 4
    cold = torch.tensor([1.0, -0.5, -0.6]) / 0.004
    P = probabilities(cold.expand(3, 3), torch.tensor([0, 1, 2]))
    assert_close(P[0], torch.tensor([0.0, 1.0, 0.0]))


def test_pitfall_01_rows_without_a_negative():
    check_no_negative(negative_probabilities)
    for mutant in (softmax_then_zero, constant_inside, large_constant):
        caught(check_no_negative, mutant)


def check_draw_without_negative(sample):
    for ids in ([5], [5, 5, 5, 5]):
        assert sample(torch.zeros(len(ids), len(ids)), torch.tensor(ids)).tolist() == [-1] * len(
            ids
        )
    picks = sample(torch.zeros(3, 3), torch.tensor([5, 5, 6])).tolist()
    assert picks[:2] == [2, 2] and picks[2] in (0, 1)
    cold = torch.tensor([[1.0, -0.5, -0.6]]).expand(3, 3) / 0.004
    assert sample(cold, torch.tensor([0, 1, 2]))[0] == 1


def test_pitfall_01_drawing_never_raises():
    check_draw_without_negative(sample_negatives)
    for mutant in (softmax_then_zero, constant_inside, large_constant):
        caught(check_draw_without_negative, drawn_with(mutant), RuntimeError)


def test_pitfall_02_a_constant_inside_the_softmax_does_nothing():
    z = torch.randn(5, 7)
    assert_close((z + 1e-4).softmax(1), z.softmax(1), atol=1e-6, rtol=0)


def check_duplicates(probabilities):
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([3, 3, 5, 7, 7, 9])
    logits = torch.randn(6, 6, generator=generator) + 9 * (
        ids[:, None] == ids
    )  # captions of one image are alike
    P = probabilities(logits, ids)
    assert_close(P.double(), loop_probabilities(logits, ids), atol=1e-6, rtol=1e-4)
    assert P[ids[:, None] == ids].sum() == 0


def test_pitfall_03_never_the_same_image():
    check_duplicates(negative_probabilities)
    caught(check_duplicates, diagonal_only)


def check_a_thousand_draws(sample):
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([3, 3, 5, 7, 7, 9])
    logits = torch.randn(6, 6, generator=generator) + 2 * (ids[:, None] == ids)
    for _ in range(1000):
        assert (ids[sample(logits, ids, generator)] != ids).all()


def test_pitfall_03_a_thousand_draws():
    check_a_thousand_draws(sample_negatives)
    caught(check_a_thousand_draws, drawn_with(diagonal_only))


def check_all_equal(probabilities):
    P = probabilities(torch.randn(4, 6), torch.tensor([5] * 4), torch.tensor([5, 5, 5, 5, -1, -1]))
    assert P.sum() == 0, "a positive, or an empty slot, may be drawn"


def test_pitfall_04_a_row_of_positives_stays_empty():
    check_all_equal(negative_probabilities)
    for mutant in (large_constant, empty_slots_count):
        caught(check_all_equal, mutant)


def check_precision(probabilities):
    "Logits of any precision; the softmax is in float32."
    logits = torch.tensor([[14.0, 13.0, 6.0, 0.0, -3.0]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        with torch.autocast("cpu", torch.bfloat16):
            P = probabilities(logits.to(dtype), torch.tensor([0]), torch.tensor([0, 1, 2, 3, 4]))
        assert P.dtype == torch.float32
        assert_close(
            P.double(),
            loop_probabilities(logits, torch.tensor([0]), torch.tensor([0, 1, 2, 3, 4])),
            atol=1e-7,
            rtol=1e-5,
        )


def test_pitfall_19_float32():
    check_precision(negative_probabilities)
    caught(check_precision, half_softmax)


@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=7),
    key_ids=st.lists(st.integers(-1, 4), min_size=1, max_size=9),
    seed=st.integers(0, 99),
)
def test_probabilities_equal_the_loops(ids, key_ids, seed):
    logits = 5 * torch.randn(len(ids), len(key_ids), generator=torch.Generator().manual_seed(seed))
    ids, key_ids = torch.tensor(ids), torch.tensor(key_ids)
    P = negative_probabilities(logits, ids, key_ids)
    assert_close(P.double(), loop_probabilities(logits, ids, key_ids), atol=1e-6, rtol=1e-4)
    assert all(abs(float(row.sum()) - 1) < 1e-5 or row.sum() == 0 for row in P)


def test_no_gradient():
    logits = torch.randn(3, 3, requires_grad=True)
    assert not negative_probabilities(logits, torch.arange(3)).requires_grad


# ---- draws ----


def check_chi_square(sample):
    "20,000 draws at the expected frequencies; 16.3 is exceeded by chance once in a thousand."
    z = torch.tensor([3.0, 1.0, 2.0, 0.0, -0.5]).expand(20_000, 5)
    picks = sample(
        z, torch.zeros(20_000, dtype=torch.long), torch.Generator().manual_seed(0), torch.arange(5)
    )
    seen, expected = (
        picks.bincount(minlength=5).double(),
        20_000 * torch.tensor([0, *z[0, 1:].double().softmax(0)], dtype=torch.float64),
    )
    assert seen[0] == 0
    assert ((seen - expected)[1:] ** 2 / expected[1:]).sum() < 16.3


def hardest(logits, ids, generator=None, key_ids=None):
    return negative_probabilities(logits, ids, key_ids).argmax(1)


def evenly(logits, ids, generator=None, key_ids=None):
    return sample_negatives(logits, ids, generator, key_ids, hard=False)


def test_pitfall_37_frequencies():
    check_chi_square(sample_negatives)
    caught(check_chi_square, hardest)
    caught(check_chi_square, evenly)


def looped(logits, ids, generator=None):
    return torch.tensor(
        [
            torch.multinomial(row, 1, generator=generator).item()
            for row in negative_probabilities(logits, ids)
        ]
    )


def test_pitfall_37_one_batched_call(monkeypatch):
    calls, real = [], torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *a, **k: calls.append(1) or real(*a, **k))

    def check(sample):
        calls.clear()
        sample(torch.randn(16, 16), torch.arange(16), torch.Generator().manual_seed(0))
        assert len(calls) == 1

    check(sample_negatives)
    caught(check, looped)


def test_even_draws_are_even():
    logits = torch.tensor([50.0, 30.0, 0.0, -30.0, -50.0]).expand(20_000, 5)
    picks = sample_negatives(
        logits,
        torch.zeros(20_000, dtype=torch.long),
        torch.Generator().manual_seed(0),
        torch.arange(5),
        hard=False,
    )
    seen = picks.bincount(minlength=5).double()
    assert seen[0] == 0 and ((seen[1:] - 5000) ** 2 / 5000).sum() < 16.3


@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    key_ids=st.lists(st.integers(-1, 3), min_size=1, max_size=8),
    count=st.integers(1, 5),
    hard=st.booleans(),
    seed=st.integers(0, 99),
    cold=st.booleans(),
)
def test_draws_are_valid_different_and_as_many_as_there_are(ids, key_ids, count, hard, seed, cold):
    generator = torch.Generator().manual_seed(seed)
    logits = (500 if cold else 1) * torch.randn(len(ids), len(key_ids), generator=generator)
    picks = sample_negatives(
        logits, torch.tensor(ids), generator, torch.tensor(key_ids), count, hard
    )
    assert (
        picks.shape == ((len(ids),) if count == 1 else (len(ids), count))
        and picks.dtype == torch.long
    )
    for own, row in zip(ids, picks.reshape(len(ids), count).tolist()):
        valid = [c for c, other in enumerate(key_ids) if other not in (own, -1)]
        drawn = [c for c in row if c >= 0]
        assert set(drawn) <= set(valid) and len(set(drawn)) == len(drawn)
        assert len(drawn) == min(count, len(valid))


def test_the_same_generator_gives_the_same_draws():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample_negatives(torch.zeros(64, 64), torch.arange(64), generator, count=3)

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_broken_logits_are_never_drawn():
    logits = torch.tensor([[0.0, torch.nan, torch.inf, -torch.inf, 1.0], [torch.nan] * 5])
    picks = sample_negatives(
        logits, torch.tensor([0, 1]), torch.Generator().manual_seed(0), torch.arange(5), count=2
    )
    assert picks.tolist() == [[4, -1], [-1, -1]]


def test_no_queries_and_no_keys():
    nothing = torch.zeros(0, dtype=torch.long)
    assert sample_negatives(torch.zeros(0, 0), nothing).shape == (0,)
    assert sample_negatives(torch.zeros(2, 0), torch.tensor([1, 2]), key_ids=nothing).tolist() == [
        -1,
        -1,
    ]
    assert sample_negatives(torch.zeros(0, 3), nothing, key_ids=torch.arange(3), count=2).shape == (
        0,
        2,
    )


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"logits\[:, :B\]"):
        negative_probabilities(torch.zeros(2, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="keys"):
        sample_negatives(torch.zeros(2, 5), torch.tensor([0, 1]), key_ids=torch.arange(4))
    with pytest.raises(ValueError, match="count"):
        sample_negatives(torch.zeros(2, 2), torch.tensor([0, 1]), count=0)
