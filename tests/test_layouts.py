"""layouts: four known corpora, read as they lie on their users' disks, with the defects that they
are known for.
"""

import json
import os
import pickle
import warnings
from dataclasses import fields, replace
from pathlib import PurePosixPath

import layout_folders
import pytest
import torch
from miniature import make_corpus, wav_bytes, write_files
from test_core import complaint

from speechimg import corpora
from speechimg.core import Config, InputError
from speechimg.corpora import check_corpus, corpus_table, find, load_corpus, splits
from speechimg.files import layouts
from speechimg.files.layouts import recognise
from speechimg.files.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:.*restore what is missing")

FILES = {
    "flickr8k": layout_folders.files_of_flickr(3),
    "flickr8k karpathy": layout_folders.files_of_flickr(3, karpathy=True),
    "spokencoco": layout_folders.files_of_spokencoco(3),
    "spokencoco official": layout_folders.files_of_spokencoco(3, karpathy=False),
    "places": layout_folders.files_of_places(3),
    "places 2020": layout_folders.files_of_places(3, layout_folders.YEAR_2020),
    "speech_coco": layout_folders.files_of_speech_coco(3),
}
SPLITS = {
    "flickr8k": ["train", "val", "test"],
    "flickr8k karpathy": ["train", "val", "test"],
    "spokencoco": ["train", "val", "test"],
    "spokencoco official": ["train", "val"],
    "places": ["train", "val"],
    "places 2020": ["train", "val", "dev_unseen", "test_seen", "test_unseen"],
    "speech_coco": ["train", "val"],
}


def number_of(path):
    "The number that a miniature picture was drawn from."
    name = PurePosixPath(path).stem
    if name.startswith("COCO"):
        number = int(name.rsplit("_", 1)[1])
        return number - (391_000 if number >= 391_000 else 500)
    return int(name.rsplit("_", 1)[1], 16)


def known_defects(problems):
    """The lines of check_corpus that a miniature is meant to have: its size, and the one wrong
    header of Flickr8k.
    """
    return [
        line
        for line in problems
        if "restore what is missing" not in line and "ends before its header says" not in line
    ]


# What all of them share


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("name", FILES)
def test_a_layout_is_a_corpus_like_any_other(tmp_path, name, packed):
    path = write_files(tmp_path / "mini", FILES[name], packed)
    before = sorted(child.name for child in tmp_path.rglob("*"))
    assert recognise(find(path)).name == name.split()[0] and splits(find(path)) == SPLITS[name]
    for split in SPLITS[name]:
        corpus = load_corpus(path, split)
        assert len(corpus.pictures) > 0 and corpus.skipped == [] and corpus.split == split
        ids = [picture.id for picture in corpus.pictures]
        assert len(set(ids)) == len(ids) and min(ids) >= 0
        assert corpus.image_of.tolist() == [caption.image for caption in corpus.captions]
        assert len({caption.uttid for caption in corpus.captions}) == len(corpus.captions)
        for row, caption in enumerate(corpus.captions):
            picture = corpus.pictures[caption.image]
            assert caption.text.startswith(layout_folders.text(number_of(picture.path))), (
                caption,
                picture,
            )
            assert caption.language == "en" and caption.speaker
            assert corpus.load_wave(row).numel() > 4_000
        assert corpus.load_picture(0).size == (96, 96)
        part = corpus.subset([len(corpus.captions) - 1])
        assert part.pictures[0].id == ids[-1] and torch.equal(
            part.load_wave(0), corpus.load_wave(len(corpus.captions) - 1)
        )
        assert pickle.loads(pickle.dumps(corpus)).read(caption.wav) == corpus.read(caption.wav)
    assert known_defects(check_corpus(path)) == []
    assert corpus_table(path, by=()).index.tolist() == SPLITS[name]
    assert (
        sorted(child.name for child in tmp_path.rglob("*")) == before
    )  # nothing copied, nothing unpacked


@pytest.mark.parametrize("name", FILES)
def test_fingerprints_tell_lists_apart(tmp_path, name):
    folder, archive = (
        write_files(tmp_path / "mini", FILES[name], packed) for packed in (False, True)
    )
    corpora = [load_corpus(folder, split) for split in SPLITS[name]]
    assert (
        corpora[0].fingerprint()
        == load_corpus(archive, "train").fingerprint()
        == corpora[0].subset([0]).fingerprint()
        or name == "speech_coco"
    )
    assert all(len(corpus.fingerprint()) == 64 for corpus in corpora)
    for source in corpora[0].sources:
        other = write_files(
            tmp_path / source.replace("/", "-"), FILES[name] | {source: FILES[name][source] + b"\n"}
        )
        assert load_corpus(other, "train").fingerprint() != corpora[0].fingerprint()
    one = {key: content for key, content in FILES[name].items() if "500_0_" not in key}
    if name == "speech_coco":
        assert (
            load_corpus(write_files(tmp_path / "one", one), "train").fingerprint()
            != corpora[0].fingerprint()
        )


