"""Build the `scenes` corpus: pictures with grammar, spoken by synthetic voices.

    python data/build_scenes.py --out data          # scenes.zip, scenes-train.zip, scenes-voice.zip
    python data/build_scenes.py --out data --voice  # only the last, from the scenes-train.zip there

With --voice it speaks, and draws nothing.

Everything is derived from one seed and from packages fetched by name (see `sources.py`); README.md
beside this file lists origins and licences. Speech needs the Debian packages espeak-ng, flite,
festival, festvox-kallpc16k, festvox-kdlpc16k and festvox-us-slt-hts. Drawing needs resvg_py
(rasterises SVG with anti-aliasing).
"""

import argparse
import functools
import io
import itertools
import json
import multiprocessing
import random
import re
import subprocess
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import soundfile as sf
import sources
import soxr
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SEED, SIDE, RATE = 2408, 192, 16_000
# noun -> emoji code point. Those that `stamps` also names in English come first.
NOUNS = dict(
    badger="1f9a1",
    bear="1f43b",
    beaver="1f9ab",
    bee="1f41d",
    bison="1f9ac",
    camel="1f42b",
    cow="1f404",
    deer="1f98c",
    dog="1f415",
    dolphin="1f42c",
    donkey="1facf",
    duck="1f986",
    elephant="1f418",
    fly="1fab0",
    fox="1f98a",
    frog="1f438",
    giraffe="1f992",
    goat="1f410",
    gorilla="1f98d",
    hippopotamus="1f99b",
    horse="1f40e",
    kangaroo="1f998",
    koala="1f428",
    lion="1f981",
    mouse="1f401",
    otter="1f9a6",
    owl="1f989",
    penguin="1f427",
    pig="1f416",
    rabbit="1f407",
    tiger="1f405",
    turkey="1f983",
    whale="1f40b",
    zebra="1f993",
    cat="1f408",
    turtle="1f422",
    snail="1f40c",
    butterfly="1f98b",
    star="2b50",
    car="1f697",
    umbrella="2614",
    apple="1f34e",
    banana="1f34c",
    mushroom="1f344",
    guitar="1f3b8",
    key="1f511",
    bicycle="1f6b2",
    rocket="1f680",
)
PLURAL = dict(
    fly="flies",
    mouse="mice",
    deer="deer",
    fox="foxes",
    bison="bison",
    butterfly="butterflies",
    hippopotamus="hippopotamuses",
)
COLOURS = dict(
    white=(250, 250, 248),
    gray=(196, 200, 204),
    red=(236, 122, 114),
    orange=(250, 178, 102),
    yellow=(252, 226, 118),
    green=(146, 208, 144),
    blue=(134, 184, 240),
    purple=(186, 158, 228),
    pink=(248, 190, 212),
)
PLACES = ("left", "right", "top", "bottom", "middle")
COUNTS = (2, 3, 4)
WORDS = {2: "two", 3: "three", 4: "four"}
STYLES, HELD_OUT_STYLE = ("fluent-3d", "fluent-flat", "twemoji", "openmoji"), "noto"

# Voices

# A voice is (engine, name). Those in TEST_VOICES speak in `test` and `voice` and nowhere else: at
# least one of every engine.
ACCENTS = (
    "en-us",
    "en-gb",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-rp",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
)
VARIANTS = (
    "m1",
    "m2",
    "m3",
    "m4",
    "m6",
    "m8",
    "f1",
    "f2",
    "f3",
    "f5",
    "Andy",
    "Annie",
    "Gene",
    "Alex",
    "Alicia",
    "linda",
    "edward",
    "Michael",
    "steph",
    "victor",
    "belinda",
    "max",
    "Lee",
    "zac",
)
TEST_VARIANTS = ("f4", "m7", "Andrea", "david")
TRAIN_VOICES = (
    [("espeak-ng", f"{a}+{v}") for v in VARIANTS for a in ACCENTS],
    [("flite", v) for v in ("slt", "awb", "kal16")],
    [("festival", v) for v in ("cmu_us_slt_arctic_hts", "kal_diphone")],
)
TEST_VOICES = (
    [("espeak-ng", f"{a}+{v}") for v in TEST_VARIANTS for a in ACCENTS],
    [("flite", "rms")],
    [("festival", "ked_diphone")],
)
ENGINE_SHARE = (0.5, 0.28, 0.22)


