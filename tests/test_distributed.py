"Several processes: the step of two is the step of one, and the loss of one costs only time."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import distributed_steps
import miniature
import pandas as pd
import pytest
import safetensors.torch
import torch
from torch.testing import assert_close
from toys import TINY_RUN

import speechimg.train as train_room
from speechimg import cli
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
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    start = [sys.executable] if count == 1 else [*launcher, str(count)]
    return [*start, *map(str, arguments)]


def say(line):
    "Run it and hand back what it said; the time is for a machine that has much else to do."
    return subprocess.run(line, env=ALONE, capture_output=True, text=True, timeout=600)


def launch(count, *arguments):
    return say(command(count, *arguments))


FORKED_STEPS = """
import sys
import distributed_steps
import torch._dynamo
from forked import ranks

sys.exit(ranks(2, lambda: distributed_steps.main(*sys.argv[1:])))
"""
FORKED_TRAINING = """
import sys
import pandas
import speechimg.train
import torch._dynamo
from forked import ranks
from speechimg.cli import main

speechimg.train.draw_curves = lambda log, path: path.touch()
sys.exit(ranks(2, lambda: sys.exit(main(["train", *sys.argv[1:]]))))
"""


def forked(program, *arguments):
    "As launch(2, ...), but both processes are forked from one that imported everything."
    done = say([sys.executable, "-c", program, *map(str, arguments)])
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


CASES = {
    "negatives from all batches": {},
    "negatives from the queue": {"negatives": "queue", "token_slots": 5},
    "the student's own keys": {"student_steps": 2, "negatives_per_anchor": 2},
}
NOTICED = [
    ("no gradient", "negatives from all batches"),
    ("own keys", "the student's own keys"),
    ("other draws", "negatives from all batches"),
    ("other rows", "negatives from all batches"),
    ("unequal parts", "negatives from all batches"),
]
ACCUMULATED = {"accumulate": 2, "queue_size": 40}  # parts of 2 + 2 and 2 + 1 pairs


def steps_of(folder, count, cases):
    "What distributed_steps.py found: for each process {case: {name: tensor}}."
    out = folder / f"steps-{count}"
    if count == 1:
        distributed_steps.main(out, json.dumps(cases))
    else:
        forked(FORKED_STEPS, out, json.dumps(cases))
    results = []
    for rank in range(count):
        found = {case: {} for case in cases}
        for name, tensor in safetensors.torch.load_file(f"{out}.{rank}").items():
            case, _, rest = name.partition(": ")
            found[case][rest] = tensor
        results.append(found)
    return results


@pytest.fixture(scope="module")
def by_one(tmp_path_factory):
    cases = {case: [settings, ""] for case, settings in CASES.items()}
    return steps_of(tmp_path_factory.mktemp("one"), 1, cases)[0]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    "All that two processes do, right and wrong, in one launch."
    cases = {case: [settings, ""] for case, settings in CASES.items()}
    cases |= {mistake: [CASES[case], mistake] for mistake, case in NOTICED}
    cases["accumulated"] = [ACCUMULATED, ""]
    return steps_of(tmp_path_factory.mktemp("two"), 2, cases)


def ulp(x):
    "Distance from x to the next number of its dtype."
    info = torch.finfo(x.dtype)
    exponent = torch.frexp(x.double().abs().clamp_min(info.tiny)).exponent - 1
    return info.eps * torch.exp2(exponent.double())


def compare(one, two):
    """Loss, gradients, weights, teacher and queue after each step.

    Sums in another order differ a little; rounded to the dtype they may fall on either side.
    """
    assert one.keys() == two.keys()
    for name, right in one.items():
        if not right.is_floating_point():
            assert torch.equal(two[name], right), name
            continue
        allowed = 2e-5 + 2e-4 * right.double().abs() + ulp(right)
        excess = (two[name].double() - right.double()).abs() - allowed
        assert excess.max() <= 0, f"{name}: off by {excess.max():.2g} more than allowed"


