"""Files of strangers, as they really come: joined, unnumbered, lying, deep, linked, half written.

What is heard and seen of them is right, or one line says what is wrong with which file.
"""

import bz2
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import unicodedata
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import soundfile
import test_bad_input
import torch
from miniature import draw, image_bytes, make_files, speak, wav_bytes, write_files
from PIL import EpsImagePlugin, Image
from test_bad_input import Frames
from test_core import complaint

from speechimg import core
from speechimg.cli import main
from speechimg.core import Config, InputError, cache_dir, read_json, shown
from speechimg.corpora import check_corpus, load_corpus, picture_folder
from speechimg.course.project import build_folder
from speechimg.data import Features
from speechimg.files import cache as caches
from speechimg.files.cache import FeatureCache, intact, ordinary, seal, sha256
from speechimg.files.decode import (
    decode_audio,
    decode_image,
    first_seen,
    formats,
    is_silent,
    sound_parts,
)
from speechimg.files.store import Folder, Store
from speechimg.model import read_file

WAVE = speak(["red circle", "blue square"])
PICTURE = draw(["red circle"])
PNG = image_bytes(PICTURE)
SECONDS = len(WAVE) / 16_000


# Sounds whose end would be lost, and good ones that would be refused


def encoded(form, subtype=None, rate=16_000, channels=1):
    return wav_bytes(np.stack([WAVE] * channels, 1), rate, subtype, form)


def without_count(mp3):
    "An MP3 whose first frame, the one that tells how many there are, is gone."
    mark = max(mp3.find(b"Xing"), mp3.find(b"Info"))
    start = mp3.rfind(b"\xff", 0, mark)
    return mp3[mp3.find(mp3[start : start + 2], mark) :]


def claiming(wav, size):
    at = wav.index(b"data") + 4
    return wav[:at] + size.to_bytes(4, "little") + wav[at + 4 :]


WAV, FLAC, OGG, OPUS = (encoded(*kind) for kind in (("WAV",), ("FLAC",), ("OGG",), ("OGG", "OPUS")))
MP3 = encoded("MP3", "MPEG_LAYER_III")
RF64 = encoded("RF64", "PCM_16")
SIZES = RF64.index(b"ds64") + 8
UNKNOWN = FLAC[:21] + bytes([FLAC[21] & 0xF0]) + bytes(4) + FLAC[26:]
AU = encoded("AU", "PCM_16")
TAG = b"ID3\4\0\0" + bytes([0, 0, 2, 1]) + bytes(257)
ENDS = {  # name: (bytes, how often the sentence is heard)
    "plain mp3": (MP3, 1),
    "mp3 without a count": (without_count(MP3), 1),
    "mp3 with tags": (TAG + without_count(MP3) + b"TAG" + bytes(125), 1),
    "joined mp3": (MP3 + MP3, 2),
    "joined mp3 with a tag between": (MP3 + TAG + without_count(MP3), 2),
    "mp3 joined with a stereo one": (MP3 + encoded("MP3", "MPEG_LAYER_III", channels=2), 2),
    "chained ogg": (OGG + OGG, 2),
    "ogg, then opus": (OGG + OPUS + OGG, 3),
    "joined flac": (FLAC + FLAC + FLAC, 3),
    "joined wav": (WAV + WAV, 2),
    "flac of unknown length": (UNKNOWN, 1),
    "wav of a recorder that died": (claiming(WAV, 0), 1),
    "wav with 0x7fffffff": (claiming(WAV, 0x7FFFFFFF), 1),
    "wav with 0x7ffff000": (claiming(WAV, 0x7FFFF000), 1),
    "wav with 0xfffffff0": (claiming(WAV, 0xFFFFFFF0), 1),
    "rf64 with sizes of 0": (RF64[:SIZES] + bytes(16) + RF64[SIZES + 16 :], 1),
    "rf64": (RF64, 1),
    "au that claims nothing": (AU[:8] + bytes(4) + AU[12:], 1),
}


