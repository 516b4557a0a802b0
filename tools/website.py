"""The site: notebooks with their outputs, the library's reference, what was measured, a search.

    python tools/website.py    # build it into site/; exit status 1 if Sphinx warns of anything

Nothing is executed: pages show the outputs that the notebooks hold. Nothing is asked of another
host, MathJax included.
"""

import importlib
import io
import json
import posixpath
import re
import shutil
import sys
import time
import tomllib
from base64 import b64decode
from pathlib import Path

import notebooks
import rooms
from gates import modules
from notebooks import ROOT, body, directives, source
from reference import describe, summary
from reference import page as reference

# titles of pages of data/ that have none of their own
TITLES = {
    "bench": "Speed, in figures",
    "soak": "Reliability, in figures",
    "reference": "Model `reference`",
    "small": "Model `small`",
}
WIDE = 900  # pixels, above which a picture cannot be read once a phone has shrunk it
SLIDER = "application/vnd.jupyter.widget-view+json"
LINK = re.compile(r"(\]\()(?!https?:|mailto:|data:|attachment:|#)([^)\s#]+)")
NEEDS = re.compile(
    r"""(?:src|srcset)=["']?(?:https?:)?//[^"'\s>]+|url\(["']?(?:https?:)?//[^"')]+"""
)


# What Sphinx reads


def moved(text: str, place: str) -> str:
    """Links of a notebook at `place` as on the site, whose root is nbs/ with data/ inside."""
    folder = posixpath.dirname(place)

    def there(match):
        target = posixpath.normpath(posixpath.join(folder, match[2])).removeprefix("nbs/")
        return match[1] + posixpath.relpath(target, folder.removeprefix("nbs").lstrip("/") or ".")

    return LINK.sub(there, text)


def width_of(picture: str | list | None) -> int:
    """Pixels, as the header of a PNG says."""
    return int.from_bytes(b64decode("".join(picture))[16:20]) if picture else 0


def outputs(cell: dict, place: str) -> tuple[list, dict]:
    """What a cell shows, without sliders that lead nowhere, and what to say of its picture."""
    image = {"alt": directives(cell).get("fig-alt", "a figure")}
    for output in (output for output in cell["outputs"] if "data" in output):
        data, about = output["data"], output.get("metadata", {}).get("image/png", {})
        image |= {name: str(about[name]) for name in ("alt", "width") if name in about}
        if width_of(data.get("image/png")) > WIDE:
            image["classes"] = "wide"
        if data.pop(SLIDER, None) and set(data) == {"text/plain"}:
            data.clear()
        if "text/markdown" in data:
            data["text/markdown"] = moved("".join(data["text/markdown"]), place)
    return [output for output in cell["outputs"] if output.get("data") != {}], image


def page(path: Path, place: str) -> dict:
    """A notebook as the site shows it: no directives, no hidden cells, hidden checks folded."""
    notebook, cells = notebooks.read(path), []
    for cell in notebook["cells"]:
        flags = directives(cell)
        if "hide" in flags or not body(cell).strip():
            continue
        if cell["cell_type"] == "markdown":
            cell["source"] = moved(source(cell), place)
        else:
            shown, image = outputs(cell, place)
            tags = [name for name in ("export", "gpu") if name in flags]
            tags += ["remove-input"] * (flags.get("echo") == "false")
            tags += ["hide-input"] * ("check" in flags)  # nobody should read them by accident
            meta = {"tags": tags, "mystnb": {"image": image}}
            cell |= {"source": body(cell), "outputs": shown, "metadata": meta}
        cells.append(cell)
    return notebook | {"cells": cells, "metadata": {"language_info": {"name": "python"}}}


def add(notebook: dict, text: str) -> None:
    """A last markdown cell."""
    name = f"added-{len(notebook['cells'])}"
    cell = {"cell_type": "markdown", "id": name, "metadata": {}, "source": text}
    notebook["cells"].append(cell)


