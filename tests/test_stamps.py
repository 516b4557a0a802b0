"""The `stamps` archive is what data/README.md and its report say it is. Reads the archive itself,
not through the library.
"""

import collections
import io
import json
import random
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import soundfile
from PIL import Image

DATA = Path(__file__).resolve().parents[1] / "data"
SPLITS = ("train", "val", "test")
# counted in the package; recordings without speech, text or picture are dropped
EXPECTED = {
    "ca": 749,
    "fr": 749,
    "bg": 749,
    "ru": 742,
    "ro": 742,
    "es": 724,
    "be": 685,
    "el": 505,
    "da": 321,
}
EXPECTED |= {"nl": 67, "en": 65}
SAMPLE = 150


@pytest.fixture(scope="module")
def archive():
    with zipfile.ZipFile(DATA / "stamps.zip") as opened:
        yield opened


@pytest.fixture(scope="module")
def manifests(archive):
    return {split: json.loads(archive.read(f"{split}.json"))["data"] for split in ("all", *SPLITS)}


@pytest.fixture(scope="module")
def report():
    return json.loads((DATA / "stamps_report.json").read_text("utf-8"))


def captions(entries):
    return [caption for entry in entries for caption in entry["captions"]]


def languages(entries):
    return collections.Counter(caption["language"] for caption in captions(entries))


def test_archive_is_stored_sorted_and_small(archive):
    entries = archive.infolist()
    assert (DATA / "stamps.zip").stat().st_size < 24e6
    assert all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    assert [entry.filename for entry in entries] == sorted({entry.filename for entry in entries})
    assert {entry.date_time for entry in entries} == {(2022, 6, 4, 0, 0, 0)}


def test_no_path_leaves_the_folder(archive, manifests):
    listed = [entry["image"] for entry in manifests["all"]] + [
        c["wav"] for c in captions(manifests["all"])
    ]
    for name in {*archive.namelist(), *listed}:
        path = PurePosixPath(name)
        assert not path.is_absolute() and ".." not in path.parts and "\\" not in name, name
    assert len({name.lower() for name in archive.namelist()}) == len(archive.namelist())


def test_every_listed_file_is_there_and_no_other(archive, manifests):
    listed = {entry["image"] for entry in manifests["all"]} | {
        c["wav"] for c in captions(manifests["all"])
    }
    assert listed | {"COPYING", "COPYRIGHT", "NOTICE"} | {
        f"{split}.json" for split in manifests
    } == set(archive.namelist())


def test_splits_share_nothing_that_tells(manifests):
    for key in (
        lambda entry: [entry["image"]],
        lambda entry: [caption["uttid"] for caption in entry["captions"]],
        lambda entry: [caption["wav"] for caption in entry["captions"]],
        lambda entry: [c["text"].lower() for c in entry["captions"] if c["language"] == "en"],
    ):
        seen = [{item for entry in manifests[split] for item in key(entry)} for split in SPLITS]
        assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])

    def by_image(entries):
        return sorted(entries, key=lambda entry: entry["image"])

    assert by_image(sum((manifests[split] for split in SPLITS), [])) == by_image(manifests["all"])


def test_splits_are_70_10_20_in_every_large_category(manifests):
    everything = collections.Counter(entry["scene"]["category"] for entry in manifests["all"])
    for split, share in zip(SPLITS, (0.7, 0.1, 0.2)):
        here = collections.Counter(entry["scene"]["category"] for entry in manifests[split])
        assert abs(len(manifests[split]) / len(manifests["all"]) - share) < 0.02
        assert all(abs(here[c] / n - share) < 0.06 for c, n in everything.items() if n >= 40), (
            split,
            here,
        )