def test_the_fingerprint_of_our_own_layout_is_that_of_its_manifest(tmp_path):
    from speechimg.files.cache import sha256

    corpus = load_corpus(make_corpus(tmp_path / "mini", 4), "val")
    assert (
        corpus.fingerprint() == sha256(corpus.read("val.json")) == corpus.subset([0]).fingerprint()
    )


def test_our_own_layout_comes_first(tmp_path):
    path = write_files(tmp_path / "both", FILES["flickr8k"])
    make_corpus(path, 4)
    assert recognise(Store(path)).name == "own" and splits(Store(path)) == ["test", "train", "val"]


def test_splits_have_aliases(tmp_path):
    flickr, places = (
        write_files(tmp_path / name, FILES[name]) for name in ("flickr8k", "places 2020")
    )
    assert load_corpus(flickr, "dev").captions == load_corpus(flickr, "val").captions
    assert (
        load_corpus(places, "dev_seen").captions
        == load_corpus(places, "dev").captions
        == load_corpus(places, "val").captions
    )
    assert load_corpus(places, "dev_unseen").captions != load_corpus(places, "val").captions
    assert "choose from train, val, test" in complaint(load_corpus, flickr, "tset")
    assert "choose from train, val" in complaint(
        load_corpus, write_files(tmp_path / "coco", FILES["spokencoco official"]), "test"
    )
    assert "'dev'" in complaint(load_corpus, make_corpus(tmp_path / "ours", 4), "dev")


def test_a_folder_is_looked_at_once_and_no_file_is_asked_for(tmp_path, monkeypatch):
    path = write_files(tmp_path / "mini", FILES["spokencoco"])
    asked, looked, scandir = [], [], os.scandir
    monkeypatch.setattr(Store, "fault", lambda self, name: asked.append(name), raising=True)
    monkeypatch.setattr(
        os, "scandir", lambda folder: (looked.append(str(folder)), scandir(folder))[1]
    )
    corpus = load_corpus(path, "train")
    files = {caption.wav for caption in corpus.captions} | {
        picture.path for picture in corpus.pictures
    }
    assert (
        len(corpus.captions) == 16
        and not files & set(asked)
        and len(looked) == len(set(looked)) < 20
    )


# Counts