def toctree(caption: str, entries: list[str]) -> str:
    """One part of the sidebar."""
    listed = "\n".join(entries)
    return f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{listed}\n```\n"


def contents(every: list, measured: list[str]) -> str:
    """The tables of contents of the sidebar: the shelves, what was measured, the reference."""
    parts = {}
    for room in every:
        number = f"{room.name[:2]} " if room.name[:1].isdigit() else ""
        parts.setdefault(room.shelf, []).append(f"{number}{room.title} <{room.name}>")
    parts |= {"Measured": measured, "Reference": ["data/README", "api/index"]}
    parts["Project"] = ["CONTRIBUTING", "CHANGELOG"]
    return "\n".join(toctree(part, entries) for part, entries in parts.items())


def write_reference(root: Path, folder: Path, homes: dict) -> None:
    """A page for each module, and one that lists them; `homes`: {module: its room}."""
    folder.mkdir(parents=True)
    rows = []
    for name, path in modules(root).items():
        room = homes[name]
        built = f"Built in [{room.title}](../{room.name}.ipynb)."
        text = reference(name, summary(path), built)
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        rows.append(f"| [{name}]({name}.md) | {summary(path)} |\n")
    tree = "```{toctree}\n:hidden:\n\n" + "\n".join(homes) + "\n```\n"
    head = "# The library\n\n| module | the idea |\n|---|---|\n"
    (folder / "index").with_suffix(".md").write_text(
        f"{head}{''.join(rows)}\n{tree}", encoding="utf-8"
    )


def write_measured(root: Path, folder: Path) -> list[str]:
    """The pages of data/; returns their names but for that of the corpora."""
    names = []
    for path in sorted((root / "data").rglob("*.md")):
        place = path.relative_to(root)
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S).replace("](../nbs/", "](../")
        if head := TITLES.get(path.parent.name if path.stem == "README" else path.stem):
            text = f"# {head}\n\n" + re.sub(r"\A\s*# .*\n", "", text)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text, encoding="utf-8")
        names.append(place.with_suffix("").as_posix())
    return [name for name in names if name != "data/README"]


def write_sources(root: Path, folder: Path) -> None:
    """Notebooks, the reference, and the pages of data/, as Sphinx shall read them."""
    every = rooms.rooms(root)
    homes = {room.module: room for room in every if room.module}
    write_reference(root, folder / "api", homes)
    measured = write_measured(root, folder)
    for room in every:
        shown = page(room.path, f"nbs/{room.name}.ipynb")
        if room.module:
            up = "../" * room.name.count("/")
            add(shown, f"In the reference: [speechimg.{room.module}]({up}api/{room.module}.md).")
        (folder / room.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{room.name}.ipynb").write_text(json.dumps(shown), encoding="utf-8")
    front = page(root / "nbs" / "index.ipynb", "nbs/index.ipynb")
    add(front, contents(every, measured))
    (folder / "index.ipynb").write_text(json.dumps(front), encoding="utf-8")
    shutil.copytree(root / "nbs" / "map", folder / "map")
    for name in ("LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(root / name, folder)


# Building


def settings(root: Path) -> dict:
    "Sphinx's configuration."
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    theme = {"use_download_button": False, "navbar_persistent": [], "show_toc_level": 2}
    return {
        "project": project["name"],
        "html_title": project["name"],
        "version": project["version"],
        "author": project["authors"][0]["name"],
        "copyright": project["authors"][0]["name"],
        "language": "en",
        "smartquotes": False,
        "templates_path": [],
        "exclude_patterns": ["LICENSE*"],
        "suppress_warnings": ["ref.python"],  # of two commands' options of one name
        "extensions": [
            "myst_nb",
            "sphinx.ext.autodoc",
            "sphinx.ext.mathjax",
            "sphinx.ext.viewcode",
        ],
        "autodoc_member_order": "bysource",
        "autodoc_typehints": "signature",
        "html_theme": "sphinx_book_theme",
        "html_css_files": ["website.css"],
        "html_sidebars": {"_modules/**": []},
        "html_copy_source": False,
        "html_show_sourcelink": False,
        "html_theme_options": theme,
        "html_context": {"default_mode": "auto"},
        "mathjax_path": "mathjax/tex-chtml.js",
        "viewcode_follow_imported_members": False,
        "add_module_names": False,
        "python_maximum_signature_line_length": 72,
        "nb_execution_mode": "off",
        "nb_ipywidgets_js": {},
        "nb_render_markdown_format": "myst",
        "myst_enable_extensions": ["dollarmath"],
        "myst_heading_anchors": 4,
    }


def build(root: Path, out: Path, work: Path) -> str:
    "Build the site of a tree into `out`; returns what Sphinx warned of."
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    shutil.rmtree(work, ignore_errors=True)
    write_sources(root, work / "source")
    warnings = io.StringIO()
    with docutils_namespace():
        places = (work / "source", None, work / "html", work / "doctrees")
        app = Sphinx(*places, "html", settings(root), status=None, warning=warnings)
        app.connect("autodoc-process-docstring", describe)
        app.build()
    static = work / "html" / "_static"
    package = importlib.import_module("sphinx-mathjax-offline")
    mathjax, fonts = Path(package.__file__).parent / "static" / "mathjax", "output/chtml/fonts"
    shutil.copy(root / "tools" / "website.css", static)
    (static / "mathjax").mkdir()
    shutil.copy(mathjax / "tex-chtml.js", static / "mathjax")
    shutil.copytree(mathjax / fonts, static / "mathjax" / fonts)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(work / "html", out)
    said = re.sub(r"\x1b\[[\d;]*m", "", warnings.getvalue())
    return said.replace(f"{work / 'source'}/", "").strip()


# Checking


def foreign(folder: Path) -> list[str]:
    """One line for each thing that a page would ask of another host."""
    found = []
    for path in sorted([*folder.rglob("*.html"), *folder.rglob("*.css")]):
        if "webpack-macros" not in path.name:  # templates of the theme; nobody opens them
            text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", path.read_text(encoding="utf-8"))
            name = path.relative_to(folder).as_posix()
            found += [f"{name}: needs {match[0]}" for match in NEEDS.finditer(text)]
    return found


def main() -> int:
    """Build; print what is wrong and how many pages there are."""
    start, out = time.monotonic(), ROOT / "site"
    found = [*build(ROOT, out, ROOT / ".cache" / "site").splitlines(), *foreign(out)]
    print("\n".join(found), end="\n" * bool(found), file=sys.stderr)
    pages, seconds = len(list(out.rglob("*.html"))), time.monotonic() - start
    print(f"site: {pages} pages in {seconds:.0f} s, {len(found)} problems; open site/index.html")
    return len(found)


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
