"corpora: one layout, in a folder or an archive, read with suspicion."

import json
import multiprocessing
import os
import pickle
import random
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from miniature import image_bytes, make_corpus, make_files, speak, wav_bytes, write_files
from PIL import Image
from test_core import complaint

from speechimg.core import InputError
from speechimg.corpora import (
    Corpus,
    Picture,
    check_corpus,
    corpus_table,
    load_corpus,
    load_probe,
    picture_folder,
)
from speechimg.files import store as store_module
from speechimg.files.store import Store

FILES = make_files(8, 2)


@pytest.fixture(params=[False, True], ids=["folder", "archive"])
def place(request, tmp_path):
    "Writes {name: bytes} to a folder, or to an archive."
    return lambda files: write_files(tmp_path / "mini corpus", files, request.param)


def changed(change, split="test", files=FILES):
    "The miniature corpus, its manifest changed in place by a function of the list of entries."
    data = json.loads(files[f"{split}.json"])["data"]
    change(data)
    return files | {f"{split}.json": json.dumps({"data": data}).encode()}


# Reading


def test_a_folder_and_its_archive_are_the_same_corpus(tmp_path):
    folder, archive = (make_corpus(tmp_path / "mini", 8, zip=packed) for packed in (False, True))
    for split in ("train", "val", "test"):
        one, other = load_corpus(folder, split), load_corpus(archive, split)
        assert (one.pictures, one.captions, one.name) == (
            other.pictures,
            other.captions,
            other.name,
        )
        assert torch.equal(one.image_of, other.image_of)
        assert all(one.read(caption.wav) == other.read(caption.wav) for caption in one.captions)
        assert (
            torch.equal(one.load_wave(3), other.load_wave(3))
            and one.load_picture(3).tobytes() == other.load_picture(3).tobytes()
        )
    assert load_probe(folder) == load_probe(archive) != []
    assert check_corpus(folder) == check_corpus(archive) == []


def test_what_a_manifest_says_is_what_is_loaded(place):
    corpus = load_corpus(place(FILES), "test")
    data = json.loads(FILES["test.json"])["data"]
    assert [picture.path for picture in corpus.pictures] == [entry["image"] for entry in data]
    assert [picture.id for picture in corpus.pictures] == list(range(len(data)))
    assert [(caption.uttid, data[caption.image]["image"]) for caption in corpus.captions] == [
        (spoken["uttid"], entry["image"]) for entry in data for spoken in entry["captions"]
    ]
    last = corpus.captions[-1]
    assert (last.text, last.speaker, last.language) == (
        data[-1]["captions"][-1]["text"],
        "voice1",
        "en",
    )
    assert (
        corpus.pictures[-1].concepts == data[-1]["concepts"]
        and corpus.pictures[-1].scene == data[-1]["scene"]
    )
    assert (
        corpus.pictures[0].group == -1
        and corpus.pictures[-1].group == corpus.pictures[-2].group == data[-1]["group"]
    )


def test_pictures_of_one_meaning_share_an_id_and_are_never_negatives(place):
    from speechimg.data import epoch_batches
    from speechimg.mining import negative_probabilities
    from speechimg.sic import id_targets

    data = json.loads(FILES["test.json"])["data"]
    for number, entry in enumerate(data):
        entry["meaning"] = 5 + number // 2
    corpus = load_corpus(place(FILES | {"test.json": json.dumps({"data": data}).encode()}), "test")
    assert [picture.id for picture in corpus.pictures] == [
        5 + number // 2 for number in range(len(data))
    ]
    ids = torch.tensor([corpus.pictures[caption.image].id for caption in corpus.captions])
    alike = ids[:, None] == ids
    assert (
        not negative_probabilities(torch.zeros(len(ids), len(ids)), ids)[alike].any()
        and (id_targets(ids, ids)[alike] > 0).all()
    )
    features = type(
        "Features",
        (),
        {"ids": ids, "groups": torch.full_like(ids, -1), "lengths": torch.ones(len(ids)).numpy()},
    )
    for batch in epoch_batches(features, 3, torch.Generator().manual_seed(0)):
        assert len(set(ids[batch].tolist())) == 3  # at most one caption of a meaning


