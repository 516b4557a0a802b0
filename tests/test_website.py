"The site: every notebook is a page with its outputs, every module a page of reference, nothing leads nowhere or asks another host."

import ast
import html
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import gates  # noqa: E402
import notebooks  # noqa: E402
import reference  # noqa: E402
import website  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The site, built once."
    folder = tmp_path_factory.mktemp("a site")
    website.build(ROOT, folder / "site", folder / "work")
    return folder / "site"


def text_of(page):
    "What a page says, in one line."
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))).split())


# The whole site


@pytest.mark.slow
def test_no_link_of_the_site_is_broken(site):
    assert website.problems(site) == []
    assert {path.name for path in site.parent.iterdir()} == {
        "site",
        "work",
    }  # nothing is left beside it


@pytest.mark.slow
def test_every_notebook_is_a_page_with_its_outputs(site):
    front = (site / "index.html").read_text(encoding="utf-8")
    for path in notebooks.paths(ROOT):
        page, shown = site / f"{path.stem}.html", website.page(path)
        assert f'href="{path.stem}.html"' in front or path.stem == "index"
        text, raw = text_of(page), page.read_text(encoding="utf-8")
        outputs = [output for cell in shown["cells"] for output in cell.get("outputs", [])]
        for output in (output for output in outputs if output["output_type"] == "stream"):
            first = next(
                (line for line in "".join(output["text"]).splitlines() if line.strip()), ""
            )
            assert " ".join(first.split()) in text, (path.name, first)
        pictures = len(re.findall(r'<img [^>]*src="_images/', raw))
        assert pictures == sum(
            bool(
                {"image/png", "image/jpeg"} & set(output.get("data", {}))
                and "text/html" not in output["data"]
            )
            for output in outputs
        ), path.name
        assert '<span class="c1">#|' not in raw and "widget-view" not in raw, path.name


@pytest.mark.slow
def test_reference_shows_what_a_function_expects(site):
    text = text_of(site / "api" / "sic.html")
    function = next(
        node
        for node in ast.parse((ROOT / "speechimg" / "sic.py").read_text()).body
        if getattr(node, "name", "") == "sic_loss"
    )
    assert "sic_loss(" in text and ast.get_docstring(function) in text
    assert (
        "speech_keys: (N, d) teacher embeddings: this batch first, then the queue" in text
        and "→ SicOutput" in text
    )
    for name in gates.modules(ROOT):
        page = (site / "api" / f"{name}.html").read_text(encoding="utf-8")
        tree = ast.parse((ROOT / "speechimg" / f"{name}.py").read_text(encoding="utf-8"))
        for public in reference.names(tree):
            assert f'id="speechimg.{name}.{public}"' in page, (name, public)
        assert f"_modules/speechimg/{name}.html" in page


@pytest.mark.slow
def test_search_knows_words_and_names(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    for word in ("turtl", "sic_loss", "id_targets", "padding"):
        assert word in index or word.removesuffix("ing") in index, word
    assert (site / "search.html").exists()


@pytest.mark.slow
def test_formulas_need_no_other_host(site):
    page = (site / "06_sic.html").read_text(encoding="utf-8")
    assert "_static/mathjax/tex-chtml.js" in page and "math notranslate" in page
    assert (site / "_static" / "mathjax" / "tex-chtml.js").exists()
    assert list((site / "_static" / "mathjax").rglob("*.woff"))


BROKEN = {
    '<a href="07_sick.html">x</a>': "leads to 07_sick.html, which is not here",
    '<a href="06_sic.html#nowhere">x</a>': "leads to 06_sic.html#nowhere, which has no such place",
    '<a href="../../etc/passwd">x</a>': "leads to ../../etc/passwd, which is not here",
    '<img src="_images/gone.png">': "leads to _images/gone.png, which is not here",
    '<img srcset="https://example.org/z.png 2x">': "needs https://example.org/z.png of another host",
    '<script src="https://cdn.example.org/x.js"></script>': "needs https://cdn.example.org/x.js of another host",
    '<link rel="stylesheet" href="//fonts.example.org/x.css">': "needs //fonts.example.org/x.css of another host",
    '<p style="background: url(https://example.org/x.png)">': "needs https://example.org/x.png of another host",
    '<iframe srcdoc="&lt;img src=https://example.org/y.png&gt;"></iframe>': "needs https://example.org/y.png of another host",
}


@pytest.mark.slow
def test_what_is_broken_is_named(site, tmp_path):
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    page = copy / "08_mining.html"
    page.write_text(
        page.read_text(encoding="utf-8").replace("</body>", "".join(BROKEN) + "</body>"),
        encoding="utf-8",
    )
    (copy / "_images" / next((copy / "_images").iterdir()).name).unlink()
    found = website.problems(copy)
    assert {line for line in found if line.startswith("08_mining.html: ")} >= {
        f"08_mining.html: {said}" for said in BROKEN.values()
    }
    assert any(
        "_images/" in line and "which is not here" in line
        for line in found
        if "gone.png" not in line
    )
    assert len(found) == len(BROKEN) + 1


# Its parts


def test_a_site_that_was_not_built_is_not_fine(tmp_path):
    assert website.problems(tmp_path / "site") == ["index.html: is not here; run `make site`"]


def test_links_that_are_fine(tmp_path):
    (tmp_path / "index.html").touch()
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "page.html").write_text('<p id="ü">x</p>')
    (tmp_path / "page.html").write_text(
        '<a href="a%20b/page.html#%C3%BC">1</a><a href="https://example.org/x">2</a><a href="#">3</a><a name="here"></a><a href="#here">4</a>'
        '<a href="a%20b/page.html?q=1">5</a><img src="data:image/png;base64,AAAA"><a href="mailto:a@b.c">6</a>'
    )
    assert website.problems(tmp_path) == []


