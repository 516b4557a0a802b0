"""Gates: conventions that nobody has to remember, because this file says when one is broken.

    python tools/gates.py              # all of them; exit status 1 if one finds something
    python tools/gates.py floors tree  # some

The first five stop the ways in which a library written in notebooks goes wrong; the others keep the tree fit to be read.
Each gate is a function of the project's folder that returns what it found, one line each, and a note for the reader.
"""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import notebooks
from notebooks import ROOT, body, directives, source

# The floors of the house. A module imports only from floors below its own, and from NEIGHBOURS.
FLOORS = [
    {"core"},
    {"attention", "overview", "course"},
    {
        "data",
        "batching",
        "corpora",
        "speech",
        "image",
        "pretrained",
        "queue",
        "sic",
        "mining",
        "sim",
        "distillation",
        "distributed",
        "hubert",
        "large",
        "store",
        "layouts",
        "hub",
        "assignments",
        "worker",
        "walls",
        "sandbox",
    },
    {"model", "handout"},
    {"alignment", "retrieval"},
    {"runs"},
    {"train", "explore", "plan", "page", "project"},
    {"pairs", "grading", "gradebook", "classroom"},
    {"studio", "cli", "benchmark"},
]
NEIGHBOURS = {  # the allowed looks sideways
    "gradebook": {"grading"},
    "classroom": {"gradebook", "grading"},
    "sandbox": {"worker"},
    "walls": {"worker"},
    "layouts": {"store"},
    "corpora": {"data", "store", "layouts"},
    "image": {"speech"},  # what all towers end with (the peak, the reader) is taught once, in 03
    "pretrained": {"speech", "image"},  # the same, and the white square of 04
    "hubert": {"speech"},  # the paper's towers end with the same reader
    "large": {"speech", "image", "hubert"},  # its eyes, and both together
}

SKIPPING = {"notest", "gpu", "slow"}  # tst_flags of settings.ini
REASON = re.compile(r"(?i)\b(?:needs?|takes?|skipped|because|seconds?|minutes?|hours?)\b")
MARKED = re.compile(r"<!--\s*(assignment|task|question):")
MAX_LINES, MAX_CELLS, MAX_WORDS, MAX_BYTES = 250, 60, 1500, 500_000
MAX_FILE, MAX_CORPORA, MAX_MODEL = 50e6, 80e6, 15e6

# What a reader must never meet. Written so that the patterns do not find themselves.
UNWANTED = {
    "a path on one machine": r"(?<![\w.~:/-])/(?:home|root|Users|work|workspace|mnt|media|srv|tmp|private)/[\w.-]+",
    "the address of a package registry": r"(?i)\b(?:registry\.npmjs|files\.pythonhosted|pypi\.org|npmjs\.com|deb\.debian\.org|anaconda\.org)",
    "an unfinished note": r"\b(?:TO[D]O|FIX[M]E|XX[X])\b",
    "a word about how the text came about": r"(?i)\b(?:sub-?agent[s]?\b|a[i] assistant|this sessio[n]\b|wi[p]/|lorem ips[u]m)",
}


class Report(NamedTuple):
    findings: list[str]  # one line each; nothing means that the gate is passed
    note: str  # what was looked at


# What is in the tree


def tree(root: Path) -> list[Path]:
    "Every file that is committed or could be: tracked, and untracked but not ignored."
    top = subprocess.run(
        ["git", "rev-parse", "--show-toplevel"], cwd=root, capture_output=True, text=True
    )
    if top.returncode == 0 and Path(top.stdout.strip()).resolve() == root.resolve():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        names = (
            subprocess.run(command, cwd=root, capture_output=True, check=True)
            .stdout.decode()
            .split("\0")
        )
        return sorted({root / name for name in names if name and (root / name).is_file()})
    hidden = {
        ".git",
        ".venv",
        ".cache",
        "__pycache__",
        ".ipynb_checkpoints",
        ".pytest_cache",
        "runs",
        "site",
    }
    return sorted(
        path
        for path in root.rglob("*")
        if path.is_file() and not hidden & set(path.relative_to(root).parts)
    )