def test_uttids_are_unique_and_captions_complete(manifests):
    every = captions(manifests["all"])
    assert len({caption["uttid"] for caption in every}) == len(every)
    for entry in manifests["all"]:
        assert entry["captions"] and entry["concepts"] and entry["scene"]["category"]
        assert len({caption["language"] for caption in entry["captions"]}) == len(entry["captions"])
        assert all(noun and noun == noun.strip().lower() for noun in entry["concepts"])
    for caption in every:
        assert caption["text"].strip() == caption["text"] != ""
        assert caption["speaker"] == f"tuxpaint-{caption['language']}"
        assert caption["uttid"].endswith(f"-{caption['language']}")


def test_language_counts(manifests):
    counts = languages(manifests["all"])
    assert set(counts) == set(EXPECTED)
    for language, expected in EXPECTED.items():
        assert 0.97 * expected <= counts[language] <= expected, (language, counts[language])


def test_counts_equal_the_report(archive, manifests, report):
    for split, entries in manifests.items():
        assert report["pictures"][split] == len(entries)
        assert report["captions"][split] == {
            code: languages(entries)[code] for code in report["captions"][split]
        }
    assert report["recordings"] == sum(name.startswith("wavs/") for name in archive.namelist())
    dropped = collections.Counter(
        (item["reason"], item["language"] or "?") for item in report["dropped"]
    )
    told = {
        (why, code): n for why, row in report["dropped_counts"].items() for code, n in row.items()
    }
    assert dropped == told
    assert set(report["abridged"]) <= {caption["uttid"] for caption in captions(manifests["all"])}


def test_counts_equal_the_readme(manifests, report):
    page = "\n".join(page.read_text("utf-8") for page in sorted(DATA.glob("README*.md")))
    for code, seconds in report["seconds"].items():
        row = [languages(manifests[split])[code] for split in ("all", *SPLITS)]
        assert f"| {code} | {' | '.join(map(str, row))} | {seconds / 60:.1f} |" in page, code
    row = [len(manifests[split]) for split in ("all", *SPLITS)]
    assert f"| pictures | {' | '.join(map(str, row))} | |" in page


def test_recordings_decode(archive, manifests):
    names = sorted({caption["wav"] for caption in captions(manifests["all"])})
    for name in random.Random(0).sample(names, SAMPLE):
        wave, rate = soundfile.read(io.BytesIO(archive.read(name)), dtype="float32", always_2d=True)
        assert (rate, wave.shape[1]) == (16_000, 1), name
        assert 0.2 < len(wave) / rate < 25 and np.isfinite(wave).all(), name
        assert 0.15 < np.abs(wave).max() <= 1.0, name


def test_recordings_are_opus_streams_with_one_serial_number(archive):
    names = [name for name in archive.namelist() if name.startswith("wavs/")]
    for name in names:
        data = archive.read(name)
        assert data[:4] == b"OggS" and data[14:18] == b"\1\0\0\0" and data[28:36] == b"OpusHead", (
            name
        )


def test_pictures_decode_and_look_right(archive, manifests):
    for entry in random.Random(0).sample(manifests["all"], SAMPLE):
        picture = Image.open(io.BytesIO(archive.read(entry["image"])))
        assert (picture.format, picture.size, picture.mode) == ("WEBP", (224, 224), "RGB"), entry[
            "image"
        ]
        pixels = np.asarray(picture, np.int16)
        edge = np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3)])
        assert np.abs(edge - edge[0]).max() <= 12, entry["image"]  # a plain margin
        assert (np.abs(pixels - edge[0]).max(-1) > 40).mean() > 0.001, entry[
            "image"
        ]  # and something to see


def test_english_stamps_have_plain_nouns(manifests):
    english = [
        entry for entry in manifests["all"] if any(c["language"] == "en" for c in entry["captions"])
    ]
    nouns = [noun for entry in english for noun in entry["concepts"]]
    assert {"frog", "bee", "owl", "elephant", "dog", "giraffe", "mouse"} <= set(nouns)
    for entry in english:
        text = next(c["text"] for c in entry["captions"] if c["language"] == "en").lower()
        assert entry["concepts"][0].rstrip("s").replace(" ", "") in text.replace(" ", ""), entry[
            "concepts"
        ]