def draw_voice(voices, rng, pitch=(0.85, 1.18)):
    """Engine first, then one of its voices, with its own rate and pitch: {'engine', 'name', 'rate',
    'pitch'}.
    """
    engine, name = rng.choice(rng.choices(voices, weights=ENGINE_SHARE)[0])
    return dict(
        engine=engine,
        name=name,
        rate=round(rng.uniform(0.92, 1.28), 3),
        pitch=round(rng.uniform(*pitch), 3),
    )


def speaker(voice):
    return f"{voice['engine']}:{voice['name']}"


# Grammar
def plural(noun):
    return PLURAL.get(noun, noun + "s")


def article(noun):
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def phrasings(scene):
    """Every way of saying where things are, for a scene {'kind', 'nouns', 'relation'}; each tells
    the scene from its siblings.
    """
    kind, relation = scene["kind"], scene["relation"]
    if kind == "whole":
        a = article(scene["nouns"][0])
        return [a, f"there is {a}", f"one {scene['nouns'][0]}", f"a picture of {a}"]
    if kind == "single":
        a, place = (
            article(scene["nouns"][0]),
            {
                "left": "on the left",
                "right": "on the right",
                "top": "at the top",
                "bottom": "at the bottom",
                "middle": "in the middle",
            }[relation],
        )
        return [
            f"{a} {place}",
            f"there is {a} {place}",
            f"{place} {a}",
            f"{place} there is {a}",
            f"one {a.split(' ', 1)[1]} {place}",
        ]
    if kind == "count":
        many = f"{WORDS[relation]} {plural(scene['nouns'][0])}"
        return [
            many,
            f"there are {many}",
            f"you can see {many}",
            f"{many} together",
            f"a picture of {many}",
        ]
    a, b = map(article, scene["nouns"])
    if kind == "mixed":
        many = f"{WORDS[relation]} {plural(scene['nouns'][0])}"
        return [
            f"{many} and {b}",
            f"{b} and {many}",
            f"there are {many} and {b}",
            f"{b} with {many}",
            f"you can see {many} and {b}",
        ]
    if relation == "left":
        return [
            f"{a} on the left and {b} on the right",
            f"{b} on the right and {a} on the left",
            f"{a} to the left of {b}",
            f"{b} to the right of {a}",
            f"on the left {a}, on the right {b}",
            f"{a} is left of {b}",
            f"{b} is right of {a}",
        ]
    return [
        f"{a} at the top and {b} at the bottom",
        f"{b} at the bottom and {a} at the top",
        f"{a} above {b}",
        f"{b} below {a}",
        f"at the top {a}, at the bottom {b}",
        f"{a} is above {b}",
        f"{b} is under {a}",
    ]


def captions(scene, n, rng, background):
    "n different sentences; with probability `background` one also names the colour behind."
    texts = rng.sample(phrasings(scene), n)
    return [
        f"{t} on a{'n' if scene['background'] == 'orange' else ''} {scene['background']} background"
        if rng.random() < background
        else t
        for t in texts
    ]


