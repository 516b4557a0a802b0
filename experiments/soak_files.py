"""Files as nobody wants them: hostile checkpoints, models and configs, mutated sounds and pictures.
Used by soak.py.

Everything is drawn from a fixed seed, so that a finding can be had again by its name.
"""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
import zlib
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TERABYTES = 10**9  # a width; its square, times four bytes, is four million terabytes


class Runs:
    "What unpickling this would do: write a file. Nobody should ever unpickle it."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def header(tensors):
    "A safetensors file that is all header: {name: (dtype, shape, bytes claimed)}."
    text, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        text[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    body = json.dumps(text).encode()
    return struct.pack("<Q", len(body)) + body


def zip_bomb(megabytes=400):
    "A small zip archive that holds much more than it shows."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("array.npy", bytes(megabytes * 2**20))
    return buffer.getvalue()


def flipped(data, rng, bits=1, start=0):
    "The same bytes with some bits turned."
    data = bytearray(data)
    for _ in range(bits):
        if len(data) > start:
            data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def weights(outside):
    "{what: bytes that stand where weights should}; `outside` is a file that must never come to be."
    return {
        "a pickle": pickle.dumps(Runs(outside)),
        "a zip bomb": zip_bomb(),
        "a header of terabytes": header(
            {"temperature": ("F32", [TERABYTES, TERABYTES], 4 * TERABYTES**2)}
        ),
        "a header that is longer than the file": struct.pack("<Q", 2**62) + b"{}",
        "JSON nested 100,000 deep": struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000,
        "empty": b"",
        "text": b"These are no weights.\n" * 50,
    }


# Checkpoints: each takes the folder of the newest checkpoint, and a file outside that must not come
# to be


def with_state(change):
    def spoil(folder, rng, outside):
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(change(state)))

    return spoil


def replaced(content, honest):
    "Another file in the place of the weights; `honest` = state.json does not know its fingerprint."

    def spoil(folder, rng, outside):
        data = content(folder, rng, outside)
        (folder / "model.safetensors").write_bytes(data)
        if not honest:
            with_state(
                lambda state: (
                    state | {"files": state["files"] | {"model": sha256(data).hexdigest()}}
                )
            )(folder, rng, outside)

    return spoil


def part_outside(folder, rng, outside):
    other = folder.parent.parent / "elsewhere"
    other.mkdir(exist_ok=True)
    shutil.copy(folder / "model.safetensors", other / "stolen.safetensors")
    digest = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with_state(
        lambda state: (
            state
            | {
                "files": {
                    "../../elsewhere/stolen": digest,
                    **{part: state["files"][part] for part in ("alignment", "optimizer")},
                }
            }
        )
    )(folder, rng, outside)


def linked(target):
    def spoil(folder, rng, outside):
        (folder / "model.safetensors").unlink()
        os.symlink(target, folder / "model.safetensors")

    return spoil


def folder_linked(folder, rng, outside):
    other = folder.parent.parent / "linked"
    shutil.copytree(folder, other)
    shutil.rmtree(folder)
    os.symlink(other, folder)


def other_shapes(folder, rng, outside):
    "Honest in every fingerprint, and of a model with one tensor of another size."
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name] = (
        tensors[name].repeat(2, axis=0) if tensors[name].ndim else tensors[name].reshape(1)
    )
    data = safetensors.numpy.save(tensors)
    replaced(lambda *_: data, False)(folder, rng, outside)


def fifo(folder, rng, outside):
    (folder / "state.json").unlink()
    os.mkfifo(folder / "state.json")


def checkpoint_cases():
    "{what: function that spoils the newest checkpoint}"

    def read(folder):
        return (folder / "model.safetensors").read_bytes()

    cases = {
        "weights truncated": replaced(
            lambda folder, rng, _: read(folder)[: rng.randrange(1, len(read(folder)))], True
        ),
        "weights with a flipped bit": replaced(
            lambda folder, rng, _: flipped(read(folder), rng), True
        ),
        "weights truncated, fingerprint renewed": replaced(
            lambda folder, rng, _: read(folder)[: rng.randrange(1, len(read(folder)))], False
        ),
        "weights of another shape, fingerprint renewed": other_shapes,
    }
    for what in (
        "a pickle",
        "a zip bomb",
        "a header of terabytes",
        "a header that is longer than the file",
        "JSON nested 100,000 deep",
    ):
        cases[f"weights replaced by {what}, fingerprint renewed"] = replaced(
            lambda folder, rng, outside, what=what: weights(outside)[what], False
        )
    return cases | {
        "a part outside the folder": part_outside,
        "weights linked to /dev/zero": linked("/dev/zero"),
        "weights linked to a folder": linked("/"),
        "the whole checkpoint a link": folder_linked,
        "state.json a pipe": fifo,
        "state.json nested 100,000 deep": lambda folder, rng, _: (folder / "state.json").write_text(
            "[" * 100_000 + "]" * 100_000
        ),
        "state.json cut": lambda folder, rng, _: (folder / "state.json").write_bytes(
            (folder / "state.json").read_bytes()[:50]
        ),
        "state.json a list": with_state(lambda state: [state]),
        "files a list": with_state(lambda state: state | {"files": list(state["files"])}),
        "no files": with_state(lambda state: state | {"files": {}}),
        "files with numbers": with_state(lambda state: state | {"files": {"model": 1}}),
        "step a text": with_state(lambda state: state | {"step": "next"}),
        "step missing": with_state(
            lambda state: {key: value for key, value in state.items() if key != "step"}
        ),
        "step of 4,000 digits": with_state(lambda state: state | {"step": 10**4000}),
        "config a number": with_state(lambda state: state | {"config": 3}),
        "seconds a list": with_state(lambda state: state | {"seconds": []}),
    }