def modules(root: Path) -> dict[str, Path]:
    "The library's modules by name, without what nbdev writes for itself."
    return {
        path.relative_to(root / "speechimg").with_suffix("").as_posix().replace("/", "."): path
        for path in sorted((root / "speechimg").rglob("*.py"))
        if not path.stem.startswith("_")
    }


def exported_name(path: Path) -> str | None:
    "The module that a notebook exports to, if it exports."
    names = [directives(cell).get("default_exp") for cell in notebooks.read(path)["cells"]]
    return next((name for name in names if name), None)


def numbers(root: Path) -> dict[str, float]:
    "The number of each module: that of its notebook; 05b comes after 05 and before 06."
    found = {}
    for path in notebooks.paths(root):
        name, place = exported_name(path), re.match(r"(\d+)([a-z]?)_", path.name)
        if name and place:
            found[name] = (
                int(place[1]) + (ord(place[2]) - ord("`")) / 100 if place[2] else int(place[1])
            )
    return found


# 1. Stale and orphan modules


def gate_modules(root: Path) -> Report:
    "Exported again into an empty place, the notebooks give exactly the modules and notebooks that are here."
    findings = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(
            root / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints")
        )
        shutil.copy(root / "settings.ini", copy)
        (copy / "speechimg").mkdir()
        if (root / "speechimg" / "__init__.py").exists():
            shutil.copy(
                root / "speechimg" / "__init__.py", copy / "speechimg"
            )  # the one file written by hand
        try:
            notebooks.export(copy)
        except (RuntimeError, ValueError, KeyError) as error:
            return Report([f"nbs: cannot be exported: {error}"], "")
        here = {path.relative_to(root).as_posix(): path for path in tree(root)}
        made = {
            path.relative_to(copy).as_posix(): path
            for path in [*copy.glob("nbs/**/*.ipynb"), *copy.glob("speechimg/**/*")]
        }
        made = {name: path for name, path in made.items() if path.is_file()}
        for name in sorted(set(here) - set(made)):
            if name.startswith("speechimg/"):
                findings.append(f"{name}: orphan, no notebook exports it; remove it")
            if name.startswith("nbs/") and not name.startswith("nbs/index_files/"):
                findings.append(f"{name}: left over, no notebook; remove it")
        for name, path in sorted(made.items()):
            if name not in here:
                findings.append(f"{name}: missing; run `make export`")
            elif path.read_bytes() != here[name].read_bytes():
                findings.append(
                    f"{name}: {'not cleaned' if name.startswith('nbs/') else 'stale'}; run `make export`"
                )
    for path in notebooks.paths(root):
        name = exported_name(path)
        if name and path.stem.partition("_")[2] != name:
            findings.append(f"{path.name}: exports {name}, so its name should end on _{name}")
    for name, path in modules(root).items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            findings.append(
                f"speechimg/{name}.py: {lines} lines, more than {MAX_LINES}: two ideas?"
            )
    total = sum(
        len(path.read_text(encoding="utf-8").splitlines()) for path in modules(root).values()
    )
    return Report(
        findings,
        f"{len(modules(root))} modules, {total} lines, from {len(notebooks.paths(root))} notebooks",
    )


# 2. Modules that lean on a cell that is not exported


def gate_standalone(root: Path) -> Report:
    "Each module has all the names that it uses, says where each comes from, and can be imported alone."
    findings = []
    for name, path in modules(root).items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                findings.append(f"speechimg/{name}.py:{node.lineno}: star import")
    files = [str(path.relative_to(root)) for path in modules(root).values()]
    if files:
        done = subprocess.run(
            [sys.executable, "-m", "pyflakes", *files], cwd=root, capture_output=True, text=True
        )
        findings += (done.stdout + done.stderr).strip().splitlines()

    def imported(name: str) -> str:
        variables = {
            **os.environ,
            "PYTHONPATH": str(root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", f"import speechimg.{name}"]
            done = subprocess.run(
                command, cwd=folder, env=variables, capture_output=True, text=True
            )
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return (
            f"speechimg/{name}.py: cannot be imported alone: {last[0]}" if done.returncode else ""
        )

    with ThreadPoolExecutor(2) as pool:
        findings += [line for line in pool.map(imported, modules(root)) if line]
    return Report(findings, f"pyflakes, and {len(modules(root))} modules imported one by one")


# 3. Forward imports, and imports across floors


def imports(path: Path) -> set[tuple[str, int]]:
    "The modules of the library that a module imports anywhere, functions included: {(name, line)}."
    found, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and "'__main__'" in ast.dump(node.test))
    ]  # what runs as a program is no import
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {
                (name.split(".")[1], node.lineno) for name in names if name.startswith("speechimg.")
            }
        elif isinstance(node, ast.ImportFrom):
            inside = node.level == 1 or (node.module or "").split(".")[0] == "speechimg"
            module = (node.module or "") if node.level else (node.module or "").partition(".")[2]
            if inside and module:
                found.add((module.split(".")[0], node.lineno))
            elif inside:  # from . import core
                found |= {
                    (alias.name, node.lineno)
                    for alias in node.names
                    if not alias.name.startswith("_")
                }
    return found


