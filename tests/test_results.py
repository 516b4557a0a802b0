"The runs behind nbs/14_results.ipynb: a plan without holes, noise, lines that fit the plan."

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from miniature import make_corpus
from toys import TINY

ROOT = Path(__file__).resolve().parent.parent
import results

from speechimg.core import Config, read_json
from speechimg.corpora import load_corpus

PLAN = {run.name: run for run in results.plan()}


def test_no_two_runs_share_a_name_or_a_folder():
    assert len(PLAN) == len(results.plan()) == len({run.folder for run in results.plan()})


def test_who_begins_with_another_comes_after_it():
    seen = set()
    for run in results.plan():
        assert run.start is None or run.start in seen
        seen.add(run.name)


def test_rows_differ_in_nothing_but_the_method():
    "Equal data, steps, rates and seed for every row of the ablation; a start of its own seed."
    rows = [run for run in results.plan() if run.experiment == "ablation"]
    free = {
        "queue_size",
        "student_steps",
        "queue_warmup_steps",
        "sim_weight",
        "alpha",
        "negatives",
        "negative_sampling",
        "token_slots",
        "seed",
    }
    first = Config.from_dict(rows[0].config).to_dict()
    for run in rows:
        config = Config.from_dict(run.config).to_dict()
        assert {name for name in config if config[name] != first[name]} <= free
        assert (
            config["seed"] == run.seed == PLAN[run.start].seed
            and run.noise == PLAN[run.start].noise == 0
        )
    assert len(rows) == 6 * len(results.SEEDS) and len(results.SEEDS) >= 3


def test_noise_differs_in_nothing_but_alpha_and_labels():
    for run in results.plan():
        if run.experiment == "noise":
            assert (
                PLAN[run.start].noise == run.noise in (0, 20, 40)
                and PLAN[run.start].seed == run.seed
            )
            with_it = PLAN[
                run.name.replace("without", "with") if run.noise else f"ablation/+ queue/{run.seed}"
            ]
            assert {
                name
                for name in {**with_it.config, **run.config}
                if with_it.config.get(name) != run.config.get(name)
            } <= {"alpha"}


def test_every_config_is_accepted_and_every_measure_exists():
    for run in results.plan():
        Config.from_dict(run.config)
        assert all(callable(getattr(results, name)) for name in run.measures)


@pytest.mark.parametrize("percent", [0, 20, 100])
def test_so_many_captions_are_moved_to_another_meaning(percent, tmp_path):
    corpus = load_corpus(make_corpus(tmp_path / "mini", n_images=12), "train")
    noisy = results.moved(corpus, percent, 3)
    meaning = lambda one, caption: one.pictures[caption.image].id  # noqa: E731
    wrong = [
        meaning(corpus, before) != meaning(noisy, after)
        for before, after in zip(corpus.captions, noisy.captions)
    ]
    assert sum(wrong) == round(len(corpus.captions) * percent / 100)
    assert [caption.uttid for caption in noisy.captions] == [
        caption.uttid for caption in corpus.captions
    ]
    again, other = results.moved(corpus, percent, 3), results.moved(corpus, percent, 4)
    assert again.captions == noisy.captions and (other.captions != noisy.captions or percent == 0)
    assert noisy.fingerprint() == again.fingerprint() and (
        percent == 0 or noisy.fingerprint() != other.fingerprint()
    )
    assert (
        percent == 0 or noisy.fingerprint() != corpus.fingerprint()
    )  # so a run with noise cannot be resumed without


def test_recordings_of_one_picture_are_compared_between_languages():
    near = {
        image: torch.nn.functional.one_hot(torch.tensor(image), 40).float() for image in range(40)
    }
    far = {image: near[(image + 1) % 40] for image in near}
    found = results.between({"a": near, "b": near, "c": far, "few": {0: near[0]}})
    assert (
        found["a"]["b"]["1"] == 100
        and found["a"]["c"]["1"] == 0
        and found["a"]["b"]["pictures"] == 40
    )
    assert "few" not in found and "few" not in found["a"] and "a" not in found["a"]


