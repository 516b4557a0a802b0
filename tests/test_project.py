"""Own pictures and voice: dealt by picture, in the common layout, reported with an interval."""

import csv

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from speechimg.core import InputError
from speechimg.corpora import load_corpus
from speechimg.course.project import (
    COLUMNS,
    as_markdown,
    build_folder,
    caption_rows,
    hits,
    luck,
    paired_interval,
    report,
    save_recording,
    split_pictures,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 60), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 99))
def test_each_picture_is_in_one_split(n, parts, seed):
    shares = {f"split {index}": part / sum(parts) for index, part in enumerate(parts)}
    try:
        found = split_pictures(n, shares, seeded(seed))
    except ValueError:
        assert n < 2 * len(parts) + sum(parts)  # only where somebody would be left without
        return
    places = [place for part in found.values() for place in part]
    assert list(found) == list(shares) and sorted(places) == list(range(n))
    assert all(found.values()) and found == split_pictures(n, shares, seeded(seed))


def test_recall_is_the_mean_of_the_hits():
    scores, own = torch.tensor([[3.0, 1, 2], [1, 1, 0], [0, 5, 5]]), torch.tensor([0, 1, 0])
    assert hits(scores, own).tolist() == [1.0, 0.5, 0.0]
    assert hits(scores, own, 2).tolist() == [1.0, 1.0, 0.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.floats(0.05, 0.95), st.integers(0, 12))
def test_luck_is_a_probability_that_falls(queries, chance, right):
    assert 0 <= luck(right + 1, queries, chance) <= luck(right, queries, chance) <= 1
    assert luck(0, queries, chance) == pytest.approx(1)
    assert luck(queries, queries, chance) == pytest.approx(chance**queries)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 99))
def test_an_interval_holds_its_difference_and_is_nothing_without_a_change(n, seed):
    generator = seeded(seed)
    before, after = (torch.rand(2, n, generator=generator) < 0.5).float()
    pictures = torch.arange(n) // 2
    found = paired_interval(before, after, pictures, generator)
    assert -100 <= found.low <= found.difference + 1e-6
    assert found.difference - 1e-6 <= found.high <= 100
    assert paired_interval(after, after, pictures, generator) == (0, 0, 0)
    other = report(before, after, pictures, n, generator)
    assert other["before"] == pytest.approx(100 * before.mean().item(), abs=1e-4)
    assert other["verdict"] in as_markdown(other)


@pytest.fixture
def folder(tmp_path):
    "Four pictures with two recordings each, as somebody would lay them down."
    rows = []
    for place in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (60 * place, 90, 120)).save(
            tmp_path / f"images/thing{place}.png"
        )
        for take in range(2):
            wave = 0.3 * np.sin(np.arange(8000) * (0.05 + 0.01 * place))
            save_recording(wave, tmp_path / f"wavs/thing{place}-{take}.wav")
            name = f"thing{place}"
            files = (f"images/{name}.png", f"wavs/{name}-{take}.wav")
            line = (*files, f"thing {place}", "anna", "2026-01-31")
            rows.append(dict(zip(COLUMNS, line)))
    write(tmp_path, rows)
    return tmp_path, rows


def write(folder, rows):
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)


def test_a_folder_of_ones_own_is_a_corpus_like_any_other(folder):
    place, rows = folder
    found = build_folder(place, {"train": 0.5, "test": 0.5}, seeded())
    corpora = {split: load_corpus(place, split) for split in ("train", "test")}
    heard = {split: len(corpus.captions) for split, corpus in corpora.items()}
    written = {split: sum(len(one["captions"]) for one in found[split]) for split in found}
    assert heard == {"train": 4, "test": 4} == written
    pictures = {
        split: {picture.path for picture in corpus.pictures} for split, corpus in corpora.items()
    }
    assert not pictures["train"] & pictures["test"]
    assert len(corpora["train"].load_wave(0)) == 8000


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"consent": ""}, "consent"),
        ({"consent": "yes"}, "consent"),
        ({"text": " "}, "thing1-0"),
        ({"wav": ""}, "no wav"),
        ({"wav": "wavs/thing0-0.wav"}, "thing0-0"),
        ({"wav": "../thing.wav"}, "thing.wav"),
        ({"wav": "wavs/none.wav"}, "none"),
        ({"image": "images/none.png"}, "none"),
    ],
)
def test_a_wrong_line_is_named(folder, change, problem):
    place, rows = folder
    write(place, [row | change if index == 2 else row for index, row in enumerate(rows)])
    with pytest.raises(InputError, match=problem):
        build_folder(place, {"train": 0.5, "test": 0.5}, seeded())


def test_a_table_that_is_none_and_a_corpus_of_another_dealing_are_refused(folder):
    place, _ = folder
    (place / "val.json").write_text("{}")
    with pytest.raises(InputError, match="val.json"):
        build_folder(place, {"train": 0.5, "test": 0.5}, seeded())
    (place / "captions.csv").unlink()
    with pytest.raises(InputError, match="captions.csv"):
        build_folder(place, {"train": 0.5, "test": 0.5}, seeded())


def test_recordings_that_cannot_be_used_are_not_written(tmp_path):
    good = 0.3 * np.sin(np.arange(8000) * 0.05)
    for wave, problem in (
        (good[:1000], "shorter"),
        (0 * good, "silent"),
        (np.sign(good), "too loud"),
    ):
        with pytest.raises(InputError, match=problem):
            save_recording(wave, tmp_path / "a.wav")
        assert not (tmp_path / "a.wav").exists()
    path = save_recording(good, tmp_path / "a.wav")
    assert np.abs(soundfile.read(path)[0] - good).max() < 1e-3
    with pytest.raises(InputError, match="already"):
        save_recording(good, path)


def test_lists_without_pictures_are_empty():
    assert caption_rows([], [], [], {}) == {}
