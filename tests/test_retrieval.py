"Ranking and measuring: loops that anyone believes, properties, mutants of known pitfalls."

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from miniature import draw, image_bytes, make_corpus, make_files, write_files
from oracles import BOTH, caught, every_order, loop_recall, loop_rerank
from torch import nn
from torch.testing import assert_close
from toys import Ears, LinearTower, tiny_model

import speechimg.retrieval as room
from speechimg.attention import Encoded
from speechimg.core import Config, InputError
from speechimg.corpora import load_corpus, load_probe
from speechimg.data import speech_mask
from speechimg.model import SpeechImageModel, embed_pictures, embed_recordings
from speechimg.retrieval import (
    embed,
    evaluate,
    evaluate_corpus,
    hit_probability,
    load_features,
    load_model,
    open_gallery,
    pair_scorer,
    recall_at_k,
    rerank,
    search,
    swap_accuracy,
    swap_trials,
    two_stages,
)
from speechimg.sim import MultimodalEncoder

# recall: oracles


def assert_same(found, wished, tolerance=1e-6):
    assert found.keys() == wished.keys()
    for direction in found:
        assert found[direction].keys() == wished[direction].keys()
        for k in found[direction]:
            assert abs(found[direction][k] - wished[direction][k]) < tolerance, (
                direction,
                k,
                found,
                wished,
            )


def irregular(seed=0, n_image=7, levels=None):
    "Scores with 1 to 6 captions per image in random order; `levels` makes many of them tie."
    rng = np.random.default_rng(seed)
    image_of = np.repeat(np.arange(n_image), rng.integers(1, 7, n_image))
    rng.shuffle(image_of)
    scores = rng.standard_normal((len(image_of), n_image)) + (
        image_of[:, None] == np.arange(n_image)
    )
    if levels:
        scores = np.round(scores * levels) / levels
    return torch.tensor(scores, dtype=torch.float32), torch.tensor(image_of)


@pytest.mark.parametrize("levels", [None, 1, 0.4])
@pytest.mark.parametrize("seed", range(4))
def test_recall_equals_the_loop(seed, levels):
    scores, image_of = irregular(seed, levels=levels)
    assert_same(
        recall_at_k(scores, image_of, (1, 2, 5, 10, 99)),
        loop_recall(scores, image_of, (1, 2, 5, 10, 99)),
    )


@pytest.mark.parametrize("seed", range(6))
def test_recall_equals_the_mean_over_all_orders(seed):
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.integers(0, 3, (6, 4)))  # integers are scores too
    image_of = torch.tensor(rng.integers(0, 4, 6))
    assert_same(
        recall_at_k(scores, image_of, (1, 2, 3)),
        loop_recall(scores, image_of, (1, 2, 3), every_order),
    )


def test_a_constant_model_scores_chance():
    image_of = torch.arange(12) % 4  # three captions per image
    found = recall_at_k(torch.zeros(12, 4), image_of, (1, 2))
    assert_same(
        found,
        {
            "speech_to_image": {1: 25.0, 2: 50.0},
            "image_to_speech": {1: 25.0, 2: 100 * (1 - math.comb(9, 2) / math.comb(12, 2))},
        },
    )


def test_a_perfect_and_a_hopeless_model():
    image_of = torch.arange(30) % 6
    scores = F.one_hot(image_of, 6).float()
    assert_same(recall_at_k(scores, image_of), {d: {1: 100.0, 5: 100.0, 10: 100.0} for d in BOTH})
    assert_same(recall_at_k(-scores, image_of, (1, 5)), {d: {1: 0.0, 5: 0.0} for d in BOTH})


def test_image_without_recordings_is_no_query():
    scores = torch.tensor([[0.9, 0.1, 0.3], [0.2, 0.1, 0.8]])
    found = recall_at_k(
        scores, torch.tensor([0, 2]), (1,)
    )  # image 1 has none, but is in the gallery
    assert_same(found, {d: {1: 100.0} for d in BOTH})
    assert recall_at_k(scores, torch.tensor([1, 2]), (1,))["speech_to_image"][1] == 50.0


def test_a_large_tie_stays_exact():
    "25,000 equal scores: factorials of that size overflow, the product does not."
    found = recall_at_k(torch.zeros(25_000, 2), torch.arange(25_000) % 2, (10,))
    assert (
        abs(
            found["image_to_speech"][10] - 100 * (1 - math.comb(12_500, 10) / math.comb(25_000, 10))
        )
        < 1e-6
    )


