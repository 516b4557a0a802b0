"""The reference of the library as Markdown for Sphinx, read from the source: signatures, docstrings, and the comments behind the arguments.

Nothing is imported, so that it takes no PyTorch and no seconds to say what a function expects. Used by website.py.
"""

import ast
import io
import re
import tokenize
from inspect import cleandoc
from pathlib import Path

MANY = 12  # fields of a class, from which they are listed one by one instead of in its signature


def comments(code: str) -> dict[int, str]:
    "{line: the comment at its end}."
    found = tokenize.generate_tokens(io.StringIO(code).readline)
    return {
        token.start[0]: token.string.lstrip("# ")
        for token in found
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
    }


def plain(text: str) -> str:
    "Text in which nothing is markup but `code`."
    parts = re.split(r"(`[^`\n]*`)", cleandoc(text))
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\<*_$\[\]|~])", r"\\\1", part)
        for part in parts
    )


def names(tree: ast.Module) -> list[str]:
    "What a module exports."
    return next(
        (
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ),
        [],
    )


def arguments(node: ast.FunctionDef, notes: dict[int, str], method: bool) -> tuple[str, list[str]]:
    "(what stands between the brackets, one line about each argument); a comment behind several arguments speaks of all of them."
    given, lines = node.args, []
    if method:
        del (given.posonlyargs or given.args)[0]
    every = [
        *given.posonlyargs,
        *given.args,
        *filter(None, [given.vararg]),
        *given.kwonlyargs,
        *filter(None, [given.kwarg]),
    ]
    for line in sorted(line for line in notes if node.lineno <= line < node.body[0].lineno):
        last = max((one.lineno for one in every if one.lineno <= line), default=0)
        here = ", ".join(one.arg for one in every if one.lineno == last)
        result = node.returns and node.returns.lineno == line
        if result and last < line:
            here = "returned"
        lines.append(
            f"- *{plain(here)}*: {plain(notes[line])}" if here else f"- {plain(notes[line])}"
        )
    return ast.unparse(given), lines


def block(kind: str, signature: str, text: str, inner: str = "", options: str = "") -> str:
    "The directive that describes one name."
    fence = "`````" if kind == "class" else "````"
    return f"{fence}{{py:{kind}}} {signature}\n{options}\n{text}\n\n{inner}{fence}\n\n"


def function(node: ast.FunctionDef, notes: dict[int, str], method: bool = False) -> str:
    marks, text = (
        {ast.unparse(mark) for mark in node.decorator_list},
        plain(ast.get_docstring(node) or ""),
    )
    if "property" in marks:
        return block("property", node.name, text)
    inside, lines = arguments(node, notes, method and "staticmethod" not in marks)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    options = "".join(f":{mark}:\n" for mark in ("staticmethod", "classmethod") if mark in marks)
    return block(
        "method" if method else "function",
        f"{node.name}({inside}){result}",
        f"{text}\n\n" + "\n".join(lines),
        options=options,
    )


def klass(node: ast.ClassDef, notes: dict[int, str]) -> str:
    "A class with what makes it, by `__init__` or by its fields, and its public methods."
    methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
    start = next((one for one in methods if one.name == "__init__"), None)
    if start:
        inside, lines = arguments(start, notes, True)
    else:
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
        inside = (
            ", ".join(ast.unparse(one) for one in fields) if len(fields) <= MANY else "**settings"
        )
        named = {
            one: f"*{plain(ast.unparse(one.target))}*"
            if len(fields) <= MANY
            else f"`{ast.unparse(one)}`"
            for one in fields
        }
        lines = [
            f"- {named[one]}: {plain(notes.get(one.end_lineno, ''))}".rstrip(": ")
            for one in fields
            if one.end_lineno in notes or len(fields) > MANY
        ]
    shown = [one for one in methods if one.name == "__call__" or not one.name.startswith("_")]
    text = plain(ast.get_docstring(node) or "") + "\n\n" + "\n".join(lines)
    return block(
        "class",
        f"{node.name}({inside})",
        text,
        "".join(function(one, notes, True) for one in shown),
    )


def assigned(node: ast.Assign) -> dict[str, ast.expr]:
    "{name: value}, for `A = 1` and for `A, B = 1, 2`."
    target, value = node.targets[0], node.value
    if isinstance(target, ast.Tuple):
        return {
            ast.unparse(name): value.elts[place] if isinstance(value, ast.Tuple) else value
            for place, name in enumerate(target.elts)
        }
    return {ast.unparse(target): value}


def constants(node: ast.Assign, notes: dict[int, str]) -> str:
    values = {name: ast.unparse(value) for name, value in assigned(node).items()}
    return "".join(
        block(
            "data",
            name,
            plain(notes.get(node.end_lineno, "")),
            options=f":value: {value}\n" * (len(value) < 80),
        )
        for name, value in values.items()
    )


def summary(path: Path) -> str:
    "The one idea of a module."
    return plain(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


def reference(path: Path, chapter: str) -> str:
    "The page of one module; `chapter` is the Markdown that names where it is built."
    code = path.read_text(encoding="utf-8")
    tree, notes = ast.parse(code), comments(code)
    text = f"# speechimg.{path.stem}\n\n{summary(path)}\n\n{chapter}\n\n```{{py:module}} speechimg.{path.stem}\n```\n\n"
    for node in tree.body:
        own = set(assigned(node)) if isinstance(node, ast.Assign) else {getattr(node, "name", "")}
        if own & set(names(tree)):
            text += {ast.FunctionDef: function, ast.ClassDef: klass, ast.Assign: constants}[
                type(node)
            ](node, notes)
    return text
