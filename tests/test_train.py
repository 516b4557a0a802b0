"The loop: killed at any moment and resumed it ends with the same bits; what it cannot do it says."

import csv
import importlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from miniature import make_corpus
from torch import nn
from toys import TINY_RUN, toy_towers

import speechimg.core as core_room
import speechimg.run.checkpoints as runs_room
import speechimg.train as train_room
from speechimg.alignment import Alignment
from speechimg.attention import Block, Encoded
from speechimg.core import Config, InputError, read_json
from speechimg.data import Batch, speech_mask
from speechimg.files.cache import sha256
from speechimg.model import SpeechImageModel
from speechimg.run.checkpoints import COLUMNS, checkpoints
from speechimg.sim import MultimodalEncoder
from speechimg.speech import peak
from speechimg.train import (
    batches,
    latest_checkpoint,
    learning_rate,
    make_optimizer,
    prepare,
    save_checkpoint,
    sibling_trials,
    some_of,
    train,
)

TINY = TINY_RUN | {"negatives": "queue", "token_slots": 5, "precision": "float32"}


def run(corpus, out, resume=False, build=toy_towers, on_step=None, **settings):
    options = {name: settings.pop(name) for name in ("limit", "on_error") if name in settings}
    return train(
        Config(**TINY | settings),
        corpus,
        out,
        resume,
        towers=build,
        on_step=on_step,
        progress=False,
        **options,
    )


def result(out):
    "Everything that a run leaves behind and that time does not change: {name: content}."
    out = Path(out)
    state, tensors = latest_checkpoint(out)
    with open(out / "log.csv") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    metrics = read_json(out / "metrics.json")
    for name in ("seconds", "command", "words"):
        metrics.pop(name)
    metrics["validation"].pop("seconds")
    return {
        "weights": sha256((out / "model.safetensors").read_bytes()),
        "step": state["step"],
        "log": rows,
        "metrics": metrics,
        **{name: sha256(tensor.contiguous().numpy().tobytes()) for name, tensor in tensors.items()},
    }


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    "A miniature corpus, its features cached, an uninterrupted run, and one that stopped at step 9."
    folder = tmp_path_factory.mktemp("workshop")
    patch = pytest.MonkeyPatch()
    patch.setenv("SPEECHIMG_CACHE", str(folder / "cache"))
    corpus = make_corpus(folder / "corpus", n_images=12)
    run(corpus, folder / "whole")
    stopped(corpus, folder / "half", 9)
    yield SimpleNamespace(
        folder=folder, corpus=corpus, whole=folder / "whole", half=folder / "half"
    )
    patch.undo()


# ---- SIGKILL

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
ENVIRONMENT = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}


def elsewhere(function, *arguments):
    "The words that call a function of this file in another process."
    code = f"import sys, test_train as t; t.torch.set_num_threads(1); t.{function}(*sys.argv[1:])"
    return [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]


def die(owner, name, call, after=False):
    "In the place of a function: what kills the process before the n-th call, or right after it."
    right, calls = getattr(owner, name), itertools.count(1)

    def deadly(*arguments, **options):
        now = next(calls) == call
        if now and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        value = right(*arguments, **options)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, name, deadly)