@pytest.mark.parametrize("name", FILES)
def test_counts_are_asserted(tmp_path, name, monkeypatch):
    path = write_files(tmp_path / "mini", FILES[name])
    with (
        pytest.warns(UserWarning, match="mini val: holds ")
        if name != "places 2020"
        else warnings.catch_warnings()
    ):
        corpus = load_corpus(path, "val")
    if name == "places 2020":  # whose numbers we do not know
        assert corpus.incomplete is None
        return
    assert "complete" not in complaint(
        load_corpus, path, "val", complete=True
    ) and corpus.incomplete in check_corpus(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_corpus(path, "val", complete=False).incomplete == corpus.incomplete
        sizes = len(corpus.pictures), len(corpus.captions)

        def recognised(store):
            found = recognise(store)
            return replace(found, read=lambda split: replace(found.read(split), expected=sizes))

        monkeypatch.setattr(corpora, "recognise", recognised)
        assert (
            load_corpus(path, "val", complete=True).incomplete is None
        )  # with the right numbers nothing is said


def test_the_official_numbers(tmp_path):
    expected = {}
    for name, files in FILES.items():
        found = recognise(Store(write_files(tmp_path / name, files)))
        expected[name] = [found.read(split).expected for split in SPLITS[name]]
    assert (
        expected["flickr8k"]
        == expected["flickr8k karpathy"]
        == [(6_000, 30_000), (1_000, 5_000), (1_000, 5_000)]
    )
    assert expected["spokencoco"] == [(113_287, None), (5_000, None), (5_000, 25_031)]
    train, val = (pictures for pictures, _ in expected["spokencoco official"])
    assert train + val == 113_287 + 5_000 + 5_000  # two ways to cut the same pictures
    assert expected["places"] == [(None, None), (1_000, 1_000)]


def test_a_subset_and_other_corpora_promise_nothing(tmp_path):
    assert (
        load_corpus(write_files(tmp_path / "mini", FILES["flickr8k"]), "val").subset([0]).incomplete
        is None
    )
    assert load_corpus(make_corpus(tmp_path / "ours", 4), "val", complete=True).incomplete is None


# Flickr8k Audio


def check_flickr_text(path):
    "Text and recording of one line belong together, though wav2capt.txt is in no helpful order."
    for split in ("train", "val", "test"):
        corpus = load_corpus(path, split)
        assert [caption.text.split(" , ")[1] for caption in corpus.captions] == [
            f"{n} ." for n in range(5)
        ] * len(corpus.pictures)
        assert [caption.uttid[-1] + caption.speaker for caption in corpus.captions] == [
            f"{n}{n + 1}" for n in range(5)
        ] * len(corpus.pictures)


@pytest.mark.parametrize("name", ["flickr8k", "flickr8k karpathy"])
def test_flickr_captions_are_joined_by_number(tmp_path, name):
    check_flickr_text(write_files(tmp_path / "mini", FILES[name]))


def test_the_check_notices_a_join_by_order(tmp_path):
    lines = FILES["flickr8k"]["flickr_audio/wav2capt.txt"].decode().splitlines()
    numbers = [line.rsplit("#", 1)[1] for line in lines][
        ::-1
    ]  # as if the lines came in the order of the texts
    joined = "".join(f"{line.rsplit('#', 1)[0]}#{n}\n" for line, n in zip(lines, numbers))
    with pytest.raises(AssertionError):
        check_flickr_text(
            write_files(
                tmp_path / "mini",
                FILES["flickr8k"] | {"flickr_audio/wav2capt.txt": joined.encode()},
            )
        )


def test_flickr_pictures_without_a_split_stay_out(tmp_path):
    files = dict(FILES["flickr8k"])
    files["flickr_audio/wav2capt.txt"] += (
        b"9999_unsplit_0.wav 9999_unsplit.jpg #0\n"  # no such recording either, and nobody asks
    )
    path = write_files(tmp_path / "mini", files)
    for split in ("train", "val", "test"):
        corpus = load_corpus(path, split)
        assert (
            len(corpus.pictures) == 3
            and not any("unsplit" in picture.path for picture in corpus.pictures)
            and corpus.skipped == []
        )


def test_the_malformed_key(tmp_path):
    """It is not the text of a picture by its side that has a proper line, and it is one where there
    is no other.
    """
    name = "2258277193_586949ec62.jpg"
    files = FILES["flickr8k"] | {
        f"Images/{name}": layout_folders.picture(0),
        "Flickr_8k.testImages.txt": f"{name}\n".encode(),
        "flickr_audio/wavs/x_0.wav": layout_folders.sound(0, 0),
    }
    files["flickr_audio/wav2capt.txt"] = f"x_0.wav {name} #0\n".encode()
    assert (
        load_corpus(write_files(tmp_path / "one", files), "test").captions[0].text
        == "a malformed key"
    )
    tokens = files["Flickr8k.token.txt"]
    for number, both in enumerate(
        (f"{name}#0\tproper\n".encode() + tokens, tokens + f"{name}#0\tproper\n".encode())
    ):
        assert (
            load_corpus(
                write_files(tmp_path / f"two{number}", files | {"Flickr8k.token.txt": both}), "test"
            )
            .captions[0]
            .text
            == "proper"
        )


def test_the_wrong_header(tmp_path):
    """A frame count that is too large hides nothing; a strict reading complains. This is what fix-
    up scripts exist for.
    """
    corpus = load_corpus(write_files(tmp_path / "mini", FILES["flickr8k"]), "train")
    wave = corpus.load_wave(0)
    assert "ends before its header says" in complaint(corpus.load_wave, 0, strict=True)
    assert [line for line in check_corpus(corpus.root) if "its header" in line] == [
        complaint(corpus.load_wave, 0, strict=True)
    ]
    original = layout_folders.sound(0, 0)
    files = FILES["flickr8k"] | {corpus.captions[0].wav: original}
    right = load_corpus(write_files(tmp_path / "right", files), "train").load_wave(0)
    assert torch.equal(wave, right)
    short = FILES["flickr8k"] | {
        corpus.captions[0].wav: layout_folders.header_claims(original, -2_000)
    }
    assert torch.equal(
        load_corpus(write_files(tmp_path / "short", short), "train").load_wave(0), right[:-1_000]
    )


def test_long_and_short_clips(tmp_path):
    """Flickr8k spans 0.23 to 323.5 seconds: what is longer than max_seconds is cut, before it fills
    the memory.
    """
    wav = next(name for name in FILES["flickr8k"] if name.endswith("_1.wav"))
    for seconds in (0.23, 40):
        path = write_files(
            tmp_path / f"{seconds}",
            FILES["flickr8k"] | {wav: wav_bytes(torch.full((int(16_000 * seconds),), 0.1).numpy())},
        )
        corpus = load_corpus(path, "train")
        row = [caption.wav for caption in corpus.captions].index(wav)
        assert len(corpus.load_wave(row, max_seconds=20)) == min(int(16_000 * seconds), 320_000)


@pytest.mark.parametrize(
    "folder",
    ["Images", "Flicker8k_Dataset", "Flickr8k_Dataset", "Flickr8k_Dataset/Flicker8k_Dataset"],
)
def test_flickr_pictures_are_found(tmp_path, folder):
    corpus = load_corpus(layout_folders.flickr(tmp_path / "mini", 2, images=folder), "test")
    assert all(
        picture.path.startswith(f"{folder}/1") for picture in corpus.pictures
    ) and corpus.load_picture(1)


def test_flickr_texts_may_lie_in_their_own_folder(tmp_path):
    files = {
        f"Flickr8k_text/{name}" if name.startswith("Flickr") else name: content
        for name, content in FILES["flickr8k"].items()
    }
    check_flickr_text(write_files(tmp_path / "mini", files))


def test_missing_captions_are_told_by_the_count(tmp_path):
    lines = FILES["flickr8k"]["flickr_audio/wav2capt.txt"].decode().splitlines()[:-7]
    corpus = load_corpus(
        write_files(
            tmp_path / "mini",
            FILES["flickr8k"] | {"flickr_audio/wav2capt.txt": "\n".join(lines).encode()},
        ),
        "train",
    )
    assert (
        torch.bincount(corpus.image_of, minlength=3).tolist() == [0, 3, 5]
        and "8 of 30,000 captions" in corpus.incomplete
    )


FLICKR_FAULTS = {
    "no lists": (
        lambda files: [files.pop(name) for name in list(files) if name.endswith("Images.txt")],
        ["Images.txt", "dataset_flickr8k.json"],
    ),
    "no pictures": (
        lambda files: [files.pop(name) for name in list(files) if name.startswith("Images/")],
        ["has no pictures", "Images/", "Flicker8k_Dataset/"],
    ),
    "one picture less": (
        lambda files: files.pop("Images/1000_00000000.jpg"),
        ["1000_00000000.jpg", "does not exist"],
    ),
    "one recording less": (
        lambda files: files.pop("flickr_audio/wavs/1000_00000000_3.wav"),
        ["1000_00000000_3.wav", "wav2capt.txt"],
    ),
    "a broken line": (
        lambda files: files.update(
            {"flickr_audio/wav2capt.txt": files["flickr_audio/wav2capt.txt"] + b"what is this\n"}
        ),
        ["wav2capt.txt line 46", "what is this"],
    ),
    "a line without text": (
        lambda files: files.update(
            {
                "flickr_audio/wav2capt.txt": files["flickr_audio/wav2capt.txt"]
                + b"a.wav 1000_00000000.jpg #9\n"
            }
        ),
        ["line 46", "caption 9"],
    ),
    "not text": (
        lambda files: files.update({"flickr_audio/wav2capt.txt": b"\xff\xfe\x00"}),
        ["wav2capt.txt", "UTF-8"],
    ),
    "a way out": (
        lambda files: files.update(
            {
                "flickr_audio/wav2capt.txt": files["flickr_audio/wav2capt.txt"]
                + b"../../../etc/x.wav 1000_00000000.jpg #0\n"
            }
        ),
        ["leaves the folder"],
    ),
    "a picture outside": (
        lambda files: files.update(
            {
                "Flickr_8k.trainImages.txt": b"../../secret.jpg\n"
                + files["Flickr_8k.trainImages.txt"]
            }
        ),
        ["../../secret.jpg"],
    ),
}


@pytest.mark.parametrize("change, words", FLICKR_FAULTS.values(), ids=FLICKR_FAULTS)
def test_wrong_flickr_folders(tmp_path, change, words):
    files = dict(FILES["flickr8k"])
    change(files)
    path = write_files(tmp_path / "mini", files)
    text = complaint(load_corpus, path, "train")
    assert all(word in text for word in words), text
    assert text in check_corpus(path)
    if any(word in text for word in ("says nowhere", "has no pictures", "UTF-8")):
        return  # nothing is left to go on with
    corpus = load_corpus(path, "train", on_error="skip")
    assert corpus.skipped == [text] and len(corpus.captions) >= 10
    assert all(
        number_of(corpus.pictures[caption.image].path) == int(caption.uttid.split("_")[1], 16)
        for caption in corpus.captions
    )


# SpokenCOCO


def check_karpathy(path):
    "restval is a part of train, and all splits draw on both files."
    sizes = {split: load_corpus(path, split) for split in ("train", "val", "test")}
    assert {split: len(corpus.pictures) for split, corpus in sizes.items()} == dict.fromkeys(
        sizes, 3
    )
    assert {picture.path.split("_")[1] for picture in sizes["train"].pictures} == {
        "train2014",
        "val2014",
    }
    assert {
        picture.path.split("_")[1] for split in ("val", "test") for picture in sizes[split].pictures
    } == {"val2014"}
    names = [picture.path for corpus in sizes.values() for picture in corpus.pictures]
    assert len(set(names)) == 9
    assert {
        len([1 for caption in corpus.captions if caption.image == place])
        for corpus in sizes.values()
        for place in range(3)
    } == {5, 6}


def test_karpathy_splits(tmp_path):
    check_karpathy(write_files(tmp_path / "mini", FILES["spokencoco"]))


@pytest.mark.parametrize("mutant", ["restval dropped", "train file only", "official"])
def test_the_check_notices_wrong_splits(tmp_path, mutant, monkeypatch):
    files, read = dict(FILES["spokencoco"]), layouts.manifest
    if mutant == "restval dropped":
        files["dataset_coco.json"] = files["dataset_coco.json"].replace(b"restval", b"none")
    elif mutant == "train file only":

        def first_part(store, name):
            return [] if name.endswith("SpokenCOCO_val.json") else read(store, name)

        monkeypatch.setattr(layouts, "manifest", first_part)
    else:
        del files["dataset_coco.json"]
    with pytest.raises((AssertionError, InputError)):
        check_karpathy(write_files(tmp_path / "mini", files))


def test_official_parts(tmp_path):
    path = write_files(tmp_path / "mini", FILES["spokencoco official"])
    for split in ("train", "val"):
        assert {picture.path.split("/")[0] for picture in load_corpus(path, split).pictures} == {
            f"{split}2014"
        }


@pytest.mark.parametrize("images", ["", "mscoco_img/", "images/", "SpokenCOCO/"])
@pytest.mark.parametrize("top", [True, False], ids=["parent", "folder"])
def test_where_the_pictures_of_coco_lie(tmp_path, images, top):
    files = layout_folders.files_of_spokencoco(2, images=images)
    if not top:  # the folder SpokenCOCO itself is given, with everything in it
        files = {name.removeprefix("SpokenCOCO/"): content for name, content in files.items()}
        images = images.removeprefix("SpokenCOCO/")
    corpus = load_corpus(write_files(tmp_path / "mini", files), "test")
    assert (
        all(picture.path.startswith(f"{images}val2014/COCO") for picture in corpus.pictures)
        and corpus.load_picture(0)
        and corpus.load_wave(0).numel()
    )


def test_two_folders_of_pictures_may_lie_apart(tmp_path):
    files = {
        ("images/" if name.startswith("val2014") else "mscoco_img/")
        * name.startswith(("val2014", "train2014"))
        + name: content
        for name, content in FILES["spokencoco"].items()
    }
    folders = {
        picture.path.split("/")[0]
        for picture in load_corpus(write_files(tmp_path / "mini", files), "train").pictures
    }
    assert folders == {"images", "mscoco_img"}


def test_missing_pictures_of_coco_say_where_they_were_looked_for(tmp_path):
    files = {
        name: content for name, content in FILES["spokencoco"].items() if not name.endswith(".jpg")
    }
    text = complaint(load_corpus, write_files(tmp_path / "mini", files), "test")
    assert all(
        word in text
        for word in ("val2014/COCO_val2014_", "the folder itself", "mscoco_img/", "images/", "link")
    )


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("SpokenCOCO/SpokenCOCO_val.json", b"{", ["SpokenCOCO_val.json", "JSON"]),
        ("SpokenCOCO/SpokenCOCO_val.json", None, ["SpokenCOCO_val.json", "does not exist"]),
        ("SpokenCOCO/SpokenCOCO_val.json", b'{"data": {}}', ["SpokenCOCO_val.json", "'data'"]),
        (
            "dataset_coco.json",
            b'{"images": [{"filename": 3}]}',
            ["dataset_coco.json", "'filename'"],
        ),
        ("dataset_coco.json", b"[]", ["dataset_coco.json"]),
    ],
)
def test_wrong_files_of_spokencoco(tmp_path, name, content, words):
    files = FILES["spokencoco"] | {name: content}
    path = write_files(
        tmp_path / "mini", {name: content for name, content in files.items() if content is not None}
    )
    text = complaint(load_corpus, path, "test")
    assert all(word in text for word in words) and text in check_corpus(path)


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        {"image": 3},
        {},
        {"image": ""},
        {"image": "/etc/x.jpg"},
        {"image": "../x.jpg"},
        {"image": "val2014/COCO_val2014_000000000001.jpg", "captions": 3},
    ],
)
def test_wrong_entries_of_spokencoco(tmp_path, wrong):
    data = json.loads(FILES["spokencoco official"]["SpokenCOCO/SpokenCOCO_val.json"])["data"]
    files = FILES["spokencoco official"] | {
        "SpokenCOCO/SpokenCOCO_val.json": json.dumps({"data": [wrong, *data]}).encode()
    }
    path = write_files(tmp_path / "mini", files)
    assert "SpokenCOCO_val.json entry 0" in complaint(load_corpus, path, "val")
    corpus = load_corpus(path, "val", on_error="skip")
    assert 1 <= len(corpus.skipped) <= 2 and len(corpus.pictures) == len(data)


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        {"uttid": "x"},
        {"uttid": "x", "wav": 3},
        {"uttid": "x", "wav": "../x.wav"},
        {"uttid": "x", "wav": "wavs/gone.wav"},
    ],
)
def test_wrong_captions_of_spokencoco(tmp_path, wrong):
    data = json.loads(FILES["spokencoco official"]["SpokenCOCO/SpokenCOCO_val.json"])["data"]
    right = sum(len(entry["captions"]) for entry in data)
    data[0]["captions"].insert(0, wrong)
    path = write_files(
        tmp_path / "mini",
        FILES["spokencoco official"]
        | {"SpokenCOCO/SpokenCOCO_val.json": json.dumps({"data": data}).encode()},
    )
    corpus = load_corpus(path, "val", on_error="skip")
    assert len(corpus.captions) == right and corpus.skipped == [complaint(load_corpus, path, "val")]


