"""The shipped `things` archives keep what data/README.md promises: splits by word, picture and
voice, kinds of everything in val and test, one right answer a picture, words with their classes.
"""

import csv
import io
import itertools
import json
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

DATA = Path(__file__).parents[1] / "data"
ARCHIVES = {"things-train.zip": ("train", "words")}
ARCHIVES["things.zip"] = ("val", "val_sentences", "test", "test_sentences")
ASKED = ARCHIVES["things.zip"]
SIZES = dict(picture=(80, 220), word=(40, 80), style=(50, 140))  # of val and of test


@pytest.fixture(scope="module")
def archives():
    opened = {name: zipfile.ZipFile(DATA / name) for name in ARCHIVES}
    yield {split: opened[name] for name, splits in ARCHIVES.items() for split in splits}
    for archive in opened.values():
        archive.close()


@pytest.fixture(scope="module")
def manifests(archives):
    return {s: json.loads(a.read(f"{s}.json"))["data"] for s, a in archives.items()}


def captions(entries):
    return [caption for entry in entries for caption in entry["captions"]]


def nouns(entries):
    return {entry["concepts"][0] for entry in entries}


def table(name):
    with open(DATA / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_sizes():
    files = [DATA / name for name in ARCHIVES]
    assert sum(path.stat().st_size for path in files) <= 24e6
    assert all(path.stat().st_size <= 50e6 for path in DATA.glob("*.zip"))


def test_kinds(manifests):
    for place, split in enumerate(("val", "test")):
        kinds = Counter(entry["scene"]["kind"] for entry in manifests[split])
        assert kinds == {kind: sizes[place] for kind, sizes in SIZES.items()}
        assert {len(entry["captions"]) for entry in manifests[split]} == {2}
    assert {entry["scene"]["kind"] for entry in manifests["train"]} == {"taught"}


def test_plurals_belong_to_their_singular(manifests):
    taught = nouns(manifests["train"]) | nouns(manifests["words"])
    assert {"glass", "glasses", "scissors"} <= taught
    assert not {"balloons", "tools", "dice", "mice"} & taught


def test_every_noun_is_taught_but_the_new_words(manifests):
    taught = nouns(manifests["train"]) | nouns(manifests["words"])
    said = {c["text"].lower() for s in ("train", "words") for c in captions(manifests[s])}
    for entry in manifests["val"] + manifests["test"]:
        noun, new = entry["concepts"][0], entry["scene"]["kind"] == "word"
        assert (noun in taught) == (not new), noun
        assert not new or not any(re.search(rf"\b{noun}\b", text) for text in said), noun


def test_one_right_answer_in_each_gallery(manifests):
    for split in ASKED:
        assert len(nouns(manifests[split])) == len(manifests[split])
    assert not nouns(manifests["val"]) & nouns(manifests["test"])


def test_meaning_is_the_word(manifests):
    pairs = {(e["concepts"][0], e["meaning"]) for s in ("train", "words") for e in manifests[s]}
    assert len(pairs) == len({noun for noun, _ in pairs}) == len({number for _, number in pairs})


def test_recordings_of_each_word(manifests):
    told = json.loads((DATA / "things_classes.json").read_text("utf-8"))
    general = {row["word"] for row in told["general"]}
    said, engines = Counter(), {}
    for entry in manifests["train"] + manifests["words"]:
        for caption in entry["captions"]:
            if caption["form"] == "bare":
                said[entry["concepts"][0]] += 1
            engine = caption["speaker"].split(":")[0]
            engines.setdefault(entry["concepts"][0], set()).add(engine)
    shown = nouns(manifests["train"])
    assert all(said[noun] >= 6 for noun in shown)
    assert all(said[word] >= (6 if word in general else 3) for word in nouns(manifests["words"]))
    assert all(len(engines[word]) >= 2 for word in engines)


def test_sentences_have_carriers_of_their_own(manifests, monkeypatch):
    monkeypatch.syspath_prepend(str(DATA))
    import build_things as things

    carriers = [set(things.CARRIERS[split]) for split in ("train", "val", "test")]
    assert len(carriers[0]) >= 20
    assert not any(one & two for one, two in itertools.combinations(carriers, 2))
    for split in ("val", "test"):
        asked, plain = manifests[f"{split}_sentences"], manifests[split]
        assert [e["image"] for e in asked] == [e["image"] for e in plain]
        assert {c["form"] for c in captions(asked)} == {"sentence"}
        assert {c["form"] for c in captions(plain)} == {"bare"}


def test_voices_are_apart(manifests):
    voices = {s: {c["speaker"] for c in captions(manifests[s])} for s in manifests}
    heard = voices["train"] | voices["words"]
    val, test = (voices[s] | voices[f"{s}_sentences"] for s in ("val", "test"))
    for one, two in itertools.combinations((heard, val, test), 2):
        assert not one & two
        assert not {v.split("+")[-1] for v in one if "+" in v} & {
            v.split("+")[-1] for v in two if "+" in v
        }  # nor under another accent
    assert {v.split(":")[0] for v in heard} == {v.split(":")[0] for v in test}
    assert len(heard) > 150 and len({v.split(":")[0] for v in val}) == 2


def test_channels(manifests):
    for split in manifests:
        share = Counter(c["channel"] for c in captions(manifests[split]))
        assert set(share) == {"clean", "room", "telephone"}
        assert share["telephone"] > 0.08 * share.total()


def test_style_is_held_out(manifests):
    for split, entries in manifests.items():
        for entry in entries:
            if "scene" in entry:
                held = entry["scene"]["kind"] == "style"
                assert (entry["scene"]["style"] == "noto") == held, (split, entry["image"])


def small(archive, entry):
    picture = Image.open(io.BytesIO(archive.read(entry["image"]))).convert("L")
    return np.asarray(picture.resize((17, 16), Image.Resampling.BILINEAR), np.int16)


def test_no_drawing_crosses_splits(archives, manifests):
    like = {row["file"]: row["note"].removeprefix("like ") for row in table("things_drawings.tsv")}
    parts = {}
    for split in ("train", "val", "test"):
        drawn = [e["scene"] for e in manifests[split] if e["scene"]["style"] == "clip-art"]
        parts[split] = {like[scene["source"]] or scene["source"] for scene in drawn}
        shown = {(e["scene"]["source"], e["scene"]["style"]) for e in manifests[split]}
        assert len(shown) == len(manifests[split])
    assert not any(one & two for one, two in itertools.combinations(parts.values(), 2))
    hashes = {}
    for split in ("train", "val", "test"):
        for entry in manifests[split]:
            pixels = small(archives[split], entry)
            key = (pixels[:, 1:] > pixels[:, :-1] + 2).tobytes() + (pixels // 32).tobytes()
            hashes.setdefault(key, set()).add(split)
    assert all(len(found) == 1 for found in hashes.values())


def test_labels_are_read():
    rows = table("things_drawings.tsv")
    assert len({row["file"] for row in rows}) == len(rows)
    assert all(row["label"] or row["note"] for row in rows)  # kept, or out for a reason
    assert sum(bool(row["label"]) for row in rows) > 1_300
    emoji = table("things_emoji.tsv")
    assert len({row["code"] for row in emoji}) == len(emoji) > 600


def test_classes(manifests):
    told = json.loads((DATA / "things_classes.json").read_text("utf-8"))
    assert [row["index"] for row in told["classes"]] == list(range(1000))
    assert len({row["synset"] for row in told["classes"]}) == 1000
    named = {word: row["index"] for row in told["classes"] for word in row["words"]}
    assert named["sorrel"] == 339 and named["tench"] == 0 and named["toilet paper"] == 999
    general = {row["word"]: row["classes"] for row in told["general"]}
    assert general["horse"] == [339] and len(general["dog"]) == 118
    entries = {entry["concepts"][0]: entry for entry in manifests["words"]}
    assert entries["dog"]["classes"] == general["dog"] and not entries["dog"]["captions"]
    for entry in entries.values():
        assert entry["classes"] and all(0 <= number < 1000 for number in entry["classes"])
        assert entry["captions"] or entry["concepts"][0] in nouns(manifests["train"])


def test_files(archives, manifests):
    for name, splits in ARCHIVES.items():
        told = {f"{split}.json" for split in splits}
        for split in splits:
            told |= {e["image"] for e in manifests[split] if "image" in e}
            told |= {c["wav"] for c in captions(manifests[split])}
        assert told == set(archives[splits[0]].namelist())
        assert all(not path.startswith("/") and ".." not in path for path in told)
    every = [c["uttid"] for entries in manifests.values() for c in captions(entries)]
    assert len(set(every)) == len(every)


def test_recordings(archives, manifests):
    for split, entries in manifests.items():
        for caption in captions(entries)[::37]:
            wave, rate = soundfile.read(io.BytesIO(archives[split].read(caption["wav"])))
            seconds, loud = len(wave) / rate, np.abs(wave).max()
            assert rate == 16_000 and wave.ndim == 1, caption["uttid"]
            assert 0.2 < seconds < 8 and 0.25 < loud <= 1.2, caption["uttid"]
            assert 2.4 < len(caption["text"]) / seconds < 42, caption["uttid"]


def test_pictures(archives, manifests):
    for split in ("train", "val", "test"):
        for entry in manifests[split][::13]:
            picture = Image.open(io.BytesIO(archives[split].read(entry["image"])))
            pixels = np.asarray(picture.convert("RGB"), np.int16)
            assert picture.size == (160, 160), entry["image"]
            assert pixels[[0, -1]].min() > 200, entry["image"]  # a white margin
            assert ((255 - pixels).max(-1) > 30).mean() > 0.01, entry["image"]


def test_readme_quotes_the_archives(monkeypatch):
    monkeypatch.syspath_prepend(str(DATA))
    import describe

    readme = (DATA / "README.md").read_text()
    for part in describe.things():
        assert part in readme, "run python data/describe.py --write"


def test_loads(monkeypatch):
    from speechimg.corpora import load_corpus

    monkeypatch.setenv("SPEECHIMG_DATA", str(DATA))
    test, words = load_corpus("things", "test"), load_corpus("things", "words")
    assert len(test.pictures) == sum(sizes[1] for sizes in SIZES.values())
    assert test.pictures[0].scene["kind"] in SIZES
    assert test.load_picture(0).size == (160, 160) and test.load_wave(0).numel() > 3_200
    dog = next(picture for picture in words.pictures if picture.concepts == ["dog"])
    assert len(dog.classes) == 118 and not dog.path
    train = load_corpus("things", "train")
    assert dog.id in {picture.id for picture in train.pictures if picture.concepts == ["dog"]}


def test_grammar(monkeypatch):
    monkeypatch.syspath_prepend(str(DATA))
    import build_things as things

    assert things.bare("owl")[:4] == ["an owl", "owl", "the owl", "owls"]
    assert things.bare("bacon")[:4] == ["some bacon", "bacon", "the bacon", "bacon"]
    assert things.bare("scissors")[0] == "some scissors"
    assert things.plural("computer mouse") == "computer mice"
    assert things.plural("mango") == "mangoes" and things.plural("sheep") == "sheep"
    assert things.plural("bus") == "buses" and things.plural("Mars") is None
    assert things.article("unicycle") == "a unicycle" and things.article("hourglass")[:3] == "an "
    assert things.spoken("a T-shirt", "festival") == "a t shirt"
    said = things.sentences("bread", "test", 5, things.random.Random(0))
    assert not any("small bread" in text or "breads" in text for text in said)


def test_plan_is_what_the_archives_hold(manifests, monkeypatch):
    monkeypatch.syspath_prepend(str(DATA))
    import build_things as things

    planned = things.plan()
    for split, entries in manifests.items():
        assert [e["concepts"] for e in planned[split]] == [e["concepts"] for e in entries]
        texts = [c["text"] for c in captions(planned[split])]
        assert texts == [c["text"] for c in captions(entries)]
