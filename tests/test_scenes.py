"""The shipped `scenes` archives keep what data/README.md promises: splits by content and voice, a
held-out style, new voices on known pictures, a fair probe.
"""

import io
import itertools
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import soundfile
from PIL import Image

DATA = Path(__file__).parents[1] / "data"
SPLITS = ("train", "val", "test", "test_style", "voice")
ARCHIVES = dict(
    train="scenes-train.zip", voice="scenes-voice.zip"
)  # of a split; the others are in scenes.zip


@pytest.fixture(scope="module")
def archives():
    opened = {name: zipfile.ZipFile(DATA / name) for name in ("scenes.zip", *ARCHIVES.values())}
    yield {split: opened[ARCHIVES.get(split, "scenes.zip")] for split in SPLITS}
    for archive in opened.values():
        archive.close()


@pytest.fixture(scope="module")
def manifests(archives):
    def read(split):
        return json.loads(archives[split].read(f"{split}.json"))["data"]

    return {split: read(split) for split in SPLITS}


def content(entries):
    return {
        (e["scene"]["kind"], tuple(e["scene"]["nouns"]), e["scene"]["relation"]) for e in entries
    }


def voices(entries):
    return {c["speaker"] for e in entries for c in e["captions"]}


def test_counts(manifests):
    sizes = {
        split: (len(entries), Counter(len(e["captions"]) for e in entries))
        for split, entries in manifests.items()
    }
    assert sizes["train"][0] >= 6_000 and set(sizes["train"][1]) == {2}
    assert sizes["val"] == (300, {2: 300})
    assert sizes["test"] == sizes["test_style"] == (500, {5: 500})
    assert sizes["voice"] == (200, {2: 200})


def test_sizes():
    files = list(DATA.glob("*.zip"))
    assert all(path.stat().st_size <= 50e6 for path in files)
    assert sum(path.stat().st_size for path in files) <= 105e6


def test_no_content_crosses_splits(manifests):
    for one, two in itertools.combinations(("train", "val", "test"), 2):
        assert not content(manifests[one]) & content(manifests[two]), (one, two)
    pairs = {
        s: {frozenset(n) for kind, n, _ in content(manifests[s]) if kind == "pair"}
        for s in ("train", "val", "test")
    }
    assert (
        not pairs["train"] & pairs["test"] and not pairs["train"] & pairs["val"]
    )  # not even swapped


def test_test_voices_are_unseen(manifests):
    heard, new = voices(manifests["train"]) | voices(manifests["val"]), voices(manifests["test"])
    assert not heard & new
    assert (
        {v.split(":")[0] for v in new}
        == {v.split(":")[0] for v in heard}
        == {"espeak-ng", "flite", "festival"}
    )
    assert not {v.split("+")[-1] for v in heard if "+" in v} & {
        v.split("+")[-1] for v in new if "+" in v
    }  # nor under another accent


def test_style_is_held_out(manifests):
    assert {e["scene"]["style"] for e in manifests["test_style"]} == {"noto"}
    assert all(
        e["scene"]["style"] != "noto" for s in ("train", "val", "test") for e in manifests[s]
    )

    def same(e):
        return (
            e["scene"]["kind"],
            e["scene"]["nouns"],
            e["scene"]["relation"],
            e["scene"]["background"],
            [c["uttid"] for c in e["captions"]],
        )

    assert [same(e) for e in manifests["test"]] == [same(e) for e in manifests["test_style"]]


def test_voice_changes_the_voices_alone(manifests):
    seen = {e["image"]: e for e in manifests["train"]}

    def bare(e):
        return {key: value for key, value in e.items() if key != "captions"}

    for e in manifests["voice"]:
        assert bare(e) == bare(seen[e["image"]]) and e["scene"]["kind"] == "pair"
    assert (
        len({e["meaning"] for e in manifests["voice"]})
        == len({e["image"] for e in manifests["voice"]})
        == 200
    )
    assert Counter(Counter(e["group"] for e in manifests["voice"]).values()) == {2: 50, 1: 100}
    assert not voices(manifests["voice"]) & (voices(manifests["train"]) | voices(manifests["val"]))
    assert voices(manifests["voice"]) == voices(manifests["test"])
    said = [c["speaker"].split(":")[0] for e in manifests["voice"] for c in e["captions"]]
    for engine, share in (("espeak-ng", 0.5), ("flite", 0.28), ("festival", 0.22)):
        assert abs(said.count(engine) / len(said) - share) < 0.06
    names = {
        s: {c[key] for e in manifests[s] for c in e["captions"] for key in ("uttid", "wav")}
        for s in SPLITS
    }
    assert not names["voice"] & (names["train"] | names["val"] | names["test"])


