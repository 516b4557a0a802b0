"""As people use it: JupyterLab in a browser, sliders moved, a recording made with a microphone.

The microphone is a file. Needs chromium (`.ci/run` installs it). Screenshots are kept in
.cache/screenshots; look at them after a change.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from speechimg.corpora import load_corpus

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
MINUTES = 60_000  # milliseconds
# in the page
NOTEBOOK = "window.jupyterapp?.shell.currentWidget"
KERNEL = f"{NOTEBOOK}?.sessionContext?.session?.kernel"
CELLS = f"{NOTEBOOK}.content.model.toJSON().cells"
TOLD = "document.querySelector('.speechimg-message').textContent"
pytestmark = pytest.mark.slow


def leave_only(home, name, texts):
    "Leave only some cells of a notebook: what else it computes is run by other tests."
    path = home / "nbs" / f"{name}.ipynb"
    book = json.loads(path.read_text("utf-8"))
    book["cells"] = [
        cell
        for cell in book["cells"]
        if cell["cell_type"] == "code" and any(text in "".join(cell["source"]) for text in texts)
    ]
    assert len(book["cells"]) >= len(texts)
    path.write_text(json.dumps(book), "utf-8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The address of a JupyterLab whose root is a copy of the notebooks, with settings of its own."
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(
        ROOT / "nbs",
        home / "nbs",
        ignore=shutil.ignore_patterns(".ipynb_checkpoints", "index_files"),
    )
    settings = home / "settings" / "@jupyterlab"
    for plugin, values in {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }.items():
        file = settings / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "IPYTHONDIR": home / "ipython",
        "SPEECHIMG_DATA": ROOT / "data",
        "OMP_NUM_THREADS": 1,
        "MPLBACKEND": "",
        "IN_TEST": 1,  # with fewer recordings, where a notebook knows how
    }
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | {
        name: str(value) for name, value in own.items() if value != ""
    }
    environment.setdefault("SPEECHIMG_CACHE", str(ROOT / ".cache"))
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--allow-root",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={home}",
        "--LabApp.expose_app_in_browser=True",
        "--ServerApp.disable_check_xsrf=True",
    ]
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (home / "lab.log").read_text()[-2000:]
                time.sleep(0.5)
        yield SimpleNamespace(address=f"http://127.0.0.1:{port}", keep=partial(leave_only, home))
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "Chromium, whose microphone hears one of the bundled recordings over and over."
    if not CHROMIUM:
        assert not os.environ.get("SPEECHIMG_BROWSER"), (
            "the browser tests were asked for, and there is no chromium"
        )
        pytest.skip("needs chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    voice, rate = tmp_path_factory.mktemp("voice") / "voice.wav", 16_000
    corpus = load_corpus("scenes", "test")
    soundfile.write(
        voice,
        np.concatenate([corpus.load_wave(0).numpy(), np.zeros(rate // 2)]),
        rate,
        subtype="PCM_16",
    )
    flags = [
        "--no-sandbox",
        "--disable-background-networking",
        "--no-first-run",
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={voice}",
        "--autoplay-policy=no-user-gesture-required",
    ]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def run_all(lab, browser):
    """A function: name of a notebook -> the page in which all its cells have run without an error,
    or those whose text holds one of `cells`."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 1400}, permissions=["microphone"]
    )
    context.set_default_timeout(3 * MINUTES)

    def opened(name, cells=None):
        page = context.new_page()
        address = f"{lab.address}/lab/tree/nbs/{name}.ipynb?reset"
        if cells:
            lab.keep(name, cells)
        page.goto(address, timeout=2 * MINUTES)
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        page.wait_for_function(f"() => {KERNEL}?.status === 'idle'")
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_function(f"() => {KERNEL}.status === 'idle'", timeout=6 * MINUTES)
        cells = json.loads(page.evaluate(f"() => JSON.stringify({CELLS})"))
        code = [
            cell
            for cell in cells
            if cell["cell_type"] == "code" and "".join(cell["source"]).strip()
        ]
        wrong = [
            output
            for cell in code
            for output in cell["outputs"]
            if output["output_type"] == "error"
        ]
        assert not wrong, wrong
        assert all(cell["execution_count"] for cell in code), "some cells did not run"
        return page

    yield opened
    context.close()


def keep(page, name):
    folder = ROOT / ".cache" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")


def picture_of(explorer):
    return explorer.locator(".speechimg-picture").first.evaluate(
        "one => one.src ?? one.querySelector('img').src"
    )


def changed(page, explorer, before):
    "The picture of an explorer, once it is another one."
    for _ in range(240):
        if (now := picture_of(explorer)) != before:
            return now
        page.wait_for_timeout(250)
    raise AssertionError("the picture stayed the same")


def move(page, explorer, control, presses=3, key="ArrowRight"):
    "Move a slider with the keyboard: the picture changes, and the line for problems stays empty."
    before = picture_of(explorer)
    handle = explorer.locator(f".speechimg-{control} .noUi-handle").first
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(presses):
        page.keyboard.press(key)
    changed(page, explorer, before)
    assert explorer.locator(".speechimg-message").first.inner_text().strip() == ""


def explorers(page, control):
    "The explorers that have a certain control."
    page.wait_for_selector(f".speechimg-explorer .speechimg-{control}")
    return page.locator(".speechimg-explorer").filter(has=page.locator(f".speechimg-{control}"))


def test_the_queue_fills_up(run_all):
    page = run_all("07_queue", ["explore(show_queue"])
    explorer = explorers(page, "momentum").first
    for control in ("step", "batch", "momentum"):
        move(page, explorer, control, key="ArrowLeft" if control == "momentum" else "ArrowRight")
    keep(page, "07_queue")


def test_the_explorers_of_their_chapter(run_all):
    page = run_all("research/explore")
    for control in ("window_ms", "temperature", "momentum", "alpha", "noise"):
        move(page, explorers(page, control).first, control)
    keep(page, "explore")


def test_speak_and_find(run_all):
    "Record, see both rankings, click a picture to hear its captions; no sound: told in words."
    page = run_all("15_studio")
    page.wait_for_selector(".speechimg-record")
    studio = page.locator(".speechimg-studio").first
    studio.scroll_into_view_if_needed()
    studio.locator(".speechimg-record").click()
    studio.locator(".speechimg-on").wait_for()
    page.wait_for_timeout(2500)
    studio.locator(".speechimg-record").click()
    studio.locator(".speechimg-hit").first.wait_for()
    assert "seconds were heard" in studio.locator(".speechimg-message").inner_text()
    for stage in ("coarse", "fine"):
        cards = studio.locator(f".speechimg-{stage} .speechimg-hit")
        assert cards.count() == 5 and f"{stage} 1" in cards.first.inner_text()
    keep(page, "15_studio")
    studio.locator(".speechimg-fine .speechimg-hit").first.click()
    studio.locator(".speechimg-clips audio").first.wait_for()
    studio.locator(".speechimg-file").set_input_files(
        {"name": "letter.docx", "mimeType": "application/msword", "buffer": b"PK no sound"}
    )
    page.wait_for_function(f"() => {TOLD}.includes('letter.docx')")
    assert studio.locator(".speechimg-hit").count() == 0