# Compositions and splits
def compositions(rng):
    """Which compositions belong to which split: {'train'|'val'|'test': [group, ...]}, a group being
    a list of siblings.

    A composition is (kind, nouns, relation). Noun pairs, (noun, count) and (noun, place) are
    divided, so no test content is ever seen in training; every group has the same nouns in other
    bindings. Two kinds are for training alone: one thing as large as the picture, so that bare
    nouns are heard, and several things beside another one, so that plurals are.
    """
    nouns = list(NOUNS)
    pairs = list(itertools.combinations(nouns, 2))
    rng.shuffle(pairs)

    def four(a, b):
        return [("pair", p, r) for r in ("left", "above") for p in ((a, b), (b, a))]

    def swap(a, b, r):
        return [("pair", (a, b), r), ("pair", (b, a), r)]

    out = dict(train=[], val=[], test=[])
    take = iter(pairs)
    out["test"] += [four(*next(take)) for _ in range(30)]  # 120 pictures
    out["test"] += [swap(*next(take), r) for r in ["left", "above"] * 38]  # 152
    out["test"] += [
        [("pair", next(take), r)] for r in ["left", "above"] * 40
    ]  # 80 without a sibling
    out["val"] += [four(*next(take)) for _ in range(45)] + [
        swap(*next(take), r) for r in ["left", "above"] * 28
    ]
    pairs = list(take)
    out["train"] += [four(*p) for p in pairs]
    for noun in nouns:  # counts: two of three held out for 28 nouns, none for the others
        ways = [("count", (noun,), n) for n in COUNTS]
        rng.shuffle(ways)
        i = nouns.index(noun)
        held, rest = (ways[:2], ways[2:]) if i % 12 < 7 else ([], ways)
        if held:
            out["test"].append(held)
        val, rest = (rest[:1], rest[1:]) if i % 12 >= 10 else ([], rest)
        if val:
            out["val"].append(val)
        if rest:
            out["train"].append(rest)
    for noun in nouns:  # places: two of five are held out
        ways = [("single", (noun,), p) for p in PLACES]
        rng.shuffle(ways)
        out["test"].append(ways[:2])
        out["train"].append(ways[2:])
    allowed = {
        (noun, n) for group in out["train"] for kind, (noun, *_), n in group if kind == "count"
    }
    mixed = [
        [("mixed", p, n) for p in ((a, b), (b, a)) for n in (2, 3) if (p[0], n) in allowed]
        for a, b in pairs
    ]
    out["train"] += [group for group in mixed if len(group) > 1][:250]
    out["train"] += [[("whole", (noun,), "all")] for noun in nouns]
    return out


REPEATS = dict(
    pair=1, mixed=1, single=6, count=8, whole=10
)  # renderings in training: pairs are many, the others few


def scenes_of(groups, rng, repeat=False):
    """Scene dicts: every composition once, or as often as REPEATS says, on other backgrounds and in
    other styles each time.
    """
    scenes, number = [], itertools.count()
    for group in groups:
        for _ in range(REPEATS[group[0][0]] if repeat else 1):
            together, g = (
                not repeat or rng.random() < 0.6,
                next(number),
            )  # siblings alike in everything but the binding
            for i, (kind, nouns, relation) in enumerate(group):
                if not (together and i):
                    style, background = rng.choice(STYLES), rng.choice(list(COLOURS))
                if kind == "whole" and rng.random() < 0.5:
                    background = "white"
                scenes.append(
                    dict(
                        kind=kind,
                        nouns=list(nouns),
                        relation=relation,
                        style=style,
                        background=background,
                        group=g,
                    )
                )
    return scenes


# Drawing
def variants(code):
    "The ways in which packages write a code point or sequence: with and without its selector."
    plain = code.lower().replace("-fe0f", "")
    return code.lower(), plain, f"{plain}-fe0f"


def first_file(names):
    return next(path for path in names if path.exists())


@functools.cache
def flat_icons():
    folder = sources.fetch("@iconify-json/fluent-emoji-flat")
    return [json.loads((folder / name).read_text()) for name in ("icons.json", "chars.json")]


def emoji_svg(code, style):
    "One emoji as SVG, in one of the styles that come as such."
    if style == "twemoji":
        folder = sources.fetch("@twemoji/svg")
        return first_file(folder / f"{name}.svg" for name in variants(code)).read_text()
    if style == "openmoji":
        folder = sources.fetch("openmoji") / "color/svg"
        return first_file(folder / f"{name.upper()}.svg" for name in variants(code)).read_text()
    icons, chars = flat_icons()
    body = icons["icons"][next(chars[name] for name in variants(code) if name in chars)]["body"]
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'


def emoji(code, style):
    "The drawing of one emoji, about 256 pixels: PIL image, RGBA."
    if style == "fluent-3d":
        folder = sources.fetch("@lobehub/fluent-emoji-3d") / "assets"
        path = first_file(folder / f"{name}.webp" for name in variants(code))
        return Image.open(path).convert("RGBA")
    if style == HELD_OUT_STYLE:
        font = ImageFont.truetype(
            str(next(sources.fetch("fonts-noto-color-emoji").rglob("NotoColorEmoji.ttf"))), 109
        )
        text = "".join(chr(int(part, 16)) for part in variants(code)[1].split("-"))
        image = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(image).text((12, 12), text, font=font, embedded_color=True)
        return image
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=emoji_svg(code, style), width=320, height=320)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


@functools.cache
def sprite(noun, style):
    """The drawing of one noun, cropped to what is drawn: PIL image, premultiplied RGBA, about 256
    pixels.
    """
    image = emoji(NOUNS[noun], style)
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    return image.convert("RGBa")  # premultiplied: edges do not pick up a halo when resized