def check_pairing(pair):
    """pair(corpus) -> picture of each caption, right for a corpus with no, one, two or six captions
    a picture (pitfall 30).
    """
    with tempfile.TemporaryDirectory() as folder:
        data = json.loads(FILES["test.json"])["data"]
        sizes, number = [6, 0, 1, 5, 2, 5, 6, 3], 0
        for entry, size in zip(data, sizes):
            entry["captions"] = [
                entry["captions"][0] | {"uttid": f"{entry['image']} {n}"} for n in range(size)
            ]
        random.Random(0).shuffle(data)
        path = write_files(
            os.path.join(folder, "irregular"),
            FILES | {"test.json": json.dumps({"data": data}).encode()},
        )
        corpus = load_corpus(path, "test")
        for caption, image in zip(corpus.captions, pair(corpus), strict=True):
            assert 0 <= image < len(corpus.pictures) and caption.uttid.startswith(
                corpus.pictures[image].path + " "
            )
            number += 1
        assert number == sum(sizes)


def test_captions_point_at_their_pictures():
    check_pairing(lambda corpus: corpus.image_of.tolist())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda corpus: [row // 5 for row in range(len(corpus.captions))],
        lambda corpus: [
            row * len(corpus.pictures) // len(corpus.captions)
            for row in range(len(corpus.captions))
        ],
        lambda corpus: list(range(len(corpus.captions))),
    ],
)
def test_the_check_notices_index_tricks(wrong):
    with pytest.raises(AssertionError):
        check_pairing(wrong)


def test_a_subset_keeps_ids(place):
    corpus = load_corpus(place(FILES), "test")
    part = corpus.subset([13, 4, 5, 4])
    assert [caption.uttid for caption in part.captions] == [
        corpus.captions[row].uttid for row in (13, 4, 5, 4)
    ]
    assert [part.pictures[image].id for image in part.image_of] == [6, 2, 2, 2] and len(
        part.pictures
    ) == 2
    assert part.read(part.captions[0].wav) == corpus.read(corpus.captions[13].wav)
    assert part.subset([]).pictures == [] and part.subset([]).image_of.shape == (0,)


def test_parts_may_be_archives_of_their_own(tmp_path):
    write_files(
        tmp_path / "two",
        {name: content for name, content in FILES.items() if "train" not in name},
        zip=True,
    )
    assert "choose from test, val" in complaint(load_corpus, tmp_path / "two.zip", "train")
    write_files(
        tmp_path / "two-train",
        {name: content for name, content in FILES.items() if "train" in name},
        zip=True,
    )
    corpus = load_corpus(tmp_path / "two.zip", "train")
    assert corpus.load_wave(0).numel() and len(corpus.pictures) == 8
    assert check_corpus(tmp_path / "two.zip") == []
    again = json.loads(FILES["train.json"])["data"][
        :3
    ]  # a part may speak of pictures that lie in another
    for entry in again:
        entry["captions"] = [
            {**entry["captions"][0], "uttid": f"again {entry['image']}", "wav": "wavs/again.wav"}
        ]
    write_files(
        tmp_path / "two-again",
        {
            "again.json": json.dumps({"data": again}).encode(),
            "wavs/again.wav": wav_bytes(speak(["red square"])),
        },
        zip=True,
    )
    assert "choose from again, test, train, val" in complaint(
        load_corpus, tmp_path / "two.zip", "tset"
    )
    again = load_corpus(tmp_path / "two.zip", "again")
    assert (
        again.pictures == corpus.pictures[:3]
        and again.load_picture(2).tobytes() == corpus.load_picture(2).tobytes()
        and again.load_wave(2).numel()
    )
    assert pickle.loads(pickle.dumps(again)).load_wave(2).numel()


def test_only_the_name_and_a_dash_make_a_part(tmp_path):
    whole = write_files(
        tmp_path / "t[w]o", FILES, zip=True
    )  # brackets mean something in a pattern, and nothing in a name
    for name in ("t[w]o2", "two-more", "other", "t[w]o_more", "at[w]o-more"):
        write_files(tmp_path / name, {"stranger.json": b"{}"}, zip=True)
    (tmp_path / "t[w]o-folder.zip").mkdir()
    (tmp_path / "t[w]o-notes.txt").write_text("no archive")
    assert Store(whole).names() == sorted(FILES)
    write_files(
        tmp_path / "t[w]o-more", {"more.json": b"{}", "test.json": b"an old copy"}, zip=True
    )
    assert (
        set(Store(whole).names()) == {*FILES, "more.json"}
        and Store(whole).read("test.json") == FILES["test.json"]
    )


def test_a_part_is_no_more_believed_than_the_whole(tmp_path):
    whole = write_files(tmp_path / "two", FILES, zip=True)
    write_files(tmp_path / "two-a", {"../diary.txt": b""}, zip=True)
    assert "leaves the folder" in complaint(Store, whole)
    (tmp_path / "two-a.zip").write_bytes(b"no archive")
    assert "two-a.zip: is neither a folder nor a readable zip archive" in complaint(Store, whole)


