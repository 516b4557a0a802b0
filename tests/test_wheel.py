"Elsewhere: the package from a wheel, a notebook in an empty folder, the data of a clone."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
import notebooks

INSTALL = """try:
    import speechimg
except ImportError:
    %pip install -q speechimg
"""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A folder with nothing but the installed wheel."
    home = tmp_path_factory.mktemp("wheel")
    for name in ("speechimg", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        shutil.copytree(
            source, home / "source" / name, ignore=shutil.ignore_patterns("__pycache__")
        ) if source.is_dir() else shutil.copy(source, home / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", home, home / "source"],
        check=True,
        capture_output=True,
    )
    (wheel,) = home.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", home / "site", wheel],
        check=True,
        capture_output=True,
    )
    return home / "site"


def environment(installed, data=None):
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in ("SPEECHIMG_DATA", "MPLBACKEND")
    }
    return (
        own
        | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
        | ({"SPEECHIMG_DATA": str(data)} if data else {})
    )


def python(code, folder, *arguments, limit=120, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=limit,
        **options,
    )


def library(folder):
    "The files of a package, from its folder; without what Python keeps for itself."
    files = [path for path in (folder / "speechimg").rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix() for path in files if path.suffix != ".pyc"}


def test_the_wheel_is_what_is_imported_and_holds_every_module(installed, tmp_path):
    done = python(
        "import speechimg; print(speechimg.__file__)", tmp_path, env=environment(installed)
    )
    assert Path(done.stdout.strip()).parent == installed / "speechimg"
    assert library(installed) == library(ROOT)


ASK = """
import os, sys
from speechimg.core import InputError, data_dir
for folder, data in zip(sys.argv[1::2], sys.argv[2::2]):
    os.chdir(folder)
    os.environ["SPEECHIMG_DATA"] = data
    if not data:
        del os.environ["SPEECHIMG_DATA"]
    try:
        print(data_dir())
    except InputError as error:
        print(error)
"""


def test_data_is_found_or_one_line_says_how_to_get_it(installed, tmp_path):
    inside = tmp_path / "clone" / "nbs"
    inside.mkdir(parents=True)
    (tmp_path / "clone" / "data").symlink_to(ROOT / "data")
    other = tmp_path / "other" / "data"
    other.mkdir(parents=True)  # a folder of that name with other things in it is not taken for it
    asked = [tmp_path, ROOT / "data", inside, "", other.parent, ""]
    done = python(ASK, tmp_path, *map(str, asked), env=environment(installed))
    assert not done.returncode, done.stderr
    named, found, missing = done.stdout.splitlines()
    assert named == str(ROOT / "data")
    assert Path(found).samefile(ROOT / "data")
    assert "clone" in missing and "SPEECHIMG_DATA" in missing


BOOKS = ["index", "05_image", "research/store", "research/hub", "research/model"]
# Each in a fork of a process that has imported what they have in common, the library apart.
RUN = """
import os, sys, traceback
import execnb.shell, seaborn, torchaudio
from execnb.nbio import read_nb
for number, path in enumerate(sys.argv[1:]):
    child = os.fork()
    if not child:
        try:
            os.mkdir(str(number))
            os.chdir(str(number))
            execnb.shell.CaptureShell().run_all(read_nb(path), exc_stop=True)
            print(number, sys.modules["speechimg"].__file__, flush=True)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def ran(installed, tmp_path_factory):
    "Where each notebook, in an empty folder, had its library from; and what went wrong."
    folder = tmp_path_factory.mktemp("empty")
    paths = [str(ROOT / "nbs" / f"{name}.ipynb") for name in BOOKS]
    done = python(RUN, folder, *paths, env=environment(installed, ROOT / "data"), limit=900)
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line[:1].isdigit())
    return {name: lines.get(str(number)) for number, name in enumerate(BOOKS)}, done.stderr


@pytest.mark.parametrize("name", BOOKS)
def test_a_notebook_in_an_empty_folder(name, ran, installed):
    found, said = ran
    assert found[name] == str(installed / "speechimg" / "__init__.py"), said[-3000:]


@pytest.mark.parametrize("path", notebooks.paths(ROOT), ids=notebooks.name_of)
def test_the_first_code_cell_installs_what_is_missing(path):
    "And does nothing where it is there, so that a clone runs its own code."
    if path.stem == "index":
        return
    first = next(
        notebooks.source(cell)
        for cell in notebooks.read(path)["cells"]
        if cell["cell_type"] == "code"
    )
    assert first.startswith(INSTALL.strip()), first
