"Reliability: each experiment of experiments/soak.py in short, and every defect that it found."

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from test_core import complaint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
import soak  # noqa: E402
import soak_files  # noqa: E402

import speechimg.cli as cli_room  # noqa: E402
from speechimg.alignment import Alignment  # noqa: E402
from speechimg.core import Config, InputError, atomic_write, read_json  # noqa: E402
from speechimg.files.cache import FeatureCache, sha256
from speechimg.files.decode import decode_audio  # noqa: E402
from speechimg.model import SpeechImageModel  # noqa: E402
from speechimg.run.checkpoints import checkpoints, latest_checkpoint, restore, save_checkpoint  # noqa: E402

# The experiments


# As experiments/soak.py does it, but its children are forked from a process that has imported all
# that they need: each of fifteen would take seven seconds for that.
FORKED_SOAK = """
import json
import sys

import pandas, soak, speechimg.retrieval, speechimg.train, torch._dynamo
from forked import Child
from speechimg import cli


def run(arguments):
    if arguments[:2] == ["-m", "speechimg.cli"]:
        sys.exit(cli.main(arguments[2:]))
    sys.argv = arguments
    sys.exit(soak.main())


def start(arguments, cache, bufsize=0, **options):
    arguments = [str(one) for one in arguments]
    options = {"stdin": soak.subprocess.DEVNULL} | options
    return Child(lambda: run(arguments), soak.environment(cache), **options)


soak.start = start
speechimg.train.draw_curves = lambda log, path: path.touch()
print(json.dumps(soak.soak(list(soak.EXPERIMENTS), quick=True)))
"""


