"""Everything that is done to the notebooks from outside.

    python tools/notebooks.py test [06_sic ...]  # nbdev_test, two at a time, each one timed
    python tools/notebooks.py run [06_sic ...]   # run in place and keep the outputs, then clean
    python tools/notebooks.py export             # ids, no dead sliders, nbdev_clean, nbdev_export

Named without folder or ending; no name means all of them.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120  # what a notebook may take on two cores
LONGEST = ("13_train", "00_page", "12_retrieval", "research/mteb")
KILLED_AFTER = 900  # a notebook that hangs
DIRECTIVE = re.compile(r"\s*#\s*\|\s*(.+?)\s*$")
TOLD = {"capture_output": True, "text": True}
NBDEV = "from nbdev.{module} import {name}; {name}.__wrapped__({arguments})"


# Reading


def paths(root: Path) -> list[Path]:
    """The notebooks of a tree, in reading order: the shelf of learners, then the others."""
    books = (root / "nbs").rglob("*.ipynb")
    found = [path for path in books if ".ipynb_checkpoints" not in path.parts]
    return sorted(found, key=lambda path: (len(path.parts), not path.name[:1].isdigit(), path))


def name_of(path: Path, root: Path | None = None) -> str:
    """What a notebook is called on the command line: 06_sic, research/hub."""
    return path.relative_to((root or ROOT) / "nbs").with_suffix("").as_posix()


def read(path: Path) -> dict:
    "A notebook as the JSON that it is."
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict) -> str:
    "The text of a cell, whichever of its two forms the file holds."
    return "".join(cell["source"])


def directives(cell: dict) -> dict[str, str]:
    "The `#|` lines at the top of a code cell: {'export': '', 'default_exp': 'core'}."
    found = {}
    for line in source(cell).splitlines() if cell["cell_type"] == "code" else []:
        match = DIRECTIVE.match(line)
        if not match:
            if line.strip():
                break
            continue
        name, _, value = match[1].replace(":", " ", 1).partition(" ")
        found[name] = value.strip()
    return found


def body(cell: dict) -> str:
    "The text of a code cell without the `#|` lines at its top."
    lines = source(cell).splitlines()
    while lines and (DIRECTIVE.match(lines[0]) or not lines[0].strip()):
        lines.pop(0)
    return "\n".join(lines)


# Writing


def write(path: Path, notebook: dict) -> None:
    "Write a notebook as nbdev does, in one step, and only if it changed."
    text = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    if text != path.read_text(encoding="utf-8"):
        half = path.with_suffix(".tmp")
        half.write_text(text, encoding="utf-8")
        os.replace(half, path)


def give_ids(root: Path) -> None:
    "Give each cell without an id of its own one that depends on nothing but its place and text."
    for path in paths(root):
        notebook, taken = read(path), set()
        for index, cell in enumerate(notebook["cells"]):
            if not cell.get("id") or cell["id"] in taken:
                cell["id"] = hashlib.sha256(
                    f"{path.name} {index} {source(cell)}".encode()
                ).hexdigest()[:8]
            taken.add(cell["id"])
        write(path, notebook)


def keep_pictures(root: Path) -> None:
    "Where sliders brought a picture along, keep the picture: their process is no more."
    slider = "application/vnd.jupyter.widget-view+json"
    for path in paths(root):
        notebook = read(path)
        shown = [
            output["data"]
            for cell in notebook["cells"]
            for output in cell.get("outputs", [])
            if "data" in output
        ]
        for data in shown:
            if "image/png" in data:
                data.pop(slider, None)
        if not any(slider in data for data in shown):
            notebook.get("metadata", {}).pop(
                "widgets", None
            )  # hundreds of kB that nothing points at any more
        write(path, notebook)


def nbdev(root: Path, module: str, name: str, arguments: str = "") -> subprocess.CompletedProcess:
    "Call one of nbdev's commands in a process of its own, with `root` as the project."
    variables = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    code = NBDEV.format(module=module, name=name, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], cwd=root, env=variables, **TOLD)


def export(root: Path) -> None:
    "What must have happened before a notebook is committed: ids, nbdev_clean, nbdev_export."
    give_ids(root)
    keep_pictures(root)
    for module, name in (("clean", "nbdev_clean"), ("doclinks", "nbdev_export")):
        done = nbdev(root, module, name)
        if done.returncode != 0:
            raise RuntimeError(f"{name} failed:\n{done.stderr.strip()}")
    if (root / "speechimg" / "course" / "handout.py").exists():
        write_catalogue(root)


def write_catalogue(root: Path) -> None:
    "Write speechimg/course/course.json, the checks that learners may see."
    code = "from speechimg.course.handout import write_catalogue; write_catalogue()"
    variables = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=variables, **TOLD)
    if done.returncode != 0:
        raise RuntimeError(f"course.json failed:\n{done.stderr.strip()}")


# Running


def test_one(path: Path, said: Path) -> None:
    "What the process of one notebook does: nbdev_test, its words into the file `said`."
    from nbdev.test import nbdev_test

    sys.stdout = sys.stderr = file = said.open("w", buffering=1)
    for stream in (1, 2):  # and those of processes that the notebook starts
        os.dup2(file.fileno(), stream)
    os.chdir(ROOT)
    nbdev_test.__wrapped__(path=str(path), n_workers=0)  # ends the process if a cell fails
    os._exit(0)


def timed(path: Path, folder: Path) -> tuple[float, str]:
    "Test one notebook in a fork of this process: (seconds, what went wrong or '')."
    said, start = folder / f"{path.parent.name} {path.stem}.txt", time.monotonic()
    process = multiprocessing.get_context("fork").Process(target=test_one, args=(path, said))
    process.start()
    process.join(KILLED_AFTER)
    late = f"stopped after {KILLED_AFTER} seconds\n" if process.is_alive() else ""
    process.kill()
    process.join()
    words = late + said.read_text(errors="replace").strip()
    passed = process.exitcode == 0 and "Success." in words
    return time.monotonic() - start, "" if passed else f"{words} (exit {process.exitcode})"


def test(chosen: list[Path], workers: int) -> int:
    "nbdev_test on each notebook, the longest of last time first; returns how many failed."
    record = ROOT / ".cache" / "notebook_seconds.json"
    known = json.loads(record.read_text()) if record.exists() else {}
    guess = known or dict.fromkeys(LONGEST, KILLED_AFTER)
    chosen = sorted(chosen, key=lambda path: -guess.get(name_of(path), SECONDS))
    for name in ("nbdev.test", "seaborn", "torch._dynamo", "torchaudio"):  # once for all
        importlib.import_module(name)

    failed = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        found = pool.map(timed, chosen, [Path(folder)] * len(chosen))
        for path, (seconds, problem) in zip(chosen, found):
            known[name_of(path)] = round(seconds, 1)
            late = f"  over {SECONDS} s" if seconds > SECONDS else ""
            verdict = "FAILED" if problem else "passed"
            print(f"  {verdict}  {name_of(path):<26} {seconds:6.1f} s{late}", flush=True)
            if problem:
                failed.append((path, problem))
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    for path, problem in failed:
        print(f"\n--- {path.name} ---\n{problem}", file=sys.stderr)
    print(f"notebooks: {len(chosen) - len(failed)} passed, {len(failed)} failed")
    return len(failed)


def run(chosen: list[Path]) -> None:
    "Run each notebook in a fresh kernel, in its own folder, and keep what it showed."
    import nbformat
    import torch
    from nbclient import NotebookClient

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, *arguments, **options):
            if "gpu" in directives(cell) and not torch.cuda.is_available():
                return cell
            return await super().async_execute_cell(cell, *arguments, **options)

    os.environ.pop("MPLBACKEND", None)  # plots belong into the notebook
    for path in chosen:
        start = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        place = {"metadata": {"path": str(path.parent)}}
        Client(notebook, timeout=KILLED_AFTER, kernel_name="python3", resources=place).execute()
        half = path.with_suffix(".tmp")
        nbformat.write(notebook, half)
        os.replace(half, path)
        print(f"  ran     {name_of(path):<24} {time.monotonic() - start:6.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Test, run or export the notebooks.")
    parser.add_argument("command", choices=["test", "run", "export"])
    parser.add_argument("names", nargs="*", help="06_sic, research/hub ...; all if none is named")
    parser.add_argument("--workers", type=int, default=2, help="how many are tested at a time")
    options = parser.parse_args()
    there = {name_of(path): path for path in paths(ROOT)}
    unknown = [name for name in options.names if name not in there]
    if unknown:
        sys.exit(f"no notebook called {', '.join(unknown)}; there are {', '.join(there)}")
    chosen = [there[name] for name in options.names or there]
    if options.command == "test":
        sys.exit(1 if test(chosen, options.workers) else 0)
    if options.command == "run":
        run(chosen)
    if options.names and options.command == "export":
        sys.exit("export takes no names: all notebooks are exported together")
    export(ROOT)


if __name__ == "__main__":
    main()
