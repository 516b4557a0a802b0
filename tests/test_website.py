"The site: every notebook is a page with its outputs, every module one of reference, links lead."

import html
import json
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
import gates
import map as house_map
import notebooks
import reference
import rooms
import website

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The site, built once, and what Sphinx said."
    folder = tmp_path_factory.mktemp("a site")
    said = website.build(ROOT, folder / "site", folder / "work")
    return folder / "site", said


@pytest.fixture(scope="module")
def site(built):
    return built[0]


def text_of(page):
    "What a page says, in one line."
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))).split())


# The whole site


def test_sphinx_has_nothing_to_say_and_no_other_host_is_asked(built):
    site, said = built
    assert said == "" and website.foreign(site) == []
    assert {path.name for path in site.parent.iterdir()} == {"site", "work"}  # nothing beside it


def lines_shown(shown):
    "The first line of each thing that a notebook printed."
    outputs = [output for cell in shown["cells"] for output in cell.get("outputs", [])]
    for output in (output for output in outputs if output["output_type"] == "stream"):
        yield next((line for line in "".join(output["text"]).splitlines() if line.strip()), "")


def pictures_shown(shown):
    "How many pictures the outputs of a notebook hold."
    outputs = [output for cell in shown["cells"] for output in cell.get("outputs", [])]
    kinds = [set(output.get("data", {})) for output in outputs]
    return sum(bool({"image/png", "image/jpeg"} & one) and "text/html" not in one for one in kinds)


def test_every_notebook_is_a_page_with_its_outputs(site):
    front = (site / "index.html").read_text(encoding="utf-8")
    for path in notebooks.paths(ROOT):
        name = notebooks.name_of(path)
        shown = website.page(path, f"nbs/{name}.ipynb")
        assert f'href="{name}.html"' in front or name == "index"
        text = text_of(site / f"{name}.html")
        raw = (site / f"{name}.html").read_text(encoding="utf-8")
        for line in lines_shown(shown):
            assert " ".join(line.split()) in text, (name, line)
        pictures = len(re.findall(r'<img [^>]*src="(?:\.\./)*_images/(?!\w+\.svg)', raw))
        assert pictures == pictures_shown(shown), name
        assert '<span class="c1">#|' not in raw and "widget-view" not in raw, name