class HalfALine:
    "A log that is killed in the middle of its n-th line."

    def __init__(self, file, line):
        self.file, self.left = file, line

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, text):
        self.left -= 1
        self.file.write(text if self.left else text[: len(text) // 2])
        if not self.left:
            self.file.flush()
            os.kill(os.getpid(), signal.SIGKILL)


def half_a_line(line):
    right = train_room.open_log
    train_room.open_log = lambda *arguments: HalfALine(right(*arguments), line)


MOMENTS = {
    "before the first checkpoint": lambda: die(train_room, "train_step", 3),
    "between two checkpoints": lambda: die(train_room, "train_step", 7),
    "after the optimiser, before the teacher": lambda: die(Alignment, "update", 6),
    "after the teacher": lambda: die(Alignment, "update", 6, after=True),
    "in the middle of a line of the log": lambda: half_a_line(10),
    "while a checkpoint is written": lambda: die(
        os, "replace", 1 + 4 + 2
    ),  # the log, four files of the first, two of the second
    "before a checkpoint gets its name": lambda: die(os, "rename", 2),
    "before the oldest checkpoint goes": lambda: die(runs_room.shutil, "rmtree", 4),
    "after the last checkpoint, before the model": lambda: die(train_room, "draw_curves", 1),
}


def in_child(work):
    "Run a function in a forked process; True if it ended by SIGKILL, an error if by any other."
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGKILL
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return False


def drive(corpus, folder):
    "In a process of its own: kill a run at every moment, then resume it. A fork spares imports."
    for name in ("pandas", "torch._dynamo"):  # once for all children; an optimiser wants the last
        importlib.import_module(name)
    train_room.draw_curves = lambda log, path: path.touch()

    for number, bomb in enumerate(MOMENTS.values()):
        out = Path(folder) / str(number)

        def killed():
            bomb()
            run(corpus, out)

        print(number, in_child(killed), sorted(path.name for path in out.iterdir()), flush=True)
        in_child(lambda: run(corpus, out, resume=True))
    killed_from_outside(corpus, Path(folder) / "outside")


def killed_from_outside(corpus, out):
    "A kill that the process cannot foresee, as soon as its log has a few lines; then resume."
    child, log = os.fork(), out / "log.csv"
    if not child:
        run(corpus, out)
        os._exit(0)
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    in_child(lambda: run(corpus, out, resume=True))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_and_resumed_gives_the_same_bits(workshop):
    """SIGKILL at nine moments, and once from outside: all that is left equals what the undisturbed
    run left.
    """
    folder = workshop.folder / "killed"
    done = subprocess.run(
        elsewhere("drive", workshop.corpus, folder),
        text=True,
        capture_output=True,
        env=ENVIRONMENT,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line[:1].isdigit()] == ["True"] * len(MOMENTS), (
        done.stdout
    )
    expected = result(workshop.whole)
    assert result(folder / "outside") == expected
    for number, moment in enumerate(MOMENTS):
        assert result(folder / str(number)) == expected, moment
        assert not list((folder / str(number)).rglob("*.tmp")), f"leftovers of: {moment}"


# ---- resume, and each thing that it could forget


class Stop(Exception):
    pass


def stopped(corpus, out, step, **settings):
    "A run that ends by an exception after so many steps."

    def stop(row):
        if row["step"] == step:
            raise Stop

    with pytest.raises(Stop):
        run(corpus, out, on_step=stop, **settings)


def half_of(workshop, out):
    "A copy of the run that stopped at step 9, with checkpoints of the steps 4 and 8."
    shutil.copytree(workshop.half, out, dirs_exist_ok=True)
    assert [path.name for path in checkpoints(out)] == ["checkpoint-4", "checkpoint-8"]


def check_resume(workshop, out):
    half_of(workshop, out)
    run(workshop.corpus, out, resume=True)
    assert result(out) == result(workshop.whole)


@pytest.mark.slow
def test_resume(workshop, tmp_path):
    check_resume(workshop, tmp_path)


def forgets(*starts):
    "A restore that leaves out what begins like this."
    right = train_room.restore

    def restore(tensors, alignment, optimizer):
        fresh = {**alignment.state_dict()}
        kept = {name: one for name, one in tensors.items() if not name.startswith(starts)}
        right(
            {**{name: one for name, one in fresh.items() if name.startswith(starts)}, **kept},
            alignment,
            optimizer,
        )

    return restore


@pytest.mark.parametrize(
    "starts",
    [
        ("queue.",),
        ("queue.pointer",),
        ("queue.memory",),
        ("teacher.",),
        ("model.fusion",),
        ("exp_avg/",),
        ("exp_avg_sq/",),
        ("step/",),
    ],
    ids=str,
)
def test_check_resume_finds_what_is_forgotten(starts, workshop, tmp_path, monkeypatch):
    "Pitfall 10."
    monkeypatch.setattr(train_room, "restore", forgets(*starts))
    with pytest.raises((AssertionError, KeyError, RuntimeError)):
        check_resume(workshop, tmp_path)


def test_check_resume_finds_a_lost_step(workshop, tmp_path, monkeypatch):
    "Pitfall 10: the ramp, the schedule and the place in the epoch all follow from the step."
    right = train_room.latest_checkpoint
    monkeypatch.setattr(
        train_room,
        "latest_checkpoint",
        lambda out: (
            (found := right(out)) and ({**found[0], "step": found[0]["step"] - 1}, found[1])
        ),
    )
    with pytest.raises(AssertionError):
        check_resume(workshop, tmp_path)


def test_resume_is_byte_identical(workshop, tmp_path):
    "Pitfall 9: resuming keeps the queue, to the last byte."
    half_of(workshop, tmp_path)
    resumed = prepare(Config(**TINY), workshop.corpus, tmp_path, True, "raise", None, toy_towers)
    alignment, optimizer = resumed.alignment, resumed.optimizer
    state, tensors = latest_checkpoint(tmp_path)
    assert resumed.done == state["step"] == 8 and alignment.queue.pointer == 8 * 4 % 9
    for name, one in alignment.state_dict().items():
        assert torch.equal(one, tensors[name]), name
    save_checkpoint(tmp_path / "again", alignment, optimizer, {"step": 8})
    assert {k: v for k, v in latest_checkpoint(tmp_path / "again")[0]["files"].items()} == state[
        "files"
    ]


def test_resume_of_a_finished_run_and_of_nothing(workshop, tmp_path):
    run(workshop.corpus, tmp_path / "new", resume=True)
    assert result(tmp_path / "new") == result(workshop.whole)
    run(workshop.corpus, tmp_path / "new", resume=True)
    assert result(tmp_path / "new") == result(workshop.whole)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "state", "no state", "empty"])