def place(canvas, noun, style, x, y, size, rng):
    """Draw a noun centred at (x, y), fractions of the side, its longer side `size` of it; soft
    shadow under it.
    """
    image = sprite(noun, style)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = size * SIDE / max(image.size)
    image = image.resize([max(1, round(n * scale)) for n in image.size], Image.Resampling.LANCZOS)
    image = image.rotate(rng.uniform(-9, 9), Image.Resampling.BICUBIC, expand=True).convert("RGBA")
    at = round(x * SIDE - image.width / 2), round(y * SIDE - image.height / 2)
    shadow = Image.new("RGBA", canvas.size)
    shadow.paste(
        (30, 30, 50, 70), (at[0] + 2, at[1] + 4), image.getchannel("A").point(lambda a: a * 0.28)
    )
    canvas.alpha_composite(shadow.filter(ImageFilter.GaussianBlur(3)))
    layer = Image.new("RGBA", canvas.size)
    layer.paste(image, at)
    canvas.alpha_composite(layer)


def layout(scene, rng):
    "Where each object goes: [(noun, x, y, size)], fractions of the side."
    u, kind, relation = rng.uniform, scene["kind"], scene["relation"]
    if kind == "single":
        size = u(0.34, 0.46)
        x = {"left": u(0.24, 0.29), "right": u(0.71, 0.76)}.get(relation, u(0.46, 0.54))
        y = {"top": u(0.24, 0.29), "bottom": u(0.71, 0.76)}.get(relation, u(0.46, 0.54))
        return [(scene["nouns"][0], x, y, size)]
    if kind == "whole":
        size = u(0.5, 0.96)
        return [(scene["nouns"][0], u(size / 2, 1 - size / 2), u(size / 2, 1 - size / 2), size)]
    if kind in ("count", "mixed"):
        cells = [(i, j) for i in range(3) for j in range(3)]
        size, things = u(0.25, 0.31), [scene["nouns"][0]] * relation + scene["nouns"][1:]
        return [
            (noun, 0.19 + 0.31 * i + u(-0.03, 0.03), 0.19 + 0.31 * j + u(-0.03, 0.03), size)
            for noun, (i, j) in zip(things, rng.sample(cells, len(things)))
        ]
    sizes = u(0.34, 0.44), u(0.34, 0.44)
    near, far = (u(0.24, 0.29), u(0.71, 0.76))
    across = u(0.42, 0.58), u(0.42, 0.58)
    points = (
        [(near, across[0]), (far, across[1])]
        if relation == "left"
        else [(across[0], near), (across[1], far)]
    )
    return [(n, x, y, s) for n, (x, y), s in zip(scene["nouns"], points, sizes)]


def draw(scene, name, style=None):
    "The picture of a scene as WebP bytes; same name, same picture; `style` overrides the scene's."
    rng = random.Random(f"{SEED} {name}")
    top = np.array(COLOURS[scene["background"]], float)
    shade = np.linspace(1.02, 0.94, SIDE)[
        :, None, None
    ]  # a faint gradient, so that backgrounds are not dead flat
    canvas = Image.fromarray(
        np.broadcast_to(np.clip(top * shade, 0, 255), (SIDE, SIDE, 3)).astype("uint8")
    ).convert("RGBA")
    for noun, x, y, size in layout(scene, rng):
        place(canvas, noun, style or scene["style"], x, y, size, rng)
    out = io.BytesIO()
    canvas.convert("RGB").save(out, "WEBP", quality=78, method=6)
    return out.getvalue()