# Places Audio


@pytest.mark.parametrize(
    "images",
    [
        "Places205/",
        "images256/",
        "",
        "PlacesAudio_400k_distro/images/",
        "data/vision/torralba/deeplearning/images256/",
    ],
)
def test_places_has_one_caption_per_picture(tmp_path, images):
    corpus = load_corpus(layout_folders.places(tmp_path / "mini", 5, images=images), "val")
    assert sorted(corpus.image_of.tolist()) == list(range(5)) == list(range(len(corpus.pictures)))
    assert corpus.pictures[0].path.startswith(images) and corpus.pictures[0].path.count(
        "/"
    ) == 2 + images.count("/")


def test_places_texts_and_speakers_from_tables(tmp_path):
    one, other = (
        load_corpus(layout_folders.places(tmp_path / str(tables), 3, tables=tables), "train")
        for tables in (False, True)
    )
    assert one.captions == other.captions and one.captions[2].speaker == "A002"


def test_places_both_releases(tmp_path):
    path = layout_folders.places(tmp_path / "mini", 2, ("train", "val", *layout_folders.YEAR_2020))
    assert splits(find(path)) == [
        "train",
        "val",
        "dev_seen",
        "dev_unseen",
        "test_seen",
        "test_unseen",
        "train_2020",
    ]
    assert (
        load_corpus(path, "train").captions != load_corpus(path, "train_2020").captions
        and load_corpus(path, "dev_seen").captions != load_corpus(path, "val").captions
    )