def test_shipped_names(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECHIMG_DATA", str(tmp_path))
    make_corpus(tmp_path / "scenes", 8, zip=True)
    make_corpus(tmp_path / "stamps", 8)
    assert (
        len(load_corpus("scenes", "val").pictures)
        == len(load_corpus("stamps", "val").pictures)
        == 8
    )
    assert "nothing here" in complaint(load_corpus, "nothing here", "val")


# Several readers


def read_all(corpus):
    return [hash(corpus.read(caption.wav)) for _ in range(5) for caption in corpus.captions]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_read_one_archive(tmp_path, method):
    corpus = load_corpus(make_corpus(tmp_path / "mini", 8, zip=True), "train")
    contents = [corpus.read(caption.wav) for caption in corpus.captions]
    with multiprocessing.get_context(method).Pool(2) as pool:
        found = pool.map(
            corpus.read, [caption.wav for caption in corpus.captions] * 10, chunksize=3
        )
    assert found == contents * 10


def test_threads_read_one_archive(tmp_path):
    corpus = load_corpus(make_corpus(tmp_path / "mini", 8, zip=True), "train")
    expected = read_all(corpus)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected for found in pool.map(read_all, [corpus] * 4))


def test_a_child_opens_the_archive_for_itself(tmp_path, monkeypatch):
    store = Store(make_corpus(tmp_path / "mini", 8, zip=True))
    handle = store.files.open()["test.json"][0]
    assert store.files.open()["test.json"][0] is handle
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert store.files.open()["test.json"][0] is not handle
    assert pickle.loads(pickle.dumps(store)).read("test.json") == store.read("test.json")


# Manifests that are wrong

WRONG = {
    "missing recording": (
        lambda data: data[0]["captions"][0].update(wav="wavs/gone.wav"),
        ["wavs/gone.wav"],
    ),
    "missing picture": (lambda data: data[0].update(image="images/gone.png"), ["images/gone.png"]),
    "recording is a folder": (lambda data: data[0]["captions"][0].update(wav="wavs"), ["wavs"]),
    "wrong type: image": (lambda data: data[0].update(image=3), ["'image'", "3"]),
    "wrong type: captions": (
        lambda data: data[0].update(captions={"a": 1}),
        ["'captions'", "list"],
    ),
    "wrong type: caption": (lambda data: data[0]["captions"].insert(0, "text"), ["'text'"]),
    "wrong type: entry": (lambda data: data.insert(0, "entry"), ["'entry'"]),
    "wrong type: uttid": (lambda data: data[0]["captions"][0].update(uttid=7), ["'uttid'", "7"]),
    "wrong type: text": (lambda data: data[0]["captions"][0].update(text=["a"]), ["'text'"]),
    "wrong type: concepts": (lambda data: data[0].update(concepts=[1]), ["'concepts'"]),
    "wrong type: group": (lambda data: data[0].update(group=True), ["'group'", "True"]),
    "wrong type: meaning": (
        lambda data: [
            entry.update(meaning="x" if place == 1 else place) for place, entry in enumerate(data)
        ],
        ["'meaning'", "'x'"],
    ),
    "negative meaning": (
        lambda data: [
            entry.update(meaning=-1 if place == 1 else place) for place, entry in enumerate(data)
        ],
        ["'meaning'", "-1"],
    ),
    "meaning of one only": (lambda data: data[1].update(meaning=4), ["'meaning'", "entry 0"]),
    "wrong type: scene": (lambda data: data[0].update(scene="x"), ["'scene'"]),
    "no wav": (lambda data: data[0]["captions"][0].pop("wav"), ["'wav'"]),
    "no image": (lambda data: data[0].pop("image"), ["'image'"]),
    "no uttid": (lambda data: data[0]["captions"][0].pop("uttid"), ["'uttid'"]),
    "empty path": (lambda data: data[0].update(image=""), ["''"]),
    "duplicate uttid": (
        lambda data: data[1]["captions"][0].update(uttid=data[0]["captions"][0]["uttid"]),
        ["test-000-0", "twice"],
    ),
    "duplicate image": (
        lambda data: data[1].update(image=data[0]["image"]),
        ["images/test-000.png", "twice"],
    ),
    "leaves by ..": (
        lambda data: data[0]["captions"][0].update(wav="../secret.wav"),
        ["../secret.wav"],
    ),
    "leaves by .. later": (
        lambda data: data[0].update(image="images/../../secret.png"),
        ["images/../../secret.png"],
    ),
    "absolute": (
        lambda data: data[0].update(image=os.path.abspath("/etc/hostname")),
        ["/etc/hostname"],
    ),
    "drive": (lambda data: data[0].update(image="C:/secret.png"), ["C:/secret.png"]),
    "backslash": (lambda data: data[0].update(image="images\\a.png"), ["images"]),
    "null byte": (lambda data: data[0].update(image="images/a\0.png"), ["images/a"]),
}


