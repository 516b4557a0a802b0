"""Write README.md from nbs/index.ipynb, with nbconvert. Nothing is executed: outputs are kept ones.

    python tools/readme.py          # write README.md and the pictures beside the notebook

Three directives shape it: `#| hide` leaves a cell out, `#| echo: false` leaves out its code and
keeps what it shows, and `#| fig-alt: words` says what its picture shows to those who cannot see it.
"""

import os
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from notebooks import ROOT, body, directives

NOTE = "<!-- Written by `make readme` from nbs/index.ipynb: edit that. -->\n\n"
PICTURES = "nbs/index_files"
# the target of a markdown link or picture, or of an HTML one
TARGET = re.compile(r"""(\]\(|(?:src|href)=["'])(?!https?:|mailto:|data:|#)([^)"'\s]+)""")


def prepared(notebook):
    "The cells that a reader of the README sees, without directives and stderr."
    cells = []
    for cell in notebook.cells:
        flags = directives(cell)
        if "hide" in flags:
            continue
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.alt = flags.get("fig-alt", "a figure")
            cell.source = "" if flags.get("echo") == "false" else body(cell)
            # a picture or markdown, not the text that stands in for it
            for output in cell.outputs:
                data = output.get("data", {})
                if any(kind in data for kind in ("image/png", "image/svg+xml", "text/markdown")):
                    data.pop("text/plain", None)
                    data.pop("text/html", None)
        cells.append(cell)
    notebook.cells = cells
    return notebook


def from_root(text: str) -> str:
    "Links that were written beside the notebook, as seen from the folder above it."

    def moved(match):
        target = os.path.normpath(os.path.join("nbs", match[2]))
        return match[1] + target.replace(os.sep, "/")

    fences = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)  # code stays as it is
    return "".join(part if part.startswith("```") else TARGET.sub(moved, part) for part in fences)


def render(root: Path) -> dict[str, bytes]:
    "The files that the README is made of, as {path from the root: content}."
    notebook = prepared(nbformat.read(root / "nbs" / "index.ipynb", as_version=4))
    alternatives = {str(index): cell.pop("alt", "") for index, cell in enumerate(notebook.cells)}
    resources = {"unique_key": "figure", "output_files_dir": "index_files"}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources=resources)
    text = re.sub(r"^```(?:python)?\n\s*```\n", "", text, flags=re.M)  # what is left of hidden code
    text = re.sub(
        r"!\[\w+\]\((\S*figure_(\d+)_\d+\.\w+)\)",
        lambda match: f"![{alternatives[match[2]]}]({match[1]})",
        text,
    )
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)^[ \t]+$", "", text))
    text = from_root(text).strip() + "\n"
    files = {"README.md": (NOTE + text).encode()}
    for name, content in resources.get("outputs", {}).items():
        files[f"{PICTURES}/{Path(name).name}"] = content
    return files


def differences(root: Path) -> list[str]:
    "One line for each file of the README that is missing, stale or left over."
    files, lines = render(root), []
    for name, content in files.items():
        path = root / name
        if not path.exists():
            lines.append(f"{name}: missing; run `make readme`")
        elif path.read_bytes() != content:
            lines.append(f"{name}: not what nbs/index.ipynb gives; run `make readme`")
    left = {path.relative_to(root).as_posix() for path in (root / PICTURES).glob("*")} - set(files)
    return lines + [f"{name}: left over; run `make readme`" for name in sorted(left)]


def write(root: Path) -> None:
    "Write the files, and remove pictures that no longer belong to it."
    files = render(root)
    for path in (root / PICTURES).glob("*"):
        if path.relative_to(root).as_posix() not in files:
            path.unlink()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    print(
        "\n".join(f"wrote {name} ({len(content) / 1000:.0f} kB)" for name, content in files.items())
    )


if __name__ == "__main__":
    write(ROOT)