def test_page_of_a_notebook(tmp_path):
    picture = {
        "image/png": "iVBORw0KGgoAAAANSUhEUgAABAAAAAIA",
        "text/plain": "<Figure>",
    }  # 1024 pixels wide
    slider = {website.SLIDER: {"model_id": "1"}, "text/plain": "interactive(children=())"}
    show = lambda data: {"output_type": "display_data", "metadata": {}, "data": data}  # noqa: E731
    code = lambda text, *outputs: {
        "cell_type": "code",
        "metadata": {},
        "source": text,
        "outputs": list(outputs),
    }  # noqa: E731
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["# Title\n", "[data](../data/README.md)"]},
        code("#| default_exp core"), code("#| hide\nsecret = 1"), code("#| export\ndef f(): pass"), code("#| echo: false\n#| fig-alt: a cat\nshow()", show(picture)),
        code("explore()", show(dict(slider)), show(slider | picture)),
    ]  # fmt: skip
    path = tmp_path / "research/core.ipynb"
    path.write_text(
        json.dumps(
            {"cells": cells, "metadata": {"widgets": {}}, "nbformat": 4, "nbformat_minor": 5}
        )
    )
    page = website.page(path)
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


def test_contents_take_up_whatever_exists():
    text = website.contents(
        {"research/core": "Core", "06_sic": "Loss", "14_results": "Results", "99z_new": "New"},
        ["data/soak"],
    )
    order = [
        "Start",
        "00 Core <research/core>",
        "The coarse stage",
        "07 Loss <06_sic>",
        "15 Results <14_results>",
        "data/soak",
        "In use",
        "99z New <99z_new>",
        "api/index",
    ]
    assert [text.index(part) for part in order] == sorted(text.index(part) for part in order)
    assert "Towers" not in text  # no chapter, no part


def test_comments_find_their_arguments(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(
        '''"""One *idea*."""
__all__ = ["LIMIT", "MORE", "f", "g", "Pair", "Many"]
LIMIT, MORE = 3, 4  # of <things>
def f(
    x,  # (B, d) first
    *, scale: float = 2.0, flag=True,  # both of them
) -> int:  # how many
    "Does `f`, and no_more."
    return 1  # not this one
def g(x): return x  # not this one either
class Pair:
    "Two."
    left: int  # one
    right: int = 2
    def swap(self, hard=False):  # for good
        "Exchange them."
    def _own(self): pass
class Many:
'''
        + "".join(f"    x{i}: int = {i}  # number {i}\n" for i in range(reference.MANY + 1))
        + "def hidden(): pass\n"
    )
    text = reference.reference(path, "Here.")
    for said in (
        "One \\*idea\\*.", "Here.", "{py:data} LIMIT\n:value: 3\n\nof \\<things>", "{py:data} MORE\n:value: 4\n", "{py:function} f(x, *, scale: float=2.0, flag=True) -> int", "Does `f`, and no\\_more.",
        "- *x*: (B, d) first\n- *scale, flag*: both of them\n- *returned*: how many", "{py:class} Pair(left: int, right: int = 2)", "- *left*: one", "{py:method} swap(hard=False)",
        "- *hard*: for good", "{py:class} Many(**settings)", "- `x0: int = 0`: number 0",
    ):  # fmt: skip
        assert said in text, said
    assert "hidden" not in text and "_own" not in text and "not this one" not in text
