"mteb's figures against ours, to the digit, offline; and the mistakes that would make them differ."

import logging
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from miniature import make_corpus
from toys import TINY

from speechimg.core import Config, InputError
from speechimg.corpora import Corpus, load_corpus
from speechimg.model import SpeechImageModel
from speechimg.retrieval import evaluate, load_features, load_model
from speechimg.run.mteb import FineModel, corpus_task, for_mteb, quiet, run_mteb

WAYS = {"a2i": "speech_to_image", "i2a": "image_to_speech"}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    "Whoever asks for a network fails the test."
    tried = []

    def refuse(*arguments, **options):
        tried.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not tried


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "24 pictures with none to 3 recordings each, in no order."
    whole = load_corpus(
        make_corpus(
            tmp_path_factory.mktemp("corpus") / "mini", n_images=24, captions=3, splits=("val",)
        ),
        "val",
    )
    chosen = np.random.default_rng(1).permutation(
        [row for row, caption in enumerate(whole.captions) if caption.image != 5]
    )[:50]
    return Corpus(
        whole.name,
        whole.split,
        whole.pictures,
        [whole.captions[row] for row in chosen],
        whole.store,
    )


def make(score_mode="sim", seed=0):
    "An untrained model: its hit rates are far from 0 and 100."
    torch.manual_seed(seed)
    return SpeechImageModel(Config(towers="small", score_mode=score_mode, **TINY)).eval()


def hits(model, corpus, direction, rerank, **more):
    with quiet():
        task = corpus_task(corpus, direction)
    return run_mteb(for_mteb(model, rerank, **more), task).iloc[0].tolist()


def ours(model, corpus, direction, rerank):
    found = evaluate(model, load_features(model, corpus), rerank)["fine" if rerank else "coarse"]
    return [found[WAYS[direction]][k] for k in ("1", "5", "10")]


@pytest.mark.parametrize("direction", ["a2i", "i2a"])
@pytest.mark.parametrize(
    "score_mode, rerank", [("sim", 0), ("sim", 7), ("sum", 7), ("logits", 7), ("sim", 100)]
)
@pytest.mark.slow
def test_their_figures_are_ours(corpus, direction, score_mode, rerank):
    model = make(score_mode)
    expected = ours(model, corpus, direction, rerank)
    assert hits(model, corpus, direction, rerank) == expected and 0 < expected[1] < 100