def test_places_from_inside_and_with_relative_paths(tmp_path):
    files = {}
    for name, content in layout_folders.files_of_places(2).items():
        name = (
            name.removeprefix("PlacesAudio_400k_distro/")
            .replace("Places205/", "pictures/here/")
            .replace("wavs/", "sounds/wavs/")
        )
        if name.endswith(".json"):
            content = json.dumps(
                json.loads(content)
                | {"image_base_path": "pictures/here/", "audio_base_path": "sounds"}
            ).encode()
        files[name] = content
    corpus = load_corpus(write_files(tmp_path / "mini", files), "val")
    assert corpus.captions[0].wav.startswith("sounds/wavs/") and corpus.pictures[0].path.startswith(
        "pictures/here/"
    )


def test_a_picture_of_places_that_is_described_twice(tmp_path):
    files = layout_folders.files_of_places(3)
    content = json.loads(files["PlacesAudio_400k_distro/metadata/train.json"])
    content["data"][2]["image"] = content["data"][0]["image"]
    corpus = load_corpus(
        write_files(
            tmp_path / "mini",
            files | {"PlacesAudio_400k_distro/metadata/train.json": json.dumps(content).encode()},
        ),
        "train",
    )
    assert corpus.image_of.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        3,
        {},
        {"image": "a/x.jpg"},
        {"image": "a/x.jpg", "wav": 3},
        {"image": "../x.jpg", "wav": "wavs/0/utterance_0.wav"},
        {"image": "a/x.jpg", "wav": "w.wav", "uttid": 3},
    ],
)
def test_wrong_rows_of_places(tmp_path, wrong):
    content = json.loads(FILES["places"]["PlacesAudio_400k_distro/metadata/val.json"])
    content["data"].insert(0, wrong)
    path = write_files(
        tmp_path / "mini",
        FILES["places"]
        | {"PlacesAudio_400k_distro/metadata/val.json": json.dumps(content).encode()},
    )
    assert "val.json entry 0" in complaint(load_corpus, path, "val")
    corpus = load_corpus(path, "val", on_error="skip")
    assert corpus.skipped and len(corpus.captions) == 3


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"data": 3}'])
def test_wrong_lists_of_places(tmp_path, content):
    path = write_files(
        tmp_path / "mini", FILES["places"] | {"PlacesAudio_400k_distro/metadata/val.json": content}
    )
    assert (
        "val.json" in complaint(load_corpus, path, "val")
        and len(load_corpus(path, "train").captions) == 3
    )