@pytest.mark.parametrize("name", ENDS)
def test_the_end_of_a_recording_is_heard(name):
    data, times = ENDS[name]
    wave = decode_audio(data, name, strict=True)
    # an MP3 that does not say so keeps the silence before and after its first and last frame
    assert 0 <= len(wave) / 16_000 - times * SECONDS < (0.1 * times if "mp3" in name else 0.01)
    end = wave[-len(WAVE) :]
    assert not is_silent(end[-len(WAVE) // 2 :])
    assert len(decode_audio(data, name, times * SECONDS - 0.1)) == round(
        (times * SECONDS - 0.1) * 16_000
    )


def test_a_mended_file_sounds_as_it_did():
    for name in ("wav of a recorder that died", "flac of unknown length", "rf64 with sizes of 0"):
        mended = decode_audio(ENDS[name][0], name)
        torch.testing.assert_close(mended, decode_audio(WAV, "a.wav"), atol=1e-4, rtol=0)
    first, second = decode_audio(FLAC + FLAC, "two").split(len(WAVE))
    assert torch.equal(first, second)


def test_an_honest_empty_sound_stays_empty():
    facts = b"LIST" + struct.pack("<I", 4) + b"INFO"
    empty = wav_bytes(WAVE[:0])
    assert "no samples" in complaint(decode_audio, empty + facts, "empty.wav")
    assert len(sound_parts(b"\xff" * 1_000_000)) == 1  # no frame of an MP3: looked for in no time


def test_channels_that_cancel_each_other_are_heard():
    def heard(*channels):
        return decode_audio(wav_bytes(np.stack(channels, 1)), "two.wav")

    for other in (-WAVE, -0.9 * WAVE, -WAVE + 1e-4):
        wave = heard(WAVE, other)
        assert (
            not is_silent(wave)
            and torch.corrcoef(torch.stack([wave, torch.tensor(WAVE)]))[0, 1].abs() > 0.99
        )
    assert heard(WAVE, 0 * WAVE).std() == pytest.approx(WAVE.std() / 2, rel=0.01)  # still the mean
    assert heard(*[WAVE] + [0 * WAVE] * 5).std() == pytest.approx(WAVE.std(), rel=0.01)


def test_a_microphone_that_rests_is_silent():
    time = torch.arange(32_000) / 16_000
    for dead in (torch.full((32_000,), 0.3), 0.3 + 2e-5 * time, -torch.ones(100), torch.zeros(1)):
        assert is_silent(dead)
    hum = 0.3 + 0.001 * torch.sin(2 * torch.pi * 50 * time)
    assert (
        not is_silent(hum) and not is_silent(hum[:700]) and not is_silent(torch.tensor(WAVE) + 0.3)
    )


# Pictures


def test_no_other_program_reads_a_picture(monkeypatch):
    "An EPS called cat.png would start Ghostscript."
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("started"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    assert "is not a picture" in complaint(decode_image, script, "cat.png")
    assert not {"EPS", "WMF", "FITS", "PSD", "ICNS", "IM"} & set(formats())


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_pictures_of_every_named_kind(form):
    assert decode_image(image_bytes(PICTURE, form), "a").size == PICTURE.size


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_greys_of_any_depth_are_as_bright(bits):
    grey = np.asarray(PICTURE.convert("L")).astype(np.uint32)
    deep = (grey * (2**bits - 1) // 255).astype(np.uint16)
    seen = np.asarray(decode_image(image_bytes(Image.fromarray(deep)), "deep.png"))[..., 0]
    assert np.abs(seen.astype(int) - grey).max() <= (2**bits - 1 > deep.max()) * 255 // 20 + 1
    assert seen.mean() > 150


def test_one_bad_number_does_not_make_a_picture_black():
    numbers = np.asarray(PICTURE.convert("L")).astype(np.float32) / 255
    for bad in (np.inf, np.nan, -np.inf):
        numbers[0, 0] = bad
        seen = decode_image(image_bytes(Image.fromarray(numbers), "TIFF"), "float.tiff")
        assert np.asarray(seen).mean() > 150


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_a_blank_first_frame_is_not_the_picture(form):
    blank = Image.new("RGB", PICTURE.size, "white")
    options = dict(save_all=True, append_images=[blank.copy(), PICTURE], duration=100)
    if form == "WEBP":
        options |= {"lossless": True, "minimize_size": False}
    data = image_bytes(blank, form, **options)
    assert np.asarray(decode_image(data, "moving")).std() > 20
    all_blank = image_bytes(
        blank, "GIF", save_all=True, append_images=[Image.new("RGB", blank.size)]
    )
    assert decode_image(all_blank, "blank.gif").size == blank.size
    with Image.open(io.BytesIO(data)) as image:
        assert first_seen(image, 1) == 0  # no more frames than the bound allows


def test_what_would_cost_too_much_is_refused_with_the_right_advice(monkeypatch):
    large = image_bytes(Image.new("L", (12_000, 9_000)), "JPEG")
    answer = complaint(decode_image, large, "108.jpg")
    assert "too large" in answer and "shrink it" in answer and "convert" not in answer
    long = Image.new("1", (70_000, 1))
    assert "too large" in complaint(decode_image, image_bytes(long), "line.png")
    jpeg = image_bytes(Image.new("RGB", (3000, 3000)), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    assert "refined" in complaint(decode_image, jpeg[:-2] + 200 * scan + jpeg[-2:], "scans.jpg")
    assert decode_image(jpeg, "good.jpg").size == (1024, 1024)
    monkeypatch.setattr("speechimg.files.decode.open_image", lambda data: bytearray(2**62))
    with pytest.raises(MemoryError):  # of the machine: no reason to leave out a picture
        decode_image(PNG, "a.png")


PEAK = """
import sys
from pathlib import Path
from PIL import Image
from speechimg.files.decode import decode_image
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1024
Image.init()
before = peak()
for name in sys.argv[1:]:
    decode_image(Path(name).read_bytes(), name)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux says how much was used")
def test_the_memory_of_one_picture(tmp_path, root):
    Image.new("I;16", (8000, 7990)).save(tmp_path / "deep.png", compress_level=1)
    palette = Image.new("P", (8000, 7990))
    palette.save(tmp_path / "palette.png", compress_level=1, transparency=0)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "deep.png", tmp_path / "palette.png"],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 50 < float(done.stdout) < 700  # MiB, as decode_image promises


# Folders and archives


def entry(name, packed, method, claimed, crc=None, flags=0):
    "A zip archive of one entry whose header says what we like."
    crc = zlib.crc32(b"") if crc is None else crc
    facts = struct.pack("<HHHHHIII", 20, flags, method, 0, 33, crc, len(packed), claimed)
    local = b"PK\3\4" + facts + struct.pack("<HH", len(name), 0) + name + packed
    central = (
        b"PK\1\2" + struct.pack("<H", 20) + facts + struct.pack("<HHHHHII", len(name), *[0] * 6)
    )
    central += name
    end = struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + b"PK\5\6" + end


def lzma_entry(data):
    options = [{"id": lzma.FILTER_LZMA1, "dict_size": 2**20}]
    packer = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=options)
    facts = bytes([93]) + (2**32 - 1).to_bytes(4, "little")  # asks for four gigabytes
    return b"\x09\x14\x05\x00" + facts + packer.compress(data) + packer.flush()


def deflated(data):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


PACKED = {8: deflated, 12: bz2.compress, 14: lzma_entry, 0: bytes}


@pytest.mark.parametrize("method", PACKED)
def test_archives_that_lie_are_read_as_far_as_they_claim(method, tmp_path, monkeypatch):
    path, packed = tmp_path / "lying.zip", PACKED[method](bytes(50_000_000))
    path.write_bytes(entry(b"bomb.png", packed, method, 100))
    largest = []
    crc32 = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda data: largest.append(len(data)) or crc32(data))
    assert "not the one that its header claims" in complaint(Store(path).read, "bomb.png")
    good = entry(b"a.png", PACKED[method](PNG), method, len(PNG), crc32(PNG))
    path.write_bytes(good)
    assert Store(path).read("a.png") == PNG and max(largest) == len(PNG)
    path.write_bytes(good.replace(crc32(PNG).to_bytes(4, "little"), b"1234"))
    assert "checksum" in complaint(Store(path).read, "a.png")


def test_what_cannot_be_unpacked_is_told_in_a_line(tmp_path):
    path = tmp_path / "odd.zip"
    for method, words in ((99, "not known here"), (14, "cannot be read"), (12, "cannot be read")):
        path.write_bytes(entry(b"a.png", b"\xff" * 50, method, 10))
        assert words in complaint(Store(path).read, "a.png")
    path.write_bytes(entry(b"a.png", PNG, 0, len(PNG), flags=1))
    assert "encrypted" in complaint(Store(path).read, "a.png")
    good = entry(b"a.png", PNG, 0, len(PNG))
    at = good.index(b"PK\1\2")
    path.write_bytes(good[: at + 6] + b"\xff\xff" + good[at + 8 :])  # a version to come
    assert "zip" in complaint(Store, path)
    path.write_bytes(entry(b"\xff\xfe.png", PNG, 0, len(PNG), flags=0x800))  # is no UTF-8
    assert "zip archive" in complaint(Store, path)


NAME = "é ü"


def test_names_are_found_however_they_are_spelled(tmp_path):
    forms = [unicodedata.normalize(form, NAME) for form in ("NFC", "NFD")]
    for there, asked in (forms, forms[::-1]):
        folder = write_files(tmp_path / there.encode().hex(), {f"images/{there}.png": PNG})
        packed = write_files(
            tmp_path / there.encode().hex(), {f"images/{there}.png": PNG}, zip=True
        )
        for store in (Store(folder), Store(packed)):
            assert store.read(f"images/{asked}.png") == PNG
            assert store.listed(f"images/{asked}.png") is None
            assert store.listed(f"images/{asked}2.png") is not None
    mac, windows = tmp_path / "mac.zip", tmp_path / "windows.zip"
    mac.write_bytes(entry(f"{NAME}.png".encode(), PNG, 0, len(PNG), zlib.crc32(PNG)))
    assert Store(mac).read(f"{NAME}.png") == PNG
    windows.write_bytes(entry(b"images\\a.png", PNG, 0, len(PNG), zlib.crc32(PNG)))
    assert Store(windows).read("images/a.png") == PNG
    windows.write_bytes(entry(b"..\\a.png", PNG, 0, len(PNG)))
    assert "leaves the folder" in complaint(Store, windows)
    answer = complaint(Store(mac).read, "wavs\\a.wav")
    assert "backslash" in answer and "leaves" not in answer


FILES = make_files(4, 1, splits=("train", "test"))


@pytest.mark.parametrize("packed", [False, True])
def test_a_corpus_in_a_folder_of_its_own(packed, tmp_path):
    "As Finder and Explorer pack it."
    inside = {f"mine/deep/{name}": data for name, data in FILES.items()} | {"__MACOSX/._mine": b"x"}
    path = write_files(tmp_path / "corpus", inside, packed)
    assert len(load_corpus(path, "test").captions) == 4 and check_corpus(path) == []
    del inside["mine/deep/wavs/test-001-0.wav"]
    path = write_files(tmp_path / "other", inside, packed)
    assert "test-001-0.wav" in check_corpus(path)[0]


def test_a_missing_picture_does_not_hide_its_recordings(tmp_path):
    gone = ("images/test-001.png", "wavs/test-001-0.wav")
    folder = write_files(tmp_path / "c", {n: d for n, d in FILES.items() if n not in gone})
    problems = check_corpus(folder)
    assert len(problems) == 2 and all(any(name in line for line in problems) for name in gone)


def test_what_is_not_searched_is_counted_and_named(tmp_path, monkeypatch):
    outside = write_files(tmp_path / "outside", {"far.png": PNG, "deep/far.png": PNG})
    names = "a.png b.jfif c.JPE d.jif e.heic f.heic g.txt h.svg .hidden.png ._h.png no-ending"
    folder = write_files(
        tmp_path / "mine", {name: PNG for name in names.split()} | {"s/t.png": PNG}
    )
    (folder / "away.png").symlink_to(outside / "far.png")
    (folder / "there").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    (folder / "broken.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.png")
    pictures = picture_folder(folder)
    found = [one.path for one in pictures.pictures]
    assert found == ["a.png", "b.jfif", "c.JPE", "d.jif", "s/t.png"]
    *faults, last = pictures.skipped
    assert len(faults) == 1 and "away.png: is a link that leaves the folder" in faults[0]
    for words in ("2 .heic", "1 .txt", "1 .svg", "2 linked folder", "1 hidden picture"):
        assert words in last
    assert "2 broken link, pipe or device" in last and "1 without an ending" in last
    monkeypatch.setenv("SPEECHIMG_LINKS", "follow")
    followed = [one.path for one in picture_folder(folder).pictures]
    assert {"away.png", "there/far.png", "there/deep/far.png"} == {*followed} - {*found}
    none = write_files(tmp_path / "none", {"a.heic": b"", "b.heic": b""})
    assert "2 .heic" in complaint(picture_folder, none)


def test_an_archive_without_lists_has_no_parts(tmp_path):
    photos = write_files(tmp_path / "photos", {"a.png": PNG, "note.json": b'{"data": 1}'}, zip=True)
    write_files(tmp_path / "photos-2019", {"b.png": PNG}, zip=True)
    (tmp_path / "photos-2020.zip").write_bytes(b"PK half of it")
    assert [one.path for one in picture_folder(photos).pictures] == ["a.png"]
    told = FILES | {"parts.json": b'["two-b.zip"]'}
    two = write_files(tmp_path / "two", told, zip=True)
    for name in ("two-a", "two-b"):
        write_files(tmp_path / name, {f"{name}.png": PNG}, zip=True)
    assert "two-b.png" in Store(two).names() and "two-a.png" not in Store(two).names()
    for bad in (b'["../x.zip"]', b"{", b"[1]", b'["two.zip"]'):
        write_files(tmp_path / "two", told | {"parts.json": bad}, zip=True)
        assert "parts.json" in complaint(Store, two)


def test_what_is_never_read_to_its_end_is_not_begun(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", "/dev/zero"):
        assert "no ordinary file" in complaint(read_file, place)
        assert "no ordinary file" in complaint(Store, place)
    assert intact(tmp_path / "pipe", "key", "params") is None
    (tmp_path / "large").write_bytes(bytes(1000))
    with pytest.raises(OSError):
        ordinary(tmp_path / "large", 999)
    assert complaint(Store, "").startswith("corpus: is an empty name")


# Lists


def told(tmp_path, change, name="test.json"):
    data = json.loads(FILES["test.json"])
    change(data["data"])
    return write_files(tmp_path / "c", FILES | {name: json.dumps(data).encode()})


@pytest.mark.parametrize("key", ["meaning", "group"])
def test_numbers_that_no_computer_holds(key, tmp_path):
    folder = told(tmp_path, lambda data: [one.update({key: 2**63}) for one in data])
    assert f"'{key}' is 9223" in complaint(load_corpus, folder, "test")
    folder = told(tmp_path, lambda data: [one.update({key: 10**400}) for one in data])
    assert f"'{key}' is" in complaint(load_corpus, folder, "test")


def test_half_a_character_and_a_mark_at_the_start(tmp_path):
    folder = told(tmp_path, lambda data: data[0]["captions"][0].update(text="\ud800"))
    assert "half of a character" in complaint(load_corpus, folder, "test")
    write_files(folder, {"test.json": b"\xef\xbb\xbf" + FILES["test.json"]})
    assert len(load_corpus(folder, "test").captions) == 4
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "config.json") == {}
    assert len(sha256("a\udc80.png")) == 64  # the name of a file, in an old encoding


FOREIGN = {
    "metadata.json": b'{"title": "Holidays"}',
    "train.json": b'{"title": "what my trainer said"}',
    "answer.json": b'{"data": [{"id": 1, "url": "x"}]}',
}


@pytest.mark.parametrize("name", FOREIGN)
def test_anybodys_json_beside_pictures_makes_no_corpus(name, tmp_path):
    folder = write_files(tmp_path / "p", {"a.png": PNG, name: FOREIGN[name]})
    assert [one.path for one in picture_folder(folder).pictures] == ["a.png"]
    from speechimg.corpora import find, splits

    assert splits(find(folder)) == []
    corpus = write_files(tmp_path / "c", FILES | {"metadata.json": FOREIGN["metadata.json"]})
    assert splits(find(corpus)) == ["test", "train"] and check_corpus(corpus) == []
    write_files(tmp_path / "c", {"val.json": b'{"data"'})
    assert len(check_corpus(corpus)) == 1 and "val.json" in check_corpus(corpus)[0]
    assert "val.json" in complaint(load_corpus, corpus, "val")


HEAD = ["image", "wav", "text", "speaker", "consent"]
ROW = ["images/{}.png", "wavs/{}.wav", "a \u2028 {} thing", "anna", "2026-01-31"]


def captions(separator=",", head=HEAD, rows=4, before=""):
    lines = [[cell.format(number) for cell in ROW] for number in range(rows)]
    return before + "".join(separator.join(line) + "\r\n" for line in [head, *lines])


GOOD_TABLES = {
    "plain": captions(),
    "capitals": captions(head=[name.capitalize() for name in HEAD]),
    "blanks": captions(head=[f" {name} " for name in HEAD]),
    "tabs": captions("\t"),
    "semicolons": captions(";"),
    "excel": captions(";", before="sep=;\r\n"),
    "blank lines": captions().replace("\r\n", "\r\n\r\n,,,,\r\n"),
}
BAD_TABLES = {
    "empty": ("", "no"),
    "no rows": (captions(rows=0), "no lines under its head"),
    "no speaker": (captions(head=[*HEAD[:3], "who", "consent"]), "'speaker'"),
    "twice": (captions(head=[*HEAD[:3], "text", "consent"]), "'text'"),
    "a cell without end": (captions() + '"' + "x" * 200_000, "cannot be read"),
    "no day": (captions().replace("2026-01-31", "yes"), "line 2"),
}


def project(tmp_path, text):
    files = {f"images/{n}.png": image_bytes(draw(["red circle"], seed=n)) for n in range(4)}
    files |= {f"wavs/{n}.wav": wav_bytes(speak(["red circle"], seed=n)) for n in range(4)}
    folder = write_files(tmp_path / "p", files | {"captions.csv": text.encode()})
    return build_folder(folder, {"train": 0.5, "test": 0.5}, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", GOOD_TABLES)
def test_tables_as_spreadsheets_save_them(name, tmp_path):
    made = project(tmp_path, GOOD_TABLES[name])
    assert sorted(map(len, made.values())) == [2, 2]
    assert "\u2028" in made["train"][0]["captions"][0]["text"]


@pytest.mark.parametrize("name", BAD_TABLES)
def test_tables_that_cannot_be_used(name, tmp_path):
    text, words = BAD_TABLES[name]
    answer = complaint(project, tmp_path, text)
    assert words in answer and "captions.csv" in answer


# The cache


class Tiny(test_bad_input.Tiny):
    def many(self, images):
        return [self(image) for image in images]


def read_all(folder, cache, **options):
    corpus = load_corpus(folder, "test")
    return Features(corpus, Frames(), Tiny(), cache, on_error="skip", progress=False, **options)


@pytest.mark.parametrize("fault", [28, 30, 13])  # no space left, read-only, not allowed
def test_a_full_or_closed_cache_costs_no_file(fault, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(fault, os.strerror(fault))

    folder = write_files(tmp_path / "c", FILES)
    with monkeypatch.context() as patch:
        patch.setattr(caches, "atomic_write", refuse)
        with pytest.warns(UserWarning, match=os.strerror(fault)) as said:
            features = read_all(folder, FeatureCache(tmp_path / "cache"))
        assert len(features) == 4 and not features.skipped and len(said) == 1
        with pytest.warns(UserWarning):
            answer = complaint(read_all, folder, FeatureCache(tmp_path / "cache"), memory=100)
        assert "SPEECHIMG_MEMORY" in answer  # nowhere to keep them: stops, and skips none
    whole = read_all(folder, FeatureCache(tmp_path / "cache"))
    for one, other in zip(features.image, whole.image):
        np.testing.assert_array_equal(one, other)


def test_a_front_end_that_fails_is_no_fault_of_a_file(tmp_path):
    class Broken(Tiny):
        def __call__(self, image):
            raise InputError("soxr", "is not installed", "pip install soxr")

        many = None

    del Broken.many
    Broken.many = lambda self, images: [self(image) for image in images]
    corpus = load_corpus(write_files(tmp_path / "c", FILES), "test")
    cache = FeatureCache(tmp_path / "cache")
    for front in (Broken(), type("One", (), {"params": "one", "__call__": Broken.__call__})()):
        answer = complaint(
            Features, corpus, Frames(), front, cache, on_error="skip", progress=False
        )
        assert "pip install" in answer


@pytest.mark.parametrize("fault", [24, 23, 12])  # too many open files, in all; no memory
def test_a_fault_of_the_machine_leaves_no_file_out(fault, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(fault, os.strerror(fault))

    folder = write_files(tmp_path / "c", FILES)
    corpus = load_corpus(folder, "test")
    monkeypatch.setattr(Folder, "read", refuse)
    with pytest.raises(OSError, match=os.strerror(fault)):
        Features(
            corpus, Frames(), Tiny(), FeatureCache(tmp_path / "k"), on_error="skip", progress=False
        )


def sealed(cache, key, params, array):
    "What somebody can put there who may write into the folder."
    path = cache.path(key, params)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, array=array, seal=seal(array, key, params))
    return path


def test_what_others_may_have_sealed(tmp_path):
    cache, key, right = FeatureCache(tmp_path), sha256("key"), np.ones((2, 3), np.float16)
    for bad in (right * np.nan, right * np.inf):
        sealed(cache, key, "params", bad)
        np.testing.assert_array_equal(cache.get(key, "params", lambda: right), right)
    path = sealed(cache, key, "params", right)
    np.savez_compressed(path, array=np.zeros(10**7), seal=seal(right, key, "params"))
    np.testing.assert_array_equal(cache.get(key, "params", lambda: right), right)


def test_the_cache_is_its_owners(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECHIMG_CACHE", str(tmp_path / "cache"))
    assert cache_dir().stat().st_mode & 0o777 == 0o700
    (tmp_path / "cache").chmod(0o777)
    with pytest.warns(UserWarning, match="everybody"):
        cache_dir()
    monkeypatch.delenv("SPEECHIMG_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(
        core.Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home"))
    )
    assert "no home" in complaint(cache_dir)


# Names and numbers


def test_names_cannot_give_orders_to_a_terminal(tmp_path):
    assert shown("a\x1b[31m\n\u202e\udc80\u2028é 日本") == r"a\x1b[31m\n\u202e\udc80\u2028é 日本"
    name = "red \x1b[31m\x07.png"
    folder = write_files(tmp_path / "p", {name: b"no picture"})
    cache = FeatureCache(tmp_path / "cache")
    pictures = picture_folder(folder)
    answer = complaint(Features, pictures, Frames(), Tiny(), cache, progress=False)
    assert answer.isprintable() and r"\x1b[31m\x07.png" in answer


@pytest.mark.parametrize(
    "name", "speech_depth image_depth fusion_depth warmup_steps steps heads batch_size".split()
)
def test_whole_numbers_have_an_end(name):
    assert name in complaint(Config, **{name: 10**400})
    assert "too large" in complaint(Config, **{name: 10**12})


def test_numbers_have_an_end():
    for name in ("max_seconds", "learning_rate", "sim_weight", "clip_norm"):
        assert name in complaint(Config, **{name: 1e307})
    assert "max_seconds" in complaint(Config, max_seconds=1e6)
    with warnings.catch_warnings(action="error"):
        assert Config(seed=2**62).seed == 2**62


def test_soundfile_still_reads_what_it_wrote(tmp_path):
    "The oracle of the first part: a decoder that knows nothing of joined files."
    for data in (WAV, FLAC, OGG, OPUS, MP3):
        wave, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        ours = decode_audio(data, "one")
        assert abs(len(ours) - len(wave) * 16_000 // rate) <= 1
        if rate == 16_000:
            torch.testing.assert_close(ours, torch.from_numpy(wave), atol=1e-6, rtol=0)


def test_a_zip_of_pythons_own_is_read(tmp_path):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
            archive.writestr("a.png", PNG)
            archive.writestr("empty.png", b"")
        store = Store(tmp_path / "a.zip")
        assert store.read("a.png") == PNG and store.read("empty.png") == b""


def test_check_of_a_folder_says_what_it_did_not_look_at(tmp_path, capsys):
    "Through the command: pictures of kinds that are not read are problems, other files are not."
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_bytes(
            image_bytes(draw(["red dot"]), name[2:].replace("jpg", "jpeg"))
        )
    (tmp_path / "notes.txt").write_text("nothing to see")
    assert main(["check", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "every file that is a picture can be read" in told or ".txt" in told
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0 ftypheic")
    (tmp_path / "old.psd").write_bytes(b"8BPS")
    assert main(["check", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "1 .heic" in told and "1 .psd" in told and "unexpected" not in told
