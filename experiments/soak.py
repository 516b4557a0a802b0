"""Reliability, in figures: kills, a full disk, hostile files, mutated sounds and pictures, a shared
and a damaged cache.

    python experiments/soak.py                # all experiments, to data/soak.json and soak.md
    python experiments/soak.py disk cache     # some of them; the others stay as they are
    python experiments/soak.py --quick        # a handful of each

Every draw comes from a fixed seed; only the moments of the kills depend on the clock. Exit
status 1 if anything fails. All that is started runs in process groups of its own, on corpora
made here, with caches of its own, in a temporary folder.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import soak_files as files

ROOT, SEED = Path(__file__).resolve().parent.parent, 0
MEMORY, FILE_SECONDS = 2048, 20  # MiB that no process may exceed; seconds that no file may take
# address space of a child that is given hostile files: what asks for more is refused by the kernel
SPACE = 8 * 2**30
TINY = {
    "width": 16,
    "dim": 8,
    "heads": 2,
    "fusion_depth": 1,
    "speech_depth": 1,
    "image_depth": 1,
    "batch_size": 4,
    "steps": 28,
    "queue_size": 9,
    "queue_warmup_steps": 3,
    "alpha_ramp_steps": 6,
    "warmup_steps": 2,
    "checkpoint_every": 4,
    "evaluate_every": 12,
    "learning_rate": 0.003,
    "negatives": "queue",
    "token_slots": 5,
    "sim_start_step": 2,
    "dropout": 0.1,
    "siblings": 0.5,
}


# Children


def environment(cache):
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "SPEECHIMG_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
        "PYTHONHASHSEED": "0",
    }


def start(arguments, cache, **options):
    "A child in a process group of its own."
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(cache),
        start_new_session=True,
        **{"stdin": subprocess.DEVNULL} | options,
    )


def high_water(pid="self"):
    """The largest memory of a process since it began its program, in MiB; ru_maxrss would count
    what its parent held at the fork."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0  # it has ended
    return max(
        [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")], default=0.0
    )


def child(arguments, cache, kill_after=None, limit=300, space=None, aim=None):
    """Run, or run and SIGKILL after so many seconds, with `aim` as soon after that as aim() says:
    .code .out .err .seconds .peak (MiB) .killed"""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        begin = time.monotonic()
        process = start(arguments, cache, stdout=out, stderr=err)
        if space:
            resource.prlimit(process.pid, resource.RLIMIT_AS, (space, space))
        until, status, peak = begin + (limit if kill_after is None else kill_after), 0, 0.0
        try:
            while True:
                peak = max(peak, high_water(process.pid))
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                if (late := time.monotonic() >= until) and (
                    kill_after is None or aim is None or aim()
                ):
                    os.killpg(process.pid, signal.SIGKILL)
                    pid, status, usage = os.wait4(process.pid, 0)
                    break
                time.sleep(0.001 if aim and late else 0.005)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        return SimpleNamespace(
            code=process.returncode,
            out=out.read(),
            err=err.read(),
            seconds=time.monotonic() - begin,
            peak=peak,
            killed=process.returncode == -signal.SIGKILL,
        )


def cli(*arguments):
    return ["-m", "speechimg.cli", *arguments]


def own(*arguments):
    return [Path(__file__), *arguments]


def told(err):
    "The lines in which the program speaks."
    return [line for line in err.splitlines() if line.startswith("speechimg: ")]


def complaint(outcome):
    """What is wrong with how a command ended, whatever it was given: a traceback, a signal, too
    much memory, no clear word. None = nothing."""
    if outcome.code < 0:
        return f"ended by signal {-outcome.code}" + (" (time limit)" if outcome.killed else "")
    if "Traceback" in outcome.err:
        return "a traceback: " + outcome.err.strip().splitlines()[-1][:200]
    if "unexpected" in outcome.err:
        return told(outcome.err)[-1][:240]
    if outcome.code == 2 and len(told(outcome.err)) != 1:
        return f"{len(told(outcome.err))} lines instead of one: {outcome.err[-300:]}"
    if outcome.code not in (0, 1, 2):
        return f"exit code {outcome.code}: {outcome.err[-200:]}"
    if outcome.peak > MEMORY:
        return f"{outcome.peak:.0f} MiB of memory"


# What there is to train on, to index, to compare


def corpus(folder, count=16):
    """A corpus of a few stamps: train.json, val.json and test.json with the same number of
    recordings each."""
    with zipfile.ZipFile(ROOT / "data" / "stamps.zip") as archive:
        entries = [
            entry for entry in json.loads(archive.read("all.json"))["data"] if entry["captions"]
        ]
        for split, place in (("train", 0), ("val", 1), ("test", 2)):
            some = [
                entry | {"captions": entry["captions"][:1]} for entry in entries[place::40][:count]
            ]
            for entry in some:
                for name in (entry["image"], entry["captions"][0]["wav"]):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(archive.read(name))
            (folder / f"{split}.json").write_text(json.dumps({"data": some}))
    return folder


def digest(path):
    return sha256(path.read_bytes()).hexdigest()


def cached(cache):
    "Every array in a cache, by its name: fingerprints of what NumPy wrote."
    found = {}
    for path in sorted(Path(cache).rglob("*.npz")):
        with zipfile.ZipFile(path) as archive:
            found[str(path.relative_to(cache))] = sha256(archive.read("array.npy")).hexdigest()
    return found


def of_training(out, cache):
    "All that a training leaves and that the clock does not change."
    metrics = json.loads((out / "metrics.json").read_text())
    for name in ("seconds", "command", "words"):  # the clock, and the name of the folder
        del metrics[name]
    del metrics["validation"]["seconds"]
    head, *rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    clock = head.index("seconds")
    kept = sorted(path for path in out.glob("checkpoint-*"))
    return {
        "weights": digest(out / "model.safetensors"),
        "metrics": metrics,
        "log": [head, *(row[:clock] + row[clock + 1 :] for row in rows)],
        "features": cached(cache),
        **{
            f"{folder.name}/{part}": digest(folder / f"{part}.safetensors")
            for folder in kept
            for part in ("model", "alignment", "optimizer")
        },
        "left behind": sorted(path.name for path in out.iterdir() if path.name.startswith(".")),
    }


def differences(one, other):
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


# Experiment 1: kills


def half_written(folder):
    "Files and folders that are not finished: what is being written, or what a kill left."
    return {
        Path(root) / name
        for root, folders, names in os.walk(folder)
        for name in (*folders, *names)
        if name.startswith(".") and name.endswith(".tmp")
    }


def stage(folder, finished, before):
    "Where a kill struck, seen from what lies there and was not there before."
    out, cache, new = folder / "out", folder / "cache", half_written(folder) - before
    if (folder / finished).exists():
        return LATE
    if new:
        return (
            "while a feature was written"
            if all(cache in path.parents for path in new)
            else "while a checkpoint or a result was written"
        )
    if out.is_dir() and any(out.glob("checkpoint-*")):
        return "in training, after a checkpoint"
    if out.is_dir() and (out / "log.csv").exists():
        return "in training, before the first checkpoint"
    return (
        "while features were computed"
        if any(path.is_file() for path in cache.rglob("*"))
        else "while starting"
    )


LATE = (
    "after the result was written"  # nothing was left to be interrupted: such a kill does not count
)


def kills(what, command, result, finished, count, work, rng, whole=None):
    """Kill the command at `count` random moments of its work, every third time at the next file
    that is being written; each time start it again, compare every result with an undisturbed
    one: `whole` = (its result, its seconds), or it is made here."""
    nothing = {"count": 0, "late": 0, "moments": {}, "failures": []}
    if not count:
        return nothing
    if not whole:
        folder = work / f"{what}-whole"
        folder.mkdir(parents=True)
        outcome = child(command(folder, False), folder / "cache")
        if outcome.code:
            return nothing | {"failures": [f"the undisturbed run failed: {outcome.err[-300:]}"]}
        whole = result(folder), outcome.seconds
    expected, life, tries, done, late, rounds, moments, failures = (
        *whole,
        0,
        0,
        0,
        0,
        Counter(),
        [],
    )
    while done < count and rounds < 3 * count:
        folder, rounds, again = work / f"{what}-{rounds}", rounds + 1, False
        folder.mkdir()
        for _ in range(5):  # up to five kills of the same run, then it may end
            if done == count:
                break
            before, aimed, tries = half_written(folder), tries % 3 == 1, tries + 1

            def writing():
                return half_written(folder) - before

            outcome = child(
                command(folder, again),
                folder / "cache",
                kill_after=rng.uniform(0, 0.6 * life if again or aimed else life),
                aim=writing if aimed else None,
            )
            again = True
            if not outcome.killed:
                break  # it was done before
            struck = stage(folder, finished, before)
            if struck == LATE:
                late += 1
                break
            done += 1
            moments[struck] += 1
        outcome = child(command(folder, again), folder / "cache")
        if outcome.code:
            failures.append(f"{what}, run {rounds}: exit code {outcome.code}: {outcome.err[-300:]}")
        elif wrong := differences(result(folder), expected):
            failures.append(
                f"{what}, run {rounds}: {', '.join(wrong)} differ from the undisturbed run"
            )
        shutil.rmtree(folder)
    if done < count:
        failures.append(f"{what}: only {done} of {count} kills struck while it worked")
    return {
        "count": done,
        "late": late,
        "runs": rounds,
        "moments": dict(moments),
        "failures": failures,
    }


def killed(bench):
    """Kills at random moments of training, indexing and evaluation, every third while a file is
    written; every run ends with the bits of an undisturbed one"""
    count, fewer = 2 if bench.quick else 20, 0 if bench.quick else 6

    def train(folder, again):
        return cli(
            "train",
            "--corpus",
            bench.corpus,
            "--config",
            bench.config,
            "--out",
            folder / "out",
            "--limit",
            16,
            *(["--resume"] if again else []),
        )

    def index(folder, _):
        return own("index", bench.corpus, folder / "index.safetensors")

    def judge(folder, _):
        return cli(
            "evaluate",
            "--model",
            "reference",
            "--corpus",
            bench.corpus,
            "--json",
            folder / "result.json",
        )

    def of_judging(folder):
        found = json.loads((folder / "result.json").read_text())
        return {name: value for name, value in found.items() if name != "seconds"} | {
            "features": cached(folder / "cache")
        }

    results = {
        "training": (
            train,
            lambda folder: of_training(folder / "out", folder / "cache"),
            "out/metrics.json",
            count,
            (of_training(bench.whole, bench.cache), bench.seconds),
        ),
        "evaluation": (judge, of_judging, "result.json", fewer, None),
        "indexing": (
            index,
            lambda folder: {
                "embeddings and hits": digest(folder / "index.safetensors"),
                "features": cached(folder / "cache"),
            },
            "index.safetensors",
            fewer,
            None,
        ),
    }
    with ThreadPoolExecutor(2) as pool:  # the long one beside the two short ones
        parts = dict(
            zip(
                results,
                pool.map(
                    lambda what: kills(
                        what,
                        *results[what][:-1],
                        bench.work,
                        random.Random(f"{SEED} {what}"),
                        results[what][-1],
                    ),
                    results,
                ),
            )
        )
    return {
        "counts": {f"kills of {what}": one["count"] for what, one in parts.items()}
        | {"more that came too late to count": sum(one["late"] for one in parts.values())},
        "moments": {what: one["moments"] for what, one in parts.items()},
        "failures": [line for one in parts.values() for line in one["failures"]],
    }


# Experiment 2: a full disk


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system in memory of so many bytes, on a folder of ours; PermissionError where mounting
    is not allowed."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield lambda size: subprocess.run(
            ["mount", "-o", f"remount,size={size}", str(folder)], check=True, capture_output=True
        )
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def rows(out, step):
    """The bytes of the log up to a step. A step that is made again takes other seconds, so only a
    row that was kept is the same."""
    path = out / "log.csv"
    return path.read_bytes().splitlines(keepends=True)[1 : step + 1] if path.exists() else []