def test_damaged_checkpoint_is_passed_over(damage, workshop, tmp_path):
    half_of(workshop, tmp_path)
    newest = checkpoints(tmp_path)[-1]
    file = newest / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-7] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-7])
    elif damage == "missing":
        file.unlink()
    elif damage == "state":
        (newest / "state.json").write_text('{"step": 8,')
    elif damage == "no state":
        (newest / "state.json").unlink()
    else:
        for path in newest.iterdir():
            path.unlink()
    with pytest.warns(UserWarning, match="checkpoint-8 is damaged"):
        run(workshop.corpus, tmp_path, resume=True)
    assert result(tmp_path) == result(workshop.whole)


def test_two_checkpoints_are_kept(workshop):
    assert [path.name for path in checkpoints(workshop.whole)] == ["checkpoint-8", "checkpoint-12"]
    assert not any(
        path.suffix in (".pt", ".pth", ".pkl", ".bin") for path in workshop.whole.rglob("*")
    )


# ---- refusals


def test_refuses_another_config_or_corpus(workshop, tmp_path):
    half_of(workshop, tmp_path)
    with pytest.raises(InputError, match="learning_rate 0.003 there, 0.001 here"):
        run(workshop.corpus, tmp_path, resume=True, learning_rate=1e-3)
    other = make_corpus(tmp_path / "other", n_images=12, seed=3)
    with pytest.raises(InputError, match="train.json"):
        run(other, tmp_path, resume=True)
    with pytest.raises(InputError, match="recordings"):
        run(workshop.corpus, tmp_path, resume=True, limit=16)


