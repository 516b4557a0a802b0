"""The rooms of the house, as nbs/rooms.toml lists them and as their notebooks describe themselves.

python tools/rooms.py    # the list, and the configuration for import-linter that is made of it
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

import notebooks
from notebooks import ROOT, directives, source


@dataclass
class Room:
    """One notebook of the house."""

    name: str  # as the list has it, from nbs/: 06_sic, research/hub
    shelf: str  # title of its shelf
    path: Path
    title: str
    idea: str  # the sentence under the title; "" if there is none
    module: str | None  # sic, run.hub; None if nothing is exported

    @property
    def short(self) -> str:
        """Its name without shelf and number: sic, hub."""
        return re.sub(r"^\d+_", "", self.name.rpartition("/")[2])


def listed(root: Path = ROOT) -> dict:
    """nbs/rooms.toml as it is."""
    return tomllib.loads((root / "nbs" / "rooms.toml").read_text(encoding="utf-8"))


def names(shelf: dict) -> list[str]:
    """The rooms of a shelf, from nbs/."""
    return [f"{shelf['folder']}/{name}".lstrip("/") for name in shelf["rooms"]]


def room(root: Path, shelf: str, name: str) -> Room:
    """Read one notebook's title, idea and module."""
    path = root / "nbs" / f"{name}.ipynb"
    cells = notebooks.read(path)["cells"]
    first = source(cells[0]) if cells else ""
    title = re.match(r"# (.+)", first)
    idea = re.search(r"(?m)^> (.+)$", first)
    exported = (directives(cell).get("default_exp") for cell in cells)
    return Room(
        name=name,
        shelf=shelf,
        path=path,
        title=title[1] if title else name,
        idea=idea[1] if idea else "",
        module=next((module for module in exported if module), None),
    )


def rooms(root: Path = ROOT) -> list[Room]:
    """Every room that is listed and there, in reading order."""
    return [
        room(root, shelf["title"], name)
        for shelf in listed(root)["shelf"]
        for name in names(shelf)
        if (root / "nbs" / f"{name}.ipynb").exists()
    ]


def unlisted(root: Path) -> list[str]:
    """One line for each notebook without a place in the list, and the other way round."""
    wanted = {name for shelf in listed(root)["shelf"] for name in names(shelf)} | {"index"}
    here = {notebooks.name_of(path, root) for path in notebooks.paths(root)}
    lines = [f"nbs/{name}.ipynb: on no shelf of nbs/rooms.toml" for name in sorted(here - wanted)]
    return lines + [f"nbs/rooms.toml: {name} has no notebook" for name in sorted(wanted - here)]


def floors(root: Path = ROOT) -> dict[str, list[str]]:
    """{package: its floors from the top}, in the words of import-linter."""
    return {
        "speechimg" if name == "house" else f"speechimg.{name}": levels
        for name, levels in listed(root)["floors"].items()
    }


def on_floors(root: Path = ROOT) -> set[str]:
    """Modules, and packages as a whole, that the floors name."""
    found = set()
    for package, levels in floors(root).items():
        inside = package.removeprefix("speechimg").lstrip(".")
        for name in re.findall(r"[\w.]+", " ".join(levels)):
            found.add(f"{inside}.{name}".lstrip("."))
    return found


def importlinter(root: Path = ROOT) -> str:
    """import-linter's configuration: a contract for each package that has floors."""
    lines = ["[importlinter]", "root_package = speechimg", ""]
    for package, levels in floors(root).items():
        lines += [f"[importlinter:contract:{package}]", f"name = the floors of {package}"]
        lines += ["type = layers", f"containers = {package}", "layers ="]
        lines += [f"    {level}" for level in levels]
        if package == "speechimg":  # torchrun -m speechimg.train is the command line's train
            lines += ["ignore_imports =", "    speechimg.train -> speechimg.cli"]
            lines += ["unmatched_ignore_imports_alerting = none"]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    for one in rooms():
        print(f"{one.shelf:<12} {one.name:<26} {one.module or '-':<26} {one.idea}")