# Speaking
def synthesise(jobs):
    "Speak [(text, voice)] with the engines: list of (samples, rate)."
    waves = [None] * len(jobs)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        script, listed = [], []
        for i, (text, voice) in enumerate(jobs):
            path = folder / f"{i}.wav"
            if voice["engine"] == "espeak-ng":
                subprocess.run(
                    [
                        "espeak-ng",
                        "-v",
                        voice["name"],
                        "-s",
                        str(round(165 * voice["rate"])),
                        "-p",
                        str(round(50 * voice["pitch"])),
                        "-w",
                        str(path),
                        text,
                    ],
                    check=True,
                    capture_output=True,
                )
            elif voice["engine"] == "flite":
                subprocess.run(
                    [
                        "flite",
                        "-voice",
                        voice["name"],
                        "--setf",
                        f"duration_stretch={1 / voice['rate']:.3f}",
                        "-t",
                        text,
                        "-o",
                        str(path),
                    ],
                    check=True,
                    capture_output=True,
                )
            else:  # one festival process for the whole list: it starts slowly
                words = re.sub(r"[^a-z ,]", "", text)
                script.append(
                    (
                        voice["name"],
                        f"(Parameter.set 'Duration_Stretch {1 / voice['rate']:.3f})\n"
                        f'(utt.save.wave (utt.synth (Utterance Text "{words}")) "{path}")\n',
                    )
                )
        script.sort(key=lambda s: s[0])
        for name, lines in itertools.groupby(script, key=lambda s: s[0]):
            listed.append(f"(voice_{name})\n" + "".join(line for _, line in lines))
        if listed:
            (folder / "say.scm").write_text("".join(listed))
            subprocess.run(
                ["festival", "-b", str(folder / "say.scm")], check=True, capture_output=True
            )
        for i in range(len(jobs)):
            waves[i] = sf.read(folder / f"{i}.wav", dtype="float32")
    return waves


def finish(wave, rate, voice, rng, room):
    """Trim, shift, tilt, level: float32 at 16 kHz. `room` adds a little of what microphones and
    rooms add (training only).
    """
    if (
        voice["engine"] != "espeak-ng"
    ):  # espeak-ng sets its own pitch; the others get it by resampling
        wave = soxr.resample(wave, rate * voice["pitch"], RATE)
    else:
        wave = soxr.resample(wave, rate, RATE)
    loud = np.abs(wave) > 0.012 * np.abs(wave).max()
    start, stop = np.flatnonzero(loud)[[0, -1]]
    wave = wave[max(0, start - 320) : stop + 800]
    if room:
        tilt = rng.uniform(-0.35, 0.35)  # first-order shelf: a duller or a brighter microphone
        wave = wave - tilt * np.concatenate([[0], wave[:-1]]).astype(wave.dtype)
        if rng.random() < 0.5:  # a short exponential tail: a small room
            noise = np.random.default_rng(rng.getrandbits(32))
            n = int(RATE * rng.uniform(0.03, 0.18))
            tail = (
                noise.standard_normal(n) * np.exp(-6 * np.arange(n) / n) * rng.uniform(0.02, 0.09)
            )
            tail[0] = 1
            wave = np.convolve(wave, tail)[: len(wave) + n // 2]
        noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(wave))
        wave = wave + noise * np.sqrt(np.mean(wave**2)) * 10 ** (-rng.uniform(22, 45) / 20)
    return (wave / (np.abs(wave).max() + 1e-9) * rng.uniform(0.5, 0.9)).astype(np.float32)


def speak(task):
    "Worker: [(uttid, text, voice, room)] -> [(uttid, Ogg Opus bytes, seconds)]."
    out = []
    for (uttid, text, voice, room), (wave, rate) in zip(
        task, synthesise([(t[1], t[2]) for t in task])
    ):
        wave = finish(wave, rate, voice, random.Random(f"{SEED} {uttid}"), room)
        data = io.BytesIO()
        sf.write(
            data,
            wave,
            RATE,
            format="OGG",
            subtype="OPUS",
            compression_level=1 - (7_500 - 6_000) / 250_000,
        )
        out.append((uttid, fix_serial(data.getvalue(), uttid), len(wave) / RATE))
    return out


def fix_serial(data, uttid):
    """The encoder gives each Ogg stream a random serial number; set it from the name, and mend each
    page's checksum.
    """
    serial = random.Random(f"serial {uttid}").getrandbits(31).to_bytes(4, "little")
    data, at = bytearray(data), 0
    while at < len(data):
        count = data[at + 26]
        size = 27 + count + sum(data[at + 27 : at + 27 + count])
        data[at + 14 : at + 18] = serial
        data[at + 22 : at + 26] = bytes(4)
        crc = 0
        for byte in data[at : at + size]:
            crc = (crc << 8 & 0xFFFFFFFF) ^ OGG_CRC[crc >> 24 ^ byte]
        data[at + 22 : at + 26] = crc.to_bytes(4, "little")
        at += size
    return bytes(data)