def test_refuses_a_folder_in_use_and_one_that_cannot_be(workshop, tmp_path):
    with pytest.raises(InputError, match="--resume"):
        run(workshop.corpus, workshop.whole)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        run(workshop.corpus, tmp_path / "file")
    with pytest.raises(InputError):
        run(tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_batch_size_beyond_the_corpus(workshop, tmp_path):
    with pytest.raises(InputError, match="batch_size"):
        run(workshop.corpus, tmp_path / "out", batch_size=20)


def test_stops_at_a_loss_that_is_not_finite(workshop, tmp_path, monkeypatch):
    "Names step and recordings, harms no checkpoint; the healed run ends as if nothing had been."
    right, calls = train_room.collate, itertools.count()

    def poisoned(features, indices):
        batch = right(features, indices)
        if next(calls) == 1 + 5:
            batch.speech[1, 0, 0] = torch.nan  # call 0 measured the longest recording
        return batch

    monkeypatch.setattr(train_room, "collate", poisoned)
    with pytest.raises(InputError) as error:
        run(workshop.corpus, tmp_path)
    bad = read_json(tmp_path / "bad_batch.json")
    assert bad["step"] == 5 and len(bad["uttids"]) == 4
    assert (
        str(error.value).startswith("step 5: ")
        and bad["not_finite"] == [bad["uttids"][1]]
        and "\n" not in str(error.value)
    )
    assert [name in str(error.value) for name in bad["uttids"]] == [
        False,
        True,
        False,
        False,
    ]  # the one to blame, not the whole batch
    assert (
        latest_checkpoint(tmp_path)[0]["step"] == 4
        and not (tmp_path / "model.safetensors").exists()
    )
    monkeypatch.undo()
    run(workshop.corpus, tmp_path, resume=True)
    assert result(tmp_path) == result(workshop.whole)


def test_names_the_whole_batch_when_no_recording_is_to_blame(workshop, tmp_path, monkeypatch):
    "Finite features, and a loss that is not: a diverged model."
    right = train_room.train_step

    def diverging(alignment, optimizer, batches, step, generator):
        if step == 3:
            raise FloatingPointError("the loss is inf")
        return right(alignment, optimizer, batches, step, generator)

    monkeypatch.setattr(train_room, "train_step", diverging)
    with pytest.raises(InputError, match="step 3: the loss is inf on ") as error:
        run(workshop.corpus, tmp_path)
    bad = read_json(tmp_path / "bad_batch.json")
    assert (
        bad["not_finite"] == []
        and len(bad["uttids"]) == 4
        and all(name in str(error.value) for name in bad["uttids"])
    )


def test_nothing_changes_when_a_number_is_not_finite():
    "A finite loss with an infinite gradient is caught too, before the optimiser."
    torch.manual_seed(0)
    alignment = Alignment(
        SpeechImageModel(
            Config(**TINY | {"token_slots": 0, "negatives": "batch"}), *toy_towers(Config(**TINY))
        )
    ).train()
    optimizer = make_optimizer(alignment.model, alignment.config)
    before = {name: one.clone() for name, one in alignment.state_dict().items()}
    alignment.model.encoders.speech_projection.weight.register_hook(lambda grad: grad * torch.inf)
    batch = SimpleNamespace(
        speech=torch.randn(4, 6, 8),
        speech_lengths=torch.tensor([6, 5, 4, 3]),
        image=torch.rand(4, 16, 3),
        ids=torch.arange(4),
        uttids=list("abcd"),
    )
    with pytest.raises(FloatingPointError):
        train_room.train_step(alignment, optimizer, batch, 5, torch.Generator())
    assert all(
        torch.equal(one, before[name])
        for name, one in alignment.state_dict().items()
        if name != "model.temperature"
    )


def test_skips_what_cannot_be_read(tmp_path, fresh_cache, capsys):
    corpus = make_corpus(tmp_path / "corpus", n_images=12)
    (corpus / "wavs" / "train-003-0.wav").write_bytes(b"no sound")
    (corpus / "images" / "train-005.png").write_bytes(b"")
    with pytest.raises(InputError, match="train-005.png|train-003-0.wav"):
        run(corpus, tmp_path / "strict")
    out = run(corpus, tmp_path / "out", on_error="skip")
    skipped = (out / "skipped.txt").read_text().splitlines()
    assert (
        len(skipped) == 2
        and "train-003-0.wav" in "".join(skipped)
        and "train-005.png" in "".join(skipped)
    )
    assert (
        read_json(out / "metrics.json")["skipped"] == 2 and "left out 2" in capsys.readouterr().out
    )
    assert read_json(out / "metrics.json")["recordings"]["train"] == 24 - 1 - 2


# ---- the parts


def test_learning_rate_by_hand():
    config = Config(learning_rate=1.0, warmup_steps=4, final_learning_rate=0.0, steps=12)
    expected = [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
        0.9619398,
        0.8535534,
        0.6913417,
        0.5,
        0.3086583,
        0.1464466,
        0.0380602,
    ]
    torch.testing.assert_close(
        [learning_rate(config, step) for step in range(12)], expected, rtol=1e-6, atol=1e-6
    )
    assert learning_rate(Config(warmup_steps=0, steps=1), 0) == 5e-4


def check_groups(make=make_optimizer, towers="small"):
    "Every trained parameter once; no decay for anything without a matrix; nothing of the teacher."
    config = Config(
        towers=towers, width=16, dim=8, heads=2, speech_depth=1, image_depth=1, fusion_depth=1
    )
    alignment = Alignment(SpeechImageModel(config))
    names = {id(p): name for name, p in alignment.named_parameters()}
    decaying, other = (
        [names[id(p)] for p in group["params"]]
        for group in make(alignment.model, config).param_groups
    )
    assert sorted(decaying + other) == sorted(
        name for name, _ in alignment.model.named_parameters(prefix="model")
    )
    assert (
        "model.temperature" in other
        and any(name.endswith("cls") for name in other)
        and any("rows" in name for name in other)
    )
    assert all(
        name.endswith(".weight") and dict(alignment.named_parameters())[name].ndim > 1
        for name in decaying
    )
    assert not any(
        part in name
        for name in decaying
        for part in ("norm", "bias", "cls", "rows", "columns", "temperature", "teacher")
    )
    assert {"model.fusion.verdict.weight", "model.encoders.speech_projection.weight"} <= set(
        decaying
    )


@pytest.mark.parametrize("towers", ["small", "light"])
def test_parameter_groups(towers):
    check_groups(towers=towers)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda model, config: torch.optim.AdamW(
            [{"params": list(model.parameters())}, {"params": [nn.Parameter(torch.zeros(1))]}]
        ),
        lambda model, config: torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim > 1]},
                {"params": [p for p in model.parameters() if p.ndim < 2]},
            ]
        ),
        lambda model, config: torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim > 1]},
                {"params": [model.temperature]},
            ]
        ),
    ],
    ids=["everything decays", "position codes decay", "forgets biases"],
)
def test_check_groups_finds(wrong):
    "Pitfall 36."
    with pytest.raises((AssertionError, KeyError)):
        check_groups(wrong)