@pytest.mark.slow
def test_a_short_soak():
    "Some kills, a full disk, a hostile file of each kind, 40 mutated files, a damaged cache."
    folders = [str(ROOT), str(ROOT / "experiments"), str(ROOT / "tests")]
    done = subprocess.run(
        [sys.executable, "-c", FORKED_SOAK],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["passed"], [
        line for one in report["experiments"].values() for line in one["failures"]
    ]
    counts = {name: one["counts"] for name, one in report["experiments"].items()}
    assert (
        counts["kills"]["kills of training"] == 2
        and counts["files"]["files"] == 40
        and counts["cache"]["files repaired"] == 11
    )
    assert report["experiments"]["disk"].get("skipped") or counts["disk"]["full disks"] == 1
    assert not [path for path in Path("/proc/mounts").read_text().split() if "/soak-" in path]
    assert soak.table(report).count("| passed |") + soak.table(report).count("| not run |") == 5


FORGETFUL = """
import sys, time
from pathlib import Path
path = Path(sys.argv[1])
for number in range(30):
    with open(path / "numbers", "a") as file: file.write(f"{number} ")
    time.sleep(0.02)
(path / "done").write_text("")
"""
CAREFUL = FORGETFUL.replace(
    "range(30)",
    "range(len((path / 'numbers').read_text().split()) if (path / 'numbers').exists() else 0, 30)",
)


@pytest.mark.parametrize("program, right", [(CAREFUL, True), (FORGETFUL, False)])
@pytest.mark.slow
def test_kills_find_a_program_that_does_things_twice(program, right, tmp_path):
    found = soak.kills(
        "toy",
        lambda folder, again: ["-c", program, folder],
        lambda folder: {"numbers": (folder / "numbers").read_text()},
        "done",
        4,
        tmp_path,
        random.Random(1),
    )
    assert found["count"] == 4 and (found["failures"] == []) == right


QUICK_THEN_IDLE = """
import sys, time
from pathlib import Path
(Path(sys.argv[1]) / "numbers").write_text("1")
(Path(sys.argv[1]) / "done").write_text("")
time.sleep(0.6)
"""


@pytest.mark.slow
def test_kills_after_the_work_do_not_count(tmp_path):
    "A program that is idle for most of its life: kills come too late, and are not counted."
    found = soak.kills(
        "idle",
        lambda folder, again: ["-c", QUICK_THEN_IDLE, folder],
        lambda folder: {"numbers": (folder / "numbers").read_text()},
        "done",
        4,
        tmp_path,
        random.Random(1),
    )
    assert (
        found["late"] > 0
        and soak.LATE not in found["moments"]
        and sum(found["moments"].values()) == found["count"]
    )
    assert found["count"] == 4 or f"only {found['count']} of 4" in found["failures"][0]


WRITES = """
import os, sys, time
from pathlib import Path
path = Path(sys.argv[1])
for number in range(12):
    time.sleep(0.1)
    half = path / f".numbers.{os.getpid()}.tmp"
    half.write_text(str(number))
    time.sleep(0.05)
    os.replace(half, path / "numbers")
(path / "done").write_text("")
"""


@pytest.mark.slow
def test_every_third_kill_waits_for_a_file_that_is_being_written(tmp_path):
    found = soak.kills(
        "toy",
        lambda folder, again: ["-c", WRITES, folder],
        lambda folder: {"numbers": (folder / "numbers").read_text()},
        "done",
        6,
        tmp_path,
        random.Random(0),
    )
    assert (
        found["failures"] == []
        and found["moments"]["while a checkpoint or a result was written"] >= 2
    )


def test_a_log_that_is_written_anew_is_noticed(tmp_path):
    "The rows that prove a resume: cut at the step, clock included, nothing where there is no log."
    assert soak.rows(tmp_path, 3) == []
    (tmp_path / "log.csv").write_text("step,seconds\n1,0.5\n2,0.7\n3,0.9\n")
    before = soak.rows(tmp_path, 2)
    (tmp_path / "log.csv").write_text("step,seconds\n1,0.5\n2,0.8\n3,0.9\n")
    assert (
        before == [b"1,0.5\n", b"2,0.7\n"]
        and soak.rows(tmp_path, 2) != before
        and soak.rows(tmp_path, 1) == before[:1]
    )


@pytest.mark.parametrize(
    "program, wrong",
    [
        ("", None),
        ("import sys; sys.exit('speechimg: no') ", None),
        ("import os; os.abort()", "signal 6"),
        ("1/0", "traceback"),
        (
            "import sys; print('speechimg: unexpected Error', file=sys.stderr); sys.exit(1)",
            "unexpected",
        ),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import sys; print('no', file=sys.stderr); sys.exit(2)", "0 lines"),
        ("import time; time.sleep(9)", "time limit"),
        ("x = b'1' * 2 * 10**8", "memory"),
    ],
)
def test_complaints(program, wrong, tmp_path, monkeypatch):
    outcome = soak.child(["-c", program], tmp_path, limit=1 if "sleep" in program else 60)
    if "10**8" in program:
        monkeypatch.setattr(soak, "MEMORY", outcome.peak - 1)
    found = soak.complaint(outcome)
    assert found is None if wrong is None else wrong in found.lower()


def test_the_report_shows_failures():
    one = {"what": "x", "counts": {"files": 3}, "seconds": 1.0, "failures": ["a"], "passed": False}
    assert "**1 failed**" in soak.table({"experiments": {"files": one}})


def test_mutations_are_the_same_every_time():
    one, other = soak_files.mutations(60, seed=3), soak_files.mutations(60, seed=3)
    assert (
        one == other
        and [len(files) for files in one] == [30, 30]
        and one != soak_files.mutations(60, seed=4)
    )
    assert {Path(name).suffix for files in one for name in files} == {
        ".wav",
        ".flac",
        ".ogg",
        ".mp3",
        ".png",
        ".jpg",
        ".gif",
        ".webp",
        ".tif",
        ".bmp",
    }


def test_the_committed_report_passed(root):
    report = json.loads((root / "data" / "soak.json").read_text())
    assert (
        report["passed"]
        and set(report["experiments"]) == set(soak.EXPERIMENTS)
        and report["seconds"] < 1800
    )
    kills = report["experiments"]["kills"]
    assert all(
        sum(moments.values()) == kills["counts"][f"kills of {what}"] and soak.LATE not in moments
        for what, moments in kills["moments"].items()
    )
    assert (
        sum(kills["moments"]["training"].values()) == 20
        and sum(
            moments.get("while a checkpoint or a result was written", 0)
            for moments in kills["moments"].values()
        )
        >= 3
    )
    disk = report["experiments"]["disk"]
    assert disk.get("skipped") or disk["counts"]["resumed from one"] >= 3
    assert (root / "data" / "soak.md").read_text() == soak.table(report)


# Checkpoints: what is found in a folder is not believed

TINY = Config(
    towers="small",
    width=16,
    dim=8,
    heads=2,
    speech_depth=1,
    image_depth=1,
    fusion_depth=1,
    queue_size=4,
)


@pytest.fixture
def run(tmp_path):
    "Two checkpoints of a tiny model, with an optimiser that has made a step."
    torch.manual_seed(0)
    alignment = Alignment(SpeechImageModel(TINY))
    optimizer = torch.optim.AdamW(alignment.model.parameters())
    sum(p.square().sum() for p in alignment.model.parameters()).backward()
    optimizer.step()
    for step in (10, 20):
        save_checkpoint(
            tmp_path / "run",
            alignment,
            optimizer,
            {"step": step, "config": {}, "data": {}, "seconds": 1.0},
        )
    return tmp_path / "run", alignment, optimizer


def check_passed_over(run, what, latest=latest_checkpoint):
    "The older checkpoint is taken with a warning; or restore refuses it: one line either way."
    out, alignment, optimizer = run
    outside = out.parent / "outside"
    soak_files.checkpoint_cases()[what](out / "checkpoint-20", random.Random(0), outside)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, tensors = latest(out)
    assert not outside.exists()
    if what == "weights of another shape, fingerprint renewed":
        return complaint(restore, tensors, alignment, optimizer)
    assert state["step"] == 10 and [
        ("checkpoint-20 is damaged" in str(one.message), "\n" in str(one.message)) for one in caught
    ] == [(True, False)]
    restore(tensors, alignment, optimizer)


@pytest.mark.parametrize("what", list(soak_files.checkpoint_cases()))
@pytest.mark.slow
def test_hostile_checkpoints(what, run):
    check_passed_over(run, what)


def believes_names(out):
    "As it was: the names of the parts come from state.json."
    for folder in reversed(checkpoints(out)):
        try:
            state, tensors = read_json(folder / "state.json"), {}
            for part, digest in state["files"].items():
                data = (folder / f"{part}.safetensors").read_bytes()
                if sha256(data) != digest:
                    raise ValueError
                tensors |= safetensors.torch.load(data)
            return state, tensors
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{folder.name} is damaged ({error})")


@pytest.mark.parametrize(
    "what", ["a part outside the folder", "the whole checkpoint a link", "no files"]
)
def test_the_check_finds_a_loader_that_believes(what, run):
    with pytest.raises(AssertionError):
        check_passed_over(run, what, believes_names)


def test_a_third_checkpoint_does_not_stay(run):
    """Killed between a checkpoint's rename and the removal of the oldest: the next save removes it.

    Newer, damaged ones are never counted.
    """
    out, alignment, optimizer = run
    for step in (5, 90):
        shutil.copytree(out / "checkpoint-10", out / f"checkpoint-{step}")
    save_checkpoint(out, alignment, optimizer, {"step": 30})
    assert [path.name for path in checkpoints(out)] == [
        "checkpoint-20",
        "checkpoint-30",
        "checkpoint-90",
    ]


def test_a_link_is_removed_and_not_what_it_points_at(run):
    out, alignment, optimizer = run
    soak_files.checkpoint_cases()["the whole checkpoint a link"](out / "checkpoint-20", None, None)
    save_checkpoint(out, alignment, optimizer, {"step": 20})
    assert (
        not (out / "checkpoint-20").is_symlink()
        and (out.parent / "linked" / "state.json").is_file()
    )


# Settings, files, memory


@pytest.mark.parametrize("what", sorted(soak_files.config_cases(soak.TINY)))
def test_hostile_configs(what, tmp_path):
    (tmp_path / "config.json").write_text(soak_files.config_cases(soak.TINY)[what])
    assert "config.json" in complaint(Config.load, tmp_path / "config.json")


def test_json_is_read_from_ordinary_files_only(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "w") as file:
        file.truncate(2**40)
    for name in ("pipe", "large"):
        assert "no ordinary file" in complaint(read_json, tmp_path / name)


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError) as caught, atomic_write(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.bin") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (MemoryError(), "not enough memory"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"
            ),
            "not enough memory",
        ),
    ],
)
def test_full_disks_and_memories_are_no_surprise(error, words, monkeypatch, capsys):
    def fail(self):
        raise error

    monkeypatch.setattr(cli_room.Check, "run", fail)
    assert cli_room.main(["check", "stamps"]) == 2
    assert (
        words in (line := capsys.readouterr().err)
        and line.count("\n") == 1
        and "unexpected" not in line
    )


