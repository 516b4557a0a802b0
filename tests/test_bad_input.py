"""Bad input, as it comes: each is handled, or told in one line that names the file and the remedy.

Every kind of file goes three ways: through its decoder, through Features (stopping, and skipping),
and through check_corpus.
"""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from miniature import draw, image_bytes, make_files, speak, wav_bytes, write_files
from PIL import Image
from test_core import complaint

from speechimg.corpora import check_corpus, load_corpus, picture_folder
from speechimg.data import Features
from speechimg.files.cache import FeatureCache
from speechimg.files.decode import MAX_SIDE, SAMPLE_RATE, decode_audio, decode_image, is_silent

WAVE = speak(["red circle", "blue square"])
FLAC = wav_bytes(WAVE, format="FLAC")
OPUS = wav_bytes(WAVE, subtype="OPUS", format="OGG")
WAV = wav_bytes(WAVE)


def spoilt(wave, value):
    wave = wave.copy()
    wave[len(wave) // 2] = value
    return wav_bytes(wave, subtype="FLOAT")


def resampled(rate, channels=1):
    "The same sentence at another rate."
    n = int(len(WAVE) * rate / SAMPLE_RATE)
    wave = np.interp(np.arange(n) * SAMPLE_RATE / rate, np.arange(len(WAVE)), WAVE)
    return wav_bytes(np.stack([wave] * channels, 1), rate)


def long(minutes, rate=SAMPLE_RATE):
    return wav_bytes(
        np.tile(WAVE, int(60 * minutes * rate / len(WAVE)) + 1)[: int(60 * minutes * rate)], rate
    )


def streamed():
    "A WAV by a recorder that could not know how long it would become."
    data = bytearray(WAV)
    at = data.index(b"data")
    data[4:8] = data[at + 4 : at + 8] = b"\xff" * 4
    return bytes(data)


# name: (bytes, seconds of sound to be had or None, whether check_corpus complains)
SECONDS = len(WAVE) / SAMPLE_RATE
SOUNDS = {
    "good wav": (WAV, SECONDS, False),
    "good flac": (FLAC, SECONDS, False),
    "good opus": (OPUS, SECONDS, False),
    "good mp3": (wav_bytes(WAVE, subtype="MPEG_LAYER_III", format="MP3"), SECONDS, False),
    "empty": (b"", None, True),
    "truncated wav": (WAV[: len(WAV) // 2], SECONDS / 2, True),
    "truncated in the header": (WAV[:30], None, True),
    "only a header": (WAV[:44], None, True),
    "truncated flac": (FLAC[: len(FLAC) // 2], None, True),
    "truncated opus": (OPUS[: len(OPUS) // 2], None, True),
    "damaged opus": (OPUS[: len(OPUS) // 2] + bytes(40) + OPUS[len(OPUS) // 2 + 40 :], None, True),
    "of unknown length": (streamed(), SECONDS, False),
    "text": (b"This is not a sound.\n" * 20, None, True),
    "a picture": (image_bytes(draw(["red circle"])), None, True),
    "no samples": (wav_bytes(WAVE[:0]), None, True),
    "one sample": (wav_bytes(WAVE[:1]), 1 / SAMPLE_RATE, None),
    "silent": (wav_bytes(np.zeros(8_000)), 0.5, True),
    "nan": (spoilt(WAVE, np.nan), None, True),
    "infinite": (spoilt(WAVE, np.inf), None, True),
    "louder than full scale": (spoilt(WAVE, 40.0), SECONDS, False),
    "as loud as floats can be": (spoilt(WAVE, 3e38), SECONDS, None),
    "stereo": (resampled(16_000, 2), SECONDS, False),
    "six channels": (resampled(16_000, 6), SECONDS, False),
    "8 kHz": (resampled(8_000), SECONDS, False),
    "44.1 kHz": (resampled(44_100), SECONDS, False),
    "48 kHz": (resampled(48_000, 2), SECONDS, False),
    "192 kHz": (resampled(192_000), SECONDS, False),
    "1 Hz": (wav_bytes(WAVE, 1), None, True),
    "8 bits": (wav_bytes(WAVE, subtype="PCM_U8"), SECONDS, False),
    "24 bits": (wav_bytes(WAVE, subtype="PCM_24"), SECONDS, False),
    "five minutes": (long(5), 300, False),
}
SIZE = (96, 96)
PICTURE = draw(["red circle", "blue square"])
PNG, JPEG, WEBP = (image_bytes(PICTURE, form) for form in ("PNG", "JPEG", "WEBP"))


def bomb(width, height):
    "A PNG that claims a size, and holds a few bytes."

    def chunk(kind, content):
        length, check = len(content), zlib.crc32(kind + content)
        return struct.pack(">I", length) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def turned(orientation):
    "The picture as a camera stores it that was held another way."
    undo = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image_bytes(PICTURE.transpose(undo[orientation]), "PNG", exif=exif)


def grey16():
    return Image.fromarray((np.asarray(PICTURE.convert("L")).astype(np.uint16) * 257))


# name: (bytes, what it should look like or None)
PICTURES = {
    "good png": (PNG, PICTURE),
    "good jpeg": (JPEG, PICTURE),
    "good webp": (WEBP, PICTURE),
    "empty": (b"", None),
    "truncated png": (PNG[: len(PNG) // 2], None),
    "truncated jpeg": (JPEG[: len(JPEG) // 2], None),
    "truncated webp": (WEBP[: len(WEBP) // 2], None),
    "truncated in the header": (PNG[:20], None),
    "damaged png": (PNG[:60] + b"\xff" * 40 + PNG[100:], None),
    "text": (b"This is not a picture.", None),
    "html": (b"<html><body>404 not found</body></html>", None),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><circle r="4"/></svg>', None),
    "a sound": (WAV, None),
    "1 x 1": (
        image_bytes(Image.new("RGB", (1, 1), (200, 30, 40))),
        Image.new("RGB", (1, 1), (200, 30, 40)),
    ),
    "palette": (image_bytes(PICTURE.convert("P", palette=Image.Palette.ADAPTIVE)), PICTURE),
    "gif": (image_bytes(PICTURE, "GIF"), PICTURE),
    "grey": (image_bytes(PICTURE.convert("L")), PICTURE.convert("L").convert("RGB")),
    "black and white": (image_bytes(Image.new("1", SIZE, 1)), Image.new("RGB", SIZE, "white")),
    "CMYK": (image_bytes(PICTURE.convert("CMYK"), "JPEG", quality=95), PICTURE),
    "16 bits": (image_bytes(grey16()), PICTURE.convert("L").convert("RGB")),
    "32 bits": (
        image_bytes(Image.fromarray(np.asarray(grey16()).astype(np.int32)), "TIFF"),
        PICTURE.convert("L").convert("RGB"),
    ),
    "floats": (
        image_bytes(Image.fromarray(np.asarray(grey16()).astype(np.float32) / 65535), "TIFF"),
        PICTURE.convert("L").convert("RGB"),
    ),
    "upside down": (turned(3), PICTURE),
    "on its side": (turned(6), PICTURE),
    "on its other side": (turned(8), PICTURE),
    "mirrored": (turned(2), PICTURE),
    "transparent": (
        image_bytes(Image.new("RGBA", SIZE, (255, 0, 0, 0))),
        Image.new("RGB", SIZE, "white"),
    ),
    "half transparent": (
        image_bytes(Image.new("RGBA", SIZE, (255, 0, 0, 128))),
        Image.new("RGB", SIZE, (255, 127, 127)),
    ),
    "transparent grey": (
        image_bytes(Image.new("LA", SIZE, (0, 0))),
        Image.new("RGB", SIZE, "white"),
    ),
    "transparent palette": (
        image_bytes(Image.new("P", SIZE, 0), "PNG", transparency=0),
        Image.new("RGB", SIZE, "white"),
    ),
    "huge": (image_bytes(Image.new("1", (9_000, 8_000))), None),
    "a bomb": (bomb(60_000, 60_000), None),
    "large": (
        image_bytes(Image.new("RGB", (5_000, 1_250), (10, 200, 30)), "JPEG"),
        Image.new("RGB", (1_024, 256), (10, 200, 30)),
    ),
}


# One by one


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds(name):
    content, seconds, _ = SOUNDS[name]
    if seconds is None:
        assert complaint(decode_audio, content, "wavs/this one.ogg").startswith(
            "wavs/this one.ogg: "
        )
        return
    wave = decode_audio(content, "a.wav")
    assert (
        wave.dtype == torch.float32
        and wave.dim() == 1
        and wave.isfinite().all()
        and wave.abs().max() <= 1
    )
    assert abs(len(wave) / SAMPLE_RATE - seconds) < (0.1 if "mp3" in name else 0.01)
    assert is_silent(wave) == (name == "silent") or name == "one sample"
    assert len(decode_audio(content, "a.wav", max_seconds=0.2)) == min(len(wave), 3_200)


@pytest.mark.parametrize(
    "name",
    [
        "stereo",
        "six channels",
        "8 kHz",
        "44.1 kHz",
        "48 kHz",
        "192 kHz",
        "8 bits",
        "24 bits",
        "good flac",
        "of unknown length",
    ],
)
def test_they_sound_alike(name):
    wave = decode_audio(SOUNDS[name][0], name)
    n = min(len(wave), len(WAVE))
    assert torch.corrcoef(torch.stack([wave[:n], torch.from_numpy(WAVE[:n])]))[0, 1] > (
        0.97 if name == "8 kHz" else 0.99
    )


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    content, expected = PICTURES[name]
    if expected is None:
        assert complaint(decode_image, content, "images/this one.png").startswith(
            "images/this one.png: "
        )
        return
    image = decode_image(content, "a.png")
    assert image.mode == "RGB" and image.size == expected.size and max(image.size) <= MAX_SIDE
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < (6 if name in ("good jpeg", "good webp", "CMYK") else 3), (
        difference.mean()
    )


def test_no_picture_is_read_before_its_size_is_known(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the pixels were read"))
    complaint(decode_image, PICTURES["huge"][0], "huge.png")


# In a corpus

FILES = make_files(4, 2, splits=("train",))


class Frames:
    params = "frames 1"

    def __call__(self, wave):
        return wave[: len(wave) // 160 * 160].view(-1, 160).numpy().astype(np.float16)


class Tiny:
    params = "tiny 1"

    def __call__(self, image):
        return np.asarray(image.resize((8, 8)))


def run(path, cache, **options):
    return Features(
        load_corpus(path, "train"), Frames(), Tiny(), FeatureCache(cache), progress=False, **options
    )


@pytest.mark.parametrize("name", SOUNDS)
def test_sounds_in_a_corpus(name, tmp_path):
    content, seconds, noticed = SOUNDS[name]
    path = write_files(tmp_path / "mini", FILES | {"wavs/train-001-0.wav": content}, zip=True)
    if seconds is None or name == "one sample":
        assert "wavs/train-001-0.wav: " in complaint(run, path, tmp_path / "cache")
        features = run(path, tmp_path / "cache", on_error="skip")
        assert (
            len(features) == 7
            and len(features.skipped) == 1
            and "train-001-0" not in features.uttids
        )
    else:
        assert len(run(path, tmp_path / "cache", max_seconds=20)) == 8
        assert run(path, tmp_path / "cache", max_seconds=20).lengths.max() <= 2_000
    if noticed is not None:
        problems = check_corpus(path)
        assert len(problems) == noticed and all(
            "wavs/train-001-0.wav" in problem and "\n" not in problem for problem in problems
        )


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_in_a_corpus(name, tmp_path):
    content, expected = PICTURES[name]
    path = write_files(tmp_path / "mini", FILES | {"images/train-001.png": content}, zip=True)
    problems = check_corpus(path)
    if expected is None:
        assert "images/train-001.png: " in complaint(run, path, tmp_path / "cache")
        features = run(path, tmp_path / "cache", on_error="skip")
        assert len(features) == 6 and len(features.image) == 3 and len(features.skipped) == 1
        assert len(problems) == 1 and problems[0].startswith("images/train-001.png: ")
    else:
        assert len(run(path, tmp_path / "cache")) == 8 and problems == []


def test_many_problems_are_all_listed(tmp_path):
    "Ten files broken in ten ways, in a folder: as many lines, each with its file."
    broken = [name for name in SOUNDS if SOUNDS[name][2]][:8]
    names = [f"wavs/train-{row // 2:03d}-{row % 2}.wav" for row in range(8)]
    files = (
        FILES
        | {path: SOUNDS[name][0] for path, name in zip(names, broken)}
        | {"images/train-000.png": b"", "images/train-003.png": PNG[:100]}
    )
    problems = check_corpus(write_files(tmp_path / "mini", files))
    assert sorted(problem.split(": ")[0] for problem in problems) == sorted(
        [*names, "images/train-000.png", "images/train-003.png"]
    )


def test_a_missing_file_is_named_or_skipped(tmp_path):
    files = {
        name: content
        for name, content in FILES.items()
        if name not in ("wavs/train-001-0.wav", "images/train-002.png")
    }
    path = write_files(tmp_path / "mini", files)
    assert "restore the file" in complaint(load_corpus, path, "train")
    corpus = load_corpus(path, "train", on_error="skip")
    features = Features(
        corpus, Frames(), Tiny(), FeatureCache(tmp_path / "cache"), on_error="skip", progress=False
    )
    assert len(features) == 5 and len(features.skipped) == 2 and len(check_corpus(path)) == 2
    assert [corpus.pictures[place].path for place in features.pictures] == [
        "images/train-000.png",
        "images/train-001.png",
        "images/train-003.png",
    ]


def test_a_gallery_with_bad_pictures(tmp_path):
    folder = write_files(
        tmp_path / "holiday",
        {f"{name.replace(' ', '-')}.png": content for name, (content, _) in PICTURES.items()},
    )
    corpus = picture_folder(folder)
    features = Features(
        corpus, None, Tiny(), FeatureCache(tmp_path / "cache"), on_error="skip", progress=False
    )
    good = sum(expected is not None for _, expected in PICTURES.values())
    assert len(features.image) == good and len(features.skipped) == len(PICTURES) - good


def test_decoding_leaves_the_callers_bytes_alone():
    buffer = io.BytesIO(PNG)
    decode_image(buffer.getvalue(), "a.png"), decode_audio(WAV, "a.wav")
    assert buffer.getvalue() == PNG and WAV == wav_bytes(WAVE)