def _crc(i):
    r = i << 24
    for _ in range(8):
        r = (r << 1 ^ (0x04C11DB7 if r >> 31 else 0)) & 0xFFFFFFFF
    return r


OGG_CRC = [_crc(i) for i in range(256)]


def paint(task):
    return [(path, draw(scene, name, style)) for path, scene, name, style in task]


# Putting it together
def plan():
    "All of the corpus except pixels and samples: {split: [entry, ...]} and the swap probe."
    parts = compositions(random.Random(SEED))
    entries, ids = {}, {}
    for split, size in (("train", None), ("val", 300), ("test", 500)):
        rng = random.Random(f"{SEED} {split}")  # its own: what training gets never changes the test
        n, voices, pitch = (
            (5, TEST_VOICES, (0.85, 1.18)) if split == "test" else (2, TRAIN_VOICES, (0.8, 1.25))
        )
        entries[split] = []
        for i, scene in enumerate(scenes_of(parts[split], rng, split == "train")[:size]):
            name = f"{split}{i:05d}"
            said = captions(scene, n, rng, 0.3)
            who = [draw_voice(voices, rng, pitch) for _ in said]
            entry = {
                "image": f"images/{name}.webp",
                "concepts": scene["nouns"],
                "group": scene["group"],
                "scene": scene,
            }
            if (
                split == "train"
            ):  # several pictures show one composition: none is a wrong answer for another
                entry["meaning"] = ids.setdefault(
                    (scene["kind"], tuple(scene["nouns"]), scene["relation"]), len(ids)
                )
            entry["captions"] = [
                {
                    "text": t,
                    "speaker": speaker(v),
                    "uttid": f"{name}_{j}",
                    "wav": f"wavs/{name}_{j}.ogg",
                    "language": "en",
                    "_voice": v,
                }
                for j, (t, v) in enumerate(zip(said, who))
            ]
            entries[split].append(entry)
    entries["test_style"] = [
        {
            **e,
            "image": e["image"].replace("test", "style"),
            "scene": {**e["scene"], "style": HELD_OUT_STYLE},
        }
        for e in entries["test"]
    ]
    return entries, probe(entries["test"])


VOICE_GROUPS = [2] * 50 + [
    1
] * 100  # pictures from each group of siblings: 200, half of them beside a sibling


def voice_entries(train):
    """The split `voice`: pairs of `train`, as they stand there, said anew by the voices of `test`;
    only the voices are unheard.

    Its random stream is its own, and what it draws from is the manifest of `train`: it can be made
    without the other splits. Wordings are drawn as for `test`, whatever `train` says of the
    picture: a sentence may occur in both.
    """
    rng, groups = random.Random(f"{SEED} voice"), {}
    for entry in train:
        if entry["scene"]["kind"] == "pair":
            groups.setdefault(entry["group"], {}).setdefault(entry["meaning"], entry)
    groups = [list(group.values()) for group in groups.values() if len(group) > 1]
    chosen = [
        e
        for group, n in zip(rng.sample(groups, len(groups)), VOICE_GROUPS)
        for e in rng.sample(group, n)
    ]
    entries = []
    for entry in sorted(chosen, key=lambda e: e["image"]):
        name = (
            "voice" + re.search(r"\d+", entry["image"])[0]
        )  # the number of its picture in `train`
        spoken = [
            (text, draw_voice(TEST_VOICES, rng)) for text in captions(entry["scene"], 2, rng, 0.3)
        ]
        entries.append(
            {
                **entry,
                "captions": [
                    {
                        "text": t,
                        "speaker": speaker(v),
                        "uttid": f"{name}_{j}",
                        "wav": f"wavs/{name}_{j}.ogg",
                        "language": "en",
                        "_voice": v,
                    }
                    for j, (t, v) in enumerate(spoken)
                ],
            }
        )
    return entries


def probe(entries):
    """Test pictures that differ only in binding: every caption of one of them, with the picture it
    means and the other one.
    """
    rows = []
    for _, group in itertools.groupby(entries, key=lambda e: e["group"]):
        for one, two in itertools.combinations(list(group), 2):
            a, b = one["scene"], two["scene"]
            if a["kind"] == "pair":
                if a["relation"] != b["relation"] or a["nouns"] == b["nouns"]:
                    continue
                kind = {"left": "left_right", "above": "above_below"}[a["relation"]]
            else:
                kind = {"count": "count", "single": "place"}[a["kind"]]
            for right, other in ((one, two), (two, one)):
                rows += [
                    {
                        "uttid": c["uttid"],
                        "image": right["image"],
                        "other": other["image"],
                        "kind": kind,
                    }
                    for c in right["captions"]
                ]
    return rows


