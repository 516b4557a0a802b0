"""The site: the notebooks with their outputs, the library's reference, what was measured, and a search, as files that need no server.

    python tools/website.py          # build it into site/ and check it; exit status 1 for a broken link
    python tools/website.py --check  # only check what is in site/

Nothing is executed: pages show the outputs that the notebooks hold. What is built asks no other host for anything, MathJax included.
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
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import notebooks
from gates import exported_name
from notebooks import ROOT, body, directives, source
from reference import reference, summary

# The parts of the site, each with the number of its last chapter
PARTS = {
    "Start": 0,
    "Data": 2,
    "Towers": 5,
    "The coarse stage": 7,
    "The fine stage": 9,
    "All together": 13,
    "Look": 14,
    "Results": 15,
    "At scale": 17,
    "In use": 99,
}
# titles of pages of data/ that have none of their own
TITLES = {
    "bench": "Speed, in figures",
    "soak": "Reliability, in figures",
    "reference": "Model `reference`",
    "small": "Model `small`",
}
WIDE = 900  # pixels, above which a picture cannot be read once a phone has shrunk it
SLIDER = "application/vnd.jupyter.widget-view+json"


# What Sphinx reads


def moved(text: str) -> str:
    "Links out of nbs/: on the site its pages lie beside data/."
    return text.replace("](../", "](")


def width_of(picture: str | list | None) -> int:
    "Pixels, as the header of a PNG says."
    return int.from_bytes(b64decode("".join(picture))[16:20]) if picture else 0


def page(path: Path) -> dict:
    "A notebook as the site shows it: no directives, no hidden cells, no code where `#| echo: false` says so, no sliders that lead nowhere."
    notebook, cells = notebooks.read(path), []
    for cell in notebook["cells"]:
        flags = directives(cell)
        if "hide" in flags or not body(cell).strip():
            continue
        if cell["cell_type"] == "markdown":
            cell["source"] = moved(source(cell))
        else:
            cell["source"] = body(cell)
            tags = (
                [name for name in ("export", "gpu") if name in flags]
                + ["remove-input"] * (flags.get("echo") == "false")
                + ["hide-input"] * ("check" in flags)
            )  # folded: a learner should not read hidden checks by accident
            image = {"alt": flags.get("fig-alt", "a figure")}
            for output in (output for output in cell["outputs"] if "data" in output):
                data, about = output["data"], output.get("metadata", {}).get("image/png", {})
                image |= {name: str(about[name]) for name in ("alt", "width") if name in about}
                if width_of(data.get("image/png")) > WIDE:
                    image["classes"] = "wide"
                if data.pop(SLIDER, None) and set(data) == {"text/plain"}:
                    data.clear()
                if "text/markdown" in data:
                    data["text/markdown"] = moved("".join(data["text/markdown"]))
            cell["outputs"] = [output for output in cell["outputs"] if output.get("data") != {}]
            cell["metadata"] = {"tags": tags, "mystnb": {"image": image}}
        cells.append(cell)
    return notebook | {"cells": cells, "metadata": {"language_info": {"name": "python"}}}


def add(notebook: dict, text: str) -> None:
    notebook["cells"].append(
        {
            "cell_type": "markdown",
            "id": f"added-{len(notebook['cells'])}",
            "metadata": {},
            "source": text,
        }
    )


def contents(titles: dict[str, str], measured: list[str]) -> str:
    "The tables of contents, which the sidebar shows: chapters by part, then what was measured and the reference."
    parts = {part: [] for part in PARTS}
    for name, text in titles.items():
        number, letter = re.match(r"(\d+)([a-z]?)_", name).groups()
        part = next(part for part, last in PARTS.items() if int(number) <= last)
        parts[part].append(f"{number}{letter} {text} <{name}>")
    parts["Results"] += measured
    parts["Reference"] = ["data/README", "api/index"]
    return "\n".join(
        "```{toctree}\n:hidden:\n:caption: %s\n\n%s\n```\n" % (part, "\n".join(entries))
        for part, entries in parts.items()
        if entries
    )


def write_sources(root: Path, folder: Path) -> None:
    "Notebooks, the reference, and the pages of data/, as Sphinx shall read them."
    pages, modules = {path: page(path) for path in notebooks.paths(root)}, {}
    titles = {
        path.stem: source(shown["cells"][0]).splitlines()[0].lstrip("# ")
        for path, shown in pages.items()
    }
    (folder / "api").mkdir(parents=True)
    for path, shown in pages.items():
        if name := exported_name(path):
            modules[name] = summary(root / "speechimg" / f"{name}.py")
            text = reference(
                root / "speechimg" / f"{name}.py",
                f"Built in [{titles[path.stem]}](../{path.name}).",
            )
            (folder / "api" / f"{name}.md").write_text(text, encoding="utf-8")
            add(shown, f"In the reference: [speechimg.{name}](api/{name}.md).")
    rows = "".join(f"| [{name}]({name}.md) | {text} |\n" for name, text in modules.items())
    tree = "```{toctree}\n:hidden:\n\n" + "\n".join(modules) + "\n```\n"
    (folder / "api" / "index").with_suffix(".md").write_text(
        f"# The library\n\n| module | the idea |\n|---|---|\n{rows}\n{tree}", encoding="utf-8"
    )
    measured = []
    for path in sorted((root / "data").rglob("*.md")):
        place = path.relative_to(root)
        text = re.sub(
            r"\A---\n.*?\n---\n", "", path.read_text(encoding="utf-8"), flags=re.S
        ).replace("](../nbs/", "](../")
        if head := TITLES.get(path.parent.name if path.stem == "README" else path.stem):
            text = f"# {head}\n\n" + re.sub(r"\A\s*# .*\n", "", text)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text, encoding="utf-8")
        measured += [place.with_suffix("").as_posix()] * (place.as_posix() != "data/README.md")
    front = next(shown for path, shown in pages.items() if path.stem == "index")
    add(front, contents({name: text for name, text in titles.items() if name != "index"}, measured))
    for path, shown in pages.items():
        (folder / path.name).write_text(json.dumps(shown), encoding="utf-8")
    for name in ("LICENSE", "CITATION.cff"):
        shutil.copy(root / name, folder)


# Building


def settings(root: Path) -> dict:
    "Sphinx's configuration."
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {
        "project": project["name"], "html_title": project["name"], "version": project["version"], "author": project["authors"][0]["name"],
        "copyright": project["authors"][0]["name"], "language": "en", "smartquotes": False, "templates_path": [],
        "extensions": ["myst_nb", "sphinx.ext.mathjax", "sphinx.ext.viewcode"],
        "html_theme": "sphinx_book_theme", "html_css_files": ["website.css"], "html_sidebars": {"_modules/**": []}, "html_copy_source": False, "html_show_sourcelink": False,
        "html_theme_options": {"use_download_button": False, "navbar_persistent": [], "show_toc_level": 2}, "html_context": {"default_mode": "auto"},
        "mathjax_path": "mathjax/tex-chtml.js", "viewcode_follow_imported_members": False, "add_module_names": False, "python_maximum_signature_line_length": 72,
        "nb_execution_mode": "off", "nb_ipywidgets_js": {}, "nb_render_markdown_format": "myst",
        "myst_enable_extensions": ["dollarmath"], "myst_heading_anchors": 4,
    }  # fmt: skip


def build(root: Path, out: Path, work: Path) -> str:
    "Build the site of a tree into `out`; returns what Sphinx warned of."
    from sphinx.application import Sphinx
    from sphinx.pycode import ModuleAnalyzer
    from sphinx.util.docutils import docutils_namespace

    shutil.rmtree(work, ignore_errors=True)
    write_sources(root, work / "source")

    def code_of(app, name):  # for the source pages; Sphinx would import the module
        module = ModuleAnalyzer.for_file(root / f"{name.replace('.', '/')}.py", name)
        module.find_tags()
        return module.code, module.tags

    warnings = io.StringIO()
    with docutils_namespace():
        app = Sphinx(
            work / "source",
            None,
            work / "html",
            work / "doctrees",
            "html",
            settings(root),
            status=None,
            warning=warnings,
        )
        app.connect("viewcode-find-source", code_of)
        app.build()
    static, mathjax = (
        work / "html" / "_static",
        Path(importlib.import_module("sphinx-mathjax-offline").__file__).parent
        / "static"
        / "mathjax",
    )
    shutil.copy(root / "tools" / "website.css", static)
    (static / "mathjax").mkdir()
    shutil.copy(mathjax / "tex-chtml.js", static / "mathjax")
    shutil.copytree(
        mathjax / "output" / "chtml" / "fonts", static / "mathjax" / "output" / "chtml" / "fonts"
    )
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(work / "html", out)
    return (
        re.sub(r"\x1b\[[\d;]*m", "", warnings.getvalue()).replace(f"{work / 'source'}/", "").strip()
    )


# Checking


class Links(HTMLParser):
    "The anchors of a page, what it points to, and what it needs to be shown; pages inside of it included."

    def __init__(self, text: str):
        super().__init__()
        text = re.sub(
            r"base64,[A-Za-z0-9+/=]+", "base64,", text
        )  # sounds take longer to read than everything else
        self.anchors, self.targets, self.needs = (
            {"", "top"},
            [],
            re.findall(r"url\([\"']?([^\"')]+)|@import [\"']([^\"']+)", text),
        )
        self.needs = [first or second for first, second in self.needs]
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("id", "name"):
                self.anchors.add(value)
            elif name == "href" and tag in ("a", "area"):
                self.targets.append(value)
            elif name in ("src", "href", "data", "poster") and value:
                self.needs.append(value)
            elif name == "srcset":
                self.needs += [one.split()[0] for one in value.split(",")]
            elif name == "srcdoc":
                inner = Links(value)
                self.needs += inner.needs
                self.targets += [
                    target for target in inner.targets if target.lstrip("#") not in inner.anchors
                ]


def problems(folder: Path) -> list[str]:
    "One line for each link of the site that leads nowhere, and for each thing that a page would ask another host for."
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    templates = (
        "_static/webpack-macros.html",
        "_static/sbt-webpack-macros.html",
    )  # of the theme; nobody opens them
    pages = {
        name: Links(path.read_text(encoding="utf-8"))
        for name, path in files.items()
        if path.suffix in (".html", ".css") and name not in templates
    }
    found = [] if "index.html" in files else ["index.html: is not here; run `make site`"]
    for name, links in pages.items():
        for link in dict.fromkeys(links.needs + links.targets):
            parts = urlsplit(link)
            if parts.scheme in ("data", "mailto", "javascript", "blob"):
                continue
            if parts.netloc or parts.scheme:
                found += [f"{name}: needs {link} of another host"] * (link in links.needs)
                continue
            target = (
                posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path)))
                if parts.path
                else name
            )
            target = f"{target}/index.html" if f"{target}/index.html" in files else target
            if target not in files:
                found.append(f"{name}: leads to {link}, which is not here")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name}: leads to {link}, which has no such place")
    return found


def main(arguments: list[str]) -> int:
    start, out = time.monotonic(), ROOT / "site"
    if "--check" not in arguments:
        if warnings := build(ROOT, out, ROOT / ".cache" / "site"):
            print(warnings, file=sys.stderr)
    found = problems(out)
    print("\n".join(found), end="\n" * bool(found))
    print(
        f"site: {len(list(out.rglob('*.html')))} pages in {time.monotonic() - start:.0f} s, {len(found)} broken links; open site/index.html"
    )
    return len(found)


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