@pytest.mark.parametrize(
    "scores, image_of",
    [
        (torch.zeros(2, 3), torch.tensor([0, 3])),
        (torch.zeros(2, 3), torch.tensor([0, -1])),
        (torch.zeros(2, 3), torch.tensor([0])),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)),
        (torch.full((2, 3), torch.nan), torch.tensor([0, 1])),
    ],
)
def test_recall_refuses_what_has_no_answer(scores, image_of):
    with pytest.raises(ValueError, match="recall_at_k"):
        recall_at_k(scores, image_of)


def test_lists_arrays_and_small_integers_will_do():
    scores, image_of = irregular(3, levels=1)
    for some in (
        (scores.tolist(), image_of.tolist()),
        (scores.numpy(), image_of.numpy().astype(np.int32)),
        (scores.half(), image_of.int()),
    ):
        assert recall_at_k(*some) == recall_at_k(scores, image_of)


def test_infinite_scores_are_ordinary():
    scores = torch.tensor([[torch.inf, 0.0], [-torch.inf, -torch.inf]])
    assert recall_at_k(scores, torch.tensor([0, 1]), (1,))["speech_to_image"][1] == 75.0


@given(st.integers(0, 10**6), st.booleans())
def test_recall_does_not_depend_on_the_order_of_anything(seed, tied):
    scores, image_of = irregular(seed, levels=1 if tied else None)
    rng = np.random.default_rng(seed)
    rows, columns = (
        torch.tensor(rng.permutation(len(scores))),
        torch.tensor(rng.permutation(scores.shape[1])),
    )
    assert_same(
        recall_at_k(scores[rows][:, columns], columns.argsort()[image_of[rows]]),
        recall_at_k(scores, image_of),
    )


@given(st.integers(0, 10**6))
def test_recall_grows_with_k_and_ends_at_100(seed):
    scores, image_of = irregular(seed, levels=2)
    found = recall_at_k(scores, image_of, (1, 2, 5, 10, len(scores)))
    for part in found.values():
        values = list(part.values())
        assert values == sorted(values) and abs(values[-1] - 100) < 1e-9


# recall: pitfalls 29 and 30 put back, and the arbitrary ties


def worst_rank(scores, image_of, ks=(1, 5, 10)):
    "Pitfall 29: no break after the first hit, so the last caption of an image counts."
    found = recall_at_k(scores, image_of, ks)
    ranks = [
        max((column > column[place]).sum().item() for place in (image_of == image).nonzero()[:, 0])
        for image, column in enumerate(scores.T)
    ]
    return found | {
        "image_to_speech": {k: 100 * sum(rank < k for rank in ranks) / len(ranks) for k in ks}
    }