@pytest.mark.parametrize("change, words", WRONG.values(), ids=WRONG)
def test_a_wrong_manifest_is_named_and_can_be_skipped(place, change, words):
    path = place(changed(change) | {"secret.wav": b"x"})
    text = complaint(load_corpus, path, "test")
    assert all(word in text for word in words) and ("test.json" in text or "restore" in text), text
    assert text in check_corpus(path)
    corpus = load_corpus(path, "test", on_error="skip")
    assert corpus.skipped == [text] and 0 < len(corpus.captions) < 17
    assert all(corpus.load_wave(row) is not None for row in range(len(corpus.captions)))
    assert [corpus.pictures[image].path for image in corpus.image_of] == [
        f"images/{caption.uttid[:8]}.png" for caption in corpus.captions
    ]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'{"data": {}}', b'{"date": []}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_broken_manifest_names_itself(place, content):
    path = place(FILES | {"test.json": content})
    assert "test.json" in complaint(load_corpus, path, "test")
    assert any("test.json" in problem for problem in check_corpus(path))
    assert len(load_corpus(path, "train").pictures) == 8


def test_links(tmp_path):
    folder = make_corpus(tmp_path / "mini", 8)
    (tmp_path / "secret.wav").write_bytes(wav_bytes(speak(["red circle"])))
    os.remove(folder / "wavs/test-000-0.wav")
    os.symlink(tmp_path / "secret.wav", folder / "wavs/test-000-0.wav")
    assert "link" in complaint(load_corpus, folder, "test") and "wavs/test-000-0.wav" in complaint(
        load_corpus, folder, "test"
    )
    assert "link" in complaint(Store(folder).read, "wavs/test-000-0.wav")
    os.remove(folder / "wavs/test-000-0.wav")
    os.symlink(
        "test-000-1.wav", folder / "wavs/test-000-0.wav"
    )  # a link that stays inside harms nobody
    assert load_corpus(folder, "test").load_wave(0).numel()
    os.symlink(folder, tmp_path / "other name")  # and neither does a link to the corpus
    assert load_corpus(tmp_path / "other name", "test").load_wave(0).numel()
    os.remove(folder / "wavs/test-000-0.wav")
    os.symlink("nowhere", folder / "wavs/test-000-0.wav")
    assert "does not exist" in complaint(load_corpus, folder, "test")


@pytest.mark.parametrize(
    "name", ["../evil.wav", "/evil.wav", "wavs/../../evil.wav", "wavs\\..\\evil.wav"]
)
def test_archives_whose_names_leave(tmp_path, name):
    path = make_corpus(tmp_path / "mini", 8, zip=True)
    with zipfile.ZipFile(path, "a") as archive:
        entry = zipfile.ZipInfo("placeholder")
        entry.filename = name  # past the tidying that ZipInfo does
        archive.writestr(entry, b"x")
    assert "leaves the folder" in complaint(load_corpus, path, "test")


def test_links_and_bombs_in_archives(tmp_path, monkeypatch):
    path = make_corpus(tmp_path / "mini", 8, zip=True)
    with zipfile.ZipFile(path, "a") as archive:
        link = zipfile.ZipInfo("wavs/link.wav")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/hostname")
        archive.writestr("wavs/zeros.wav", bytes(2**20), compress_type=zipfile.ZIP_DEFLATED)
    assert "link" in complaint(Store(path).read, "wavs/link.wav")
    monkeypatch.setattr(store_module, "MAX_BYTES", 2**19)
    assert "too large" in complaint(Store(path).read, "wavs/zeros.wav")