@pytest.mark.parametrize("name", sorted(soak_files.extremes()[0]))
def test_a_header_allocates_nothing(name):
    "What a header promises is not believed: the sound is there, or refused."
    try:
        assert len(decode_audio(soak_files.extremes()[0][name], name)) < 10**6
    except InputError as error:
        assert name in str(error) and "\n" not in str(error)


# The cache

ARRAY = np.arange(60, dtype=np.float16).reshape(6, 10)


def check_repaired(make_cache, folder, what):
    cache, other = make_cache(folder), ARRAY[:, ::-1] + np.float16(1)
    cache.get(sha256("other"), "params", lambda: other)
    for _ in range(2):
        cache.get(sha256("key"), "params", lambda: ARRAY)
        soak.damage(random.Random(0), folder / "outside")[what](cache.path(sha256("key"), "params"))
        np.testing.assert_array_equal(cache.get(sha256("key"), "params", lambda: ARRAY), ARRAY)
    assert not (folder / "outside").exists()


@pytest.mark.parametrize("what", list(soak.damage(None, None)))
@pytest.mark.slow
def test_a_damaged_cache_is_repaired(what, tmp_path):
    check_repaired(FeatureCache, tmp_path, what)


class Unsealed(FeatureCache):
    "As it was: whatever NumPy can read is taken."

    def get(self, key, params, compute):
        try:
            with np.load(self.path(key, params)) as file:
                return file["array"]
        except Exception:
            return super().get(key, params, compute)


@pytest.mark.parametrize(
    "what", ["another shape", "another length", "another type", "no numbers", "another recording's"]
)
def test_the_check_finds_a_cache_without_a_seal(what, tmp_path):
    with pytest.raises(AssertionError):
        check_repaired(Unsealed, tmp_path, what)
