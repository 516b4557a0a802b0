"""What Sphinx's autodoc is told: docstrings here are plain text, and arguments are described by the
comments behind them, which fastcore reads. Used by website.py.
"""

import re
from inspect import getdoc
from pathlib import Path

PLAIN = re.compile(r"(`[^`\n]*`)|([\\*_|<])")


def plain(text: str) -> str:
    """Text for reStructuredText in which nothing is markup but `code`."""
    return PLAIN.sub(lambda one: f"`{one[1]}`" if one[1] else f"\\{one[2]}", text)


def arguments(thing) -> list[str]:
    """One line for each argument, or for what is returned, that has a comment behind it."""
    from fastcore.docments import docments

    try:
        notes = docments(thing)
    except (TypeError, ValueError, OSError, SyntaxError, AttributeError):
        return []  # no source, or none with arguments
    shown = {"return": "returned"}
    return [
        f"- *{plain(shown.get(name, name))}*: {plain(' '.join(note.split()))}"
        for name, note in notes.items()
        if note and name != "self"
    ]


def describe(app, what, name, thing, options, lines) -> None:
    """Hook of autodoc: plain docstrings, then the arguments."""
    if what == "module":
        lines[:] = []  # it is the page's first sentence
        return
    own = what in ("function", "method", "class", "exception")
    text = (getdoc(thing) or "").splitlines() if own else lines[:]
    described = arguments(thing) if own else []
    lines[:] = [plain(line) for line in text] + [""] * bool(described) + described


def summary(path: Path) -> str:
    """The one idea of a module: its docstring."""
    first = re.match(r'\s*"""(.*?)"""', path.read_text(encoding="utf-8"), re.S)
    return first[1].strip() if first else ""


def page(module: str, idea: str, built: str) -> str:
    """The page of one module; `built` is the Markdown that names its notebook."""
    order = f".. automodule:: speechimg.{module}\n   :members:\n   :undoc-members:\n"
    return f"# speechimg.{module}\n\n{idea}\n\n{built}\n\n```{{eval-rst}}\n{order}```\n"