def five_in_a_row(scores, image_of, ks=(1, 5, 10)):
    "Pitfall 30: caption i belongs to image i // 5."
    return recall_at_k(scores, torch.arange(len(scores)) // 5 % scores.shape[1], ks)


def diagonal(scores, image_of, ks=(1, 5, 10)):
    "Pitfall 30: caption i belongs to image i."
    return recall_at_k(scores, torch.arange(len(scores)) % scores.shape[1], ks)


def by_argsort(scores, image_of, ks=(1, 5, 10)):
    "Ties by whatever order argsort leaves behind."
    order = np.argsort(scores.numpy(), 1)[:, ::-1]
    ranks = [int((row == owner).nonzero()[0][0]) for row, owner in zip(order, image_of.tolist())]
    return recall_at_k(scores, image_of, ks) | {
        "speech_to_image": {k: 100 * np.mean([rank < k for rank in ranks]) for k in ks}
    }


def optimistic(scores, image_of, ks=(1, 5, 10)):
    "Ties always in one's favour."
    return loop_recall(
        scores,
        image_of,
        ks,
        lambda row, right, k: float(sum(one > max(row[p] for p in right) for one in row) < k),
    )


def check_recall(function):
    for seed, levels in ((0, None), (1, 1), (2, 0.4)):
        scores, image_of = irregular(seed, levels=levels)
        assert_same(function(scores, image_of, (1, 2, 5)), loop_recall(scores, image_of, (1, 2, 5)))


def test_recall_passes_its_check():
    check_recall(recall_at_k)


@pytest.mark.parametrize("mutant", [worst_rank, five_in_a_row, diagonal, by_argsort, optimistic])
def test_recall_mutants_are_caught(mutant):
    caught(check_recall, mutant)


# re-ranking


def table_scorer(table, calls=None):
    "score_pairs that looks the scores up; notes the pairs it was asked for."

    def score_pairs(query_idx, candidate_idx):
        assert query_idx.shape == candidate_idx.shape and query_idx.ndim == 1
        if calls is not None:
            calls.extend(zip(query_idx.tolist(), candidate_idx.tolist()))
        return table[query_idx, candidate_idx]

    return score_pairs


def orders_of(final):
    return final.argsort(dim=1, descending=True, stable=True).tolist()


def scored(seed, q=6, n=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(q, n, generator=generator), torch.randn(
        q, n, generator=generator
    ) * 300 - 200  # far below -100 as well


def check_rerank(function):
    for seed in range(5):
        coarse, fine = scored(seed)
        for k, mode in itertools.product(
            (1, 3, 9, 16), ("sim", "sum")
        ):  # pitfall 27: k above the gallery
            assert orders_of(function(coarse, table_scorer(fine), k, mode)) == loop_rerank(
                coarse, table_scorer(fine), k, mode
            ), (seed, k, mode)


def topk_crash(coarse, score_pairs, k, mode="sim"):
    "Pitfall 27: topk of more than there is."
    coarse.topk(k, 1)
    return rerank(coarse, score_pairs, k, mode)


def filled_with_minus_100(coarse, score_pairs, k, mode="sim"):
    "Pitfall 28: the others at -100."
    k = min(k, coarse.shape[1])
    candidates = coarse.topk(k, 1).indices
    queries = torch.arange(len(coarse)).repeat_interleave(k)
    fine = score_pairs(queries, candidates.flatten()).view(-1, k) + (
        coarse.gather(1, candidates) if mode == "sum" else 0
    )
    return torch.full_like(coarse, -100.0).scatter_(1, candidates, fine)


def others_forgotten(coarse, score_pairs, k, mode="sim"):
    "Pitfall 28: strictly below, but all alike."
    final = rerank(coarse, score_pairs, k, mode)
    floor = final.topk(min(k, final.shape[1]), 1).values[:, -1:]
    return torch.where(final < floor, floor - 1, final)


def union_of_candidates(coarse, score_pairs, k, mode="sim"):
    "Pitfall 32: every query re-ranks what any query chose."
    chosen = coarse.topk(min(k, coarse.shape[1]), 1).indices.unique()
    queries = torch.arange(len(coarse)).repeat_interleave(len(chosen))
    fine = score_pairs(queries, chosen.repeat(len(coarse))).view(len(coarse), -1) + (
        coarse[:, chosen] if mode == "sum" else 0
    )
    final = coarse - coarse.amax(1, keepdim=True) + fine.amin(1, keepdim=True) - 1
    return final.index_copy(1, chosen, fine)


def always_sum(coarse, score_pairs, k, mode="sim"):
    "Pitfall 33: the mode is ignored."
    return rerank(coarse * 300, score_pairs, k, "sum")


def always_sim(coarse, score_pairs, k, mode="sim"):
    "Pitfall 33 the other way round."
    return rerank(coarse, score_pairs, k, "sim")


def test_rerank_passes_its_check():
    check_rerank(rerank)


@pytest.mark.parametrize(
    "mutant", [topk_crash, filled_with_minus_100, others_forgotten, union_of_candidates, always_sum]
)
def test_rerank_mutants_are_caught(mutant):
    caught(check_rerank, mutant, RuntimeError)


def test_the_two_modes_differ_where_they_should():
    def check(function):
        coarse, fine = torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([[1.0, 1.5, 9.0]])
        assert orders_of(function(coarse, table_scorer(fine), 2, "sim")) == [[1, 0, 2]]
        assert orders_of(function(coarse, table_scorer(fine), 2, "sum")) == [[0, 1, 2]]

    check(rerank)
    caught(check, always_sim)
    caught(
        check,
        lambda coarse, score_pairs, k, mode: rerank(coarse, score_pairs, k, "sum"),
        RuntimeError,
        IndexError,
        ValueError,
    )


def test_rerank_by_hand():
    coarse = torch.tensor([[0.9, 0.8, 0.7, 0.7, 0.1]])
    fine = torch.tensor([[-5.0, 2.0, 9.0, 9.0, 9.0]])
    assert_close(
        rerank(coarse, table_scorer(fine), 2), torch.tensor([[-5.0, 2.0, -7.0, -7.0, -8.0]])
    )  # a tie among the rest stays one


def test_each_query_asks_for_its_own_candidates_once():
    coarse, fine = scored(1)
    calls = []
    rerank(coarse, table_scorer(fine, calls), 3, chunk=4)
    wished = [
        (query, place)
        for query, row in enumerate(coarse.topk(3, 1).indices.tolist())
        for place in row
    ]
    assert sorted(calls) == sorted(wished)


@pytest.mark.parametrize("chunk", [1, 2, 7, 10_000])
def test_chunks_change_nothing(chunk):
    coarse, fine = scored(2)
    assert torch.equal(
        rerank(coarse, table_scorer(fine), 4, chunk=chunk), rerank(coarse, table_scorer(fine), 4)
    )


def test_ties_at_the_border_go_to_the_lower_index():
    calls = []
    rerank(torch.tensor([[0.5, 0.7, 0.5, 0.5]]), table_scorer(torch.zeros(1, 4), calls), 2)
    assert calls == [(0, 1), (0, 0)]


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_no_numbers_are_refused(fill):
    coarse, fine = scored(3)
    fine[2, coarse[2].argmax()] = fill
    with pytest.raises(ValueError, match=f"query 2 and candidate {coarse[2].argmax()}"):
        rerank(coarse, table_scorer(fine), 2)
    coarse[1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        rerank(coarse, table_scorer(fine), 2)


def test_unknown_mode_and_empty_cases():
    coarse, fine = scored(4)
    with pytest.raises(ValueError, match="mode"):
        rerank(coarse, table_scorer(fine), 2, "max")
    assert torch.equal(rerank(coarse, None, 0), coarse)
    assert rerank(coarse[:0], table_scorer(fine), 3).shape == (0, 9)


def test_huge_and_half_precision_scores_keep_their_order():
    coarse, fine = scored(5)
    for factor, dtype in (
        (1e30, torch.float32),
        (1e200, torch.float64),
        (1.0, torch.float16),
        (1.0, torch.bfloat16),
    ):
        table = fine.to(torch.float64).mul(factor).to(dtype)
        found = rerank(
            coarse.to(dtype if dtype.itemsize == 2 else torch.float32), table_scorer(table), 3
        )
        assert found.isfinite().all()
        wished = loop_rerank(
            coarse.to(dtype).float() if dtype.itemsize == 2 else coarse,
            table_scorer(table.double()),
            3,
        )
        assert orders_of(found) == wished, dtype


@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from(["sim", "sum"]), st.booleans())
def test_reranking_k_cannot_change_recall_at_k(seed, k, mode, tied):
    scores, image_of = irregular(seed)
    generator = torch.Generator().manual_seed(seed)
    fine = torch.randn(scores.shape, generator=generator) * 50
    if tied:
        fine = fine.sign()
    there = rerank(scores, table_scorer(fine), k, mode)
    back = rerank(scores.T, table_scorer(fine.T), k, mode)
    for beyond in (k, k + 1, k + 3):  # at k and beyond, since the rest keeps its order
        before = recall_at_k(scores, image_of, (beyond,))
        assert_same(
            {BOTH[0]: recall_at_k(there, image_of, (beyond,))[BOTH[0]]}, {BOTH[0]: before[BOTH[0]]}
        )
        assert_same(
            {BOTH[1]: recall_at_k(back.T, image_of, (beyond,))[BOTH[1]]}, {BOTH[1]: before[BOTH[1]]}
        )


@given(st.integers(0, 10**6), st.integers(1, 12))
def test_reranking_follows_every_permutation(seed, k):
    coarse, fine = scored(seed)
    rng = np.random.default_rng(seed)
    rows, columns = torch.tensor(rng.permutation(6)), torch.tensor(rng.permutation(9))
    shuffled = rerank(coarse[rows][:, columns], table_scorer(fine[rows][:, columns]), k)
    assert torch.equal(shuffled, rerank(coarse, table_scorer(fine), k)[rows][:, columns])


@given(st.integers(0, 10**6), st.integers(1, 12))
def test_reranking_by_the_coarse_score_changes_no_order(seed, k):
    coarse, _ = scored(seed)
    assert orders_of(rerank(coarse, table_scorer(coarse), k)) == orders_of(coarse)


@given(
    st.lists(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 6),
    st.integers(0, 99),
)
def test_the_rest_is_strictly_below_and_keeps_ties(rows, k, seed):
    coarse = torch.tensor(rows)
    final = rerank(
        coarse,
        table_scorer(torch.randn(coarse.shape, generator=torch.Generator().manual_seed(seed))),
        k,
    )
    order = coarse.argsort(dim=1, descending=True, stable=True)
    inside, outside = final.gather(1, order[:, :k]), final.gather(1, order[:, k:])
    if outside.numel():
        assert (outside.amax(1) < inside.amin(1)).all()
    rest = coarse.gather(1, order[:, k:])
    assert torch.equal(outside[:, 1:] < outside[:, :-1], rest[:, 1:] < rest[:, :-1])


# a real, tiny model


class Eyes:
    "Front end: 4 x 4 colours, as pixels of 8 bits."

    params, feature_dim = "toy eyes 2", 3

    def __call__(self, picture):
        return np.array(picture.resize((4, 4))).reshape(16, 3)


def toy_model(mode="sim", seed=0):
    torch.manual_seed(seed)
    config = Config(width=12, dim=6, heads=2, fusion_depth=1, score_mode=mode)
    towers = (LinearTower(0.5, front_end, 12) for front_end in (Ears(800), Eyes()))
    return SpeechImageModel(config, *towers).eval()


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("retrieval") / "mini", n_images=10, captions=3)


@pytest.fixture
def mini(corpus_path, fresh_cache):
    "Model, corpus, features, trials."
    model, corpus = toy_model(), load_corpus(corpus_path, "test")
    features = load_features(model, corpus)
    return SimpleNamespace(
        path=corpus_path,
        model=model,
        corpus=corpus,
        features=features,
        trials=swap_trials(load_probe(corpus_path), corpus, features),
    )


def test_embeddings_equal_one_at_a_time(mini):
    "Batches, padding and the order of lengths leave no trace."
    found = embed(mini.model, mini.features, batch_size=7)
    with torch.no_grad():
        for row, frames in enumerate(mini.features.speech):
            alone = mini.model.encode_speech(
                torch.from_numpy(frames).float()[None], torch.tensor([len(frames)])
            )
            assert_close(found.speech[row], alone.embedding[0])
            assert_close(found.speech_tokens[row], alone.tokens[0])
        for row, grid in enumerate(mini.features.image):
            alone = mini.model.encode_image(
                torch.from_numpy(grid).float()[None] / 255
            )  # 8 bits to [0, 1], as in training
            assert_close(found.image[row], alone.embedding[0])
            assert_close(found.image_tokens[row], alone.tokens[0])
    assert torch.equal(found.image_of, mini.features.image_of)


def test_vectors_may_come_without_tokens(mini):
    vectors, tokens = embed_recordings(mini.model, mini.features.speech, 7, keep_tokens=False)
    assert torch.equal(vectors, embed(mini.model, mini.features, 7).speech)
    assert set(tokens) == {None}
    vectors, tokens = embed_pictures(mini.model, mini.features.image, 7, keep_tokens=False)
    assert torch.equal(vectors, embed(mini.model, mini.features, 7).image) and tokens is None


def test_recordings_of_like_length_share_a_batch(mini, monkeypatch):
    "No batch pads more than the next length needs; the lengths may be told without reading."
    shapes, encode = [], mini.model.encode_speech

    def spy(*arguments, **options):
        features = arguments[0] if arguments else options["features"]
        shapes.append(features.shape[:2])
        return encode(*arguments, **options)

    monkeypatch.setattr(mini.model, "encode_speech", spy)
    lengths = sorted(len(frames) for frames in mini.features.speech)
    embed_recordings(mini.model, mini.features.speech, 7)
    wished = [(len(part), part[-1]) for part in (lengths[i : i + 7] for i in range(0, 30, 7))]
    assert [tuple(shape) for shape in shapes] == wished


def test_embedding_leaves_model_and_random_state_alone(mini):
    mini.model.train()
    state, before = (
        torch.get_rng_state(),
        {name: tensor.clone() for name, tensor in mini.model.state_dict().items()},
    )
    first, second = embed(mini.model, mini.features), embed(mini.model, mini.features)
    evaluate(mini.model, mini.features, 4, mini.trials)
    assert torch.equal(first.speech, second.speech), "dropout was on"
    assert mini.model.training and torch.equal(state, torch.get_rng_state())
    assert all(
        torch.equal(before[name], tensor) for name, tensor in mini.model.state_dict().items()
    )


def test_the_model_is_back_in_training_after_an_error(mini, monkeypatch):
    mini.model.train()
    monkeypatch.setattr(mini.model, "encode_speech", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed(mini.model, mini.features)
    assert mini.model.training and torch.is_grad_enabled()


def one_pair(model, embeddings, speech, image):
    "A pair on its own, without any padding."
    tokens = embeddings.speech_tokens[speech][None]
    with torch.no_grad():
        return model.match(
            tokens,
            torch.ones(tokens.shape[:2], dtype=torch.bool),
            embeddings.image_tokens[image][None],
        )[0, 1].item()


@pytest.mark.parametrize("direction", BOTH)
def test_pair_scores_equal_one_pair_at_a_time(mini, direction):
    embeddings = embed(mini.model, mini.features)
    queries, candidates = torch.tensor([0, 3, 3, 7, 9, 1]), torch.tensor([2, 2, 9, 0, 5, 1])
    found = pair_scorer(mini.model, embeddings, direction, batch_size=4)(queries, candidates)
    for score, q, c in zip(found.tolist(), queries.tolist(), candidates.tolist()):
        assert (
            abs(
                score
                - one_pair(mini.model, embeddings, *((q, c) if direction == BOTH[0] else (c, q)))
            )
            < 1e-5
        )


def test_a_forgotten_mask_is_caught(mini, monkeypatch):
    "Pitfall 24: padding in a batch must not be read; a scorer without masks fails the check."
    embeddings = embed(mini.model, mini.features)
    lengths = torch.tensor([len(tokens) for tokens in embeddings.speech_tokens])
    shortest, longest = int(lengths.argmin()), int(lengths.argmax())

    def check(_):
        found = pair_scorer(mini.model, embeddings)(
            torch.tensor([longest, shortest]), torch.tensor([0, 0])
        )
        assert abs(found[1].item() - one_pair(mini.model, embeddings, shortest, 0)) < 1e-5

    check(None)
    hear = MultimodalEncoder.hear
    monkeypatch.setattr(
        MultimodalEncoder,
        "hear",
        lambda self, tokens, mask: hear(self, tokens, torch.ones_like(mask)),
    )
    caught(check, None)


def test_swapped_directions_are_caught(mini):
    "A scorer that reads pictures as recordings gives other numbers (or none)."
    embeddings = embed(mini.model, mini.features)

    def check(direction):
        found = pair_scorer(mini.model, embeddings, direction)(
            torch.tensor([1]), torch.tensor([4])
        ).item()
        assert abs(found - one_pair(mini.model, embeddings, 4, 1)) < 1e-5

    check("image_to_speech")
    caught(check, "speech_to_image")


@pytest.mark.parametrize("mode", ["sim", "sum", "logits"])
def test_two_stages_follow_the_config(mini, mode):
    model = toy_model(mode)
    model.temperature.data.fill_(0.02)
    embeddings = embed(model, mini.features)
    coarse, fine = two_stages(model, embeddings, 4)
    scaled, mode = (coarse / 0.02, "sum") if mode == "logits" else (coarse, mode)
    wished = loop_rerank(
        scaled,
        lambda q, c: torch.tensor([one_pair(model, embeddings, q.item(), c.item())]),
        4,
        mode,
    )
    assert orders_of(fine) == wished
    coarse_back, fine_back = two_stages(model, embeddings, 4, "image_to_speech")
    assert torch.equal(coarse_back, coarse.T)
    assert orders_of(fine_back) == loop_rerank(
        scaled.T,
        lambda q, c: torch.tensor([one_pair(model, embeddings, c.item(), q.item())]),
        4,
        mode,
    )


def test_evaluation_has_exactly_the_promised_form(mini):
    result = evaluate(mini.model, mini.features, 4, mini.trials)
    again = json.loads(json.dumps(result))
    assert again == result and list(result) == ["coarse", "fine", "swap", "pairs", "seconds"]
    for stage in ("coarse", "fine"):
        assert list(result[stage]) == list(BOTH)
        for part in result[stage].values():
            assert list(part) == ["1", "5", "10"] and all(
                isinstance(value, float) and 0 <= value <= 100 for value in part.values()
            )
    assert list(result["swap"]) == ["coarse", "fine"]
    assert result["pairs"] == 30 * 4 + 10 * 4 + 2 * len(mini.trials) and result["seconds"] >= 0


def test_evaluation_equals_the_loops(mini):
    result = evaluate(mini.model, mini.features, 4)
    assert (
        result["swap"] is None
        and evaluate(mini.model, mini.features, 4, mini.trials[:0])["swap"] is None
    )
    embeddings = embed(mini.model, mini.features)
    wished = loop_recall(embeddings.speech @ embeddings.image.T, embeddings.image_of)
    for direction in BOTH:
        for k in (1, 5, 10):
            assert abs(result["coarse"][direction][str(k)] - wished[direction][k]) < 1e-3
    pairs = torch.tensor(
        [[one_pair(mini.model, embeddings, s, i) for i in range(10)] for s in range(30)]
    )
    all_fine = evaluate(
        mini.model, mini.features, 99
    )  # more candidates than pictures or recordings: matching alone decides
    wished = loop_recall(pairs, embeddings.image_of)
    assert all_fine["pairs"] == 2 * 300
    for direction in BOTH:
        for k in (1, 5, 10):
            assert abs(all_fine["fine"][direction][str(k)] - wished[direction][k]) < 1e-3


@pytest.mark.parametrize("k", [1, 5, 10])
def test_evaluation_keeps_recall_at_the_depth_of_reranking(mini, k):
    result = evaluate(mini.model, mini.features, k)
    for direction in BOTH:
        assert result["coarse"][direction][str(k)] == result["fine"][direction][str(k)]


def test_without_reranking_both_stages_agree(mini):
    result = evaluate(mini.model, mini.features, 0)
    assert result["coarse"] == result["fine"] and result["pairs"] == 0


# swap probe


def test_swap_trials_point_at_the_right_things(mini):
    for (caption, right, other), one in zip(mini.trials.tolist(), load_probe(mini.path)):
        assert (
            mini.features.uttids[caption] == one["uttid"]
            and mini.features.image_of[caption] == right != other
        )
        assert mini.corpus.pictures[mini.features.pictures[other]].path == one["other"]


def test_swap_accuracy_by_hand_and_draws():
    def unit(*rows):
        return F.normalize(torch.tensor(rows), dim=-1)

    embeddings = room.Embeddings(
        unit([1.0, 0.0], [0.0, 1.0]),
        unit([1.0, 0.2], [0.2, 1.0], [1.0, 0.2]),
        [torch.zeros(1, 2)] * 2,
        torch.tensor([3.0, 2.0, 3.0])[:, None, None],
        None,
    )

    class Judge(nn.Module):
        weight = nn.Parameter(torch.zeros(1))

        def parameters(self, recurse=True):
            return iter([self.weight])

        fusion = SimpleNamespace(
            judge_many=lambda speech, image, pairs, batch_size: torch.stack(
                [torch.zeros(len(pairs[1])), image[pairs[1], 0, 0]], 1
            )
        )

    trials = torch.tensor(
        [[0, 0, 1], [1, 1, 0], [0, 0, 2], [1, 0, 1]]
    )  # coarse: won, won, draw, lost; fine: won, lost, draw, won
    assert swap_accuracy(Judge(), embeddings, trials) == {"coarse": 62.5, "fine": 62.5}


def test_swap_trials_name_what_is_wrong(mini):
    broken = [dict(load_probe(mini.path)[0], other="images/none.png")]
    with pytest.raises(InputError, match="swap.json.*does not have"):
        swap_trials(broken, mini.corpus, mini.features)
    mini.features.skipped.append("something was skipped")
    assert swap_trials(broken, mini.corpus, mini.features).shape == (0, 3)
    assert swap_trials([], mini.corpus, mini.features).shape == (0, 3)


# zero-shot


def test_zero_shot_counts_galleries_and_nouns(tmp_path, fresh_cache):
    files = make_files(8, 2, splits=("all",))
    data = json.loads(files["all.json"])
    for number, entry in enumerate(data["data"]):
        for place, caption in enumerate(entry["captions"]):
            caption["language"] = (
                ("en", "fr")[place] if number else "fr"
            )  # picture 0 has no English
    files["all.json"] = json.dumps(data).encode()
    path, model = write_files(tmp_path / "foreign", files), toy_model()
    wanted = data["data"][3]["concepts"][0]
    asked = sum(wanted in entry["concepts"] for entry in data["data"][1:])
    found = evaluate_corpus(model, path, "all", "en", nouns=[wanted], rerank=3)
    assert (
        found["pictures"] == 7
        and found["all"]["queries"] == 7
        and found["nouns"]["queries"] == asked
    )
    assert list(found["all"]["coarse"]) == ["1", "5", "10"] and found["all"]["fine"]["10"] == 100.0
    assert evaluate_corpus(model, path, "all", None, nouns=[], rerank=3)["all"]["queries"] == 16
    assert evaluate_corpus(model, path, "all", "fr", nouns=["nothing"], rerank=3)["nouns"] is None
    with pytest.raises(InputError, match="no recording in language 'xx'"):
        evaluate_corpus(model, path, "all", "xx", nouns=[])


# models and searches


def test_load_model_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECHIMG_DATA", str(tmp_path))
    with pytest.raises(InputError, match="nowhere: holds no model"):
        load_model("nowhere")
    folder = tmp_path / "models" / "mine"
    small = tiny_model(towers="small")
    small.save_pretrained(folder)
    assert all(
        torch.equal(one, small.state_dict()[name])
        for name, one in load_model("mine").cpu().state_dict().items()
    )
    assert not load_model(folder).training
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(InputError, match="model.safetensors"):
        load_model("mine")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text('{"width": 24}')
    with pytest.raises(InputError):
        load_model("mine")
    (folder / "config.json").write_text('{"widht": 24}')
    with pytest.raises(InputError, match="did you mean width"):
        load_model("mine")


def test_search_in_a_folder_of_pictures(tmp_path, fresh_cache, mini):
    folder = tmp_path / "my pictures" / "more"
    folder.mkdir(parents=True)
    for number, noun in enumerate(("red circle", "blue square", "green triangle", "yellow circle")):
        (folder / f"{number} <b>.png").write_bytes(image_bytes(draw([noun])))
    (folder / "broken.png").write_bytes(b"\x89PNG but no more")
    (folder / "notes.txt").write_text("not a picture at all")
    gallery = open_gallery(mini.model, folder.parent)
    assert [picture.path for picture in gallery[0].pictures] == [
        f"more/{number} <b>.png" for number in range(4)
    ]
    notes, broken = sorted(gallery[0].skipped, key=lambda line: "broken.png" in line)
    assert "not searched are 1 .txt" in notes and "broken.png" in broken
    wave = mini.corpus.load_wave(0)
    hits = search(mini.model, wave, gallery, top=3, rerank=2)
    assert (
        [hit.rank for hit in hits] == [1, 2, 3]
        and sorted(hit.before for hit in hits[:2]) == [1, 2]
        and hits[2].before == 3
    )
    assert [hit.fine is None for hit in hits] == [False, False, True]
    assert hits == search(mini.model, wave, folder.parent, top=3, rerank=2), (
        "a folder and its opened gallery answer alike"
    )
    embeddings = embed(
        mini.model, SimpleNamespace(speech=[Ears(800)(wave)], image=[], image_of=None)
    )
    for hit in hits:
        assert (
            abs(hit.coarse - (embeddings.speech[0] @ gallery[1].image[hit.picture]).item()) < 1e-5
        )


def test_search_sees_only_the_first_max_seconds(mini):
    gallery, wave = open_gallery(mini.model, mini.path), mini.corpus.load_wave(1)
    mini.model.config.max_seconds = 0.2
    louder = wave.clone()
    louder[3200:] = 0.9
    assert search(mini.model, wave, gallery) == search(mini.model, louder, gallery)


def test_galleries_that_cannot_be(tmp_path, fresh_cache, mini):
    with pytest.raises(InputError, match="does not exist"):
        open_gallery(mini.model, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no pictures"):
        open_gallery(mini.model, tmp_path / "empty")
    (tmp_path / "empty" / "a.png").write_bytes(b"text")
    with pytest.raises(InputError, match="nothing readable"):
        open_gallery(mini.model, tmp_path / "empty")


def test_a_corpus_as_gallery_leaves_its_recordings_unread(tmp_path, fresh_cache, mini, monkeypatch):
    files = {
        name: content if not name.startswith("wavs/") else b"not sound"
        for name, content in make_files(6, 1).items()
    }
    corpus, embeddings = open_gallery(mini.model, write_files(tmp_path / "mute", files))
    assert corpus.split == "test" and len(corpus.pictures) == 6 == len(embeddings.image)


def test_hit_probability_formula():
    for t, p, k, g in itertools.product((1, 3, 6), (1, 2, 3), (1, 2, 5, 10), (0, 1, 4)):
        if p > t:
            continue
        places = min(max(k - g, 0), t)
        wished = 1 - math.comb(t - p, places) / math.comb(t, places)
        assert (
            abs(
                hit_probability(torch.tensor([g]), torch.tensor([t]), torch.tensor([p]), k).item()
                - wished
            )
            < 1e-12
        )
