"""Count what the archives of `scenes` hold: its tables in README.md beside this file.

python data/describe.py            # prints them
python data/describe.py --write    # puts them into README.md, between its markers
"""

import argparse
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent


def manifests(name):
    "{split: its entries} over all parts of a corpus."
    found = {}
    for path in sorted(HERE.glob(f"{name}*.zip")):
        with zipfile.ZipFile(path) as archive:
            for file in archive.namelist():
                if file.endswith(".json") and "/" not in file:
                    found[file[:-5]] = json.loads(archive.read(file))["data"]
    return found


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def scenes():
    "Counts per split, kind, style and voice of `scenes`."
    parts = manifests("scenes")
    probe = parts.pop("swap")
    parts = {split: parts[split] for split in ("train", "val", "test", "test_style", "voice")}
    kinds = {s: Counter(e["scene"]["kind"] for e in entries) for s, entries in parts.items()}
    groups = {s: Counter(e["group"] for e in entries) for s, entries in parts.items()}
    yield (
        '**Splits.** "With siblings": pictures whose nouns occur in the same split in '
        "another binding."
    )
    order = ("single", "count", "pair", "mixed", "whole")
    yield table(
        ["split", "pictures", "captions", *order, "compositions", "with siblings", "voices"],
        [
            [
                s,
                len(entries),
                sum(len(e["captions"]) for e in entries),
                *(kinds[s][k] for k in order),
                len(
                    {
                        (e["scene"]["kind"], *e["scene"]["nouns"], e["scene"]["relation"])
                        for e in entries
                    }
                ),
                sum(n for n in groups[s].values() if n > 1),
                len({c["speaker"] for e in entries for c in e["captions"]}),
            ]
            for s, entries in parts.items()
        ],
    )
    pairs = len({(r["image"], r["other"]) for r in probe})
    yield (
        f"**Swap probe** (`swap.json`, pictures of `test`): {len(probe)} trials over {pairs} "
        "ordered pairs of pictures."
    )
    yield table(["kind", "trials"], sorted(Counter(r["kind"] for r in probe).items()))
    yield "**Drawing styles** (pictures; those of `voice` are among those of `train`)."
    styles = sorted({e["scene"]["style"] for entries in parts.values() for e in entries})
    yield table(
        ["split", *styles],
        [
            [s, *(Counter(e["scene"]["style"] for e in entries)[x] for x in styles)]
            for s, entries in parts.items()
        ],
    )
    yield "**Engines** (captions; voices in brackets). `test_style` says the captions of `test`."
    engines = ("espeak-ng", "festival", "flite")
    said = {
        s: [c["speaker"] for e in parts[s] for c in e["captions"]]
        for s in ("train", "val", "test", "voice")
    }
    yield table(
        ["split", *engines],
        [
            [
                s,
                *(
                    f"{sum(x.startswith(g) for x in v)} ({len({x for x in v if x.startswith(g)})})"
                    for g in engines
                ),
            ]
            for s, v in said.items()
        ],
    )
    yield (
        "Voices that speak in `test` and `voice` only: "
        + ", ".join(f"`{v}`" for v in sorted({re.sub(r":.*\+", ":*+", v) for v in said["test"]}))
        + " (`*` stands for each of the eight English accents)."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    text = "\n\n".join(scenes())
    if not write:
        return print(text)
    readme = (HERE / "README.md").read_text()
    readme = re.sub(
        "(<!-- counts:scenes -->).*?(<!-- end -->)",
        lambda m: f"{m[1]}\n\n{text}\n\n{m[2]}",
        readme,
        flags=re.S,
    )
    (HERE / "README.md").write_text(readme)


if __name__ == "__main__":
    main()