def test_ulp_is_that_of_the_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.tensor([0.142, 1.0, 3.9, 2000.0], dtype=dtype)
        bits = x.view(torch.int16 if x.element_size() == 2 else torch.int32)
        assert torch.equal(ulp(x), (bits + 1).view(dtype).double() - x.double())
    assert ulp(torch.zeros(1, dtype=torch.float16)) == 2.0**-24


def test_half_precision_may_differ_by_its_last_bit_and_no_more():
    x = {"queue": torch.tensor([0.142, 1.5]).half()}
    bits = x["queue"].view(torch.int16)
    compare(x, {"queue": (bits + 1).view(torch.float16)})
    with pytest.raises(AssertionError, match="queue"):
        compare(x, {"queue": (bits + 2).view(torch.float16)})


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_step_of_one(case, by_one, by_two):
    """Pitfalls 11, 12 and 35: equal loss, gradients, weights, teacher, queue.

    Parts of 4 and 3 pairs, the longest recording in one of them.
    """
    first, second = (found[case] for found in by_two)
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs between the processes"
    compare(by_one[case], first)
    assert first["2/queue.ids"].min() >= 0 and int(first["2/queue.pointer"]) == 21 % 9


@pytest.mark.slow
@pytest.mark.parametrize("mistake, case", NOTICED)
def test_the_comparison_notices(mistake, case, by_one, by_two):
    with pytest.raises(AssertionError):
        compare(by_one[case], by_two[0][mistake])


@pytest.mark.slow
def test_accumulation_over_two_processes_moves_teacher_and_queue_once(by_two):
    "Pitfall 13: 7 pairs, two processes, two micro-batches each; the queue holds all of them once."
    first, second = (found["accumulated"] for found in by_two)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert int(first["2/queue.pointer"]) == 21
    assert sorted(first["0/queue.ids"][:7].tolist()) == [1, 1, 3, 3, 4, 5, 9]


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


# in bfloat16, another order of sums is another sign of many a small gradient
SETTINGS = TINY_RUN | {"batch_size": 7, "augment": False, "precision": "float32"}


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return miniature.make_corpus(folder / "mini")


def options(mini, out, *more):
    return ["--corpus", mini, "--out", out, "--config", mini.parent / "config.json", *more]


def run(count, mini, out, *more):
    "A training from the command line: alone in this process, by two in forked ones."
    given = [str(one) for one in options(mini, out, *more)]
    if count == 1:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            patch.setattr(warnings, "formatwarning", warnings.formatwarning)  # main changes it
            assert cli.main(["train", *given]) == 0
    else:
        forked(FORKED_TRAINING, *given)


@pytest.fixture(scope="module")
def alone(mini):
    "The run of one process."
    run(1, mini, mini.parent / "alone")
    return mini.parent / "alone"


def same_run(one, other, tolerance=2e-3):
    "Weights and log of two runs, up to the order of sums."
    (state, tensors), (_, others) = latest_checkpoint(one), latest_checkpoint(other)
    assert state["step"] == 12 and tensors.keys() == others.keys()
    names = [name for name in tensors if name.startswith(("model.", "teacher.", "queue."))]
    differences = [(tensors[name].double() - others[name].double()).flatten() for name in names]
    apart = torch.cat(differences).abs() > tolerance
    # Of a gradient that is 0 but for rounding (biases) AdamW makes a step, in any direction.
    assert apart.double().mean() < 0.01
    log, log_other = (pd.read_csv(folder / "log.csv") for folder in (one, other))
    assert log["step"].tolist() == log_other["step"].tolist() == list(range(1, 13))
    losses = torch.tensor(log_other["loss"]), torch.tensor(log["loss"])
    assert_close(*losses, rtol=tolerance, atol=tolerance)


THREADS = """
import os, sys
from pathlib import Path
from speechimg.cli import main

code = main(["train", *sys.argv[1:]])
tasks = Path("/proc/self/task")
names = [(task / "comm").read_text() for task in tasks.iterdir()] if tasks.exists() else []
said = f"RANK {os.environ['RANK']} {sum('gloo' in name for name in names)}\\n"
print(said, end="", file=sys.stderr, flush=True)
sys.exit(code)
"""