# Configs, and models


def config_cases(good):
    "{what: text of a config file}, all to be refused."

    def change(**values):
        return json.dumps(good | values)

    return {
        "width 10**9": change(width=TERABYTES, heads=1),
        "dim 10**9": change(dim=TERABYTES),
        "queue_size 10**15": change(queue_size=10**15),
        "heads 0": change(heads=0),
        "learning_rate of 400 digits": change(learning_rate=10**400),
        "learning_rate 1e999": change().replace("0.003", "1e999"),
        "seed of 100 digits": change(seed=10**100),
        "steps a text": change(steps="many"),
        "width true": change(width=True),
        "an unknown name": change(wdith=3),
        "a list": "[1, 2]",
        "a number": "7",
        "nested 100,000 deep": "[" * 100_000 + "]" * 100_000,
        "cut": change()[:40],
        "empty": "",
        "bytes": "\0\1\2",
        "a name of 1 MB": json.dumps({"a" * 10**6: 1}),
    }


def model_cases(folder, rng, outside):
    "{what: function of a fresh copy of a good model's folder}, all to be refused."

    def weight(content):
        return lambda copy: (copy / "model.safetensors").write_bytes(content)

    def config(text):
        return lambda copy: (copy / "config.json").write_text(text)

    def link(target):
        return lambda copy: (
            (copy / "model.safetensors").unlink(),
            os.symlink(target, copy / "model.safetensors"),
        )

    good, settings = (
        (folder / "model.safetensors").read_bytes(),
        json.loads((folder / "config.json").read_text()),
    )
    cases = {f"weights: {what}": weight(data) for what, data in weights(outside).items()}
    cases |= {
        "weights truncated": weight(good[: len(good) // 2]),
        "weights with a broken header": weight(flipped(good[:200], rng, 40, 8) + good[200:]),
        "weights linked to /dev/zero": link("/dev/zero"),
        "weights linked to nothing": link(outside),
    }
    paper = settings | {
        "learning_rate": 0.003,
        "towers": "paper",
        "speech_model": "tiny",
        "image_model": "tiny",
    }
    cases |= {
        "config: paper towers of 100,000 blocks": config(
            json.dumps(paper | {"speech_depth": 10**5})
        ),
        "config: paper towers of width 17,000": config(
            json.dumps(paper | {"width": 17_000, "dim": 1})
        ),
    }
    return cases | {
        f"config: {what}": config(text)
        for what, text in config_cases(settings | {"learning_rate": 0.003}).items()
        if what != "learning_rate 1e999"
    }


# Sounds and pictures


def png(width, height):
    "A PNG that claims a size, and holds a few bytes."

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def flac(total, rate=16_000, channels=1, data=b""):
    "A FLAC stream whose header promises `total` samples."
    bits = rate << 44 | (channels - 1) << 41 | 15 << 36 | total
    return (
        b"fLaC"
        + b"\x80\0\0\x22"
        + struct.pack(">HH", 4096, 4096)
        + bytes(6)
        + bits.to_bytes(8, "big")
        + bytes(16)
        + data
    )


def wav(rate=16_000, channels=1, bits=16, claimed=None, data=bytes(3200)):
    size = len(data) if claimed is None else claimed
    step = channels * bits // 8
    return (
        b"RIFF"
        + struct.pack("<I", min(36 + size, 2**32 - 1))
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * step % 2**32, step % 2**16, bits)
        + b"data"
        + struct.pack("<I", size)
        + data
    )


def seeds():
    """{ending: [bytes, ...]} for sounds and for pictures: some of the bundled corpora, and the same
    in every format."""
    import soundfile
    from PIL import Image

    sounds, pictures = {}, {}
    with zipfile.ZipFile(ROOT / "data" / "stamps.zip") as archive:
        names = sorted(archive.namelist())
        for name in [name for name in names if name.endswith((".ogg", ".wav", ".flac", ".mp3"))][
            ::250
        ][:3]:
            wave, rate = soundfile.read(io.BytesIO(archive.read(name)), dtype="float32")
            sounds.setdefault(Path(name).suffix[1:], []).append(archive.read(name))
            for ending, form, kind in (
                ("wav", "WAV", "PCM_16"),
                ("wav", "WAV", "FLOAT"),
                ("wav", "WAV", "MS_ADPCM"),
                ("flac", "FLAC", "PCM_16"),
                ("mp3", "MP3", "MPEG_LAYER_III"),
            ):
                buffer = io.BytesIO()
                soundfile.write(buffer, wave[: rate * 2], rate, kind, format=form)
                data, peak = bytearray(buffer.getvalue()), buffer.getvalue().find(b"PEAK")
                if kind == "FLOAT" and peak > 0:
                    data[peak + 12 : peak + 16] = bytes(4)  # the time of writing
                sounds.setdefault(ending, []).append(bytes(data))
        for name in [name for name in names if name.endswith((".png", ".jpg", ".webp", ".gif"))][
            ::200
        ][:2]:
            picture = Image.open(io.BytesIO(archive.read(name))).convert("RGB").resize((160, 120))
            for ending, form, options in (
                ("png", "PNG", {}),
                ("jpg", "JPEG", {}),
                ("jpg", "JPEG", {"progressive": True}),
                ("gif", "GIF", {}),
                ("webp", "WEBP", {}),
                ("webp", "WEBP", {"lossless": True}),
                ("tif", "TIFF", {}),
                ("tif", "TIFF", {"compression": "tiff_lzw"}),
                ("bmp", "BMP", {}),
            ):
                buffer = io.BytesIO()
                picture.save(buffer, form, **options)
                pictures.setdefault(ending, []).append(buffer.getvalue())
    return sounds, pictures


def extremes():
    "Headers that promise more than anybody has: ({name: sound}, {name: picture})."
    bmp = (
        b"BM"
        + struct.pack("<IHHI", 2**31, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 7_900, 8_000, 1, 24, 0, 0, 1, 1, 0, 0)
        + bytes(3000)
    )
    gif = (
        b"GIF89a"
        + struct.pack("<HHBBB", 8_000, 7_900, 0x80, 0, 0)
        + bytes(6)
        + b"\x2c"
        + struct.pack("<HHHHB", 0, 0, 8_000, 7_900, 0)
        + b"\x02\x02\x4c\x01\x00\x3b"
    )
    sounds = {
        "flac-2**36": flac(2**36 - 1),
        "flac-8-channels": flac(2**36 - 1, 655_350, 8),
        "flac-promises-some": flac(10**9, 48_000, 2, bytes(4000)),
        "wav-1024-channels": wav(channels=1024),
        "wav-65535-channels": wav(channels=65_535, bits=8),
        "wav-4-GB": wav(claimed=2**32 - 1),
        "wav-rate-0": wav(rate=0),
        "wav-rate-2**32": wav(rate=2**32 - 1),
        "wav-768-kHz": wav(rate=768_000),
        "wav-1-kHz": wav(rate=1_000),
        "wav-64-bits": wav(bits=64),
        "wav-0-bits": wav(bits=0),
        "rf64": b"RF64" + wav()[4:],
        "au": b".snd" + struct.pack(">IIIII", 24, 2**32 - 1, 3, 2**31 - 1, 2**31 - 1),
    }
    pictures = {
        "png-8000": png(8_000, 7_900),
        "png-2**31": png(2**31 - 1, 2**31 - 1),
        "png-flat": png(60_000_000, 1),
        "png-0": png(0, 0),
        "bmp-7900": bmp,
        "gif-8000": gif,
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9e9" height="9e9"/>',
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n",
    }
    return {
        f"{name}.flac" if "flac" in name else f"{name}.wav": data for name, data in sounds.items()
    }, {f"{name}.png": data for name, data in pictures.items()}


def mutated(data, others, rng):
    "(what was done, the file after it)."
    kind = rng.choice(
        ("flip", "flip", "truncate", "insert", "header", "extreme", "extreme", "repeat")
    )
    at = rng.randrange(len(data))
    if kind == "flip":
        return kind, flipped(data, rng, rng.choice((1, 8, 64)))
    if kind == "truncate":
        return kind, data[:at]
    if kind == "insert":
        return kind, data[:at] + rng.randbytes(rng.choice((1, 40, 4000))) + data[at:]
    if kind == "header":
        return kind, rng.choice(others)[: rng.choice((4, 16, 64))] + data[rng.choice((4, 16, 64)) :]
    if kind == "repeat":
        return kind, data[:at] + data[at // 2 :] * 2
    at = rng.randrange(4, min(120, len(data) - 4))
    return kind, data[:at] + rng.choice(
        (
            b"\xff\xff\xff\xff",
            b"\x7f\xff\xff\xff",
            b"\xff\xff\xff\x7f",
            b"\0\0\0\0",
            b"\x80\0\0\0",
            b"\0\0\0\x80",
        )
    ) + data[at + 4 :]


def mutations(count, seed=0):
    """({name: sound}, {name: picture}), `count` together, formats in turn, the crafted headers
    among them."""
    rng, made = random.Random(seed), []
    for kinds, special, number in zip(seeds(), extremes(), (count - count // 2, count // 2)):
        every, files = (
            [data for some in kinds.values() for data in some],
            dict(list(special.items())[: max(number // 4, 1)]),
        )
        for place in range(number - len(files)):
            ending = sorted(kinds)[place % len(kinds)]
            kind, data = mutated(rng.choice(kinds[ending]), every, rng)
            files[f"{place:03d}-{kind}.{ending}"] = data
        made.append(files)
    return tuple(made)