def chunks(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


def write_zip(path, files):
    """Stored (manifests deflated), sorted, with one fixed date: the same files give the same
    archive.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0))
            entry.compress_type = (
                zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
            )
            archive.writestr(entry, files[name])
    print(f"{path}: {len(files)} files, {path.stat().st_size / 1e6:.1f} MB")


def manifest(entries):
    "The JSON file of a split; what only the build has to know is left out."
    return json.dumps(
        {
            "data": [
                {
                    **e,
                    "captions": [
                        {k: v for k, v in c.items() if k != "_voice"} for c in e["captions"]
                    ],
                }
                for e in entries
            ]
        },
        separators=(",", ":"),
    ).encode()


def build_voice(out, workers=2):
    """Write scenes-voice.zip into `out`, beside the scenes-train.zip that lies there and holds its
    pictures.
    """
    with zipfile.ZipFile(Path(out) / "scenes-train.zip") as archive:
        entries = voice_entries(json.loads(archive.read("train.json"))["data"])
    clips = [(c["uttid"], c["text"], c["_voice"], False) for e in entries for c in e["captions"]]
    with multiprocessing.Pool(workers) as pool:
        spoken = [x for part in pool.imap(speak, chunks(clips, 200)) for x in part]
    minutes = sum(t for *_, t in spoken) / 60
    print(f"voice: {len(entries)} pictures of train, {len(spoken)} clips, {minutes:.1f} min")
    write_zip(
        Path(out) / "scenes-voice.zip",
        {
            **{f"wavs/{uttid}.ogg": data for uttid, data, _ in spoken},
            "voice.json": manifest(entries),
        },
    )


def build(out, workers=2, only=None):
    """Write scenes.zip (val, test, test_style, swap), scenes-train.zip and scenes-voice.zip into
    `out`.
    """
    entries, swap = plan()
    if only:
        entries = {k: v[:only] for k, v in entries.items()}
    pictures = [
        (e["image"], e["scene"], e["image"].replace("style", "test"), None)
        for s in entries.values()
        for e in s
    ]
    clips = [
        (c["uttid"], c["text"], c["_voice"], split == "train")
        for split, s in entries.items()
        if split != "test_style"
        for e in s
        for c in e["captions"]
    ]
    print(
        {k: len(v) for k, v in entries.items()},
        len(pictures),
        "pictures",
        len(clips),
        "clips",
        len(swap),
        "probe rows",
    )
    with multiprocessing.Pool(workers) as pool:
        images = dict(x for part in pool.imap(paint, chunks(pictures, 100)) for x in part)
        print(f"pictures drawn: {sum(map(len, images.values())) / 1e6:.1f} MB")
        spoken = [x for part in pool.imap(speak, chunks(clips, 200)) for x in part]
    size, hours = sum(len(d) for _, d, _ in spoken) / 1e6, sum(t for *_, t in spoken) / 3600
    print(f"clips spoken: {size:.1f} MB, {hours:.2f} h")
    waves = {f"wavs/{uttid}.ogg": data for uttid, data, _ in spoken}
    train = {k: v for k, v in {**images, **waves}.items() if k.split("/")[1].startswith("train")}
    rest = {k: v for k, v in {**images, **waves}.items() if k not in train}
    write_zip(Path(out) / "scenes-train.zip", {**train, "train.json": manifest(entries["train"])})
    write_zip(
        Path(out) / "scenes.zip",
        {
            **rest,
            **{f"{s}.json": manifest(entries[s]) for s in ("val", "test", "test_style")},
            "swap.json": json.dumps({"data": swap}, separators=(",", ":")).encode(),
        },
    )
    build_voice(out, workers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=Path(__file__).parent, type=Path)
    parser.add_argument("--workers", default=2, type=int)
    parser.add_argument("--only", type=int, help="the first N pictures of each split: a quick look")
    parser.add_argument(
        "--voice",
        action="store_true",
        help="only scenes-voice.zip, from the scenes-train.zip in OUT",
    )
    args = parser.parse_args()
    build_voice(args.out, args.workers) if args.voice else build(args.out, args.workers, args.only)
