"Runs that meet: two in one folder, one that goes on after something changed or failed."

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import toys
from miniature import draw, image_bytes, make_files, write_files
from test_core import complaint

import speechimg.train as training
from speechimg.core import Config, write_json
from speechimg.model import SpeechImageModel
from speechimg.retrieval import load_model
from speechimg.run import checkpoints
from speechimg.run.checkpoints import alone_in, begin_with, latest_checkpoint, open_log

FILES = make_files(6, 1, splits=("train", "val"))
CONFIG = Config(
    **toys.TINY
    | dict(towers="small", batch_size=4, steps=4, queue_size=4, warmup_steps=1)
    | dict(evaluate_every=2, checkpoint_every=2)
)


@pytest.fixture
def corpus(tmp_path, fresh_cache):
    return write_files(tmp_path / "mini", FILES)


def train(corpus, out, **options):
    return training.train(CONFIG, corpus, out, progress=False, **options)


def rows(out):
    lines = (out / "log.csv").read_text().splitlines()[1:]
    return [line.split(",") for line in lines]


# Two at once


def test_the_second_of_two_trainings_is_told_who_is_there(corpus, tmp_path):
    out, answers = tmp_path / "run", []

    def meet(row):
        if row["step"] == 2:
            answers.append(complaint(train, corpus, out))
            answers.append(complaint(train, corpus, out, resume=True))

    train(corpus, out, on_step=meet)
    for answer in answers:
        assert f"process {os.getpid()} on" in answer and str(out) in answer
    assert len(answers) == 2 and len(rows(out)) == 4  # the first was not disturbed
    assert not list(out.glob(".*"))
    assert "already holds a run" in complaint(train, corpus, out)


HOLD = """
import sys, time
from pathlib import Path
from speechimg.run.checkpoints import alone_in
with alone_in(Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_the_folder_free(tmp_path, root):
    out, environment = tmp_path / "run", os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE, env=environment, text=True
    ) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match=f"process {other.pid} on"):
            alone_in(out).__enter__()
        other.send_signal(signal.SIGKILL)
    with alone_in(out):
        assert f"process {os.getpid()}" in (out / ".holder").read_text()
    with alone_in(out):
        pass
    assert list(out.glob("*")) == []


def test_of_many_at_the_same_moment_one_comes_in(tmp_path):
    inside, said, ready = [], [], threading.Barrier(8)

    def enter():
        ready.wait()
        try:
            with alone_in(tmp_path / "run"):
                inside.append(1)
                time.sleep(0.3)
        except ValueError as error:
            said.append(str(error))

    threads = [threading.Thread(target=enter) for _ in range(8)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(inside) == 1 and len(said) == 7 and all("being written by" in one for one in said)
    left = tmp_path / "run"  # goes only if the one who came in had made it
    assert not left.exists() or not list(left.iterdir())


def test_a_folder_that_cannot_be_made_or_is_somebody_elses(corpus, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be made" in complaint(train, corpus, tmp_path / "file" / "run")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("mine")
        answer = complaint(train, corpus, tmp_path)
        assert name in answer and "overwritten" in answer
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


# Going on


def stopped(corpus, out, at=3):
    def stop(row):
        if row["step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(corpus, out, on_step=stop)


@pytest.mark.parametrize(
    "name", ["wavs/train-001-0.wav", "images/train-002.png", "wavs/val-000-0.wav"]
)
def test_changed_files_under_the_same_lists_are_seen(name, corpus, tmp_path):
    stopped(corpus, tmp_path / "run")
    other = name.replace("001", "003").replace("002", "003").replace("000", "003")
    (corpus / name).write_bytes(FILES[other])
    answer = complaint(train, corpus, tmp_path / "run", resume=True)
    assert "contents" in answer and "same config and corpus" in answer
    (corpus / name).write_bytes(FILES[name])
    train(corpus, tmp_path / "run", resume=True)
    assert len(rows(tmp_path / "run")) == 4


def test_a_run_of_an_older_version_still_goes_on(corpus, tmp_path):
    stopped(corpus, tmp_path / "run")
    path = tmp_path / "run/checkpoint-2/state.json"
    state = json.loads(path.read_text())
    del state["data"]["contents"], state["row"]
    write_json(path, state)
    train(corpus, tmp_path / "run", resume=True)
    assert len(rows(tmp_path / "run")) == 4


def test_a_validation_that_fails_loses_no_step(corpus, tmp_path, monkeypatch):
    whole = train(corpus, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(corpus, tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run")[0]["step"] == 2 and len(rows(tmp_path / "run")) == 1
    train(corpus, tmp_path / "run", resume=True)

    def numbers(out):  # all but the seconds
        return [row[:2] + row[3:] for row in rows(out)]

    assert numbers(tmp_path / "run") == numbers(whole)  # its validation was done again


SPOILT = [b"\xff\xfe\0", b"step,loss\nx,y\n", b"1,2\n", b"", b"\n" * 9, b"1" * 400 + b",,\n"]


@pytest.mark.parametrize("content", SPOILT)
def test_a_spoilt_log_is_begun_anew(content, tmp_path):
    path = tmp_path / "log.csv"
    row = {"step": 1, "epoch": 0, "loss": float("nan")}
    head = ",".join(checkpoints.COLUMNS) + "\n"
    path.write_bytes(head.encode() + checkpoints.as_line(row).encode() + content)
    with open_log(path, 5) as log:
        log.write(checkpoints.as_line({"step": 2}))
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "1", "2"]


# Models that cannot judge


@pytest.mark.parametrize("bad", [-0.07, 0.0, float("nan"), float("inf")])
def test_a_temperature_with_which_nothing_can_be_computed(bad, tmp_path):
    model = SpeechImageModel(CONFIG)
    with torch.no_grad():
        model.temperature.fill_(bad)
    model.save_pretrained(tmp_path / "model")
    for load in (load_model, SpeechImageModel.from_pretrained):
        answer = complaint(load, tmp_path / "model")
        assert "model.safetensors" in answer and "temperature" in answer


def test_weights_that_are_no_numbers(tmp_path):
    model = SpeechImageModel(CONFIG)
    with torch.no_grad():
        model.encoders.image_projection.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    for load in (
        lambda: load_model(tmp_path / "model"),
        lambda: begin_with(model, tmp_path / "model"),
    ):
        assert re.search("model.safetensors: .*image_projection", complaint(load))


HOSTILE = ['{"seconds": NaN}', '{"seconds": 1e999}', "[1]", '{"a": "\\ud800"}', "{", "[" * 99_999]
HOSTILE += ['{"validation": {"coarse": {"speech_to_image": {"1": {}, "5": [], "10": null}}}}']
HOSTILE += ['{"recordings": 3, "corpus": {}, "evaluations": {"\\u001b": []}, "steps": "{{ 7*7 }}"}']


@pytest.mark.parametrize("content", HOSTILE)
@pytest.mark.filterwarnings("ignore:.*left out of the card")
def test_a_hostile_past_breaks_no_model(content, tmp_path):
    SpeechImageModel(CONFIG).save_pretrained(tmp_path / "model")
    (tmp_path / "model/metrics.json").write_text(content)
    load_model(tmp_path / "model").save_pretrained(tmp_path / "again")
    assert "49" not in (tmp_path / "again/README.md").read_text()


def test_pictures_for_the_corpus_of_these_tests():
    assert image_bytes(draw(["red circle"])) != FILES["images/train-003.png"]