SIX_STEPS = {"batch_size": 8, "steps": 6, "warmup_steps": 1}


@pytest.mark.slow
def test_a_run_from_beginning_to_end(tmp_path, monkeypatch):
    "Two stages on a miniature corpus; stopped and gone on with; the line says what was done."
    mini, size = make_corpus(tmp_path / "mini"), TINY | SIX_STEPS
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(
        results,
        "corpus_of",
        lambda run: (
            lambda split: (
                results.moved(load_corpus(mini, split), run.noise, run.seed)
                if split == "train"
                else None
            )
        ),
    )
    monkeypatch.setattr(
        results, "test", lambda model, run: results.recalls(model, results_features(model, mini))
    )
    first = results.Run("stage 1", "mini", 0, size | {"sim_weight": 0.0}, noise=20)
    second = results.Run(
        "ablation",
        "mini",
        0,
        size | {"queue_size": 9, "score_mode": "logits"},
        "stage 1/mini/0",
        20,
    )
    monkeypatch.setattr(results, "plan", lambda: [first, second])
    for run in (first, second):
        results.carry_out(run)
        line = read_json(run.folder / "line.json")
        assert (
            line["steps"] == 6
            and line["noise"] == 20
            and line["start"] == run.start
            and line["commit"]
        )
    coarse, both = (
        read_json(run.folder / "line.json")["figures"]["test"] for run in (first, second)
    )
    assert set(coarse) == {"coarse"} and set(both) == {"coarse", "sim", "fine"}
    assert all(
        0 <= value <= 100
        for stage in both.values()
        for way in stage.values()
        for value in way.values()
    )
    before = (second.folder / "model.safetensors").read_bytes()
    results.carry_out(second)  # it is finished: nothing is trained again
    assert (second.folder / "model.safetensors").read_bytes() == before


def results_features(model, mini):
    from speechimg.retrieval import load_features

    return load_features(model, load_corpus(mini, "test"))


def test_the_committed_lines_are_those_of_the_plan():
    "Same settings as the plan asks for, from a commit, within a quarter of an hour."
    defaults = Config().to_dict()
    assert list(results.finished()) == [
        name for name in PLAN if name in results.finished()
    ]  # in its order, too
    for name, line in results.finished().items():
        run = PLAN[name]
        assert line["config"] == {
            key: value for key, value in run.config.items() if value != defaults[key]
        }, name
        assert (
            line["noise"] == run.noise
            and line["start"] == run.start
            and set(line["figures"]) == set(run.measures)
        )
        assert (
            line["commit"] and not line["commit"].endswith("+") and line["training_seconds"] < 900
        )


def test_the_list_says_what_is_done(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results.py", "--list"])
    assert results.main() == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == len(PLAN)
    assert sum(line.startswith("done") for line in told) == len(results.finished())


def test_scores_are_computed_once_for_both_ways_of_ranking(monkeypatch):
    "Matching alone and both stages together re-rank the same candidates: each pair is read once."
    calls = []

    def scorer(model, embeddings, direction):
        def score(query, candidate):
            calls.extend(zip([direction] * len(query), query.tolist(), candidate.tolist()))
            return (query * 7 + candidate * 3).remainder(5).float()

        return score

    import speechimg.retrieval as retrieval

    embeddings = SimpleNamespace(
        speech=torch.randn(6, 4), image=torch.randn(5, 4), image_of=torch.arange(6) % 5
    )
    monkeypatch.setattr(retrieval, "embed", lambda model, features: embeddings)
    monkeypatch.setattr(retrieval, "pair_scorer", scorer)
    found = results.recalls(
        SimpleNamespace(config=SimpleNamespace(sim_weight=1.0), temperature=torch.tensor(0.1)),
        None,
        k=3,
    )
    assert len(calls) == len(set(calls)) == 6 * 3 + 5 * 3 and set(found) == {
        "coarse",
        "sim",
        "fine",
    }
    assert json.dumps(found)
