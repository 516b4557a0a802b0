"""Miniature corpora for the tests: coloured shapes, and tones whose sound says what the picture
shows.

Every noun is a shape in a colour. A caption says the nouns from left to right, one tone pattern per
noun, so that a tiny model can learn to hear what is seen and in which order. Pictures come in pairs
of siblings: the same two nouns with their places swapped.
"""

import io
import json
import zipfile
from pathlib import Path

import numpy as np

COLOURS = {
    "red": (214, 69, 65),
    "green": (63, 163, 77),
    "blue": (58, 110, 165),
    "yellow": (242, 183, 5),
}
SHAPES = ("circle", "square", "triangle")
NOUNS = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
RATE = 16_000


def draw(nouns, size=96, seed=0):
    "A PIL picture of one or two nouns, from left to right, on a light background."
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), tuple(int(v) for v in rng.integers(225, 256, 3)))
    pen = ImageDraw.Draw(image)
    for place, noun in enumerate(nouns):
        colour, shape = noun.split()
        x = size * (2 * place + 1) / (2 * len(nouns)) + rng.uniform(-3, 3)
        y, r = size / 2 + rng.uniform(-8, 8), size * rng.uniform(0.15, 0.2)
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
        else:
            pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=COLOURS[colour])
    return image


def speak(nouns, voice=0, seed=0):
    """A (n,) float32 wave at 16 kHz: per noun a low tone for the shape, then a high tone for the
    colour.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for noun in nouns:
        colour, shape = noun.split()
        for low in (300 + 250 * SHAPES.index(shape), 1400 + 500 * list(COLOURS).index(colour)):
            t = np.arange(int(RATE * rng.uniform(0.14, 0.2))) / RATE
            pitch = low * (1 + 0.02 * (voice % 5 - 2))
            parts.append(np.sin(2 * np.pi * pitch * t) * np.hanning(len(t)))
        parts.append(np.zeros(int(RATE * 0.05)))
    wave = np.concatenate(parts)
    return (0.5 * wave + 0.003 * rng.standard_normal(len(wave))).astype(np.float32)


def wav_bytes(wave, rate=RATE, subtype="PCM_16", format="WAV"):
    "A wave, (n,) or (n, channels), as the bytes of a sound file."
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, subtype=subtype, format=format)
    return buffer.getvalue()


def image_bytes(image, format="PNG", **options):
    "A PIL picture as the bytes of a file."
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def make_files(n_images=12, captions=2, splits=("train", "val", "test"), seed=0):
    "The whole corpus as {name: bytes}; n_images per split."
    files, pairs = {}, [(a, b) for a in NOUNS for b in NOUNS if a < b]
    rng = np.random.default_rng(seed)
    for split in splits:
        data, probe = [], []
        chosen = rng.permutation(len(pairs))
        scenes = []  # singles first, then pairs of siblings
        singles = (
            n_images // 4 + (n_images - n_images // 4) % 2
        )  # an even number is left for the siblings
        scenes += [
            ((NOUNS[i % len(NOUNS)],), -1)
            for i in rng.permutation(max(singles, len(NOUNS)))[:singles]
        ]
        for group in range((n_images - singles) // 2):
            pair = pairs[chosen[group % len(pairs)]]
            scenes += [(pair, group), (pair[::-1], group)]
        for number, (nouns, group) in enumerate(scenes):
            image = f"images/{split}-{number:03d}.png"
            files[image] = image_bytes(draw(nouns, seed=(seed, number, *split.encode())))
            spoken = []
            for voice in range(captions):
                uttid = f"{split}-{number:03d}-{voice}"
                files[f"wavs/{uttid}.wav"] = wav_bytes(
                    speak(nouns, voice, (seed, number, voice, *split.encode()))
                )
                spoken.append(
                    {
                        "text": " ".join(("a " + " left of a ".join(nouns)).split()),
                        "speaker": f"voice{voice}",
                        "uttid": uttid,
                        "wav": f"wavs/{uttid}.wav",
                        "language": "en",
                    }
                )
            entry = {
                "image": image,
                "captions": spoken,
                "concepts": list(nouns),
                "scene": {
                    "kind": "pair" if len(nouns) > 1 else "single",
                    "nouns": list(nouns),
                    "relation": "left" if len(nouns) > 1 else "centre",
                },
            }
            data.append(entry | ({"group": group} if group >= 0 else {}))
        for one, other in zip(data, data[1:]):
            if "group" in one and one["group"] == other.get("group"):
                probe += [
                    {
                        "uttid": a["captions"][0]["uttid"],
                        "image": a["image"],
                        "other": b["image"],
                        "kind": "left_right",
                    }
                    for a, b in ((one, other), (other, one))
                    if a["captions"]
                ]
        files[f"{split}.json"] = json.dumps({"data": data}).encode()
        if split == "test":
            files["swap.json"] = json.dumps({"data": probe}).encode()
    return files


def write_files(folder, files, zip=False):
    """Write {name: bytes} to a folder, or to folder.zip (stored, in place readable); returns the
    path.
    """
    folder = Path(folder)
    if zip:
        path = folder.with_suffix(".zip")
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def make_corpus(
    folder, n_images=12, captions=2, splits=("train", "val", "test"), zip=False, seed=0
):
    """Make a miniature corpus in the common layout; returns the folder, or the archive with
    zip=True.
    """
    return write_files(folder, make_files(n_images, captions, splits, seed), zip)