# SPEECH-COCO


@pytest.mark.parametrize("top", ["", "CORPUS-MSCOCO/"])
@pytest.mark.parametrize("images", ["", "images/", "CORPUS-MSCOCO/"])
def test_speech_coco_is_found(tmp_path, top, images):
    corpus = load_corpus(layout_folders.speech_coco(tmp_path / "mini", 2, 3, images, top), "val")
    assert (
        torch.bincount(corpus.image_of).tolist() == [3, 3]
        and corpus.pictures[0].path == images + "val2014/COCO_val2014_000000000502.jpg"
    )
    assert [caption.speaker for caption in corpus.captions[:3]] == ["Paul", "Elizabeth", "Judith"]


JSON = "val2014/json/503_300_Paul_None_1-0.json"


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"imgID": "503"}',
        b'{"imgID": 503, "wavFilename": 3}',
        b'{"imgID": 503, "wavFilename": "../../x.wav"}',
        b'{"imgID": 503, "speaker": 3}',
    ],
)
def test_wrong_files_of_speech_coco(tmp_path, content):
    assert JSON in FILES["speech_coco"]
    path = write_files(tmp_path / "mini", FILES["speech_coco"] | {JSON: content})
    assert complaint(load_corpus, path, "val") in check_corpus(path)
    corpus = load_corpus(path, "val", on_error="skip")
    assert len(corpus.skipped) == 1 and len(corpus.captions) == 14


