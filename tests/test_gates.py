"Each gate passes on a small sound project, and finds the one defect planted in a copy of it."

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbdev.config
import pytest
from forked import Child

ROOT = Path(__file__).resolve().parent.parent
import gates
import map as house_map
import notebooks
import readme

ROOMS = """
[[shelf]]
title = "Learn"
about = "In order."
folder = ""
rooms = ["01_data"]

[[shelf]]
title = "Research"
about = "In need."
folder = "research"
rooms = ["core", "model"]

[floors]
house = ["model", "data", "core"]
"""
CORE = "#| export\ndef twice(x):\n    'Two times x.'\n    return 2 * x"
DATA = """#| export
from speechimg.core import twice

def four(x):
    'Four times x.'
    return twice(twice(x))"""
MODEL = "#| export\nfrom speechimg.data import four\n\nsixteen = four(four(1))"


def cell(text, kind="code", output=None):
    "One cell, as a notebook holds it."
    made = {"cell_type": kind, "metadata": {}, "source": text}
    if kind == "code":
        shown = [{"output_type": "stream", "name": "stdout", "text": output}] if output else []
        made |= {"execution_count": None, "outputs": shown}
    return made


def notebook(title, name, *cells):
    "A notebook in the rhythm that the gates ask for."
    start = [
        cell(f"# {title}\n> {title} in one sentence.", "markdown"),
        cell(f"#| default_exp {name}"),
    ]
    end = [cell("assert True"), cell("## What comes next\nThe next one.", "markdown")]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return {"cells": [*start, *cells, *end], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}


def save(folder, name, content):
    (folder / "nbs" / f"{name}.ipynb").write_text(json.dumps(content))


def edit(folder, name, change):
    "Change a notebook's cells and write it back as nbdev would."
    path = folder / "nbs" / f"{name}.ipynb"
    content = notebooks.read(path)
    change(content["cells"])
    notebooks.write(path, content)


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    "A small project without a defect."
    folder = tmp_path_factory.mktemp("sound") / "with a space"
    (folder / "nbs" / "research").mkdir(parents=True)
    (folder / "speechimg").mkdir()
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (folder / "nbs" / "rooms.toml").write_text(ROOMS)
    for name in ("settings.ini", "pyproject.toml", "CITATION.cff", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    save(
        folder,
        "research/core",
        notebook("Core", "core", cell(CORE), cell("print(twice(2))", output="4\n")),
    )
    save(
        folder,
        "01_data",
        notebook("Data", "data", cell(DATA), cell("print(four(2))", output="8\n")),
    )
    save(
        folder,
        "research/model",
        notebook("Model", "model", cell(MODEL), cell("four(1)", output="4\n")),
    )
    index = [
        cell(
            "# speechimg\n> All of it.\n\n[core](research/core.ipynb), [licence](../LICENSE).",
            "markdown",
        ),
        cell("#| echo: false\nprint('a table')", output="a table\n"),
        cell("#| hide\nsecret = 1"),
    ]
    content = {**notebook("", "none"), "cells": index}
    content["cells"][1]["outputs"].append(
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {"image/png": "aGVsbG8=", "text/plain": "<Figure>"},
        }
    )
    save(folder, "index", content)
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", "."], cwd=folder, check=True)
    notebooks.export(folder)
    readme.write(folder)
    house_map.write(folder)
    return folder


def forked_nbdev(root, module, name):
    "As notebooks.nbdev, in a fork of this process, where nbdev has been imported."

    def work():
        os.chdir(root)
        nbdev.config.get_config.cache_clear()
        getattr(importlib.import_module(f"nbdev.{module}"), name).__wrapped__()

    with tempfile.TemporaryFile("w+") as said:
        code = Child(work, os.environ, subprocess.DEVNULL, said, said).wait()
        said.seek(0)
        return subprocess.CompletedProcess([], code, stderr=said.read())