class Toy:
    "What batches() needs of Features: pictures 0-3 hold one object, the others are siblings."

    def __init__(self, image_of, lengths):
        self.ids = self.image_of = image_of
        self.groups, self.levels, self.lengths = (
            torch.where(image_of < 4, -1, image_of // 2),
            1 + (image_of >= 4).long(),
            lengths,
        )

    def __len__(self):
        return len(self.ids)


def toy_features():
    return Toy(torch.arange(40) % 20, np.random.default_rng(0).integers(3, 9, 40))


def test_batches_go_on_where_they_stopped():
    config = Config(batch_size=6, steps=30, seed=3)
    every = list(batches(config, toy_features()))
    assert [step for step, _, _ in every] == list(range(30))
    for start in (0, 1, 7, 29, 30):
        assert list(batches(config, toy_features(), start)) == every[start:]
    assert list(batches(Config(batch_size=6, steps=30, seed=4), toy_features())) != every
    for _, epoch in itertools.groupby(every, key=lambda one: one[1]):
        drawn = [index for _, _, indices in epoch for index in indices]
        assert len(drawn) == len(set(drawn)) <= 40


def test_singles_first():
    config = Config(batch_size=4, steps=12, singles_first=5)
    levels = [
        toy_features().levels[indices].tolist() for _, _, indices in batches(config, toy_features())
    ]
    assert (
        levels[:5] == [[1] * 4] * 5
        and any(2 in level for level in levels[5:])
        and len(levels) == 12
    )
    assert list(batches(config, toy_features(), 7)) == list(batches(config, toy_features()))[7:]


def test_the_share_of_siblings_follows_its_schedule(monkeypatch):
    import speechimg.train as module

    asked, real = [], module.epoch_batches

    def note(features, size, generator, most, siblings):
        asked.append(siblings)
        return real(features, size, generator, most, siblings)

    monkeypatch.setattr(module, "epoch_batches", note)
    config = Config(
        batch_size=8,
        steps=25,
        siblings=1.0,
        siblings_start_step=5,
        siblings_late=0.25,
        siblings_late_step=15,
    )
    starts = {
        epoch: step for step, epoch, _ in reversed(list(batches(config, toy_features())))
    }  # epoch -> its first step
    wanted = [
        0.0 if start < 5 else 1.0 if start < 15 else 0.25 for _, start in sorted(starts.items())
    ]
    assert asked == wanted and set(wanted) == {0.0, 1.0, 0.25}
    asked.clear()
    list(batches(Config(batch_size=8, steps=25, siblings=0.5), toy_features()))
    assert set(asked) == {0.5}  # 0 = never


def test_limit_keeps_siblings_together(workshop):
    from speechimg.corpora import load_corpus

    corpus = load_corpus(workshop.corpus, "train")
    part = some_of(corpus, 12, seed=1)
    assert (
        len(part.captions) == 12
        and some_of(corpus, None, 0) is corpus
        and some_of(corpus, 99, 0) is corpus
    )
    assert [caption.uttid for caption in some_of(corpus, 12, seed=1).captions] == [
        caption.uttid for caption in part.captions
    ]
    groups = [part.pictures[caption.image].group for caption in part.captions]
    split = [group for group in set(groups) - {-1} if groups.count(group) not in (0, 4)]
    assert len(split) <= 1  # at most the last family is cut


def test_sibling_trials():
    features = toy_features()
    trials = sibling_trials(features)
    assert len(trials) == 32
    for caption, right, other in trials.tolist():
        assert (
            features.image_of[caption] == right != other and right // 2 == other // 2 and right >= 4
        )
    assert len(sibling_trials(features, 10)) <= 10
    features.groups = torch.full((40,), -1)
    assert sibling_trials(features).shape == (0, 3)


def test_log_and_curves(workshop):
    with open(workshop.whole / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS and [int(row["step"]) for row in rows] == list(range(1, 13))
    assert all((row["coarse_r1"] != "") == (row["step"] in ("6", "12")) for row in rows)
    assert (workshop.whole / "curves.png").read_bytes()[:4] == b"\x89PNG"
    metrics = json.loads((workshop.whole / "metrics.json").read_text())
    assert (
        metrics["config"] == Config(**TINY).to_dict()
        and metrics["seed"] == 0
        and metrics["steps"] == 12
        and metrics["seconds"] > 0
    )
    assert metrics["validation"]["coarse"]["speech_to_image"].keys() == {
        "1",
        "5",
        "10",
    } and metrics["command"].startswith("speechimg train")
    assert (
        safetensors.torch.load_file(workshop.whole / "model.safetensors").keys()
        == SpeechImageModel(Config(**TINY), *toy_towers(Config(**TINY))).state_dict().keys()
    )


def test_without_validation_and_with_a_long_queue(tmp_path, fresh_cache, curves):
    corpus = make_corpus(tmp_path / "corpus", n_images=12, splits=("train",))
    with pytest.warns(UserWarning, match="queue_size 64"):
        out = run(corpus, tmp_path / "out", queue_size=64, steps=3)
    assert read_json(out / "metrics.json")["validation"] is None and (out / "curves.png").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bfloat16", "negatives_per_anchor": 2},
        {"augment": False, "siblings": 1.0, "negatives": "batch"},
    ],
    ids=str,
)
@pytest.mark.slow
def test_small_towers_train(settings, workshop, tmp_path):
    "The real small towers take a few steps, batch norm included, and resume to the same bits."
    small = {"towers": "small", "steps": 4, "checkpoint_every": 2, "evaluate_every": 4} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build = train_room.build_towers
        run(workshop.corpus, tmp_path / "whole", build=build, **small)

        def stop(row):
            if row["step"] == 3:
                raise Stop

        with pytest.raises(Stop):
            run(workshop.corpus, tmp_path / "part", build=build, on_step=stop, **small)
        run(workshop.corpus, tmp_path / "part", resume=True, build=build, **small)
    assert result(tmp_path / "whole") == result(tmp_path / "part")


