"What every test can rely on: one thread, the same draws each time, and shared features."

import os
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "experiments")]
# Features of the corpora are computed once for the whole of `make test`, inside the clone; tests
# that must not see them (or that damage them on purpose) ask for `fresh_cache`.
os.environ.setdefault("SPEECHIMG_CACHE", str(ROOT / ".cache"))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")

# No clock: on a busy machine examples come slowly, and nothing is wrong.
hypothesis.settings.register_profile(
    "project",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=True,
    max_examples=30,
    database=None,
)
hypothesis.settings.load_profile("project")


def pytest_configure(config):
    "Sums differ in their last bits with the number of threads; two processes use two cores."
    import torch

    torch.set_num_threads(1)
    # torch.compile keeps code for any user of the machine, and does not note for which
    # instructions: vectors of eight, read back where sixteen fit, write beyond their ends.
    compiled = tempfile.TemporaryDirectory(prefix="speechimg-compiled-")  # not ROOT: no spaces
    config.add_cleanup(compiled.cleanup)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled.name


# With two processes that each take a file after the other, the last should be short ones.
LONGEST = "course soak website browser train large distributed wheel learning".split()


# What a test waits for when it asks for these: a class that is graded, a wall that is built.
TAKES_LONG = {"classroom", "boxes"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "The files that take longest first, in which the order stays; slow is what waits long."
    names = [f"test_{name}" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else 99)
    for item in items:
        if TAKES_LONG & set(item.fixturenames):
            item.add_marker("slow")


@pytest.fixture(autouse=True)
def same_draws():
    "A test that forgets to pass a generator still draws the same numbers in every run."
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    "A training draws its curves only for a test that asks for `curves`: more than 12 steps cost."
    if "curves" not in request.fixturenames:
        monkeypatch.setattr("speechimg.train.draw_curves", lambda log, path: path.touch())


@pytest.fixture
def curves():
    "Trainings of this test draw their curves."


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    "An empty feature cache, for this test only."
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPEECHIMG_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def root():
    "The project's folder."
    return ROOT