def shipped(name):
    "Of scenes 80 recordings of val and all pictures they show; of stamps all that is English."
    whole = load_corpus(name, "val" if name == "scenes" else "all")
    return whole.subset(
        range(80)
        if name == "scenes"
        else [row for row, caption in enumerate(whole.captions) if caption.language == "en"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scenes", "stamps"])
def test_the_reference_model_has_the_same_figures_everywhere(name):
    "Both corpora that ship with the project, both directions, coarse and fine, to the digit."
    model, corpus = load_model("reference"), shipped(name)
    found = evaluate(model, load_features(model, corpus), 16)
    for direction, way in WAYS.items():
        for rerank, stage in ((0, "coarse"), (16, "fine")):
            assert hits(model, corpus, direction, rerank) == [
                found[stage][way][k] for k in ("1", "5", "10")
            ], (name, direction, stage)
    assert found["coarse"] != found["fine"]


@pytest.mark.slow
def test_mistakes_show(corpus, monkeypatch):
    "Mutants: another depth or mode, a ranking upside down, names in another order, recall."
    model = make()
    right = {direction: ours(model, corpus, direction, 7) for direction in WAYS}
    assert any(hits(model, corpus, direction, 3) != right[direction] for direction in WAYS)
    assert any(hits(make("sum"), corpus, direction, 7) != right[direction] for direction in WAYS)
    with quiet():
        task = corpus_task(corpus, "i2a")
    table = run_mteb(for_mteb(model, 7), task, scores=["recall_at_5", "hit_rate_at_5"]).iloc[0]
    assert (
        table["hit_rate_at_5"] == right["i2a"][1] and table["recall_at_5"] < table["hit_rate_at_5"]
    )
    original = FineModel.scores
    with monkeypatch.context() as patch:
        patch.setattr(FineModel, "scores", lambda self, *sides: -original(self, *sides))
        assert any(hits(model, corpus, direction, 7) != right[direction] for direction in WAYS)
    load = FineModel.load
    with monkeypatch.context() as patch:
        patch.setattr(
            FineModel,
            "load",
            lambda self, *arguments: (lambda names, read: (sorted(names), read))(
                *load(self, *arguments)
            ),
        )
        assert any(hits(model, corpus, direction, 7) != right[direction] for direction in WAYS)


def test_the_model_is_what_mteb_calls_one(corpus):
    with quiet():
        from mteb.models.models_protocols import (
            CrossEncoderProtocol,
            EncoderProtocol,
            SearchProtocol,
        )
    model = make()
    coarse, fine = (
        for_mteb(model, 0, name="me/mine", trained_on=["FlickrAudioToImageRetrieval"]),
        for_mteb(model),
    )
    assert isinstance(coarse, EncoderProtocol) and not isinstance(coarse, SearchProtocol)
    assert (
        isinstance(fine, SearchProtocol)
        and isinstance(fine, EncoderProtocol)
        and not isinstance(fine, CrossEncoderProtocol)
    )
    meta = coarse.mteb_model_meta
    assert (meta.name, meta.embed_dim, meta.license, set(meta.modalities)) == (
        "me/mine",
        8,
        "apache-2.0",
        {"audio", "image"},
    )
    assert meta.n_parameters == sum(
        p.numel() for p in model.parameters()
    ) and meta.training_datasets == {"FlickrAudioToImageRetrieval"}
    assert (
        meta.revision
        == for_mteb(make()).mteb_model_meta.revision
        != for_mteb(make(seed=1)).mteb_model_meta.revision
    )


def test_encode_keeps_the_order_of_the_loader(corpus):
    with quiet():
        from mteb._create_dataloaders import create_dataloader
    model = make()
    with quiet():
        task = corpus_task(corpus, "a2i")
    task.load_data()
    tables = task.dataset["default"]["val"]
    for kind, side, expected in (
        (
            "query",
            "queries",
            model.embed_speech([corpus.load_wave(row) for row in range(50)], progress=False),
        ),
        (
            "document",
            "corpus",
            model.embed_images([corpus.load_picture(row) for row in range(24)], progress=False),
        ),
    ):
        from mteb.types import PromptType

        loader = create_dataloader(
            tables[side], task_metadata=task.metadata, prompt_type=PromptType(kind), batch_size=7
        )
        assert (
            np.abs(
                for_mteb(model, 0).encode(
                    loader, task_metadata=task.metadata, hf_split="val", hf_subset="default"
                )
                - expected
            ).max()
            < 1e-5
        )


def loader(column, items):
    "What is looked at of a DataLoader of mteb."

    class Loader:
        dataset, collate_fn = SimpleNamespace(features={"id": None, column: None}), None

        def __iter__(self):
            yield (
                self.collate_fn([{column: item} for item in items])
                if self.collate_fn
                else {column: items}
            )

    return Loader()


def test_other_rates_and_channels_are_brought_to_ours():
    model, seconds = make(), torch.arange(8_000) / 8_000
    tone = (0.3 * torch.sin(2 * torch.pi * 440 * seconds)).numpy()
    found = for_mteb(model, 0).encode(
        loader(
            "audio",
            [
                {"array": tone, "sampling_rate": 8_000},
                {"array": np.stack([tone, tone]), "sampling_rate": 8_000},
                {"array": tone[None], "sampling_rate": 8_000},
            ],
        )
    )
    assert np.abs(found - found[0]).max() < 1e-3  # resampled in another order of additions
    wave = (0.3 * torch.sin(2 * torch.pi * 440 * torch.arange(16_000) / 16_000)).numpy()
    right, mutant = model.embed_speech(
        [wave, tone], progress=False
    )  # mutant: the rate is not looked at
    assert found[0] @ right > 0.99 > found[0] @ mutant
    with pytest.raises(InputError, match="audio 1"):
        for_mteb(model, 0).encode(
            loader(
                "audio",
                [
                    {"array": wave, "sampling_rate": 16_000},
                    {"array": wave * np.nan, "sampling_rate": 16_000},
                ],
            )
        )
    with pytest.raises(InputError, match="text"):
        for_mteb(model, 0).encode(loader("text", ["a"]))


def test_given_candidates_are_the_only_ones_ranked(corpus):
    "top_ranked: each query has its own; their order is that of the full ranking."
    model = make()
    with quiet():
        task = corpus_task(corpus, "a2i")
        task.load_data()
        tables, options = (
            task.dataset["default"]["val"],
            {
                "task_metadata": task.metadata,
                "hf_split": "val",
                "hf_subset": "default",
                "encode_kwargs": {"batch_size": 8},
                "num_proc": None,
            },
        )
        judge = for_mteb(model, rerank=100)
        judge.index(tables["corpus"], **options)
        everything = judge.search(tables["queries"], top_k=1000, **options)
        names = list(tables["corpus"]["id"])
        candidates = {query: names[row % 5 :: 3] for row, query in enumerate(everything)}
        found = judge.search(tables["queries"], top_k=1000, top_ranked=candidates, **options)
        few = judge.search(tables["queries"], top_k=2, **options)
    for query, scores in everything.items():
        assert len(scores) == 24 and set(found[query]) == set(candidates[query])
        assert sorted(found[query], key=found[query].get) == sorted(found[query], key=scores.get)
        assert sorted(few[query]) == sorted(sorted(scores, key=scores.get)[-2:])


def test_results_go_where_they_are_told(corpus, tmp_path):
    with quiet():
        task = corpus_task(corpus.subset(range(6)), "i2a")
    run_mteb(for_mteb(make()), task, tmp_path)
    assert any("mini-val-i2a" in path.name for path in tmp_path.rglob("*.json"))


def test_quiet_is_only_for_a_while(capfd, corpus):
    before = logging.getLogger("mteb").level
    with quiet():
        assert logging.getLogger("mteb").level == logging.ERROR
    assert logging.getLogger("mteb").level == before
    hits(make(), corpus.subset(range(6)), "a2i", 0)
    printed = capfd.readouterr()
    assert not printed.out and not printed.err, (printed.out, printed.err)


def test_a_wrong_direction_is_named(corpus):
    with pytest.raises(InputError, match="t2i"):
        corpus_task(corpus, "t2i")


def test_without_mteb_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(InputError, match=r"speechimg\[benchmark\]"):
        with quiet():
            pass
