"The tools behind `make`: installing, running notebooks, publishing, the demo, the Makefile."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
import demo
import install
import notebooks
import publish

# Installing


@pytest.fixture
def place(tmp_path, monkeypatch):
    "An empty project folder whose name has a space, in which pip and venv are only written down."
    folder, calls = tmp_path / "a place", []
    (folder / "tools").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "install.py", folder / "tools")
    (folder / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(install, "__file__", str(folder / "tools" / "install.py"))
    monkeypatch.setattr(
        install, "version_of", lambda python: (3, 12) if os.path.exists(python) else None
    )
    monkeypatch.chdir(folder)

    def make():
        calls.append("venv")
        Path(install.PYTHON).parent.mkdir(parents=True)
        Path(install.PYTHON).touch()

    monkeypatch.setattr(install, "make_venv", make)
    monkeypatch.setattr(install, "install", lambda extras: calls.append(extras))
    return calls


def test_installs_once(place):
    install.main([])
    install.main([])
    assert place == ["venv", []]


def test_installs_again_when_something_changed(place):
    install.main([])
    install.main(["dev"])
    install.main([])  # what is there stays
    assert place == ["venv", [], ["dev"]]
    Path("pyproject.toml").write_text("[project]\nname = 'other'\n")
    install.main([])
    assert place[3:] == [["dev"]]
    moved = Path.cwd().parent / "moved"
    Path.cwd().rename(moved)  # an editable install points to where the folder was
    install.__file__ = str(moved / "tools" / "install.py")
    install.main([])
    assert place[4:] == [["dev"]]


def test_a_failed_installation_is_not_remembered(place, monkeypatch):
    monkeypatch.setattr(install, "install", lambda extras: sys.exit("pip failed"))
    with pytest.raises(SystemExit):
        install.main([])
    assert install.installed() == []


def test_old_python_is_named(monkeypatch):
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer; `python3` here is 3\.9"):
        install.find_python()
    monkeypatch.setattr(install.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        install, "version_of", lambda python: (3, 12) if python == "python3.12" else None
    )
    assert install.find_python() == "python3.12"


def test_install_runs_on_old_pythons():
    "It must get as far as its message there: no syntax that an old Python refuses."
    import ast

    text = (ROOT / "tools" / "install.py").read_text()
    ast.parse(text, feature_version=(3, 4))
    assert not re.search(r"""\bf["']""", text)


# Notebooks


def cell(text):
    return {"cell_type": "code", "source": text}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("#| export\nx = 1", {"export": ""}),
        ("#| default_exp core", {"default_exp": "core"}),
        ("\n#|eval: false\n# | gpu\nx", {"eval": "false", "gpu": ""}),
        ("#| fig-alt: two words: three\nx", {"fig-alt": "two words: three"}),
        ("x = 1\n#| export", {}),
        ("# a comment\n#| export", {}),
    ],
)
def test_directives(text, expected):
    assert notebooks.directives(cell(text)) == expected


def test_directives_are_those_of_nbdev():
    from types import SimpleNamespace

    from nbdev.process import extract_directives

    for path in notebooks.paths(ROOT):
        for one in notebooks.read(path)["cells"]:
            if one["cell_type"] == "code":
                theirs = extract_directives(
                    SimpleNamespace(source=notebooks.source(one)), remove=False
                )
                assert {name.rstrip(":") for name in theirs} == set(notebooks.directives(one)), (
                    path.name
                )


def test_a_failing_notebook_is_reported(tmp_path, monkeypatch, capsys):
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "nbs").mkdir()
    for name, code in (("00_good", "assert True"), ("01_bad", "assert 1 == 2")):
        cells = [
            {
                "cell_type": "code",
                "id": "a",
                "metadata": {},
                "execution_count": None,
                "outputs": [],
                "source": code,
            }
        ]
        content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
        (tmp_path / "nbs" / f"{name}.ipynb").write_text(json.dumps(content))
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    assert notebooks.test(notebooks.paths(tmp_path), workers=2) == 1
    said = capsys.readouterr()
    assert (
        "passed  00_good" in said.out
        and "FAILED  01_bad" in said.out
        and "AssertionError" in said.err
    )
    assert set(json.loads((tmp_path / ".cache" / "notebook_seconds.json").read_text())) == {
        "00_good",
        "01_bad",
    }