@pytest.fixture(scope="module", autouse=True)
def nbdev_is_imported_once(sound):
    "The sound project is exported as people do it, the copies that are spoilt by forks."
    for name in ("clean", "doclinks"):
        importlib.import_module(f"nbdev.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notebooks, "nbdev", forked_nbdev)
        yield


@pytest.fixture
def project(sound, tmp_path):
    "A copy of the sound project to spoil."
    return Path(shutil.copytree(sound, tmp_path / "a copy"))


def add_module(folder):
    (folder / "speechimg" / "orphan.py").write_text("x = 1\n")


def stale_module(folder):
    with open(folder / "speechimg" / "data.py", "a") as file:
        file.write("\nextra = 1\n")


def missing_module(folder):
    (folder / "speechimg" / "data.py").unlink()


def uncleaned(folder):
    edit(folder, "01_data", lambda cells: cells[2].update(execution_count=7))


def junk(folder):
    (folder / "nbs" / "out.bin").write_bytes(b"\0")


def misnamed(folder):
    edit(folder, "01_data", lambda cells: cells[1].update(source="#| default_exp speech"))
    notebooks.export(folder)
    missing_module(folder)


def leans(folder):
    edit(
        folder,
        "01_data",
        lambda cells: cells[2].update(source=DATA.replace("twice(twice(x))", "thrice(x)")),
    )
    notebooks.export(folder)


def star(folder):
    edit(
        folder,
        "01_data",
        lambda cells: cells[2].update(source=DATA.replace("import twice", "import *")),
    )
    notebooks.export(folder)


def unimportable(folder):
    edit(
        folder, "01_data", lambda cells: cells[2].update(source=DATA + "\n\neight = four('x') / 2")
    )
    notebooks.export(folder)


def cycle(folder):
    more = "\n\n\ndef eight(x):\n    from speechimg.data import four\n\n    return four(x)"
    edit(folder, "research/core", lambda cells: cells[2].update(source=CORE + more))
    notebooks.export(folder)


def unknown_room(folder):
    (folder / "speechimg" / "helper.py").write_text("x = 1\n")


def unlisted_notebook(folder):
    save(folder, "research/more", notebook("More", "more"))


def unused_import(folder):
    edit(folder, "01_data", lambda cells: cells[3].update(source="import os"))


def two_statements(folder):
    edit(folder, "01_data", lambda cells: cells[3].update(source="a = 1; print(a)"))


def long_line(folder):
    (folder / "notes.py").write_text(f"# {'long ' * 30}\n")


def too_many_names(folder):
    names = "\n".join(f"    a{number} = {number}" for number in range(16))
    (folder / "notes.py").write_text(f"def f():\n{names}\n    return locals()\n")


def long_cell(folder):
    lines = "".join(f"a{number} = {number}\n" for number in range(41))
    edit(folder, "01_data", lambda cells: cells[2].update(source=f"{DATA}\n\n\n{lines}"))


def large_tools(folder):
    (folder / "tools").mkdir()
    (folder / "tools" / "big.py").write_text("x = 1\n" * 1501)


def stale_map(folder):
    (folder / "nbs" / "map" / "data.svg").write_text("<svg/>")


def no_reason(folder):
    edit(folder, "01_data", lambda cells: cells[3].update(source="#| gpu\nfour(2)"))


def eval_false(folder):
    edit(folder, "01_data", lambda cells: cells[3].update(source="#| eval: false\nfour(2)"))


def whole_notebook(folder):
    edit(
        folder,
        "01_data",
        lambda cells: cells[0].update(source="# Data\n> One sentence.\n- skip_exec: true"),
    )


def not_python(folder):
    edit(
        folder, "01_data", lambda cells: cells[3].update(source="#| slow\n# takes an hour\nfour(2")
    )


def other_kernel(folder):
    path = folder / "nbs" / "01_data.ipynb"
    path.write_text(path.read_text().replace('"language": "python"', '"language": "R"'))


def heavy(folder):
    edit(folder, "01_data", lambda cells: cells[3]["outputs"][0].update(text="x" * 500_001))


def many_cells(folder):
    edit(folder, "01_data", lambda cells: cells.extend([cell("1")] * 60))


def many_words(folder):
    edit(
        folder,
        "01_data",
        lambda cells: cells[0].update(source=cells[0]["source"] + "\n\n" + "word " * 1500),
    )


def no_outputs(folder):
    edit(folder, "01_data", lambda cells: cells[3].update(outputs=[]))


def failed_output(folder):
    error = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
    edit(folder, "01_data", lambda cells: cells[3].update(outputs=[error]))


def untitled(folder):
    edit(folder, "01_data", lambda cells: cells[0].update(source="Data"))


def no_end(folder):
    edit(folder, "01_data", lambda cells: cells.pop())


def untested(folder):
    edit(folder, "01_data", lambda cells: cells.pop(-2))


def stale_readme(folder):
    edit(folder, "index", lambda cells: cells[0].update(source=cells[0]["source"] + "\n\nMore."))


def stale_picture(folder):
    edit(
        folder,
        "index",
        lambda cells: cells[1]["outputs"][1]["data"].update({"image/png": "aGVsbG9v"}),
    )


def picture_left(folder):
    (folder / "nbs" / "index_files" / "old.png").write_bytes(b"old")


def machine_path(folder):
    edit(
        folder,
        "01_data",
        lambda cells: cells[3]["outputs"][0].update(text="saved to " + "/home" + "/ann/out.png"),
    )


def checkout_path(folder):
    (folder / "notes.txt").write_text(f"see {folder.resolve()}\n")


def unwanted_word(folder):
    (folder / "notes.txt").write_text("TO" + "DO: finish\n")


def registry(folder):
    (folder / "notes.txt").write_text("https://files.python" + "hosted.org/x\n")


def dead_document(folder):
    (folder / "notes.py").write_text("# see method." + "md\n")


def large_model(folder):
    (folder / "data" / "models" / "big").mkdir(parents=True)
    (folder / "data" / "models" / "big" / "model.safetensors").write_bytes(bytes(15_000_001))


def other_version(folder):
    (folder / "speechimg" / "__init__.py").write_text('__version__ = "9.9.9"\n')


DEFECTS = [
    ("modules", add_module, "speechimg/orphan.py: orphan"),
    ("modules", stale_module, "speechimg/data.py: stale"),
    ("modules", missing_module, "speechimg/data.py: missing"),
    ("modules", uncleaned, "nbs/01_data.ipynb: not cleaned"),
    ("modules", junk, "nbs/out.bin: left over"),
    ("modules", misnamed, "01_data.ipynb: exports speech"),
    ("modules", unlisted_notebook, "nbs/research/more.ipynb: on no shelf"),
    ("lint", leans, "ndefined name `thrice`"),
    ("lint", star, "undefined-local-with-import-star"),
    ("lint", not_python, "invalid-syntax"),
    ("lint", unused_import, "unused-import"),
    ("lint", two_statements, "01_data.ipynb"),
    ("lint", long_line, "line-too-long"),
    ("lint", too_many_names, "too-many-locals"),
    ("alone", unimportable, "cannot be imported alone: TypeError"),
    ("floors", cycle, "speechimg.core -> speechimg.data"),
    ("floors", unknown_room, "speechimg.helper: on no floor"),
    ("skipped", no_reason, "skipped (gpu) without a reason"),
    ("skipped", eval_false, "skipped (eval: false) without a reason"),
    ("skipped", whole_notebook, "skip_exec"),
    ("skipped", other_kernel, "language is not Python"),
    ("notebooks", heavy, "kB, more than 500"),
    ("notebooks", many_cells, "code cells, more than 60"),
    ("notebooks", many_words, "words, more than 1500"),
    ("notebooks", long_cell, "an exported cell of"),
    ("notebooks", no_outputs, "no outputs"),
    ("notebooks", failed_output, "an output is an error"),
    ("notebooks", untitled, "first cell"),
    ("notebooks", no_end, "What comes next"),
    ("notebooks", untested, "no cell tests anything"),
    ("budgets", large_tools, "tools: 1,501 lines"),
    ("readme", stale_readme, "README.md: not what"),
    ("readme", stale_picture, ".png: not what"),
    ("readme", picture_left, "old.png: left over"),
    ("readme", stale_map, "nbs/map/data.svg: missing or stale"),
    ("tree", machine_path, "01_data.ipynb: a path on one machine"),
    ("tree", checkout_path, "notes.txt: a path of this machine"),
    ("tree", unwanted_word, "an unfinished note"),
    ("tree", registry, "package registry"),
    ("tree", dead_document, "which is not here"),
    ("tree", large_model, "big: 15 MB, more than 15"),
    ("versions", other_version, "__version__"),
]


@pytest.mark.parametrize("name", [name for name in gates.GATES if name != "assignments"])
def test_sound_project_passes(sound, name):
    assert gates.GATES[name](sound).findings == []


@pytest.mark.parametrize(
    "name, spoil, message", DEFECTS, ids=[spoil.__name__ for _, spoil, _ in DEFECTS]
)
def test_gate_finds_the_defect(project, name, spoil, message):
    spoil(project)
    findings = gates.GATES[name](project).findings
    assert any(message in line for line in findings), findings
    assert all("\n" not in line for line in findings)


def test_every_gate_has_a_defect():
    # those of assignments are in test_course.py: they need a course
    assert {name for name, _, _ in DEFECTS} == set(gates.GATES) - {"assignments"}


def test_untracked_files_are_seen_and_ignored_ones_are_not(project):
    (project / ".gitignore").write_text("ignored.py\n")
    add_module(project)
    (project / "speechimg" / "ignored.py").write_text("x = 1\n")
    findings = gates.gate_modules(project).findings
    assert [line.split(":")[0] for line in findings] == ["speechimg/orphan.py"]


def test_reasons_are_listed(project):
    edit(
        project,
        "01_data",
        lambda cells: cells[3].update(source="#| slow\n# two hours on one GPU\nfour(2)"),
    )
    report = gates.gate_skipped(project)
    assert report.findings == [] and "two hours on one GPU" in report.note
    edit(project, "01_data", lambda cells: cells[3].update(source="#| gpu\nfour(2)"))
    edit(
        project,
        "01_data",
        lambda cells: cells.insert(3, cell("Needs one GPU and takes ten minutes.", "markdown")),
    )
    assert "takes ten minutes" in gates.gate_skipped(project).note


def test_ids_do_not_depend_on_chance(project):
    edit(project, "01_data", lambda cells: [one.pop("id") for one in cells])
    other = Path(shutil.copytree(project, project.parent / "other"))
    for folder in (project, other):
        notebooks.export(folder)
    for name in ("nbs/01_data.ipynb", "speechimg/data.py"):
        assert (project / name).read_bytes() == (other / name).read_bytes()


def test_readme_hides_and_moves_links(sound):
    text = (sound / "README.md").read_text()
    assert "secret" not in text and "print(" not in text and "a table" in text and "#|" not in text
    assert "](nbs/research/core.ipynb)" in text and "](LICENSE)" in text
    assert [path.read_bytes() for path in (sound / "nbs" / "index_files").iterdir()] == [b"hello"]


def test_words_counts_prose():
    assert (
        gates.words(
            "Two words $x + y$ and `code` [here](http://a.b/c).\n```\nnot this at all\n```\n"
        )
        == 4
    )