def test_a_recording_finds_itself_by_the_name_of_its_json(tmp_path):
    corpus = load_corpus(
        write_files(tmp_path / "mini", FILES["speech_coco"] | {JSON: b'{"imgID": 503}'}), "val"
    )
    assert [caption.wav for caption in corpus.captions if caption.text == ""] == [
        "val2014/wav/503_300_Paul_None_1-0.wav"
    ]


def test_speech_coco_without_json_files(tmp_path):
    files = {
        name: content for name, content in FILES["speech_coco"].items() if "json" not in name
    } | {"val2014/json/readme.txt": b"x"}
    assert "holds no .json files" in complaint(
        load_corpus, write_files(tmp_path / "mini", files), "val"
    )


# Links and listings


def test_links_to_pictures_elsewhere_need_a_word(tmp_path, monkeypatch):
    path = write_files(tmp_path / "mini", FILES["flickr8k"])
    os.rename(path / "Images", tmp_path / "another disk")
    os.symlink(tmp_path / "another disk", path / "Images")
    monkeypatch.delenv("SPEECHIMG_LINKS", raising=False)
    assert "has no pictures" in complaint(load_corpus, path, "test")
    monkeypatch.setenv("SPEECHIMG_LINKS", "follow")
    assert load_corpus(path, "test").load_picture(0).size == (96, 96)
    os.rename(tmp_path / "another disk", path / "real")
    os.remove(path / "Images")
    os.symlink("real", path / "Images")  # stays inside: no word needed
    monkeypatch.delenv("SPEECHIMG_LINKS")
    assert load_corpus(path, "test").load_picture(0).size == (96, 96)