def gate_floors(root: Path) -> Report:
    "A module imports only modules with a lower number, from a floor below its own."
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    number, findings, count = numbers(root), [], 0
    for name, path in modules(root).items():
        if name not in floor:
            findings.append(
                f"speechimg/{name}.py: on no floor; FLOORS in tools/gates.py should say which"
            )
            continue
        for other, line in sorted(imports(path)):
            count += 1
            where = f"speechimg/{name}.py:{line}: imports {other}"
            if other == name or other not in floor:
                findings.append(f"{where}, which is no other module of the house")
            elif number.get(other, -1) >= number.get(name, 1000):
                findings.append(
                    f"{where}, whose number is not lower ({number[other]:g} in {number[name]:g})"
                )
            elif floor[other] >= floor[name] and other not in NEIGHBOURS.get(name, set()):
                findings.append(f"{where}, which is not on a floor below")
    return Report(findings, f"{count} imports between {len(modules(root))} modules, all downwards")


# 4. Skipped cells


class Skipped(NamedTuple):
    where: str  # notebook and cell number
    flags: str  # what keeps the tests from running it
    reason: str  # "" if none is given


def skipped_cells(root: Path) -> list[Skipped]:
    "Every cell that the tests do not run. The reason is the comment under its directives, or the end of the text above."
    found = []
    for path in notebooks.paths(root):
        above = ""
        for index, cell in enumerate(notebooks.read(path)["cells"]):
            flags = directives(cell)
            skip = sorted(SKIPPING & set(flags)) + (
                ["eval: false"] if flags.get("eval", "").lower() == "false" else []
            )
            if (
                re.search(r"skip_exec\s*:\s*true", source(cell), re.I)
                and cell["cell_type"] != "code"
            ):
                skip = ["skip_exec (the whole notebook)"]
            if skip:
                first = (
                    (body(cell).strip().splitlines() or [""])[0]
                    if cell["cell_type"] == "code"
                    else ""
                )
                reason = (
                    first.lstrip("# ")
                    if first.startswith("#")
                    else above
                    if REASON.search(above)
                    else ""
                )
                found.append(Skipped(f"{path.name} cell {index}", ", ".join(skip), reason))
            if cell["cell_type"] == "markdown":
                above = (source(cell).strip().splitlines() or [""])[-1]
            elif not skip:
                above = ""
    return found


def compiles(code: str) -> str:
    "What Python says against a cell's code, IPython's own syntax included; '' if nothing."
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(
                TransformerManager().transform_cell(code),
                "cell",
                "exec",
                ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
            )
    except SyntaxError as error:
        return str(error)
    return ""


def gate_skipped(root: Path) -> Report:
    "Each cell that the tests do not run says why, and every cell is Python."
    cells = skipped_cells(root)
    findings = [
        f"{cell.where}: skipped ({cell.flags}) without a reason"
        for cell in cells
        if not cell.reason
    ]
    for path in notebooks.paths(root):
        if path.name.startswith(("_", ".")):
            findings.append(
                f"{path.name}: nbdev skips notebooks whose name starts with {path.name[0]}"
            )
        kernel = notebooks.read(path).get("metadata", {}).get("kernelspec", {})
        if kernel.get("language", "python") != "python":
            findings.append(
                f"{path.name}: the kernel's language is {kernel['language']}, so nbdev_test skips it"
            )
        for index, cell in enumerate(notebooks.read(path)["cells"]):
            problem = compiles(body(cell)) if cell["cell_type"] == "code" else ""
            if problem:
                findings.append(f"{path.name} cell {index}: {problem}")
    listed = "".join(
        f"\n      {cell.where} ({cell.flags}): {cell.reason}" for cell in cells if cell.reason
    )
    return Report(findings, f"{len(cells)} cells skipped{listed}")