# ---- What helps when models are large


def same_but_for(settings, one, other):
    "Two results that differ in these settings and in nothing else."
    one, other = (
        dict(each, metrics={**each["metrics"], "config": {**each["metrics"]["config"], **settings}})
        for each in (one, other)
    )
    assert one == other


def test_workers_change_nothing(workshop, tmp_path):
    "Batches that other processes prepare are the same batches, to the last bit."
    run(workshop.corpus, tmp_path / "out", workers=2)
    same_but_for({"workers": 0}, result(workshop.whole), result(tmp_path / "out"))


def test_features_on_the_disk_change_nothing(workshop, tmp_path, monkeypatch):
    "No array is kept in memory, neither by workers nor for validation: the same, to the last bit."
    monkeypatch.setenv("SPEECHIMG_MEMORY", "0")
    run(workshop.corpus, tmp_path / "out", workers=2)
    same_but_for({"workers": 0}, result(workshop.whole), result(tmp_path / "out"))


def test_tensorboard_shows_the_log(workshop, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(workshop.corpus, tmp_path / "out", tensorboard=True)
    same_but_for({"tensorboard": False}, result(workshop.whole), result(out))
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    log = pd.read_csv(out / "log.csv")
    for name in ("sic", "sim", "learning_rate"):
        scalars = events.Scalars(name)
        assert [one.step for one in scalars] == log["step"].tolist()
        np.testing.assert_allclose([one.value for one in scalars], log[name], rtol=1e-5, atol=1e-9)
    assert [one.step for one in events.Scalars("fine_r10")] == [6, 12]


def test_tensorboard_that_is_not_there(workshop, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        run(workshop.corpus, tmp_path / "out", tensorboard=True)


def test_accumulation_is_the_mean_over_micro_batches():
    "Without queue, matching and alpha: the mean of two gradients; teacher and queue move once."
    config = Config(
        **TINY
        | {
            "queue_size": 9,
            "token_slots": 0,
            "negatives": "batch",
            "sim_weight": 0.0,
            "alpha": 0.0,
            "queue_warmup_steps": 100,
            "clip_norm": 0.0,
        }
    )
    generator = torch.Generator().manual_seed(0)
    batches_ = [
        Batch(
            torch.randn(n, 5, 8, generator=generator),
            torch.full((n,), 5),
            torch.rand(n, 16, 3, generator=generator),
            torch.arange(n) + 10 * n,
            [str(i) for i in range(n)],
        )
        for n in (3, 2)
    ]

    def gradients(parts):
        torch.manual_seed(0)
        alignment = Alignment(SpeechImageModel(config, *toy_towers(config))).train()
        for module in alignment.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        train_room.train_step(
            alignment,
            make_optimizer(alignment.model, config),
            parts,
            0,
            torch.Generator().manual_seed(0),
        )
        return {
            name: p.grad.clone()
            for name, p in alignment.model.named_parameters()
            if p.grad is not None
        }, alignment

    both, alignment = gradients(batches_)
    first, second = gradients(batches_[:1])[0], gradients(batches_[1:])[0]
    for name in both:
        torch.testing.assert_close(
            both[name], 0.6 * first[name] + 0.4 * second[name], rtol=1e-4, atol=1e-6
        )
    assert int(alignment.queue.pointer) == 5
    slow, fast = next(alignment.teacher.parameters()), next(alignment.model.encoders.parameters())
    assert not torch.equal(slow, fast)


@pytest.mark.slow
def test_compiled_it_learns_the_same(workshop, tmp_path, monkeypatch):
    """All is traced, and the fusion's way back, too; towers are made of the same blocks.

    Of machine code the next test knows.
    """

    def compile_part(part, **options):
        compiled.append(part)
        backend = "aot_eager" if isinstance(part, MultimodalEncoder) else "eager"
        part._compiled_call_impl = torch.compile(part._call_impl, backend=backend, **options)

    compiled, short = [], {"steps": 3, "evaluate_every": 3, "checkpoint_every": 3}
    monkeypatch.setattr(nn.Module, "compile", compile_part)
    out = run(workshop.corpus, tmp_path / "out", compile=True, **short)
    assert len(compiled) == 3
    plain = run(workshop.corpus, tmp_path / "plain", **short)
    np.testing.assert_allclose(
        pd.read_csv(out / "log.csv")["loss"], pd.read_csv(plain / "log.csv")["loss"], rtol=1e-3
    )
    assert not any("_orig_mod" in name for name in latest_checkpoint(out)[1])


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
def test_machine_code_judges_as_the_fusion_does():
    "Values and gradients, with the options of a training; towers consist of the same blocks."
    import torch._inductor.config

    torch.manual_seed(0)
    fusion = MultimodalEncoder(4, 1, 2)
    speech, image = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    mask = torch.arange(3) < torch.tensor([3, 2])[:, None]
    pairs, results = (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])), []
    with torch._inductor.config.patch(compile_threads=1):  # no processes for that
        for fast in (False, True):
            if fast:
                fusion.compile(dynamic=True)
            out = fusion(speech, mask, image, pairs)
            wanted = [speech, *fusion.parameters()]
            results.append([out, *torch.autograd.grad(out.square().sum(), wanted)])
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Loudest(nn.Module):
    "A peak between two layers: all that the fault below needs, and quicker than a tower."

    def __init__(self):
        super().__init__()
        self.before, self.norm, self.after = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, tokens):
        return self.after(peak(self.norm(self.before(tokens)), None))


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU"
)
def test_compiled_in_half_precision_gradients_stay_finite():
    "With amax for the peak, no token was as large as the peak, whose gradient became 0 / 0."
    torch.manual_seed(0)
    loudest = Loudest()
    loudest.compile(dynamic=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = loudest(torch.randn(8, 36, 16))
    found.float().square().mean().backward()
    assert all(weight.grad.isfinite().all() for weight in loudest.parameters())


# ---- Beginning with a trained model, and a corpus made by a function


def test_a_second_stage_begins_with_the_weights_and_with_nothing_else(workshop, tmp_path):
    "Pitfall 9: the queue of another stage is stale, so it is left behind, whatever its size."
    config = Config(**TINY | {"queue_size": 5})
    second = prepare(
        config,
        workshop.corpus,
        tmp_path / "second",
        False,
        "raise",
        None,
        toy_towers,
        workshop.whole,
    )
    trained = safetensors.torch.load_file(workshop.whole / "model.safetensors")
    alignment = second.alignment
    for name, tensor in alignment.model.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    for student, teacher in zip(
        alignment.model.encoders.parameters(), alignment.teacher.parameters()
    ):
        assert torch.equal(student, teacher)
    assert (
        alignment.queue.ids.tolist() == [-1] * 5
        and int(alignment.queue.pointer) == 0
        and not second.optimizer.state
        and second.done == 0
    )
    assert second.data["start"] == sha256((workshop.whole / "model.safetensors").read_bytes())


def test_a_second_stage_is_resumed_only_with_the_same_start(workshop, tmp_path):
    def stage(out, resume=False, start=workshop.whole, on_step=None):
        return train(
            Config(**TINY),
            workshop.corpus,
            out,
            resume,
            towers=toy_towers,
            start=start,
            on_step=on_step,
            progress=False,
        )

    def stop(row):
        if row["step"] == 9:
            raise KeyboardInterrupt

    stage(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "again", on_step=stop)
    for other in (None, tmp_path / "whole"):
        with pytest.raises(InputError, match="holds a run with start"):
            stage(tmp_path / "again", True, other)
    stage(tmp_path / "again", True)
    assert (
        result(tmp_path / "again")["weights"]
        == result(tmp_path / "whole")["weights"]
        != result(workshop.whole)["weights"]
    )


@pytest.mark.parametrize("start", ["nobody", "wider"])
def test_a_start_that_does_not_fit(workshop, tmp_path, start):
    if start == "wider":
        config = Config(**TINY | {"width": 32})
        SpeechImageModel(config, *toy_towers(config)).save_pretrained(tmp_path / "wider")
        start = tmp_path / "wider"
    with pytest.raises(
        InputError, match="does not hold the weights of this model|holds no model.safetensors"
    ):
        train(
            Config(**TINY),
            workshop.corpus,
            tmp_path / "out",
            towers=toy_towers,
            start=start,
            progress=False,
        )


def test_a_corpus_made_by_a_function(workshop, tmp_path):
    "What it returns is trained on, also without a validation; it has a fingerprint of its own."
    from speechimg.corpora import load_corpus

    def half(split):
        corpus = load_corpus(workshop.corpus, split)
        return corpus.subset(range(0, len(corpus.captions), 2)) if split == "train" else None

    out = run(half, tmp_path / "half")
    metrics, rows = (
        read_json(out / "metrics.json"),
        len(load_corpus(workshop.corpus, "train").captions),
    )
    assert (
        metrics["recordings"] == {"train": -(-rows // 2)}
        and metrics["validation"] is None
        and "--corpus half" in metrics["command"]
    )
    with pytest.raises(InputError, match="holds a run with"):
        run(lambda split: load_corpus(workshop.corpus, split), tmp_path / "half", resume=True)


# ---- The precision that a run began in


def processor(monkeypatch, native):
    "A processor that multiplies bfloat16 itself, or one that does not."
    monkeypatch.setattr(core_room, "cpu_multiplies_bfloat16", lambda: native)


SHORT = {"precision": "auto", "steps": 6, "checkpoint_every": 2, "evaluate_every": 6}


def test_a_run_goes_on_in_its_own_precision(workshop, tmp_path, monkeypatch):
    "Begun where bfloat16 is native, resumed where it is not: the same bits, and one line says so."
    processor(monkeypatch, native=True)
    run(workshop.corpus, tmp_path / "whole", **SHORT)
    stopped(workshop.corpus, tmp_path / "again", 3, **SHORT)
    shutil.copytree(tmp_path / "again", tmp_path / "old")
    processor(monkeypatch, native=False)
    with pytest.warns(UserWarning, match="goes on in bfloat16") as caught:
        run(workshop.corpus, tmp_path / "again", resume=True, **SHORT)
    lines = [str(one.message) for one in caught if "goes on in" in str(one.message)]
    assert len(lines) == 1 and "\n" not in lines[0] and "would choose float32" in lines[0]
    assert result(tmp_path / "again") == result(tmp_path / "whole")
    metrics = read_json(tmp_path / "again" / "metrics.json")
    assert (metrics["precision"], metrics["config"]["precision"]) == ("bfloat16", "auto")
    assert Config.load(tmp_path / "again" / "config.json").precision == "auto"

    # whoever asks for the run's own gets it without a word, and for the other is refused
    old = tmp_path / "old"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "goes on in")
        own = Config(**TINY | SHORT | {"precision": "bfloat16"})
        assert prepare(own, workshop.corpus, old, True, "raise", None, toy_towers).done == 2
    with pytest.raises(InputError, match="precision 'auto' there, 'float32' here"):
        run(workshop.corpus, old, resume=True, **SHORT | {"precision": "float32"})
    # a checkpoint of an older version says it in its config; the recipe says auto by now
    state = old / "checkpoint-2" / "state.json"
    older = json.loads(state.read_text())
    assert older.pop("precision") == "bfloat16"
    older["config"]["precision"] = "bfloat16"
    state.write_text(json.dumps(older))
    with pytest.warns(UserWarning, match="goes on in bfloat16"):
        run(workshop.corpus, old, resume=True, **SHORT)
    assert result(old) == result(tmp_path / "whole")


def test_auto_is_float32_where_bfloat16_is_not_native(workshop, tmp_path, monkeypatch):
    processor(monkeypatch, native=False)
    out = run(workshop.corpus, tmp_path / "auto", steps=12, precision="auto")
    same_but_for({"precision": "float32"}, result(workshop.whole), result(out))
    assert read_json(out / "metrics.json")["precision"] == "float32"


def test_several_processes_agree_on_a_precision(monkeypatch):
    "bfloat16 only if every one of them would take it."
    processor(monkeypatch, native=True)
    assert train_room.shared_precision(Config()) == "bfloat16"
    monkeypatch.setattr(train_room, "row_counts", lambda mine, device: [mine, 0])
    assert train_room.shared_precision(Config()) == "float32"


# ---- What a run was told


def test_the_command_can_be_pasted_and_the_corpus_is_data(workshop, tmp_path):
    corpus = shutil.copytree(workshop.corpus, tmp_path / "my flickr8k; rm -r")
    out = run(corpus, tmp_path / "a run", limit=16, steps=1, evaluate_every=1)
    metrics = read_json(out / "metrics.json")
    assert metrics["corpus"] == str(corpus)
    assert shlex.split(metrics["command"]) == metrics["words"]
    assert metrics["words"] == [
        *("speechimg", "train", "--corpus", str(corpus), "--out", "a run"),
        *("--config", "config.json", "--limit", "16"),
    ]