@pytest.mark.slow
def test_a_training_by_two_processes_is_that_of_one(mini, alone, tmp_path):
    """From the command line; only rank 0 writes and speaks; one process can read it and go on.

    And no thread of the group outlives the training (Linux lists them): one that still runs while
    Python ends aborts the process now and then, after all was written.
    """
    (tmp_path / "program.py").write_text(THREADS)
    out = mini.parent / "two"
    done = launch(2, tmp_path / "program.py", *options(mini, out, "--set", "workers=1"))
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    same_run(alone, out)
    assert done.stdout.count("trained 12 steps") == 1
    assert json.loads((out / "metrics.json").read_text())["processes"] == 2
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    said = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith("RANK")]
    assert sorted(said) == [["0", "0"], ["1", "0"]]


def kill_rank_1(job):  # the launcher, a Popen
    "SIGKILL the process of rank 1 -> how many there were."
    killed = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # gone in the meantime
        if parent == job.pid and b"RANK=1" in environment:
            os.kill(int(process.name), signal.SIGKILL)
            killed += 1
    return killed


@pytest.mark.slow
def test_killed_rank_ends_the_job_and_one_process_goes_on(mini):
    """SIGKILL of rank 1 in the middle: soon over, one clear line, the checkpoint intact.

    One process goes on from it to the end.
    """
    out = mini.parent / "killed"
    more = ("--set", "steps=120", "--set", "evaluate_every=120")
    line = command(2, "-m", "speechimg.train", *options(mini, out, *more))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(line, env=ALONE, start_new_session=True, **pipes)
    try:
        until = time.monotonic() + 600
        while not checkpoints(out):
            assert time.monotonic() < until and job.poll() is None, job.communicate()[1][-2000:]
            time.sleep(0.02)
        assert kill_rank_1(job) == 1
        _, error = job.communicate(timeout=600)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0
    assert "another process has ended" in error and "--resume" in error, error[-3000:]
    step = latest_checkpoint(out)[0]["step"]
    assert 4 <= step < 120 and not (out / "metrics.json").exists()
    run(1, mini, out, "--resume", *more)
    log = pd.read_csv(out / "log.csv")
    assert latest_checkpoint(out)[0]["step"] == 120 and log["loss"].notna().all()
    assert log["step"].tolist() == list(range(1, 121))


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


REFUSED = """
import os, sys
import pandas
import speechimg.train
import torch._dynamo
from forked import ranks
from speechimg.cli import main

def attempt():
    corpus, config, out = sys.argv[1:]
    out += os.environ["RANK"]
    options = ["train", "--corpus", corpus, "--config", config, "--out", out]
    first = main([*options, "--set", "widht=3"])
    print(f"CODE {first}\\n", end="", file=sys.stderr, flush=True)
    sys.exit(main([*options, "--resume"]))

sys.exit(ranks(2, attempt))
"""


@pytest.mark.slow
def test_wrong_input_and_folders_that_are_not_shared_are_refused(mini, alone, tmp_path):
    """A setting that does not exist is told by every process, in a line of its own.

    And each process finds a checkpoint of another step, as on machines with disks of their own:
    all stop, nothing is trained.
    """
    for rank in (0, 1):
        shutil.copytree(alone, tmp_path / f"out{rank}")
        (tmp_path / f"out{rank}" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "out1" / "checkpoint-12")
    before = (tmp_path / "out0" / "log.csv").read_bytes()
    given = mini, mini.parent / "config.json", tmp_path / "out"
    done = say([sys.executable, "-c", REFUSED, *map(str, given)])
    assert done.returncode != 0 and done.stderr.count("CODE 2") == 2
    assert done.stderr.count("did you mean width?") == 2, done.stderr[-3000:]
    assert "of the steps 12, 8" in done.stderr, done.stderr[-3000:]
    assert "Traceback (most recent call last)" not in done.stderr
    assert (tmp_path / "out0" / "log.csv").read_bytes() == before
    assert len(checkpoints(tmp_path / "out1")) == 1


def test_the_others_wait_for_two_days(monkeypatch):
    "Rank 0 may need hours for the features of a corpus; a job that is dead torchrun ends."
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
