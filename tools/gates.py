"""Gates: conventions that nobody has to remember, because this file says when one is broken.

    python tools/gates.py              # all of them; exit status 1 if one finds something
    python tools/gates.py floors tree  # some

Where somebody else's program holds a convention, the gate calls it: nbdev, ruff, import-linter.
Each gate is a function of the project's folder: what it found, one line each, and a note.
"""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

import notebooks
import rooms
from notebooks import ROOT, body, directives, source

SKIPPING = {"notest", "gpu", "slow"}  # tst_flags of settings.ini
REASON = re.compile(r"(?i)\b(?:needs?|takes?|skipped|because|seconds?|minutes?|hours?)\b")
MARKED = re.compile(r"<!--\s*(assignment|task|question):")
MAX_CELLS, MAX_WORDS, MAX_BYTES, MAX_CELL = 60, 1500, 500_000, 40
MAX_CHAPTERS, MAX_SHELF_WORDS = 16, 15_000  # of the learners' shelf
MAX_FILE, MAX_CORPORA, MAX_MODEL = 50e6, 130e6, 15e6

BESIDE = ("nbs/rooms.toml", "nbs/map/", "nbs/index_files/")  # what is no notebook in nbs/

# Lines of code that are not blank, as ruff formats them
METHOD = (
    *("core", "attention", "data", "corpora", "sic", "queue", "mining", "sim", "distillation"),
    *("model", "alignment", "retrieval", "train"),
)
BUDGETS = {"the method": 2500, "the library": 10_000, "tools": 1500}

# What a reader must never meet. Written so that the patterns do not find themselves.
UNWANTED = {
    "a path on one machine": r"(?<![\w.~:/-])/(?:home|root|Users|work|workspace|mnt|media|srv|tmp"
    r"|private)/[\w.-]+",
    "the address of a package registry": r"(?i)\b(?:registry\.npmjs|files\.pythonhosted|pypi\.org"
    r"|npmjs\.com|deb\.debian\.org|anaconda\.org)",
    "an unfinished note": r"\b(?:TO[D]O|FIX[M]E|XX[X])\b",
    "a word about how it came about": r"(?i)\b(?:sub-?agent[s]?\b|a[i] assistant|this sessio[n]\b"
    r"|wi[p]/|lorem ips[u]m)",
}


class Report(NamedTuple):
    """What a gate says."""

    findings: list[str]  # one line each; nothing means that the gate is passed
    note: str  # what was looked at


def tree(root: Path) -> list[Path]:
    """Every file that is committed or could be: tracked, and untracked but not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout.decode()
    return sorted({root / name for name in listed.split("\0") if name and (root / name).is_file()})


def modules(root: Path) -> dict[str, Path]:
    """The library's modules by their dotted name, without what nbdev writes for itself."""
    library = root / "speechimg"
    found = [path for path in library.rglob("*.py") if not path.stem.startswith("_")]
    return {".".join(path.relative_to(library).with_suffix("").parts): path for path in found}


def called(root: Path, *arguments: str) -> list[str]:
    """What a program, run by this Python, says against the tree; nothing if it is content."""
    command = [sys.executable, *arguments]  # its scripts fail where a folder's name holds a space
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return [] if done.returncode == 0 else (done.stdout + done.stderr).strip().splitlines()


# 1. Stale and orphan modules, rooms without a place


def exported_again(root: Path, copy: Path) -> dict[str, Path]:
    """Clean and export the notebooks of a tree into an empty place: {name: file}."""
    ignored = shutil.ignore_patterns(".ipynb_checkpoints")
    shutil.copytree(root / "nbs", copy / "nbs", ignore=ignored)
    shutil.copy(root / "settings.ini", copy)
    (copy / "speechimg").mkdir()
    shutil.copy(root / "speechimg" / "__init__.py", copy / "speechimg")  # written by hand
    notebooks.export(copy)
    made = [*copy.glob("nbs/**/*.ipynb"), *copy.glob("speechimg/**/*")]
    return {path.relative_to(copy).as_posix(): path for path in made if path.is_file()}