def test_damaged_archives(tmp_path):
    path = make_corpus(tmp_path / "mini", 8, zip=True)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("wavs/test-000-0.wav").header_offset + 200
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    corpus = load_corpus(path, "test")
    assert "wavs/test-000-0.wav" in complaint(corpus.load_wave, 0) and corpus.load_wave(1).numel()
    assert len(check_corpus(path)) == 1
    path.write_bytes(whole[: len(whole) // 2])
    assert "zip" in complaint(load_corpus, path, "test")
    path.write_bytes(b"")
    assert "zip" in complaint(check_corpus, path)


PARTS = st.lists(
    st.sampled_from(["..", ".", "a", "wavs", "", "...", "C:", "~", "a\\b", "é"]), max_size=5
)


@given(PARTS, st.booleans())
def test_a_safe_path_stays_inside(parts, absolute):
    path = "/" * absolute + "/".join(parts)
    try:
        assert store_module.safe(path, "a.json") == path
    except InputError as error:
        assert str(error).startswith("a.json: ")
    else:
        assert (
            os.path.commonpath(
                ["/corpus folder", os.path.normpath(os.path.join("/corpus folder", path))]
            )
            == "/corpus folder"
        )


# Others


def test_unknown_splits_and_layouts(place, tmp_path):
    assert "choose from test, train, val" in complaint(load_corpus, place(FILES), "tset")
    (tmp_path / "flickr" / "flickr_audio").mkdir(parents=True)  # and nothing in it
    assert "train.json" in complaint(load_corpus, tmp_path / "flickr", "train")
    assert "train.json" in complaint(check_corpus, tmp_path / "flickr")
    assert "does not exist" in complaint(load_corpus, tmp_path / "nowhere", "train")
    assert "does not exist" in complaint(check_corpus, tmp_path / "nowhere")
    (tmp_path / "file.txt").write_text("hello")
    assert "file.txt" in complaint(load_corpus, tmp_path / "file.txt", "train")


def test_wrong_probes(place):
    probe = json.loads(FILES["swap.json"])["data"]
    path = place(
        FILES
        | {"swap.json": json.dumps({"data": probe + [probe[0] | {"uttid": "nobody"}]}).encode()}
    )
    assert len(load_probe(path)) == len(probe) + 1
    assert [
        problem for problem in check_corpus(path) if "nobody" in problem and "swap.json" in problem
    ]
    path = place(FILES | {"swap.json": json.dumps({"data": [{"uttid": 3}]}).encode()})
    assert "swap.json" in complaint(load_probe, path)
    assert any("swap.json" in problem for problem in check_corpus(path))


def test_a_corpus_without_a_probe(place):
    assert (
        load_probe(place({name: content for name, content in FILES.items() if name != "swap.json"}))
        == []
    )


def test_any_folder_of_pictures(tmp_path):
    folder = tmp_path / "holiday"
    (folder / "deep" / "er").mkdir(parents=True)
    for name in ("b.JPG", "deep/a.png", "deep/er/c.webp", ".hidden.png"):
        (folder / name).write_bytes(image_bytes(Image.new("RGB", (8, 8), "red"), "PNG"))
    (folder / "notes.txt").write_text("no picture")
    (tmp_path / "secret.png").write_bytes(b"x")
    os.symlink(tmp_path / "secret.png", folder / "secret.png")
    corpus = picture_folder(folder)
    assert [picture.path for picture in corpus.pictures] == [
        "b.JPG",
        "deep/a.png",
        "deep/er/c.webp",
    ]
    assert (
        corpus.captions == []
        and corpus.image_of.shape == (0,)
        and corpus.load_picture(2).size == (8, 8)
    )
    assert len(picture_folder(make_corpus(tmp_path / "mini", 8, zip=True)).pictures) == 24
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in complaint(picture_folder, tmp_path / "empty")


def test_tables(tmp_path):
    table = corpus_table(make_corpus(tmp_path / "mini", 8), by=("speaker",))
    assert (
        table.loc[("test", "voice1")].to_dict() == {"pictures": 8, "captions": 8}
        and len(table) == 6
    )


def test_a_corpus_by_hand(tmp_path):
    folder = write_files(tmp_path / "hand", {"a.png": image_bytes(Image.new("RGB", (4, 4)))})
    corpus = Corpus("hand", "all", [Picture("a.png", 0)], [], folder)
    assert (
        corpus.load_picture(0).size == (4, 4)
        and repr(corpus) == "Corpus hand/all: 1 pictures, 0 captions"
    )


@pytest.mark.parametrize("classes", [[], ["dog"], [1000], [-1], [True], "3"])
def test_a_word_without_a_picture_names_classes_of_imagenet(classes, tmp_path):
    entry = {"classes": classes, "concepts": ["dog"], "captions": []}
    (tmp_path / "train.json").write_text(json.dumps({"data": [entry]}))
    with pytest.raises(InputError, match="classes"):
        load_corpus(tmp_path, "train")
    (tmp_path / "train.json").write_text(json.dumps({"data": [entry | {"classes": [3]}]}))
    corpus = load_corpus(tmp_path, "train")
    assert corpus.pictures[0].classes == [3] and corpus.pictures[0].path == ""
    with pytest.raises(InputError, match="in place of a file"):
        corpus.load_picture(0)