def full_disk(bench):
    """The disk fills up while a checkpoint is written: one clear line, the older checkpoint intact;
    with room again the run goes on from it and ends with the same bits"""

    def tree(folder):
        return sum(
            -(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file()
        )

    whole, failures, stopped, steps, used = bench.whole, [], 0, [], 0
    one = tree(sorted(whole.glob("checkpoint-*"))[-1])
    sizes = [
        int(one * share) // 4096 * 4096
        for share in ((2.5,) if bench.quick else (0.5, 1.02, 1.4, 2.05, 2.95))
    ]
    for number, size in enumerate(sizes):
        out = bench.work / f"disk-{number}" / "out"
        try:
            with small_disk(out.parent, size) as grow:
                command = cli(
                    "train",
                    "--corpus",
                    bench.corpus,
                    "--config",
                    bench.config,
                    "--out",
                    out,
                    "--limit",
                    16,
                )
                outcome = child([*command, "--resume"], bench.cache)
                if outcome.code == 0:
                    failures.append(f"{size} bytes were enough")
                    continue
                stopped += 1
                if outcome.code != 2 or complaint(outcome):
                    why = complaint(outcome) or outcome.err[-200:]
                    failures.append(f"{size} bytes: exit code {outcome.code}, {why}")
                elif "space" not in outcome.err:
                    failures.append(
                        f"{size} bytes: does not say that the disk is full: {outcome.err[-200:]}"
                    )
                for folder in out.glob("checkpoint-*"):
                    state = json.loads((folder / "state.json").read_text())
                    steps.append(state["step"])
                    if any(
                        digest(folder / f"{part}.safetensors") != value
                        for part, value in state["files"].items()
                    ):
                        failures.append(f"{size} bytes: {folder.name} is damaged")
                intact = max(
                    (int(folder.name[11:]) for folder in out.glob("checkpoint-*")), default=0
                )
                before = rows(out, intact)
                grow(10 * one + 2**24)
                outcome = child([*command, "--resume"], bench.cache)
                if outcome.code:
                    failures.append(
                        f"{size} bytes: resumed, exit code {outcome.code}: {outcome.err[-300:]}"
                    )
                elif wrong := differences(
                    of_training(out, bench.cache), of_training(whole, bench.cache)
                ):
                    failures.append(f"{size} bytes: {', '.join(wrong)} differ after the resume")
                elif len(before) != intact or rows(out, intact) != before:
                    failures.append(
                        f"{size} bytes: the log up to step {intact} was written anew: "
                        "the intact checkpoint was not used"
                    )
                else:
                    used += intact > 0
        except PermissionError as error:
            return {"counts": {}, "skipped": f"not run, needs root: {error}", "failures": []}
    return {
        "counts": {
            "full disks": stopped,
            "checkpoints left intact": len(steps),
            "resumed from one": used,
        },
        "failures": failures,
    }


# Experiment 3: hostile checkpoints, configs and models


def snapshot(folder, without):
    "Every file below a folder, except in some of its parts."
    return {
        str(path): path.lstat().st_mtime_ns
        for path in folder.rglob("*")
        if not any(part in (path, *path.parents) for part in without)
    }


def hostile(bench):
    """Truncated, flipped, foreign and hostile checkpoints, configs and models: passed over for the
    older one, or refused in one line"""
    rng, failures, peak, counts, slowest, crew = (
        random.Random(SEED),
        [],
        0,
        Counter(),
        0,
        Crew(bench.cache),
    )
    base, expected = bench.whole, of_training(bench.whole, bench.cache)

    def attempt(what, arguments, folder, codes=(2,)):
        nonlocal peak, slowest
        before, outside = snapshot(bench.work, (folder, bench.cache)), bench.work / "outside"
        outcome = crew.run(arguments, 60)
        if outcome is None:
            failures.append(f"{what}: {crew.over}")
            return None, True
        peak, slowest, wrong = (
            max(peak, outcome.peak),
            max(slowest, outcome.seconds),
            complaint(outcome),
        )
        if not wrong and outcome.code not in codes:
            wrong = f"exit code {outcome.code}: {outcome.err[-200:]}"
        if not wrong and (
            outside.exists() or snapshot(bench.work, (folder, bench.cache)) != before
        ):
            wrong = "something was written outside"
        if wrong:
            failures.append(f"{what}: {wrong}")
        return outcome, wrong

    def some(cases, pick):
        return {
            what: case
            for number, (what, case) in enumerate(cases.items())
            if not bench.quick or what in pick
        }

    for what, spoil in some(files.checkpoint_cases(), ("a part outside the folder",)).items():
        folder = bench.work / "run"
        shutil.copytree(base, folder)
        for name in ("model.safetensors", "metrics.json", "config.json"):
            (folder / name).unlink()
        spoil(
            sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-1],
            rng,
            bench.work / "outside",
        )
        outcome, wrong = attempt(
            f"checkpoint: {what}",
            [
                "train",
                "--corpus",
                bench.corpus,
                "--config",
                bench.config,
                "--out",
                folder,
                "--limit",
                16,
                "--resume",
            ],
            folder,
            (0, 2),
        )
        if not wrong:
            counts["checkpoints passed over" if outcome.code == 0 else "checkpoints refused"] += 1
            if outcome.code == 0 and len(told(outcome.err)) != 1:
                failures.append(
                    f"checkpoint: {what}: {len(told(outcome.err))} lines about it instead of one"
                )
            if outcome.code == 0 and (
                different := differences(of_training(folder, bench.cache), expected)
            ):
                failures.append(f"checkpoint: {what}: {', '.join(different)} differ")
        shutil.rmtree(folder)
        for name in ("elsewhere", "linked"):
            shutil.rmtree(bench.work / name, ignore_errors=True)
    for what, text in some(
        files.config_cases(TINY), ("width 10**9", "learning_rate of 400 digits")
    ).items():
        (bench.work / "bad.json").write_text(text)
        outcome, wrong = attempt(
            f"config: {what}",
            [
                "train",
                "--corpus",
                bench.corpus,
                "--config",
                bench.work / "bad.json",
                "--out",
                bench.work / "none",
            ],
            bench.work / "none",
        )
        counts["configs refused"] += not wrong
        shutil.rmtree(bench.work / "none", ignore_errors=True)
    for what, spoil in some(
        files.model_cases(base, rng, bench.work / "outside"),
        ("weights: a pickle", "config: cut", "config: paper towers of 100,000 blocks"),
    ).items():
        copy = bench.work / "copy"
        copy.mkdir()
        for name in ("model.safetensors", "config.json"):
            shutil.copy(base / name, copy)
        spoil(copy)
        outcome, wrong = attempt(
            f"model: {what}", ["evaluate", "--corpus", bench.corpus, "--model", copy], copy
        )
        counts["models refused"] += not wrong
        shutil.rmtree(copy)
    crew.stop()
    return {
        "counts": dict(counts),
        "peak_mib": round(peak),
        "slowest_seconds": round(slowest, 1),
        "failures": failures,
    }