def gate_modules(root: Path) -> Report:
    """Exported again into an empty place, the notebooks give exactly what is here."""
    findings = rooms.unlisted(root)
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = exported_again(root, Path(folder) / "copy")
        except (RuntimeError, ValueError, KeyError) as error:
            return Report([f"nbs: cannot be exported: {error}"], "")
        here = {path.relative_to(root).as_posix(): path for path in tree(root)}
        for name in sorted(set(here) - set(made)):
            if name.startswith("speechimg/") and name.endswith(".py"):
                findings.append(f"{name}: orphan, no notebook exports it; remove it")
            if name.startswith("nbs/") and not name.startswith(BESIDE):
                findings.append(f"{name}: left over, no notebook; remove it")
        for name, path in sorted(made.items()):
            if name not in here:
                findings.append(f"{name}: missing; run `make export`")
            elif path.read_bytes() != here[name].read_bytes():
                what = "not cleaned" if name.startswith("nbs/") else "stale"
                findings.append(f"{name}: {what}; run `make export`")
    for one in rooms.rooms(root):
        if one.module and one.module.rpartition(".")[2] != one.short:
            findings.append(f"{one.path.name}: exports {one.module}, and is called {one.short}")
    return Report(findings, f"{len(modules(root))} modules from {len(made)} files")


# 2. Format and lint


def gate_lint(root: Path) -> Report:
    """ruff: 100 columns, one statement a line, nothing unused, no function too long."""
    findings = called(root, "-m", "ruff", "format", "--check", "--quiet", ".")
    findings += called(root, "-m", "ruff", "check", "--quiet", "--output-format", "concise", ".")
    exported = ["--isolated", "--quiet", "--output-format", "concise", "--select", "F403,F811,F821"]
    findings += called(root, "-m", "ruff", "check", *exported, "speechimg")
    return Report(findings, "ruff has nothing to say")


# 3. Every module can be imported first