# 5. Assignments


def gate_assignments(root: Path) -> Report:
    "Each mark of an assignment can be understood, and each assignment has what it needs."
    from speechimg.course.assignments import read_assignments

    findings, found = [], []
    for path in notebooks.paths(root):
        try:
            found += read_assignments(path)
        except ValueError as error:
            findings.append(str(error))
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
            f"{one.notebook}: assignment {one.name} lacks {what}"
            for what, there in needs.items()
            if not there
        ]
    return Report(findings, f"{len(found)} assignments: {', '.join(one.name for one in found)}")


# Notebooks that can be read


def words(text: str) -> int:
    "Words of prose: without code, formulas, HTML and the targets of links."
    text = re.sub(
        r"```.*?```|\$\$.*?\$\$|\$[^$\n]+\$|<[^>]+>|\]\([^)]*\)|`[^`]*`", " ", text, flags=re.S
    )
    return len(re.findall(r"[^\W_][\w'’-]*", text))


def gate_notebooks(root: Path) -> Report:
    "Each notebook is short, starts with its idea, shows what it ran, and ends with what comes next."
    findings = []
    for path in notebooks.paths(root):
        notebook, numbered = notebooks.read(path), path.name[:1].isdigit()
        cells = notebook["cells"]
        code = [
            cell
            for cell in cells
            if cell["cell_type"] == "code" and "check" not in directives(cell)
        ]
        prose = [source(cell) for cell in cells if cell["cell_type"] == "markdown"]
        counted = sum(
            words(text) for text in prose if not MARKED.match(text)
        )  # the text of an assignment is handed out by itself
        size = path.stat().st_size
        say = lambda problem: findings.append(f"{path.name}: {problem}")  # noqa: E731
        if size > MAX_BYTES:
            say(f"{size / 1000:.0f} kB, more than {MAX_BYTES // 1000}")
        if len(code) > MAX_CELLS:
            say(f"{len(code)} code cells, more than {MAX_CELLS}")
        if counted > MAX_WORDS:
            say(f"{counted} words, more than {MAX_WORDS}")
        if not cells or not re.match(r"# .+\n+> .+", source(cells[0])):
            say("the first cell is not `# Title` and `> one sentence`")
        outputs = [output for cell in code for output in cell.get("outputs", [])]
        if not outputs:
            say("no outputs; run `make notebooks`")
        if any(output["output_type"] == "error" for output in outputs):
            say("an output is an error; run `make notebooks`")
        if numbered and (
            not prose
            or not re.search(r"(?m)^#+ what comes next", prose[-1], re.I)
            or cells[-1]["cell_type"] != "markdown"
        ):
            say("does not end on a markdown cell `## What comes next`")
        if numbered and exported_name(path):
            tests = [cell for cell in code if not {"export", "exporti"} & set(directives(cell))]
            if not any(re.search(r"\bassert|assert_close\(", source(cell)) for cell in tests):
                say("no cell tests anything")
    return Report(
        findings, f"{len(notebooks.paths(root))} notebooks, each short, with outputs and tests"
    )


# The README


def gate_readme(root: Path) -> Report:
    "README.md is what nbs/index.ipynb gives."
    import readme

    if not (root / "nbs" / "index.ipynb").exists():
        return Report(["nbs/index.ipynb: missing"], "")
    return Report(readme.differences(root), "README.md is what nbs/index.ipynb gives")


# The tree as a whole


def readable(path: Path) -> str | None:
    "The text of a file as a reader meets it, without embedded pictures and sounds; None if it is no text."
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
                parts += output.get("traceback", [])
        text = "\n".join(part for part in parts if isinstance(part, str))
    return re.sub(r"base64,[A-Za-z0-9+/=\s]+", "base64,", text)


