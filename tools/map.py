"""Draw the map of the house for each room, the place of the room marked: nbs/map/NAME.svg.

    python tools/map.py    # write those that changed, remove those of rooms that are no more

What stands still (arrows, the wave, the picture) is in map.svg beside this file.
"""

from html import escape
from pathlib import Path
from typing import NamedTuple

import rooms
from notebooks import ROOT

COLOURS = {
    "page": "#ffffff",
    "data": "#dfe7f1",
    "tower": "#cfe8dd",
    "coarse": "#fbe3c4",
    "fine": "#f6cfc6",
    "use": "#e4dcee",
    "shelf": "#eeeeea",
}


class Box(NamedTuple):
    """A part of the method; its left upper corner and size in pixels of a picture of 960 x 420."""

    x: int
    y: int
    width: int
    height: int
    colour: str
    idea: tuple[str, ...]  # one or two short lines
    others: str = ""  # rooms without a box of their own that belong to it


BOXES = {
    "page": Box(8, 8, 120, 58, "page", ("all of it,", "on one page")),
    "data": Box(160, 225, 128, 66, "data", ("mask and batch",), "decode cache ahead mixture"),
    "corpora": Box(
        160, 125, 128, 66, "data", ("many recordings,", "one image id"), "store layouts"
    ),
    "attention": Box(330, 175, 140, 60, "tower", ("the block of", "all towers")),
    "speech": Box(330, 85, 140, 60, "tower", ("frames become", "tokens"), "whisper light hubert"),
    "image": Box(330, 265, 140, 60, "tower", ("patches become", "tokens"), "lite light blip2"),
    "sic": Box(515, 165, 160, 76, "coarse", ("coarse: one vector", "against many")),
    "queue": Box(
        515, 60, 160, 66, "coarse", ("a slow teacher and", "what it saw"), "queue_negatives"
    ),
    "distillation": Box(760, 60, 170, 66, "coarse", ("believe the teacher", "a little")),
    "mining": Box(515, 275, 160, 66, "fine", ("wrong pairs that", "nearly fool it")),
    "sim": Box(760, 165, 170, 76, "fine", ("fine: read both,", "answer yes or no")),
    "alignment": Box(8, 355, 128, 56, "use", ("one whole step",), "model distributed"),
    "retrieval": Box(
        146, 355, 128, 56, "use", ("rank and measure",), "mteb explore attention_view"
    ),
    "train": Box(284, 355, 128, 56, "use", ("the loop",), "core checkpoints plan hub gpu soak cli"),
    "results": Box(422, 355, 128, 56, "use", ("what it is worth",), "words"),
    "studio": Box(560, 355, 128, 56, "use", ("speak to it",), "answers"),
    "research": Box(698, 355, 124, 56, "shelf", ("files, GPUs, hub",)),
    "teach": Box(832, 355, 120, 56, "shelf", ("hand out, grade",)),
}


def home(room: rooms.Room) -> set[str]:
    """The boxes in which a room is at home: its own, those that it belongs to, or its shelf's."""
    short = "answers" if room.name == "research/page" else room.short
    if room.shelf == "Teach":
        return {"teach"}
    own = {name for name, box in BOXES.items() if short == name or short in box.others.split()}
    return own | ({"research"} if room.shelf == "Research" else set())


def drawn(box: Box, label: str, marked: bool) -> str:
    """One box: a rounded rectangle, its name, its idea."""
    x, lines = box.x + box.width / 2, [label, *box.idea]
    y = box.y + box.height / 2 - 8 * (len(lines) - 1) + 5
    place = f'x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="9"'
    edge = 'stroke="#b3261e" stroke-width="3"' if marked else 'stroke="#555" stroke-width="0.8"'
    parts = [f'<rect {place} fill="{COLOURS[box.colour]}" {edge}/>']
    for number, text in enumerate(lines):
        style = 'font-size="15" font-weight="bold"' if number == 0 else 'font-size="12" fill="#444"'
        parts.append(f'<text x="{x:g}" y="{y + 16 * number:g}" {style}>{escape(text)}</text>')
    if marked:
        style = 'font-size="11" font-weight="bold" fill="#b3261e"'
        parts.append(f'<text x="{box.x + 36}" y="{box.y - 6}" {style}>you are here</text>')
    return "\n".join(parts)


def picture(every: list[rooms.Room], here: rooms.Room | None) -> str:
    """The map as SVG; nothing is marked on the one of the front page."""
    numbers = {one.short: f"{one.name[:2]} {one.short}" for one in every if one.name[:1].isdigit()}
    marked = home(here) if here else set()
    alt = "The pieces of the method and the way of a recording and a picture through them"
    alt += f"; marked: {', '.join(sorted(marked))}" if marked else ""
    boxes = [drawn(box, numbers.get(name, name), name in marked) for name, box in BOXES.items()]
    template = (ROOT / "tools" / "map.svg").read_text(encoding="utf-8")
    return template.replace("TITLE", alt).replace("BOXES", "\n".join(boxes))


def pictures(root: Path) -> dict[str, str]:
    """{path from the root: SVG}, one for each room and one for the front page."""
    every = rooms.rooms(root)
    files = {"nbs/map/house.svg": picture(every, None)}
    for one in every:
        name = "answers" if one.name == "research/page" else one.short
        if one.shelf != "Assignments":  # they show the picture of their chapter
            files[f"nbs/map/{name}.svg"] = picture(every, one)
    return files


def differences(root: Path) -> list[str]:
    """One line for each picture that is missing, stale or left over."""
    files = pictures(root)
    left = {path.relative_to(root).as_posix() for path in (root / "nbs" / "map").glob("*")}
    lines = [f"{name}: left over; run `make readme`" for name in sorted(left - set(files))]
    for name, text in files.items():
        if not (root / name).exists() or (root / name).read_text(encoding="utf-8") != text:
            lines.append(f"{name}: missing or stale; run `make readme`")
    return lines


def write(root: Path) -> None:
    """Write the pictures, and remove what belongs to no room."""
    files = pictures(root)
    for path in (root / "nbs" / "map").glob("*"):
        if path.relative_to(root).as_posix() not in files:
            path.unlink()
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(ROOT)