# The demo, and publishing a model


def test_bar():
    assert (
        demo.bar(0).strip() == ""
        and demo.bar(100) == "█" * 30
        and demo.bar(50).rstrip() == "█" * 15
    )
    assert all(len(demo.bar(percent / 3)) == 30 for percent in range(-9, 330))


@pytest.fixture(scope="module")
def miniature_project(tmp_path_factory):
    "A data folder with miniature corpora and a model that has learnt nothing."
    import miniature
    from toys import tiny_model

    from speechimg.core import write_json

    data = tmp_path_factory.mktemp("a project") / "data"
    miniature.make_corpus(
        data / "scenes", 12, 2, splits=("train", "val", "test", "test_style", "voice"), zip=True
    )
    files = miniature.make_files(8, 1, splits=("all",))
    files.pop("swap.json", None)
    miniature.write_files(data / "stamps", files, zip=True)
    miniature.make_corpus(data / "things", 12, 2, splits=("test", "test_sentences"), zip=True)
    (data / "towers").symlink_to(Path(__file__).resolve().parent.parent / "data" / "towers")
    run = data.parent / "run"
    tiny_model(queue_size=16).save_pretrained(run)
    write_json(
        run / "metrics.json",
        {"command": "speechimg train --config config.json", "seed": 0, "steps": 0, "seconds": 1.0},
    )
    return data


@pytest.mark.slow
def test_publish_and_demo(miniature_project, tmp_path, monkeypatch, capsys, fresh_cache):
    "From a run to metrics that the front page can read, then the whole demo on it, twice."
    monkeypatch.setenv("SPEECHIMG_DATA", str(miniature_project))
    folder = miniature_project / "models" / "reference"
    metrics = publish.publish(miniature_project.parent / "run", folder)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {"stamps_en", "stamps_en_noun", "test", "test_style", "voice"} <= set(
        metrics["evaluations"]
    )
    assert (
        metrics["evaluations"]["test"]["swap"] and not metrics["evaluations"]["test_style"]["swap"]
    )
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "metrics.json",
        "model.safetensors",
    ]

    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(
        demo,
        "SMALL",
        demo.SMALL
        | {"width": 16, "dim": 8, "heads": 2, "batch_size": 8, "steps": 4, "evaluate_every": 2},
    )
    monkeypatch.setattr(sys, "argv", ["demo.py", "--seconds", "1"])
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        demo.main()
        said = capsys.readouterr().out
        assert all(
            part in said
            for part in (
                "1  Scenes",
                "2  People",
                "3  Six",
                "4  A small model",
                "swap probe",
                "answers.html",
            )
        )
        page = (tmp_path / "runs" / "demo" / "answers.html").read_text()
        assert page.count("<audio") == 6 and "http" not in re.sub(r"data:[^\"]+", "", page)
    assert sorted(path.name for path in (tmp_path / "runs" / "demo").iterdir()) == ["answers.html"]


def test_demo_without_a_model_says_so_in_one_line(miniature_project, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECHIMG_DATA", str(tmp_path))
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^demo: reference: [^\n]+$"):
        demo.main()


# The Makefile


def make(*arguments):
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_make_lists_its_commands():
    text = make().stdout
    assert all(
        f"make {name} " in text
        for name in (
            "demo",
            "test",
            "check",
            "lab",
            "corpora",
            "reference",
            "small",
            "notebooks",
            "readme",
            "export",
            "soak",
            "site",
        )
    )


@pytest.mark.parametrize(
    "target", ["demo", "test", "check", "reference", "corpora", "notebooks", "site"]
)
def test_make_uses_relative_paths_only(target):
    "A folder's name may hold spaces: no recipe spells it out, none calls a script of `.venv/bin`."
    recipe = make("-n", target)
    assert recipe.returncode == 0 and str(ROOT) not in recipe.stdout
    assert set(re.findall(r"\.venv/bin/(\w+)", recipe.stdout)) <= {"python"}


def test_missing_python_is_named():
    done = make("PYTHON=no-such-python", "install")
    assert done.returncode != 0 and "no 'no-such-python' here" in done.stdout + done.stderr