ALONE = """
import importlib, os, sys
import numpy, torch, torch.nn.functional  # what takes the time is imported once
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        try:
            importlib.import_module("speechimg." + name)
        except BaseException as error:
            print(f"speechimg.{name}: cannot be imported alone: {type(error).__name__}: {error}")
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""


def gate_alone(root: Path) -> Report:
    """Every module is imported as the first one of its process, from this tree."""
    command = [sys.executable, "-c", ALONE, *modules(root)]
    here = os.environ | {"PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=root, env=here, capture_output=True, text=True)
    findings = done.stdout.strip().splitlines() + done.stderr.strip().splitlines()[-1:]
    return Report(findings, f"{len(modules(root))} modules imported, each in a process of its own")


# 4. Imports only downwards


LINT = "from importlinter.cli import lint_imports_command as run; run()"


def gate_floors(root: Path) -> Report:
    """import-linter: a module imports only from floors below its own; every one is on a floor."""
    named, findings = rooms.on_floors(root), []
    for name in modules(root):
        above = {name.rsplit(".", count)[0] for count in range(name.count(".") + 1)}
        if not named & above:
            findings.append(f"speechimg.{name}: on no floor of nbs/rooms.toml")
    with tempfile.NamedTemporaryFile("w", suffix=".ini") as file:
        file.write(rooms.importlinter(root))
        file.flush()
        findings += called(root, "-c", LINT, "--no-logo", "--no-cache", file.name)
    return Report(findings, f"{len(named)} modules and packages, all imports downwards")


# 5. Skipped cells


class Skipped(NamedTuple):
    """A cell that the tests do not run."""

    where: str  # notebook and cell number
    flags: str  # what keeps the tests from running it
    reason: str  # "" if none is given


def reason_of(cell: dict, above: str) -> str:
    """Why a cell is skipped: the comment under its directives, or the end of the text above."""
    if cell["cell_type"] != "code":
        return above
    first = (body(cell).strip().splitlines() or [""])[0]
    if first.startswith("#"):
        return first.lstrip("# ")
    return above if REASON.search(above) else ""


def flags_of(cell: dict) -> list[str]:
    """What keeps a cell from being run by the tests."""
    flags = directives(cell)
    if cell["cell_type"] != "code":
        frozen = re.search(r"skip_exec\s*:\s*true", source(cell), re.I)
        return ["skip_exec (the whole notebook)"] if frozen else []
    never = flags.get("eval", "").lower() == "false"
    return sorted(SKIPPING & set(flags)) + ["eval: false"] * never


def skipped_cells(root: Path) -> list[Skipped]:
    """Every cell that the tests do not run."""
    found = []
    for path in notebooks.paths(root):
        above = ""
        for index, cell in enumerate(notebooks.read(path)["cells"]):
            flags = flags_of(cell)
            if flags:
                where = f"{notebooks.name_of(path, root)} cell {index}"
                found.append(Skipped(where, ", ".join(flags), reason_of(cell, above)))
            if cell["cell_type"] == "markdown":
                above = (source(cell).strip().splitlines() or [""])[-1]
            elif not flags:
                above = ""
    return found


def gate_skipped(root: Path) -> Report:
    """Each cell that the tests do not run says why; ruff reads it all the same."""
    cells = skipped_cells(root)
    findings = [
        f"{cell.where}: skipped ({cell.flags}) without a reason"
        for cell in cells
        if not cell.reason
    ]
    for path in notebooks.paths(root):
        if path.name.startswith(("_", ".")):
            findings.append(f"{path.name}: nbdev skips a notebook of such a name")
        kernel = notebooks.read(path).get("metadata", {}).get("kernelspec", {})
        if kernel.get("language", "python") != "python":
            findings.append(f"{path.name}: nbdev skips a kernel whose language is not Python")
    listed = "".join(
        f"\n      {cell.where} ({cell.flags}): {cell.reason}" for cell in cells if cell.reason
    )
    return Report(findings, f"{len(cells)} cells skipped{listed}")


# 6. Assignments


def gate_assignments(root: Path) -> Report:
    """Each assignment has a solution in the library, tasks, a question, checks of both kinds."""
    from speechimg.core import InputError
    from speechimg.course.assignments import all_assignments

    try:
        found = all_assignments()
    except InputError as error:
        return Report([str(error)], "")
    findings = []
    for one in found:
        kinds = [part.kind for part in one.parts]
        checks = [part for part in one.parts if part.kind == "check"]
        needs = {
            "a solution": "solution" in kinds,
            "a text": "text" in kinds,
            "a question": "question" in kinds,
            "visible checks": any(not part.hidden for part in checks),
            "hidden checks": any(part.hidden for part in checks),
        }
        findings += [
            f"assignment {one.name} lacks {what}" for what, there in needs.items() if not there
        ]
    return Report(findings, f"{len(found)} assignments: {', '.join(one.name for one in found)}")


# Notebooks that can be read


def words(text: str) -> int:
    """Words of prose: without code, formulas, HTML and the targets of links."""
    code = r"```.*?```|\$\$.*?\$\$|\$[^$\n]+\$|<[^>]+>|\]\([^)]*\)|`[^`]*`"
    return len(re.findall(r"[^\W_][\w'’-]*", re.sub(code, " ", text, flags=re.S)))


def prose_of(cells: list[dict]) -> list[str]:
    """The markdown of a notebook, without the texts that an assignment hands out by themselves."""
    texts = [source(cell) for cell in cells if cell["cell_type"] == "markdown"]
    return [text for text in texts if not MARKED.match(text)]


def shape(room: rooms.Room) -> list[str]:
    """What is wrong with the length, the beginning and the end of a notebook."""
    cells = notebooks.read(room.path)["cells"]
    code = [
        cell for cell in cells if cell["cell_type"] == "code" and "check" not in directives(cell)
    ]
    prose, size = prose_of(cells), room.path.stat().st_size
    counted = sum(words(text) for text in prose)
    exported = [len(body(cell).splitlines()) for cell in code if "export" in directives(cell)]
    wrong = {
        f"{size / 1000:.0f} kB, more than {MAX_BYTES // 1000}": size > MAX_BYTES,
        f"{len(code)} code cells, more than {MAX_CELLS}": len(code) > MAX_CELLS,
        f"{counted} words, more than {MAX_WORDS}": counted > MAX_WORDS,
        f"an exported cell of {max(exported, default=0)} lines, more than {MAX_CELL}": any(
            lines > MAX_CELL for lines in exported
        ),
        "the first cell is not `# Title` and `> one sentence`": not room.idea,
        "does not end on a markdown cell `## What comes next`": not (
            prose and re.search(r"(?mi)^#+ what comes next", source(cells[-1]))
        ),
    }
    return [f"{room.name}: {problem}" for problem, true in wrong.items() if true]


def shown(room: rooms.Room) -> list[str]:
    """What is wrong with the outputs and the tests of a notebook."""
    cells = [cell for cell in notebooks.read(room.path)["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    tests = [source(cell) for cell in cells if not {"export", "exporti"} & set(directives(cell))]
    tested = any(re.search(r"\bassert|assert_close\(", text) for text in tests)
    wrong = {
        "no outputs; run `make notebooks`": not outputs,
        "an output is an error; run `make notebooks`": any(
            output["output_type"] == "error" for output in outputs
        ),
        "no cell tests anything": bool(room.module) and not tested,
    }
    return [f"{room.name}: {problem}" for problem, true in wrong.items() if true]


def gate_notebooks(root: Path) -> Report:
    """Each notebook is short, begins with its idea, shows what it ran, ends with what is next."""
    every = rooms.rooms(root)
    findings = [line for one in every for line in [*shape(one), *shown(one)]]
    learn = [one for one in every if one.name[:1].isdigit()]
    total = sum(
        words(text) for one in learn for text in prose_of(notebooks.read(one.path)["cells"])
    )
    if len(learn) > MAX_CHAPTERS:
        findings.append(f"{len(learn)} chapters, more than {MAX_CHAPTERS}")
    if total > MAX_SHELF_WORDS:
        findings.append(f"{total:,} words on the learners' shelf, more than {MAX_SHELF_WORDS:,}")
    return Report(
        findings, f"{len(every)} notebooks; {len(learn)} chapters of {total:,} words for learners"
    )


# Budgets


def lines_of(paths) -> int:
    """Lines of code that are not blank."""
    return sum(
        bool(line.strip())
        for path in paths
        for line in path.read_text(encoding="utf-8").splitlines()
    )


def gate_budgets(root: Path) -> Report:
    """Lines that are not blank: of the method, of the library and of tools."""
    library = modules(root)
    counted = {
        "the method": lines_of(library[name] for name in METHOD if name in library),
        "the library": lines_of(library.values()),
        "tools": lines_of((root / "tools").glob("*.py")),
    }
    findings = [
        f"{what}: {counted[what]:,} lines, more than {most:,}"
        for what, most in BUDGETS.items()
        if counted[what] > most
    ]
    return Report(
        findings,
        ", ".join(f"{what} {counted[what]:,} of {most:,} lines" for what, most in BUDGETS.items()),
    )


# The README, and the pictures at the head of the chapters


def gate_readme(root: Path) -> Report:
    """README.md is what nbs/index.ipynb gives, and nbs/map is what tools/map.py draws."""
    import map as house_map
    import readme

    return Report(
        readme.differences(root) + house_map.differences(root),
        "README.md and nbs/map are up to date",
    )


# The tree as a whole


def readable(path: Path) -> str | None:
    """The text of a file without embedded pictures and sounds; None if it is no text."""
    if path.stat().st_size > 5e6:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    if path.suffix == ".ipynb":
        parts = []
        for cell in notebooks.read(path)["cells"]:
            parts.append(source(cell))
            for output in cell.get("outputs", []):
                kinds = {"text": output.get("text", ""), **output.get("data", {})}
                parts += [
                    "".join(value)
                    for kind, value in kinds.items()
                    if not kind.startswith(("image/png", "image/jpeg", "audio"))
                ]
        text = "\n".join(part for part in parts if isinstance(part, str))
    return re.sub(r"base64,[A-Za-z0-9+/=\s]+", "base64,", text)


def too_large(root: Path, size: dict[Path, int]) -> list[str]:
    """Files and folders that outgrew what a clone should bring."""
    corpora = sum(bytes for path, bytes in size.items() if path.parent == root / "data")
    found = [
        f"{path.relative_to(root)}: {bytes / 1e6:.0f} MB, more than {MAX_FILE / 1e6:.0f}"
        for path, bytes in size.items()
        if bytes > MAX_FILE
    ]
    if corpora > MAX_CORPORA:
        found.append(f"data: {corpora / 1e6:.0f} MB together, more than {MAX_CORPORA / 1e6:.0f}")
    for folder in (root / "data" / "models").glob("*/"):
        weight = sum(bytes for path, bytes in size.items() if path.is_relative_to(folder))
        if weight > MAX_MODEL:
            found.append(f"{folder.name}: {weight / 1e6:.0f} MB, more than {MAX_MODEL / 1e6:.0f}")
    return found


def gate_tree(root: Path) -> Report:
    """No path of one machine, no unfinished note, no document that is not there, nothing huge."""
    files = tree(root)
    names = {path.name for path in files}
    here = (
        rf"(?<![\w.~-])(?:{re.escape(str(root.resolve()))}(?![\w-])|{re.escape(str(Path.home()))}/)"
    )
    patterns = {**UNWANTED, "a path of this machine": here}
    size = {path: path.stat().st_size for path in files}
    findings = too_large(root, size)
    for path in files:
        text, name = readable(path), path.relative_to(root).as_posix()
        if text is None or name == "LICENSE":
            continue
        for what, pattern in patterns.items():
            for match in list(re.finditer(pattern, text))[:3]:
                findings.append(
                    f"{name}: {what}: {text[max(0, match.start() - 20) : match.end() + 20]!r}"
                )
        missing = sorted(set(re.findall(r"\b[\w-]+\.md\b", text)) - names)
        findings += [f"{name}: speaks of {one}, which is not here" for one in missing]
    return Report(findings, f"{len(files)} files, {sum(size.values()) / 1e6:.1f} MB")


# One version


def gate_versions(root: Path) -> Report:
    """settings.ini, pyproject.toml, CITATION.cff and the package say the same."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    settings = configparser.ConfigParser()
    settings.read(root / "settings.ini", encoding="utf-8")
    settings = settings["DEFAULT"]
    cited = re.search(r"(?m)^version: (\S+)", (root / "CITATION.cff").read_text(encoding="utf-8"))
    package = (root / "speechimg" / "__init__.py").read_text(encoding="utf-8")
    pairs = {
        "name": (project["name"], settings["lib_name"]),
        "version": (project["version"], settings["version"]),
        "Python": (project["requires-python"].lstrip(">="), settings["min_python"]),
        "description": (project["description"], settings["description"]),
        "version in CITATION.cff": (project["version"], cited and cited[1]),
        "__version__": (f'__version__ = "{project["version"]}"', package.strip()),
        "tst_flags": (SKIPPING, set(settings["tst_flags"].split())),
    }
    findings = [
        f"{what}: {one!r} here, {other!r} elsewhere"
        for what, (one, other) in pairs.items()
        if one != other
    ]
    return Report(findings, f"version {project['version']} everywhere")


GATES = {
    name.removeprefix("gate_"): function
    for name, function in list(globals().items())
    if name.startswith("gate_")
}


def main(names: list[str]) -> int:
    """Run the gates that are named, or all; print what each found; return how many failed."""
    unknown = set(names) - set(GATES)
    if unknown:
        sys.exit(f"no gate called {', '.join(sorted(unknown))}; there are {', '.join(GATES)}")
    broken = 0
    for name in names or GATES:
        findings, note = GATES[name](ROOT)
        print(
            f"  {'FAILED' if findings else 'passed'}  {name:<12} {'' if findings else note}",
            flush=True,
        )
        for line in findings:
            print(f"      {line}")
        broken += bool(findings)
    print(f"gates: {len(names or GATES) - broken} passed, {broken} failed")
    return broken


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