# Experiment 4: mutated sounds and pictures


class Worker:
    "A child that runs command lines one after the other in one process, and says how each ended."

    def __init__(self, cache):
        self.process = start(
            own("worker"),
            cache,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        resource.prlimit(self.process.pid, resource.RLIMIT_AS, (SPACE, SPACE))

    def run(self, arguments, limit):
        "How it ended, or None when it did not within the limit, or died."
        self.process.stdin.write((json.dumps([str(one) for one in arguments]) + "\n").encode())
        line, until = b"", time.monotonic() + limit
        while not line.endswith(b"\n"):
            ready, _, _ = select.select(
                [self.process.stdout], [], [], max(0, until - time.monotonic())
            )
            piece = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not piece:
                return None
            line += piece
        return SimpleNamespace(killed=False, **json.loads(line))

    def stop(self):
        "End it: why it ended, if it did so by itself."
        code = self.process.poll()
        if code is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close(), self.process.stdout.close()
        return (
            "took more than the time limit"
            if code is None
            else f"ended by signal {-code}"
            if code < 0
            else f"ended with {code}"
        )


class Crew:
    "A worker at a time, replaced when it died, hung, or once needed more memory than allowed."

    def __init__(self, cache):
        self.cache, self.worker, self.over = cache, None, ""

    def run(self, arguments, limit):
        fresh = self.worker is None
        self.worker = self.worker or Worker(self.cache)
        outcome = self.worker.run(
            arguments, limit + 40 * fresh
        )  # the first also waits for the imports
        if outcome is None:
            self.stop()
        elif outcome.peak > MEMORY:
            self.stop()  # a peak never falls: the next starts afresh
        return outcome

    def stop(self):
        if self.worker:
            self.over = self.worker.stop()
        self.worker = None


def work_off():
    "The worker: a command line per line of its input, a line of JSON for each."
    sys.path.insert(0, str(ROOT))
    from speechimg.cli import main

    answer = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            (
                os.dup2(out.fileno(), 1),
                os.dup2(err.fileno(), 2),
            )  # what the C libraries print counts, too
            begin = time.monotonic()
            try:
                code = main(json.loads(line))
            except SystemExit as error:
                code = error.code
            sys.stdout.flush(), sys.stderr.flush()
            out.seek(0), err.seek(0)
            peak = high_water()
            print(
                json.dumps(
                    {
                        "code": code,
                        "out": out.read()[-2000:],
                        "err": err.read()[-4000:],
                        "seconds": time.monotonic() - begin,
                        "peak": peak,
                    }
                ),
                file=answer,
                flush=True,
            )


def mutants(bench):
    """500 mutated sounds and pictures through `check` and `search`, as query and as gallery: no
    traceback, hang, crash or excess"""
    work, count, rng = bench.work / "mutants", 40 if bench.quick else 500, random.Random(SEED)
    sounds, pictures = files.mutations(count, SEED)
    picture, wave = (
        sorted((bench.corpus / "images").iterdir())[0],
        sorted((bench.corpus / "wavs").iterdir())[0],
    )
    commands = []  # (file, command line)
    for name, data in sounds.items():
        folder = work / "sounds" / name.replace(".", "-")
        folder.mkdir(parents=True)
        (folder / name).write_bytes(data), shutil.copy(picture, folder / "good.png")
        (folder / "train.json").write_text(
            json.dumps(
                {
                    "data": [
                        {
                            "image": "good.png",
                            "captions": [{"uttid": "one", "wav": name, "text": "a word"}],
                        }
                    ]
                }
            )
        )
        commands += [
            (name, ["search", folder / name, "--gallery", bench.gallery]),
            (name, ["check", folder]),
        ]
    for name, data in pictures.items():
        folder = work / "pictures" / name.replace(".", "-")
        folder.mkdir(parents=True)
        (folder / name).write_bytes(data)
        commands += [
            (name, ["check", folder]),
            (name, ["search", wave, "--gallery", folder, "--rerank", 2]),
        ]
    failures, ended, times, peak, crew, words = [], Counter(), [], 0, Crew(bench.cache), 0
    try:
        for name, arguments in commands:
            outcome = crew.run(arguments, FILE_SECONDS)
            if outcome is None:
                failures.append(f"{name}: {arguments[0]} {crew.over}")
                continue
            ended[f"{arguments[0]}: exit code {outcome.code}"] += 1
            times.append(outcome.seconds)
            words += sum(
                not line.startswith(("speechimg: ", "skipped ")) and ": only the first" not in line
                for line in outcome.err.splitlines()
            )
            peak, wrong = max(peak, outcome.peak), complaint(outcome)
            if wrong:
                failures.append(f"{name}: {arguments[0]}: {wrong}")
    finally:
        crew.stop()
    for name, arguments in rng.sample(
        commands, 1 if bench.quick else 6
    ):  # the same in processes of their own
        outcome = child(cli(*arguments), bench.cache, limit=60, space=SPACE)
        peak, wrong = max(peak, outcome.peak), complaint(outcome)
        if wrong:
            failures.append(f"{name}: {arguments[0]} in a process of its own: {wrong}")
    return {
        "counts": {
            "files": len(sounds) + len(pictures),
            "commands": len(commands),
            "of them in a process of its own too": 1 if bench.quick else 6,
        },
        "ended": dict(sorted(ended.items())),
        "lines by decoders themselves": words,
        "peak_mib": round(peak),
        "slowest_seconds": round(max(times, default=0), 1),
        "failures": failures,
    }


# Experiment 5: one cache for two, and a damaged one


def shared_cache(bench):
    """Two trainings share an empty cache; then the cache is damaged in every way and repaired;
    always the same bits"""
    rng, failures, repaired, rounds = random.Random(SEED), [], 0, 1 if bench.quick else 2
    expected = of_training(bench.whole, bench.cache) | {
        "features": bench.features
    }  # by now that cache holds more

    def command(out):
        return [
            "train",
            "--corpus",
            bench.corpus,
            "--config",
            bench.config,
            "--out",
            out,
            "--limit",
            16,
        ]

    for number in range(rounds):
        work = bench.work / f"both-{number}"
        cache, both = work / "cache", []
        work.mkdir()
        try:
            for name in ("one", "other"):
                with open(work / f"{name}.txt", "w") as log:
                    both.append(
                        (name, start(cli(*command(work / name)), cache, stdout=log, stderr=log))
                    )
            for name, process in both:
                if process.wait(300):
                    said = (work / f"{name}.txt").read_text()[-300:]
                    failures.append(f"together, {name}: exit code {process.returncode}: {said}")
                elif wrong := differences(of_training(work / name, cache), expected):
                    failures.append(f"together, {name}: {', '.join(wrong)} differ")
        finally:
            for _, process in both:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    damages, crew = damage(rng, bench.work / "outside"), Crew(cache)
    if bench.quick:
        damages = {"every kind, a file each": damages}  # in one run
    for what, spoil in damages.items():
        hit = rng.sample(sorted(cache.rglob("*.npz")), len(spoil) if bench.quick else 5)
        for number, path in enumerate(hit):
            (list(spoil.values())[number] if bench.quick else spoil)(path)
        out = bench.work / "repaired"
        outcome = crew.run(command(out), 100)
        wrong = (
            crew.over
            if outcome is None
            else complaint(outcome)
            or (
                differences(of_training(out, cache), expected)
                if outcome.code == 0
                else outcome.err[-200:]
            )
        )
        if wrong or (bench.work / "outside").exists():
            failures.append(f"cache, {what}: {wrong}")
        else:
            repaired += len(hit)
        shutil.rmtree(out, ignore_errors=True)
    crew.stop()
    return {
        "counts": {
            "pairs of trainings": rounds,
            "kinds of damage": len(damages),
            "files repaired": repaired,
        },
        "failures": failures,
    }


def damage(rng, outside):
    "{what: function of a path in the cache}"
    import pickle

    import numpy as np

    def put(path, array, **options):
        with open(path, "wb") as file:
            np.savez(file, array=array, **options)

    def read(path):
        return np.load(path)["array"]

    def plain_pickle(path):
        path.write_bytes(pickle.dumps(files.Runs(outside)))

    def pickled_inside(path):
        member = io.BytesIO()
        np.save(member, np.array([files.Runs(outside)], dtype=object), allow_pickle=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("array.npy", member.getvalue())

    def another_file(path):
        others = [other for other in sorted(path.parent.parent.rglob("*.npz")) if other != path]
        shutil.copy(rng.choice(others), path)

    def into_a_folder(path):
        path.unlink(), path.mkdir()

    return {
        "truncated": lambda path: path.write_bytes(
            path.read_bytes()[: rng.randrange(path.stat().st_size)]
        ),
        "a flipped bit": lambda path: path.write_bytes(files.flipped(path.read_bytes(), rng)),
        "a pickle": plain_pickle,
        "a pickle as array.npy": pickled_inside,
        "a zip bomb": lambda path: path.write_bytes(files.zip_bomb()),
        "another shape": lambda path: put(path, read(path)[:1, :7]),
        "another length": lambda path: put(path, read(path)[:-1]),
        "another type": lambda path: put(path, read(path).astype(np.float64) + 1),
        "no numbers": lambda path: put(path, np.full(read(path).shape, np.nan, np.float16)),
        "another recording's": another_file,
        "empty": lambda path: path.write_bytes(b""),
    }


# The commands of this file, and the report


def index(corpus, out):
    """Open a gallery, search it, write embeddings and hits: what is killed in the experiment on
    indexing."""
    sys.path.insert(0, str(ROOT))
    import safetensors.torch
    import torch

    from speechimg.core import atomic_write
    from speechimg.corpora import load_corpus
    from speechimg.retrieval import load_model, open_gallery, search

    model = load_model("reference")
    gallery = open_gallery(model, corpus)
    hits = [
        search(model, load_corpus(corpus, "test").load_wave(place), gallery, top=5)
        for place in range(2)
    ]
    tensors = {
        "image": gallery[1].image,
        "tokens": gallery[1].image_tokens,
        "hits": torch.tensor(
            [[hit.picture, hit.coarse, hit.fine or 0] for some in hits for hit in some]
        ),
    }
    with atomic_write(out) as file:
        file.write(
            safetensors.torch.save({name: one.contiguous() for name, one in tensors.items()})
        )


EXPERIMENTS = {
    "kills": killed,
    "disk": full_disk,
    "hostile": hostile,
    "files": mutants,
    "cache": shared_cache,
}


def prepared(work, quick):
    """What the experiments share: a corpus, a config, an undisturbed run and its features, a
    gallery."""
    bench = SimpleNamespace(
        work=work,
        quick=quick,
        corpus=corpus(work / "corpus"),
        config=work / "config.json",
        cache=work / "cache",
        whole=work / "whole",
        gallery=work / "gallery",
    )
    bench.config.write_text(json.dumps(TINY | ({"steps": 24} if quick else {})))
    bench.gallery.mkdir()
    for path in sorted((bench.corpus / "images").iterdir())[:3]:
        shutil.copy(path, bench.gallery)
    outcome = child(
        cli(
            "train",
            "--corpus",
            bench.corpus,
            "--config",
            bench.config,
            "--out",
            bench.whole,
            "--limit",
            16,
        ),
        bench.cache,
    )
    if outcome.code:
        raise SystemExit(f"the undisturbed training failed: {outcome.err}")
    bench.seconds, bench.features = outcome.seconds, cached(bench.cache)
    return bench


def table(report):
    "The report as a table in markdown."
    lines = [
        "| experiment | what was done | seconds | largest process | result |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, one in report["experiments"].items():
        done = one.get("skipped") or ", ".join(
            f"{value} {what}" for what, value in one["counts"].items()
        )
        result = (
            "not run"
            if one.get("skipped")
            else "passed"
            if one["passed"]
            else f"**{len(one['failures'])} failed**"
        )
        peak = f"{one['peak_mib']:,} MiB" if "peak_mib" in one else ""
        lines.append(
            f"| {name}: {one['what']} | {done} | {one['seconds']:.0f} | {peak} | {result} |"
        )
    return "\n".join(lines) + "\n"


def main():
    if sys.argv[1:2] == ["worker"]:
        return work_off()
    if sys.argv[1:2] == ["index"]:
        return index(Path(sys.argv[2]), Path(sys.argv[3]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "experiments", nargs="*", choices=[*EXPERIMENTS, []], help="which; all when left out"
    )
    parser.add_argument("--quick", action="store_true", help="a handful of each")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "data", help="folder of soak.json and soak.md"
    )
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    report = soak(
        chosen.experiments or list(EXPERIMENTS), chosen.quick, lambda line: print(line, flush=True)
    )
    if chosen.experiments and (chosen.out / "soak.json").exists():  # the others keep their lines
        report = summary(
            json.loads((chosen.out / "soak.json").read_text())["experiments"]
            | report["experiments"]
        )
    (chosen.out / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    (chosen.out / "soak.md").write_text(table(report))
    print(table(report))
    return 0 if report["passed"] else 1


def soak(names, quick=False, say=lambda line: None):
    "Run some experiments -> the report, as it is written."
    report = {}
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        bench = prepared(Path(folder), quick)
        for name in names:
            experiment, start = EXPERIMENTS[name], time.monotonic()
            found = experiment(bench)
            hidden = [
                line.replace(folder, "...") for line in found["failures"]
            ]  # no path of one machine
            report[name] = (
                {"what": " ".join(experiment.__doc__.split())}
                | found
                | {
                    "failures": hidden,
                    "seconds": round(time.monotonic() - start, 1),
                    "passed": not hidden,
                }
            )
            seconds, counts = report[name]["seconds"], report[name]["counts"]
            verdict = "FAILED" if hidden else "passed"
            say(f"{name}: {seconds:.0f} s, {counts or report[name].get('skipped')}, {verdict}")
            for line in hidden:
                say(f"  {line}")
    return summary(report)


def summary(report):
    "The whole report, of the reports of experiments."
    import importlib.metadata as installed

    report = {name: report[name] for name in EXPERIMENTS if name in report}
    return {
        "seed": SEED,
        "passed": all(one["passed"] for one in report.values()),
        "seconds": round(sum(one["seconds"] for one in report.values()), 1),
        "bounds": {"memory_mib": MEMORY, "file_seconds": FILE_SECONDS},
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "system": platform.system(),
            **{name: installed.version(name) for name in ("torch", "numpy", "pillow", "soundfile")},
        },
        "experiments": report,
    }


if __name__ == "__main__":
    sys.exit(main())