def test_voice_loads(manifests, monkeypatch):
    from speechimg.corpora import load_corpus

    monkeypatch.setenv("SPEECHIMG_DATA", str(DATA))
    new, train = load_corpus("scenes", "voice"), load_corpus("scenes", "train")
    assert (len(new.pictures), len(new.captions)) == (200, 400)
    known = {picture.path: picture for picture in train.pictures}
    assert all(
        picture == known[picture.path] for picture in new.pictures
    )  # ids too: an embedding of train means the same here
    assert new.load_wave(399).numel() > 6_400 and new.load_picture(199).size == (192, 192)


def test_voice_is_heard_whole(archives, manifests):
    for c in (c for e in manifests["voice"] for c in e["captions"]):
        wave, rate = soundfile.read(io.BytesIO(archives["voice"].read(c["wav"])))
        frames = (wave[: len(wave) // 320 * 320].reshape(-1, 320) ** 2).mean(
            1
        ) ** 0.5  # loudness every 20 ms
        assert (
            rate == 16_000
            and 0.3 < abs(wave).max() <= 1.2
            and (frames > 0.05 * frames.max()).mean() > 0.3
        ), c["uttid"]
        assert 8 < len(c["text"]) / (len(wave) / rate) < 32 and frames[-1] < 0.2 * frames.max(), c[
            "uttid"
        ]  # neither cut short nor cut off


@pytest.mark.parametrize("split", SPLITS)
def test_half_have_siblings(manifests, split):
    entries = manifests[split]
    groups = {}
    for e in entries:
        groups.setdefault(e["group"], []).append(e)
    for group in groups.values():
        assert len({frozenset(e["scene"]["nouns"]) for e in group}) == 1  # the same nouns ...
        assert len(content(group)) == len(group)  # ... in different bindings
    assert sum(len(g) for g in groups.values() if len(g) > 1) >= len(entries) / 2


def test_one_meaning_per_composition(manifests):
    rows = {
        (e["meaning"], e["scene"]["kind"], tuple(e["scene"]["nouns"]), e["scene"]["relation"])
        for e in manifests["train"]
    }
    assert (
        len({row[0] for row in rows})
        == len(rows)
        == len(content(manifests["train"]))
        < len(manifests["train"])
    )


def test_two_kinds_are_for_training_alone(manifests):
    kinds = {
        split: Counter(e["scene"]["kind"] for e in entries) for split, entries in manifests.items()
    }
    assert min(kinds["train"][kind] for kind in ("whole", "mixed")) > 300
    assert not any(
        kinds[split][kind]
        for split in ("val", "test", "test_style", "voice")
        for kind in ("whole", "mixed")
    )
    counted = {(noun, n) for kind, (noun, *_), n in content(manifests["train"]) if kind == "mixed"}
    tested = {
        (nouns[0], n)
        for split in ("val", "test")
        for kind, nouns, n in content(manifests[split])
        if kind == "count"
    }
    assert not counted & tested  # not even beside something else
    assert {
        e["scene"]["nouns"][0] for e in manifests["train"] if e["scene"]["kind"] == "whole"
    } == {n for e in manifests["train"] for n in e["concepts"]}


@pytest.mark.parametrize("split", ("val", "test", "voice"))
def test_every_caption_tells_its_picture_from_all_others(manifests, split):
    assert len(content(manifests[split])) == len(manifests[split])
    meaning = {}
    for e in manifests[split]:
        assert len({c["text"] for c in e["captions"]}) == len(e["captions"])
        for c in e["captions"]:
            plain = c["text"].split(" on a ")[0].split(" on an ")[0]
            assert meaning.setdefault(plain, e["image"]) == e["image"], plain


def test_probe(archives, manifests):
    rows = json.loads(archives["test"].read("swap.json"))["data"]
    by_image = {e["image"]: e for e in manifests["test"]}
    assert (
        len({frozenset((r["image"], r["other"])) for r in rows}) >= 200
        and len({(r["image"], r["other"]) for r in rows}) >= 250
    )
    for r in rows:
        one, two = by_image[r["image"]]["scene"], by_image[r["other"]]["scene"]
        assert r["uttid"] in {c["uttid"] for c in by_image[r["image"]]["captions"]}
        assert sorted(one["nouns"]) == sorted(two["nouns"]) and (one["nouns"], one["relation"]) != (
            two["nouns"],
            two["relation"],
        )
        assert all(
            one[key] == two[key] for key in ("kind", "style", "background", "group")
        )  # nothing else gives it away
        if r["kind"] in ("left_right", "above_below"):
            assert one["nouns"] == two["nouns"][::-1] and one["relation"] == two["relation"]
    assert {(r["image"], r["other"]) for r in rows} == {
        (r["other"], r["image"]) for r in rows
    }  # both ways: no answer is right by habit


def test_files(archives, manifests):
    for split, entries in manifests.items():
        archive, drawn = (
            archives[split],
            archives["train" if split == "voice" else split],
        )  # voice has its pictures from train
        assert {c["wav"] for e in entries for c in e["captions"]} <= set(archive.namelist()) and {
            e["image"] for e in entries
        } <= set(drawn.namelist())
        for e in entries[::97]:
            picture = Image.open(io.BytesIO(drawn.read(e["image"])))
            assert picture.size == (192, 192) and picture.convert("L").getextrema() != (0, 0)
            for c in e["captions"]:
                wave, rate = soundfile.read(io.BytesIO(archive.read(c["wav"])))
                assert (
                    rate == 16_000
                    and wave.ndim == 1
                    and 0.4 < len(wave) / rate < 8
                    and 0.2 < abs(wave).max() <= 1.2
                )
    assert all(
        not name.startswith("/") and ".." not in name
        for archive in archives.values()
        for name in archive.namelist()
    )
    assert set(archives["voice"].namelist()) == {"voice.json"} | {
        c["wav"] for e in manifests["voice"] for c in e["captions"]
    }


def test_readme_quotes_the_archives(monkeypatch):
    monkeypatch.syspath_prepend(str(DATA))
    import describe

    readme = (DATA / "README.md").read_text()
    for part in describe.scenes():
        assert part in readme, "run python data/describe.py --write"


def test_grammar(manifests, monkeypatch):
    monkeypatch.syspath_prepend(str(DATA))
    scenes = pytest.importorskip(
        "build_scenes", reason="building the corpora needs the extra speechimg[corpora]"
    )
    entries, probe = scenes.plan()
    again, _ = scenes.plan()
    assert json.dumps(entries) == json.dumps(again) and len(probe) >= 250  # deterministic
    drawn = scenes.voice_entries(manifests["train"])
    assert (
        json.loads(scenes.manifest(drawn))["data"] == manifests["voice"]
    )  # from the manifest of train and the seed alone
    for e in drawn:
        assert all(
            c["text"].split(" on a ")[0].split(" on an ")[0] in scenes.phrasings(e["scene"])
            for c in e["captions"]
        )
    swapped = [
        scenes.phrasings(dict(kind="pair", nouns=n, relation="left"))
        for n in (["cat", "dog"], ["dog", "cat"])
    ]
    assert not set(swapped[0]) & set(swapped[1])
    assert "an owl at the top and a cat at the bottom" in scenes.phrasings(
        dict(kind="pair", nouns=["owl", "cat"], relation="above")
    )
    assert "three mice" in scenes.phrasings(dict(kind="count", nouns=["mouse"], relation=3))
    assert (
        scenes.phrasings(dict(kind="single", nouns=["apple"], relation="left"))[0]
        == "an apple on the left"
    )
    assert scenes.phrasings(dict(kind="whole", nouns=["owl"], relation="all"))[0] == "an owl"
    assert (
        scenes.phrasings(dict(kind="mixed", nouns=["mouse", "star"], relation=2))[0]
        == "two mice and a star"
    )