def test_one_linked_file_is_asked_for(tmp_path, monkeypatch):
    path = write_files(tmp_path / "mini", FILES["flickr8k"])
    monkeypatch.delenv("SPEECHIMG_LINKS", raising=False)
    name = load_corpus(path, "test").captions[0].wav
    os.rename(path / name, tmp_path / "secret.wav")
    os.symlink(tmp_path / "secret.wav", path / name)
    assert name in complaint(load_corpus, path, "test") and "link" in complaint(
        load_corpus, path, "test"
    )
    assert len(load_corpus(path, "test", on_error="skip").captions) == 14


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
def test_listed_and_fault_agree(tmp_path, packed):
    store = Store(write_files(tmp_path / "mini", FILES["speech_coco"], packed))
    for name in [
        *FILES["speech_coco"],
        "val2014",
        "val2014/wav",
        "val2014/wav/none.wav",
        "none",
        "none/none.wav",
        JSON + "/x",
    ]:
        assert (
            (store.listed(name) is None)
            == (store.fault(name) is None)
            == (name in FILES["speech_coco"])
        )
    assert set(store.listing("val2014")) == {"wav", "json"} | {
        name.split("/")[1] for name in FILES["speech_coco"] if name.startswith("val2014/COCO")
    }
    assert store.listing("nowhere") == {} and pickle.loads(pickle.dumps(store)).listing(
        "val2014"
    ) == store.listing("val2014")


# Configurations

PAIRS = {
    "flickr8k-base": 30_000,
    "flickr8k-large": 30_000,
    "spokencoco-large": 5 * 113_287,
    "scenes-small": 12_052,
}  # about five for each picture of SpokenCOCO
EPOCHS = {"flickr8k-base": 30, "flickr8k-large": 30, "spokencoco-large": 10}
# How a run is carried out, which changes no formula of the method. `accumulate` does: each micro-
# batch finds its own negatives.
ENGINEERING = {
    "cache_towers",
    "checkpointing",
    "workers",
    "compile",
    "tensorboard",
    "precision",
    "evaluate_every",
    "checkpoint_every",
    "seed",
}
OTHER_TOWERS = {"words"}  # says nothing where towers are the paper's
SEEN = {
    "towers"
}  # that speech goes through HuBERT and pictures through BLIP-2 is all that the abstract tells


@pytest.mark.parametrize("name", PAIRS)
def test_configurations_mark_what_is_assumed(root, name):
    written = json.loads((root / "data" / "configs" / f"{name}.json").read_text())
    config, assumed = Config.load(name), written.pop("assumed")
    assert {key: getattr(config, key) for key in written} == written
    changed = {item.name for item in fields(Config) if getattr(config, item.name) != item.default}
    assert changed <= set(written)
    assert set(assumed) == set(written) - ENGINEERING - SEEN and len(assumed) == len(set(assumed))
    assert config.queue_size <= PAIRS[name]  # a longer one holds stale copies (pitfall 8)
    if name in EPOCHS:
        assert (
            set(written) >= {item.name for item in fields(Config)} - ENGINEERING - OTHER_TOWERS
        )  # a choice that is left at its default is a choice, too
        assert (
            config.steps == round(EPOCHS[name] * PAIRS[name] / config.batch_size)
            and config.towers == "paper"
        )
        assert config.speech_model == "hubert_" + name.split("-")[1]
        assert (
            config.momentum,
            config.temperature,
            config.alpha,
            config.dim,
            config.fusion_depth,
            config.weight_decay,
        ) == (0.995, 0.07, 0.4, 256, 6, 0.02)


def test_the_shipped_configurations_are_these(root):
    assert {path.stem for path in (root / "data" / "configs").iterdir()} == set(PAIRS)


def test_scenes_small_is_what_the_shipped_model_was_trained_with(root):
    assert Config.load("scenes-small") == Config.load(
        root / "data" / "models" / "small" / "train.json"
    )


# All the way


@pytest.mark.parametrize("name", ["flickr8k", "spokencoco", "places 2020"])
def test_a_training_runs_on_a_layout(tmp_path, name, fresh_cache):
    from speechimg.train import train

    path = write_files(tmp_path / "mini", FILES[name])
    settings = dict(towers="small", width=32, dim=16, heads=2, queue_size=4, batch_size=2)
    settings |= dict(speech_depth=1, image_depth=1, fusion_depth=1)
    settings |= dict(warmup_steps=1, evaluate_every=1, checkpoint_every=1)
    out = train(Config.from_dict(settings | {"steps": 2}), path, tmp_path / "run", progress=False)
    data = json.loads((out / "metrics.json").read_text())["data"]
    corpora = {split: load_corpus(path, split) for split in ("train", "val")}
    assert {
        f"{split}.json": corpus.fingerprint() for split, corpus in corpora.items()
    }.items() <= data.items()