def prose(path: Path, text: str) -> str:
    "What of a file is markdown, without code and formulas in it."
    if path.suffix == ".ipynb":
        text = "\n\n".join(
            source(cell)
            for cell in notebooks.read(path)["cells"]
            if cell["cell_type"] == "markdown"
        )
    return (
        re.sub(r"(?s)```.*?```|\$\$.*?\$\$|\$[^$\n]+\$|`[^`\n]*`", "", text)
        if path.suffix in (".md", ".ipynb")
        else ""
    )


def broken_links(text: str, path: Path, names: set[str]) -> list[str]:
    "Links to files that are not there, and documents that are spoken of and are not in the tree."
    found = [
        f"speaks of {name}, which is not here"
        for name in sorted(set(re.findall(r"\b[\w-]+\.md\b", text)) - names)
    ]
    for target in re.findall(
        r"\]\((?!https?:|mailto:|data:|attachment:|#)([^)\s#]+)", prose(path, text)
    ):
        if not (path.parent / target).exists():
            found.append(f"links to {target}, which is not here")
    return found


def gate_tree(root: Path) -> Report:
    "No path of one machine, no unfinished note, no dead link, nothing too large."
    files, findings = tree(root), []
    names = {path.name for path in files}
    places = (
        rf"(?<![\w.~-])(?:{re.escape(str(root.resolve()))}(?![\w-])|{re.escape(str(Path.home()))}/)"
    )
    patterns = {**UNWANTED, "a path of this machine": places}
    size = {path: path.stat().st_size for path in files}
    for path in files:
        name = path.relative_to(root).as_posix()
        if size[path] > MAX_FILE:
            findings.append(f"{name}: {size[path] / 1e6:.0f} MB, more than {MAX_FILE / 1e6:.0f}")
        text = readable(path)
        if text is None or name == "LICENSE":
            continue
        for what, pattern in patterns.items():
            for match in list(re.finditer(pattern, text))[:3]:
                findings.append(
                    f"{name}: {what}: {text[max(0, match.start() - 20) : match.end() + 20]!r}"
                )
        findings += [f"{name}: {problem}" for problem in broken_links(text, path, names)]
    corpora = sum(size[path] for path in files if path.parent == root / "data")
    if corpora > MAX_CORPORA:
        findings.append(f"data: {corpora / 1e6:.0f} MB together, more than {MAX_CORPORA / 1e6:.0f}")
    for folder in (root / "data" / "models").glob("*/"):
        weight = sum(size[path] for path in files if path.is_relative_to(folder))
        if weight > MAX_MODEL:
            findings.append(
                f"data/models/{folder.name}: {weight / 1e6:.0f} MB, more than {MAX_MODEL / 1e6:.0f}"
            )
    return Report(findings, f"{len(files)} files, {sum(size.values()) / 1e6:.1f} MB")


# One version


def gate_versions(root: Path) -> Report:
    "settings.ini, pyproject.toml, CITATION.cff and the package say the same."
    with open(root / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    settings = configparser.ConfigParser()
    settings.read(root / "settings.ini", encoding="utf-8")
    settings = settings["DEFAULT"]
    cited = re.search(r"(?m)^version: (\S+)", (root / "CITATION.cff").read_text(encoding="utf-8"))
    package = re.search(
        r'__version__ = "([^"]+)"', (root / "speechimg" / "__init__.py").read_text(encoding="utf-8")
    )
    pairs = {
        "name": (project["name"], settings["lib_name"]),
        "version": (project["version"], settings["version"]),
        "Python": (project["requires-python"].lstrip(">="), settings["min_python"]),
        "description": (project["description"], settings["description"]),
        "version in CITATION.cff": (project["version"], cited and cited[1]),
        "__version__": (project["version"], package and package[1]),
    }
    findings = [
        f"{what}: {here!r} in pyproject.toml, {there!r} elsewhere"
        for what, (here, there) in pairs.items()
        if here != there
    ]
    if set(settings["tst_flags"].split()) != SKIPPING:
        findings.append("settings.ini: tst_flags are not those that the gate 'skipped' knows")
    return Report(findings, f"version {project['version']} everywhere")


GATES = {
    name.removeprefix("gate_"): function
    for name, function in list(globals().items())
    if name.startswith("gate_")
}


def main(names: list[str]) -> int:
    "Run the gates that are named, or all; print what each found; return how many found something."
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