WIDTHS = """() => {
  const codes = [...document.querySelectorAll(".cell_input pre")];
  const wide = codes.filter(one => one.scrollWidth > one.clientWidth + 1).length;
  return [wide, document.documentElement.scrollWidth - document.documentElement.clientWidth];
}"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_code_fits_on_a_screen_and_pages_on_a_phone(site):
    "At 1,280 pixels no line of code is cut off; no page is wider than a phone."
    from playwright.sync_api import sync_playwright

    wrong = []
    flags = ["--no-sandbox", "--disable-gpu"]
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=flags)
        # layout is CSS; without it, each page would load MathJax first
        page = browser.new_context(java_script_enabled=False).new_page()
        for one in rooms.rooms(ROOT):
            page.set_viewport_size({"width": 1280, "height": 900})
            page.goto((site / f"{one.name}.html").as_uri(), wait_until="domcontentloaded")
            for width in (1280, 390):  # loaded once, then made narrow
                page.set_viewport_size({"width": width, "height": 900})
                code, over = page.evaluate(WIDTHS)
                if over > 0 or (width == 1280 and code):
                    wrong.append(f"{one.name}, {width} pixels: {code} cells, {over} pixels over")
        browser.close()
    assert wrong == []


def test_reference_shows_what_a_function_expects(site):
    text = text_of(site / "api" / "sic.html")
    assert "sic_loss(" in text and "→ SicOutput" in text
    assert "speech_keys: (N, d) keys: this batch first, then any others" in text
    for name, path in gates.modules(ROOT).items():
        page = (site / "api" / f"{name}.html").read_text(encoding="utf-8")
        code = path.read_text(encoding="utf-8")
        exported = re.search(r"__all__ = \[(.*?)\]", code, re.S)
        for public in re.findall(r"'(\w+)'", exported[1] if exported else ""):
            if re.search(
                rf"(?m)^(?:def|class) {public}\b", code
            ):  # autodoc leaves some numbers out
                assert f'id="speechimg.{name}.{public}"' in page, (name, public)
        assert f"_modules/speechimg/{name.replace('.', '/')}.html" in page


def test_search_knows_words_and_names(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    for word in ("turtl", "sic_loss", "id_targets", "padding"):
        assert word in index or word.removesuffix("ing") in index, word
    assert (site / "search.html").exists()


def test_formulas_need_no_other_host(site):
    page = (site / "06_sic.html").read_text(encoding="utf-8")
    assert "_static/mathjax/tex-chtml.js" in page and "math notranslate" in page
    assert (site / "_static" / "mathjax" / "tex-chtml.js").exists()
    assert list((site / "_static" / "mathjax").rglob("*.woff"))


def test_things_of_other_hosts_are_named(tmp_path):
    foreign = [
        '<img srcset="https://example.org/z.png 2x">',
        '<script src="https://cdn.example.org/x.js"></script>',
        "<script src=//cdn.example.org/y.js></script>",
        '<p style="background: url(https://example.org/x.png)">',
    ]
    for number, text in enumerate(foreign):
        (tmp_path / f"{number}.html").write_text(f"<p>{text}")
    (tmp_path / "fine.html").write_text('<a href="https://example.org">x</a><img src="_images/a">')
    found = website.foreign(tmp_path)
    assert [line.split(":")[0] for line in found] == [f"{number}.html" for number in range(4)]


def small_project(folder):
    "One notebook, one module, no data."
    (folder / "tools").mkdir()
    for name in ("settings.ini", "pyproject.toml", "LICENSE", "CITATION.cff", "tools/website.css"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("# A page\n")
    (folder / "nbs").mkdir()
    rooms_of_it = '[[shelf]]\ntitle = "Learn"\nabout = ""\nfolder = ""\nrooms = ["06_sic"]\n'
    (folder / "nbs" / "rooms.toml").write_text(rooms_of_it + "[floors]\nhouse = []\n")
    for name in ("index", "06_sic"):
        cells = [{"cell_type": "markdown", "metadata": {}, "source": f"# {name}\n> One idea."}]
        content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 4}
        (folder / "nbs" / f"{name}.ipynb").write_text(json.dumps(content))
    (folder / "speechimg").mkdir()
    house_map.write(folder)


def test_links_that_lead_nowhere_are_named(tmp_path):
    small_project(tmp_path)
    path = tmp_path / "nbs" / "06_sic.ipynb"
    fine = "[1](index.ipynb) [2](../data/README.md) [3](../LICENSE) [4](https://example.org)"
    text = path.read_text().replace("One idea.", f"{fine} [gone](07_queue.ipynb) [x](#nowhere)")
    path.write_text(text)
    said = website.build(tmp_path, tmp_path / "site", tmp_path / "work").splitlines()
    assert len(said) == 2 and "07_queue.ipynb" in said[0] and "nowhere" in said[1], said


# Its parts


def test_links_are_those_of_the_site():
    text = "[a](../data/README.md) [b](06_sic.ipynb) [c](research/hub.ipynb#x) [d](https://e.org)"
    assert website.moved(text, "nbs/index.ipynb") == text.replace("../data", "data")
    deep = "[a](../../data/README.md) [b](../06_sic.ipynb) [c](hub.ipynb) ![d](../map/sic.svg)"
    assert website.moved(deep, "nbs/research/cli.ipynb") == deep.replace("../../data", "../data")


def code(text, *outputs):
    "A code cell that showed something."
    shown = [{"output_type": "display_data", "metadata": {}, "data": data} for data in outputs]
    return {"cell_type": "code", "metadata": {}, "source": text, "outputs": shown}


def test_page_of_a_notebook(tmp_path):
    # 1024 pixels wide, as the header of a PNG says it
    picture = {"image/png": "iVBORw0KGgoAAAANSUhEUgAABAAAAAIA", "text/plain": "<Figure>"}
    slider = {website.SLIDER: {"model_id": "1"}, "text/plain": "interactive(children=())"}
    title = ["# Title\n", "[data](../data/README.md)"]
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": title},
        code("#| default_exp core"),
        code("#| hide\nsecret = 1"),
        code("#| export\ndef f(): pass"),
        code("#| echo: false\n#| fig-alt: a cat\nshow()", picture),
        code("explore()", dict(slider), slider | picture),
    ]
    path = tmp_path / "core.ipynb"
    path.write_text(
        json.dumps(
            {"cells": cells, "metadata": {"widgets": {}}, "nbformat": 4, "nbformat_minor": 5}
        )
    )
    page = website.page(path, "nbs/core.ipynb")
    assert [cell["source"] for cell in page["cells"]] == [
        "# Title\n[data](data/README.md)",
        "def f(): pass",
        "show()",
        "explore()",
    ]
    function, shown, explored = page["cells"][1:]
    assert function["metadata"]["tags"] == ["export"] and shown["metadata"]["tags"] == [
        "remove-input"
    ]
    assert shown["metadata"]["mystnb"]["image"] == {"alt": "a cat", "classes": "wide"}
    assert [output["data"] for output in explored["outputs"]] == [
        picture
    ]  # a slider is shown by its picture, or not at all
    assert "widgets" not in page["metadata"]


def test_contents_are_the_shelves(tmp_path):
    every = rooms.rooms(ROOT)
    text = website.contents(every, ["data/soak"])
    order = ["Learn", "06 ", "<06_sic>", "Research", "<research/hub>", "Teach", "<teach/teachers>"]
    order += ["data/soak", "api/index", "CHANGELOG"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert text.count("{toctree}") == 7


def example(
    x,  # (B, d) first
    *,
    scale: float = 2.0,  # of *both*
) -> int:  # how many
    "Does `f`, and no_more."
    return 1  # not this one


def test_comments_find_their_arguments():
    lines = ["something else"]
    reference.describe(None, "function", "example", example, None, lines)
    assert lines == [
        "Does ``f``, and no\\_more.",
        "",
        "- *x*: (B, d) first",
        "- *scale*: of \\*both\\*",
        "- *returned*: how many",
    ]
    text = reference.page("sic", "One idea.", "Here.")
    assert text.startswith("# speechimg.sic") and ".. automodule:: speechimg.sic\n" in text
    assert reference.summary(ROOT / "speechimg" / "sic.py").startswith("The coarse loss")
