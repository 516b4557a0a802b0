"Several processes: the step of two is the step of one, and the loss of one of them costs nothing but time."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import miniature
import pandas as pd
import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

import speechimg.train as train_room
from speechimg.core import Config, InputError
from speechimg.run.checkpoints import checkpoints, latest_checkpoint
from speechimg.run.distributed import (
    World,
    all_rows,
    all_rows_with_gradient,
    average,
    longest,
    processes,
    row_counts,
    sum_over_all,
    world,
    zero_first,
)
from speechimg.train import share

HERE = Path(__file__).resolve().parent
ALONE = {
    key: value
    for key, value in os.environ.items()
    if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}


def command(count, *arguments):
    "A command line for so many processes."
    start = (
        [sys.executable]
        if count == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(count),
        ]
    )
    return [*start, *map(str, arguments)]


def steps(folder, count, settings, mistake=""):
    "What distributed_steps.py found, as each process has it."
    out = folder / f"{count}-{mistake.replace(' ', '-')}"
    done = subprocess.run(
        command(count, HERE / "distributed_steps.py", out, json.dumps(settings), mistake),
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [safetensors.torch.load_file(f"{out}.{rank}") for rank in range(count)]


def compare(one, two):
    "Loss, gradients, weights, teacher and queue after each step."
    assert one.keys() == two.keys()
    for name in one:
        assert_close(two[name], one[name], rtol=2e-4, atol=2e-5, msg=lambda text: f"{name}: {text}")


CASES = {
    "negatives from all batches": {},
    "negatives from the queue": {"negatives": "queue", "token_slots": 5},
    "the student's own keys": {"student_steps": 2, "negatives_per_anchor": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_step_of_one(case, tmp_path):
    "Pitfalls 11, 12 and 35: parts of 4 and 3 pairs, the longest recording in one of them; equal loss, gradients, weights, teacher, queue."
    alone, (first, second) = steps(tmp_path, 1, CASES[case])[0], steps(tmp_path, 2, CASES[case])
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs between the processes"
    compare(alone, first)
    assert first["2/queue.ids"].min() >= 0 and int(first["2/queue.pointer"]) == 21 % 9


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake, case",
    [
        ("no gradient", "negatives from all batches"),
        ("own keys", "the student's own keys"),
        ("other draws", "negatives from all batches"),
        ("unequal parts", "negatives from all batches"),
    ],
)
def test_the_comparison_notices(mistake, case, tmp_path):
    alone = steps(tmp_path, 1, CASES[case])[0]
    first = steps(tmp_path, 2, CASES[case], mistake)[0]
    with pytest.raises(AssertionError):
        compare(alone, first)


@pytest.mark.slow
def test_accumulation_over_two_processes_moves_teacher_and_queue_once(tmp_path):
    "Pitfall 13: 7 pairs, two processes, two micro-batches each; the queue holds all of them once."
    first, second = steps(
        tmp_path, 2, {"accumulate": 2, "queue_size": 40}
    )  # parts of 2 + 2 and 2 + 1 pairs
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert int(first["2/queue.pointer"]) == 21 and sorted(first["0/queue.ids"][:7].tolist()) == [
        1,
        1,
        3,
        3,
        4,
        5,
        9,
    ]


def test_alone_nothing_is_sent():
    x = torch.randn(3, 2, requires_grad=True)
    assert (
        world() == (0, 1)
        and row_counts(3, "cpu") == [3]
        and longest(5, "cpu") == 5
        and sum_over_all(2, "cpu") == 2
    )
    assert (
        torch.equal(all_rows(x), x)
        and not all_rows(x).requires_grad
        and all_rows_with_gradient(x) is x
    )
    before = x.detach().clone()
    average([x])
    assert torch.equal(x, before)
    with processes() as found, zero_first():
        assert found == (0, 1)


def test_shares_are_consecutive_and_nearly_equal():
    for count in range(1, 12):
        for parts in range(1, 5):
            got = share(list(range(count)), parts)
            assert (
                sum(got, []) == list(range(count))
                and max(map(len, got)) - min(map(len, got)) <= 1
                and len(got) == min(count, parts)
            )


SETTINGS = {
    "width": 16,
    "dim": 8,
    "heads": 2,
    "fusion_depth": 1,
    "speech_depth": 1,
    "image_depth": 1,
    "batch_size": 7,
    "steps": 12,
    "queue_size": 9,
    "queue_warmup_steps": 3,
    "alpha_ramp_steps": 6,
    "warmup_steps": 2,
    "checkpoint_every": 4,
    "evaluate_every": 6,
    "learning_rate": 3e-3,
    "sim_start_step": 2,
    "augment": False,
}


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return miniature.make_corpus(folder / "mini")


def training(count, mini, out, *more):
    return command(
        count,
        "-m",
        "speechimg.train",
        "--corpus",
        mini,
        "--out",
        out,
        "--config",
        mini.parent / "config.json",
        *more,
    )


def run(count, mini, out, *more):
    done = subprocess.run(
        training(count, mini, out, *more), env=ALONE, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


@pytest.fixture(scope="module")
def alone(mini):
    "The run of one process."
    run(1, mini, mini.parent / "alone")
    return mini.parent / "alone"


def same_run(one, other, tolerance=2e-3):
    "Weights and log of two runs, up to the order of sums."
    (state, tensors), (_, others) = latest_checkpoint(one), latest_checkpoint(other)
    assert state["step"] == 12 and tensors.keys() == others.keys()
    pairs = [
        (tensor.double().flatten(), others[name].double().flatten())
        for name, tensor in tensors.items()
        if name.startswith(("model.", "teacher.", "queue."))
    ]
    apart = (
        torch.cat([one for one, _ in pairs]) - torch.cat([other for _, other in pairs])
    ).abs() > tolerance
    assert (
        apart.double().mean() < 0.01
    )  # biases whose gradient is 0 but for rounding: AdamW makes steps of that, in any direction
    log, log_other = (pd.read_csv(folder / "log.csv") for folder in (one, other))
    assert log["step"].tolist() == log_other["step"].tolist() == list(range(1, 13))
    assert_close(
        torch.tensor(log_other["loss"]), torch.tensor(log["loss"]), rtol=tolerance, atol=tolerance
    )


@pytest.mark.slow
def test_a_training_by_two_processes_is_that_of_one(mini, alone):
    "From the command line; only rank 0 writes and speaks; read again and gone on with by one process."
    out = mini.parent / "two"
    done = run(2, mini, out, "--set", "workers=1")
    same_run(alone, out)
    assert (
        done.stdout.count("trained 12 steps") == 1
        and json.loads((out / "metrics.json").read_text())["processes"] == 2
    )
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


THREADS = """
import os, sys
from pathlib import Path
from speechimg.core import Config
from speechimg.train import train

train(Config.load(sys.argv[1]), sys.argv[2], sys.argv[3], progress=False)
names = [Path(f"/proc/self/task/{task}/comm").read_text() for task in os.listdir("/proc/self/task")]
print("RANK", os.environ["RANK"], sum("gloo" in name for name in names), "\\n", end="", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to list threads")
def test_no_thread_of_the_group_outlives_the_training(mini, tmp_path):
    "One that still runs while Python ends aborts the process now and then, after all was written."
    (tmp_path / "program.py").write_text(THREADS)
    done = subprocess.run(
        command(2, tmp_path / "program.py", mini.parent / "config.json", mini, tmp_path / "out"),
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(
        line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RANK")
    ) == [["0", "0"], ["1", "0"]]


@pytest.mark.slow
def test_killed_rank_ends_the_job_and_one_process_goes_on(mini):
    "SIGKILL of rank 1 in the middle: soon over, one clear line, the checkpoint intact; one process goes on from it to the end."
    out = mini.parent / "killed"
    more = ("--set", "steps=120", "--set", "evaluate_every=120")
    job = subprocess.Popen(
        training(2, mini, out, *more),
        env=ALONE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 120
        while not checkpoints(out):
            assert time.monotonic() < until and job.poll() is None, job.communicate()[1][-2000:]
            time.sleep(0.02)
        killed = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                parent, environment = (
                    int((process / "stat").read_text().rsplit(")", 1)[1].split()[1]),
                    (process / "environ").read_bytes().split(b"\0"),
                )
            except OSError:
                continue  # gone in the meantime
            if parent == job.pid and b"RANK=1" in environment:
                os.kill(int(process.name), signal.SIGKILL)
                killed += 1
        assert killed == 1
        _, error = job.communicate(timeout=90)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0
    assert "another process has ended" in error and "--resume" in error, error[-3000:]
    assert latest_checkpoint(out)[0]["step"] >= 4 and not (out / "metrics.json").exists()
    step = latest_checkpoint(out)[0]["step"]
    run(1, mini, out, "--resume", *more)
    log = pd.read_csv(out / "log.csv")
    assert (
        latest_checkpoint(out)[0]["step"] == 120
        and log["step"].tolist() == list(range(1, 121))
        and log["loss"].notna().all()
        and step < 120
    )


@pytest.mark.slow
def test_resumed_on_another_number_of_processes_the_run_is_the_same(mini, alone):
    "One process up to step 8, then two."
    out = mini.parent / "one-two"
    shutil.copytree(alone, out)
    shutil.rmtree(out / "checkpoint-12")
    for name in ("metrics.json", "model.safetensors", "config.json"):
        (out / name).unlink()
    run(2, mini, out, "--resume")
    same_run(alone, out)


APART = """
import os, sys
from speechimg.cli import main
sys.exit(main(["train", "--corpus", sys.argv[1], "--config", sys.argv[2], "--out", sys.argv[3] + os.environ["RANK"], "--resume"]))
"""


@pytest.mark.slow
def test_folders_that_are_not_shared_are_refused(mini, alone, tmp_path):
    "Each process finds a checkpoint of another step, as on machines with disks of their own: all stop, nothing is trained."
    for rank in (0, 1):
        shutil.copytree(alone, tmp_path / f"out{rank}")
    for name in ("out0", "out1"):
        (tmp_path / name / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "out1" / "checkpoint-12")
    before = (tmp_path / "out0" / "log.csv").read_bytes()
    (tmp_path / "program.py").write_text(APART)
    done = subprocess.run(
        command(2, tmp_path / "program.py", mini, mini.parent / "config.json", tmp_path / "out"),
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode != 0
        and "of the steps 12, 8" in done.stderr
        and "Traceback (most recent call last)" not in done.stderr.split("speechimg: ")[0]
    ), done.stderr[-3000:]
    assert (tmp_path / "out0" / "log.csv").read_bytes() == before and len(
        checkpoints(tmp_path / "out1")
    ) == 1


def test_the_others_wait_for_two_days(monkeypatch):
    "Rank 0 may need longer than an hour or two for the features of a corpus; a job that is dead torchrun ends."
    seen = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, timeout: seen.update(hours=timeout.total_seconds() / 3600),
    )
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with processes():
        pass
    assert seen == {"hours": 48}


def test_a_batch_too_small_for_its_processes_is_refused(mini, monkeypatch):
    "An empty micro-batch on one process would leave the others waiting for ever."
    monkeypatch.setattr(train_room, "world", lambda: World(0, 4))
    config = Config.from_dict(SETTINGS | {"accumulate": 2})
    with pytest.raises(InputError, match="7 is too small for 4 processes with accumulate 2"):
        train_room.prepare(
            config, mini, mini.parent / "never", False, "raise", None, train_room.build_towers
        )


@pytest.mark.slow
def test_wrong_input_is_told_once(mini):
    done = subprocess.run(
        training(2, mini, mini.parent / "wrong", "--set", "widht=3"),
        env=ALONE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and "did you mean width?" in done.stderr
