"""Count what the archives of `scenes` and `things` hold: their tables in README.md beside this
file.

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


def things():
    "Counts per manifest, kind, style and engine of `things`."
    parts = manifests("things")
    order = ("train", "words", "val", "val_sentences", "test", "test_sentences")
    said = {s: [c for e in parts[s] for c in e["captions"]] for s in order}
    forms = {s: Counter(c["form"] for c in said[s]) for s in order}
    yield "**Manifests.** Nouns: different words with an entry; of `words`, those with recordings."
    yield table(
        ["manifest", "pictures", "nouns", "bare", "sentences", "voices"],
        [
            [
                s,
                sum("image" in e for e in parts[s]),
                len({e["concepts"][0] for e in parts[s] if e["captions"] or "image" in e}),
                forms[s]["bare"],
                forms[s]["sentence"],
                len({c["speaker"] for c in said[s]}),
            ]
            for s in order
        ],
    )
    yield "**Kinds and styles** (pictures)."
    drawn = {s: [e["scene"] for e in parts[s]] for s in ("train", "val", "test")}
    kinds = ("taught", "picture", "style", "word")
    styles = sorted({scene["style"] for listed in drawn.values() for scene in listed})
    rows = []
    for split, listed in drawn.items():
        kind, style = (Counter(scene[key] for scene in listed) for key in ("kind", "style"))
        rows.append([split, *(kind[k] for k in kinds), *(style[x] for x in styles)])
    yield table(["split", *kinds, *styles], rows)
    yield "**Engines and channels** (recordings)."
    engines, channels = ("espeak-ng", "festival", "flite"), ("clean", "room", "telephone")
    rows = []
    for split in order:
        engine = Counter(c["speaker"].split(":")[0] for c in said[split])
        channel = Counter(c["channel"] for c in said[split])
        rows.append([split, *(engine[x] for x in engines), *(channel[x] for x in channels)])
    yield table(["manifest", *engines, *channels], rows)


def fill(readme, name, end, parts):
    "The page with the tables of a corpus between its markers."
    text = "\n\n".join(parts)
    pattern = f"(<!-- counts:{name} -->).*?(<!-- {end} -->)"
    return re.sub(pattern, lambda m: f"{m[1]}\n\n{text}\n\n{m[2]}", readme, flags=re.S)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    if not write:
        return print("\n\n".join([*scenes(), *things()]))
    readme = fill((HERE / "README.md").read_text(), "scenes", "end", scenes())
    (HERE / "README.md").write_text(fill(readme, "things", "end things", things()))


if __name__ == "__main__":
    main()
