"""Build `stamps.zip`: the described stamps of Tux Paint, with the voices of the volunteers who read
the descriptions.

    python data/build_stamps.py --out data/stamps.zip

Needs the package `tuxpaint-stamps-default` (see sources.py) and, from PyPI, pillow, resvg_py,
soundfile and soxr. With the same versions of these every run writes the same bytes. Beside the
archive lies `stamps_report.json`: what was counted, what was dropped, and why.
"""

import argparse
import collections
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import struct
import unicodedata
import zipfile
import zlib
from pathlib import Path

import numpy as np
import soundfile
import sources
import soxr
from PIL import Image

PACKAGE = "tuxpaint-stamps-default"
SEED = 2022
SAMPLE_RATE = 16_000
CANVAS, BOX = (
    224,
    204,
)  # side of the picture and of the box that the stamp is fitted into, in pixels
UPSCALE = 2.5  # the smallest stamps have 20 pixels: larger than this they turn to fog
NOT_PICTURES = ("symbols/alphabets/", "symbols/math/", "symbols/numbers/")  # things that one reads
RARE = 50  # a language with fewer recordings than this can neither be learnt from nor measured on
SPLITS = {"train": 0.7, "val": 0.1, "test": 0.2}
# Drawings whose letters are live text: the packaged bitmap is taken, for a rendering would depend
# on installed fonts.
LIVE_TEXT = re.compile(rb"<(svg:)?(text|flowRoot)[ >]")
# Stamps made for dark paper, which vanish on white, and the colour they get instead.
ON_DARK = frozenset(
    "animals/fish/shrimp household/dishes/glass naturalforces/lightningbolt "
    "seasonal/christmas/lamp "
    "seasonal/halloween/ghost seasonal/halloween/skull seasonal/newyears/fireworks "
    "seasonal/newyears/fireworks2 "
    "town/flags/whiteflag".split()
)
WHITE, DARK = (1.0, 1.0, 1.0), (0.25, 0.32, 0.44)
# Rows at the top of a bitmap that belong to a frame line, left over from cutting the picture out.
FRAME_ROWS = {"symbols/chess/b_1_king": 2, "symbols/chess/b_4_knight": 1}
# The licence text goes into the archive; Debian keeps one copy of it for all packages.
GPL = Path("/usr/share/common-licenses/GPL-2")
GPL_DIGEST = "8177f97513213526df2cf6184d8ff986c675afb514d4e68a404010521b880643"
NOTICE = """\
Pictures, descriptions and recordings: Tux Paint stamps, copyright 2002-2022 by Bill Kendrick \
and many contributors,
GNU General Public License, version 2 or (at your option) any later version; see COPYRIGHT and \
COPYING.

Changed for this archive: pictures rendered on white, 224 x 224 pixels, as WebP; recordings \
mixed to mono, resampled to
16 kHz, trimmed, brought to one peak level, as Opus; descriptions gathered in JSON, with \
English nouns and a split added.
The source form is the Debian package tuxpaint-stamps-default, version {version}; the script \
that made the changes is
data/build_stamps.py of this project.
"""

# English nouns

# Rule: the first clause of the English description, in lower case, without article and quantity ("a
# pair of"), cut before the first preposition, verb or relative pronoun; its last word, in the
# singular, is the noun. Two words are one noun where COMPOUNDS says so. The descriptions that the
# rule gets wrong are in EXCEPTIONS, by their beginning.
QUANTITY = re.compile(
    r"^(a pair of|a head of|a bunch of|a cluster of|a string of|a quarter of|a tube of|a "
    r"plant of common|"
    r"some|two|the|our|an|a)\s+"
)
CUT = frozenset(
    "with in for of from on at to that who which used worn playing dancing hatched inside "
    "covered lets is are means "
    "resembles carry carries called said making like or and".split()
)
PLURAL_ONLY = frozenset(
    "glasses sunglasses jeans pants scissors pliers binoculars fireworks".split()
)
# A kind of its last word: both names are kept ("fire truck", "truck").
KINDS = frozenset(
    "fire truck|garbage truck|dump truck|tow truck|forklift truck|pickup truck|tanker truck|"
    "container truck|"
    "logging truck|cement truck|sports car|race car|sedan car|school bus|soccer ball|tennis "
    "ball|cricket ball|"
    "christmas tree|palm tree|top hat|party hat|cowboy hat|hard hat|birthday cake|bass "
    "guitar|electric guitar|"
    "classical guitar|wild boar|laptop computer|digital camera|sail boat|t shirt|polo shirt|"
    "traffic cone|"
    "christmas stocking|easter egg|bicycle wheel|tractor wheel|american football|electric "
    "kettle|christmas hat|"
    "mandarin orange|wheelie bin|compost bin|mobile telephone|steam locomotive|monarch "
    "butterfly".split("|")
)
# Something else than its last word says: only the whole name is kept ("sea lion" is no lion).
NAMES = frozenset(
    "police officer|sea lion|candy cane|teddy bear|rubber duck|computer mouse|guinea fowl|"
    "vacuum cleaner|air balloon|"
    "speech balloon|thought balloon|scream balloon|paw print|bow tie|totem pole|apple core|"
    "clothes hanger|drum kit|"
    "lightning bolt|wishing well|mince pie|microwave oven|pressure cooker|pepper grinder|gas "
    "cylinder|compact disc|"
    "cement mixer|washing machine|party horn|trophy cup|garlic bulb|tennis racket|measuring "
    "tape|town hall|dollar sign|"
    "cent sign|pound sign|penny sign|yen sign|euro sign|stop sign|train sign|treble clef|"
    "bass clef|post box|motor bike|"
    "eighth note|half note|quarter note|whole note|quarter rest|christmas light|clock face|"
    "computer monitor|"
    "christmas pudding".split("|")
)
EXCEPTIONS = {
    "Tux and spider": ["penguin", "spider"], "Penguins are": ["penguin"], "Tux—": ["penguin"],
    "Tux the penguin in a farm tractor": ["penguin", "tractor"], "Tux Airways": ["airplane"],
    "George the blue groper": ["fish"], "A couple of wings": ["wing"],
    "Edward Bear": ["teddy bear"],
    "The baby of a gnu": ["gnu"], "A mountaingoat": ["mountain goat"],
    "A spider dancing with a fly": ["spider", "fly"],
    "A blue and yellow flag": ["flag"], "A cup of": ["cup", "coffee"],
    "A glass of water": ["glass", "water"],
    "A bunny with an Easter egg": ["bunny", "egg"], "A chick inside an egg": ["chick", "egg"],
    "A chick hatched": ["chick", "egg"], "A girl in a wheelchair": ["girl", "wheelchair"],
    "A top and skirt": ["top", "skirt"],
    "A ripe, red tomato": ["tomato"], "A red and white anemone": ["anemone", "flower"],
    "A lemon slice": ["lemon"],
    "A cherimoya fruit": ["cherimoya", "fruit"], "An avocado fruit": ["avocado", "fruit"],
    "A ginger": ["ginger"],
    "A thyme plant": ["thyme"], "A silver garbage can": ["garbage can"],
    "A model of the earth": ["globe"],
    "Eat your bread": ["bread"], "Eat your broccoli": ["broccoli"], "Say cheese": ["cheese"],
    "Remember to flush": ["toilet"],
    "It's a cep": ["cep"], "Holly leaves": ["holly"], "A four leaf clover": ["clover"],
    "Hard candy": ["candy"],
    "Santa Claus": ["santa claus"], "A Christmas tree": ["christmas tree", "tree"],
    "Appooppan Thaadi": ["milkweed"],
    "An important part of Hanukkah": ["menorah"], "Gimel": ["dreidel"], "Hei": ["dreidel"],
    "Nun": ["dreidel"],
    "Shin": ["dreidel"], "A wooden toy from Germany": ["toy"], "A grave marker": ["gravestone"],
    "A cemetery marker": ["gravestone"], "A monument stone": ["gravestone"],
    "Another tombstone": ["tombstone"],
    "Our moon as a crescent": ["moon"], "Mars—": ["mars", "planet"],
    "Mercury—": ["mercury", "planet"],
    "Venus—": ["venus", "planet"], "Jupiter—": ["jupiter", "planet"],
    "Saturn—": ["saturn", "planet"],
    "Uranus—": ["uranus", "planet"], "Neptune—": ["neptune", "planet"],
    "Pluto—": ["pluto", "planet"],
    "The Earth": ["earth", "planet"], "– Because a brain": ["helmet"], "We remember": ["memorial"],
    "Boom": ["explosion"],
    "Fire!": ["fire"], "A tough APC": ["tank"], "With a fast APC": ["tank"], "This gun": ["gun"],
    "This shell": ["shell"],
    "An F-22 Raptor": ["airplane"], "A mustang airplane": ["airplane"],
    "Silver pig tails": ["hair"],
    "Excited": ["face"], "Happy": ["face"], "Mad": ["face"], "Sad": ["face"],
    "A Canadian 1 cent": ["coin", "penny"],
    "A Canadian 5 cent": ["coin", "nickel"], "A Canadian 10 cent": ["coin", "dime"],
    "A Canadian 25 cent": ["coin", "quarter"],
    "A Canadian dollar": ["coin", "dollar"], "A Canadian two dollar": ["coin", "dollar"],
    "A US 1 cent": ["coin", "penny"],
    "A US 5 cent": ["coin", "nickel"], "A US 10 cent": ["coin", "dime"],
    "A US 25 cent": ["coin", "quarter"],
    "A US 50 cent": ["coin", "half dollar"], "A US “Sacagawea”": ["coin", "dollar"],
    "1 Japanese": ["coin", "yen"],
    "5 Japanese": ["coin", "yen"], "10 Japanese": ["coin", "yen"], "50 Japanese": ["coin", "yen"],
    "100 Japanese": ["coin", "yen"], "500 Japanese": ["coin", "yen"], "Flat.": ["flat sign"],
    "Sharp.": ["sharp sign"],
    "This means something can be recycled": ["recycling sign"], "Down at the docks": ["dock"],
    "Enter the cave": ["cave"],
    "A sword in the stone": ["sword", "stone"], "“Arrow”": ["arrow"],
    "“Crossroads”": ["road sign", "crossroads"],
    "An empty roadsign": ["road sign"], "Dead end": ["road sign"], "“Give Way”": ["road sign"],
    "“Hospital”": ["road sign"],
    "No entry": ["road sign"], "“No U-Turn”": ["road sign"], "Roundabout": ["road sign"],
    "School ahead": ["road sign"],
    "“T-intersection”": ["road sign"], "“Toilets”": ["road sign"], "“Yield”": ["road sign"],
    "“School": ["road sign"],
    "Pedestrian": ["road sign"], "A railroad crossing": ["road sign"],
    "The red light": ["traffic light"],
    "The yellow light": ["traffic light"], "The green light": ["traffic light"],
    "Police car emblems": ["emblem"],
    "Rugby goal posts": ["goal post"], "A hot air balloon": ["hot air balloon"],
    "Eddie": ["helicopter"],
    "UB2006": ["submarine"], "Tankers carry": ["tanker"], "A clock face": ["clock"],
    "A VW Beetle": ["car"], "A home compost bin": ["bin"],
}  # fmt: skip


def singular(word: str) -> str:
    "The singular of a regular English plural; other words unchanged."
    if word in PLURAL_ONLY or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("ches", "shes", "xes", "toes")) else word[:-1]


def nouns(description: str) -> list[str]:
    "The English noun or nouns of a picture, from its English description (rule above)."
    for beginning, answer in EXCEPTIONS.items():
        if description.startswith(beginning):
            return answer
    clause = re.sub(r"\([^)]*\)|[“”\"]", "", description.lower().replace("’", "'")).strip()
    clause = re.split(r"[.!?,:;—–]| - ", clause)[0].strip()
    while (shorter := QUANTITY.sub("", clause)) != clause:
        clause = shorter
    words = clause.split()
    words = words[: next((i for i, word in enumerate(words) if i and word in CUT), len(words))]
    head = singular(words[-1])
    pair = " ".join([*words[-2:-1], head])
    if pair in NAMES:
        return [pair]
    return [pair, head] if pair in KINDS else [head]


# Descriptions


def read_descriptions(path: Path) -> dict[str, str]:
    "The texts of one stamp by language: English on the first line, then lines `xx.utf8=text`."
    lines = unicodedata.normalize("NFC", path.read_text("utf-8")).splitlines()
    texts = {"en": lines[0].strip()}
    for line in lines[1:]:
        if found := re.fullmatch(r"([A-Za-z_@]+)\.utf8=(.*)", line):
            texts[found[1]] = found[2].strip()
    return {language: text for language, text in texts.items() if text}


# Pictures


def resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resample an RGBA picture with its colours weighted by alpha, so that hidden colours cannot
    bleed into the edge.
    """
    pixels = np.asarray(picture.convert("RGBA"), np.float32) / 255  # (H, W, 4)
    pixels[..., :3] *= pixels[..., 3:]
    planes = [
        Image.fromarray(pixels[..., i]).resize(size, Image.Resampling.LANCZOS) for i in range(4)
    ]
    return np.clip(
        np.stack([np.asarray(plane) for plane in planes], -1), 0, 1
    )  # (h, w, 4), premultiplied


def open_stamp(root: Path, name: str) -> tuple[Image.Image, float]:
    "(the drawing if there is one, else the bitmap; how much it may be enlarged)"
    stem = root / name
    drawing, bitmap = stem.with_suffix(".svg"), stem.with_suffix(".png")
    if drawing.exists() and not (bitmap.exists() and LIVE_TEXT.search(drawing.read_bytes())):
        import resvg_py

        png = resvg_py.svg_to_bytes(
            svg_path=str(drawing), width=4 * CANVAS, dpi=96, skip_system_fonts=True
        )
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA"), 4.0
    picture = Image.open(bitmap).convert("RGBA")
    return picture.crop((0, FRAME_ROWS.get(name, 0), *picture.size)), UPSCALE


def render(root: Path, name: str) -> bytes:
    "One stamp as WebP, cut to its content, centred on the canvas."
    picture, limit = open_stamp(root, name)
    content = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    picture = picture.crop(content)
    scale = min(BOX / max(picture.size), limit)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    small = resize(picture, (width, height))
    canvas = np.full((CANVAS, CANVAS, 3), DARK if name in ON_DARK else WHITE, np.float32)
    top, left = (CANVAS - height) // 2, (CANVAS - width) // 2
    place = canvas[top : top + height, left : left + width]
    place[:] = np.clip(small[..., :3] + place * (1 - small[..., 3:]), 0, 1)
    out = io.BytesIO()
    Image.fromarray((canvas * 255 + 0.5).astype(np.uint8)).save(out, "WEBP", quality=82, method=6)
    return out.getvalue()


# Recordings


def levels(wave: np.ndarray, frame: int = SAMPLE_RATE // 100) -> np.ndarray:
    "The level of each 10 ms of a wave, in dB below full scale."
    count = len(wave) // frame
    power = (wave[: count * frame].reshape(count, frame) ** 2).mean(1)
    return 10 * np.log10(power + 1e-10)


def voiced_seconds(wave: np.ndarray) -> float:
    """How long a wave sounds like a voice: 40 ms frames, loud enough, that repeat themselves at 70
    to 450 Hz.
    """
    frame, hop = SAMPLE_RATE // 25, SAMPLE_RATE // 100
    if len(wave) < frame:
        return 0.0
    frames = np.lib.stride_tricks.sliding_window_view(wave, frame)[::hop]  # (T, frame)
    frames = frames - frames.mean(1, keepdims=True)
    spectrum = np.abs(np.fft.rfft(frames, 2 * frame)) ** 2
    repeats = np.fft.irfft(spectrum)[:, :frame]  # autocorrelation, (T, lag)
    lags = np.arange(SAMPLE_RATE // 450, SAMPLE_RATE // 70)
    # A lag leaves fewer samples to sum over: divide by their share, or low voices look noisy.
    strength = (repeats[:, lags] / (1 - lags / frame)).max(1) / (repeats[:, 0] + 1e-9)
    loud = repeats[:, 0] > repeats[:, 0].max() * 10**-2.5
    return float((loud & (strength > 0.5)).sum() * hop / SAMPLE_RATE)


def trim(wave: np.ndarray) -> np.ndarray:
    """Cut the silence at both ends, leave 80 ms before and 120 ms after the speech, fade 5 ms where
    something was cut.
    """
    level = levels(wave)
    # Above the room's noise, but never so high that a quiet consonant goes.
    threshold = np.clip(np.percentile(level, 5) + 8, level.max() - 45, level.max() - 28)
    loud = np.convolve(level > threshold, np.ones(3), "same") >= 2  # a single loud frame is a click
    where = np.flatnonzero(loud)
    first, last = (where[0], where[-1]) if len(where) else (0, len(level))
    start = max(0, (first - 8) * SAMPLE_RATE // 100)
    stop = min(len(wave), (last + 13) * SAMPLE_RATE // 100)
    cut, fade = wave[start:stop].copy(), SAMPLE_RATE // 200
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    cut[:fade] *= ramp
    cut[-fade:] *= ramp[::-1]
    return cut


REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def ogg_checksum(page: bytes) -> int:
    """The checksum of an Ogg page. It is zlib's with the bits of every byte and of the result in
    reverse, starting at 0.
    """
    value = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{value:032b}"[::-1], 2)


def tidy_ogg(ogg: bytes) -> bytes:
    """The same Opus stream with serial number 1 instead of a random one, and without the 750 bytes
    of padding in its tags.
    """
    pages, start = [], 0
    while start < len(ogg):
        table = 27 + ogg[start + 26]  # header, then one byte for each segment
        size = table + sum(ogg[start + 27 : start + table])
        page = bytearray(ogg[start : start + size])
        if page[table : table + 8] == b"OpusTags":
            vendor = 12 + int.from_bytes(page[table + 8 : table + 12], "little")
            tags = page[table : table + vendor] + bytes(4)  # no comments
            page = page[:26] + bytes([1, len(tags)]) + tags
        page[14:18] = struct.pack("<I", 1)
        page[22:26] = bytes(4)  # the checksum is taken with its own field at zero
        page[22:26] = struct.pack("<I", ogg_checksum(bytes(page)))
        pages.append(bytes(page))
        start += size
    return b"".join(pages)


def encode_opus(wave: np.ndarray, bitrate: int = 14_000) -> bytes:
    """A 16 kHz mono wave as Opus in Ogg, at about `bitrate` bits a second; the same bytes every
    time.
    """
    out = io.BytesIO()
    # libsndfile maps the compression level 0..1 onto 256..6 kbit/s for each channel.
    level = 1 - (bitrate - 6_000) / 250_000
    soundfile.write(out, wave, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=level)
    return tidy_ogg(out.getvalue())


def convert(path: Path) -> tuple[bytes | None, float, str]:
    "One recording: (Opus bytes, seconds, ''), or (None, 0, reason) where it holds no speech."
    try:
        wave, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (n, channels)
    except (soundfile.LibsndfileError, RuntimeError):
        return None, 0.0, "unreadable"
    if not len(wave) or not np.isfinite(wave).all():
        return None, 0.0, "unreadable"
    mono, loudest = wave.mean(1), wave[:, int((wave**2).sum(0).argmax())]
    if (mono**2).sum() < 0.1 * (loudest**2).sum():  # channels in opposite phase cancel out
        mono = loudest
    mono = soxr.resample(mono - mono.mean(), rate, SAMPLE_RATE, quality="HQ").astype(np.float32)
    if len(mono) < SAMPLE_RATE // 10 or (level := levels(mono)).max() < -50:
        return None, 0.0, "too quiet" if len(mono) >= SAMPLE_RATE // 10 else "too short"
    if (level > level.max() - 30).sum() < 15:
        return None, 0.0, "too short"
    if voiced_seconds(mono) < 0.08:
        return None, 0.0, "no voice in it"
    mono = trim(mono)
    mono *= min(0.7 / np.abs(mono).max(), 16)  # 24 dB at most: noise comes up too
    return encode_opus(mono), len(mono) / SAMPLE_RATE, ""


# Splits


def split_stamps(stamps: dict[str, dict], seed: int) -> dict[str, str]:
    """The split of each stamp: 70/10/20 within each category; stamps that share a description or a
    recording stay together.
    """
    leader = {name: name for name in stamps}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    first = {}
    for name, stamp in stamps.items():
        shared = [stamp["texts"]["en"].lower()] + [
            caption["digest"] for caption in stamp["captions"]
        ]
        for key in shared:
            if key in first:
                a, b = sorted((find(name), find(first[key])))
                leader[b] = a
            else:
                first[key] = name
    groups = collections.defaultdict(list)
    for name in stamps:
        groups[find(name)].append(name)
    by_category = collections.defaultdict(list)
    for name in groups:
        by_category[stamps[name]["category"]].append(groups[name])
    chosen, total = {}, collections.Counter()
    for category in sorted(by_category):
        members = sorted(by_category[category])
        random.Random(f"{seed} {category}").shuffle(members)
        filled = collections.Counter()
        for group in members:
            # Whichever split is furthest behind its share here; the whole corpus breaks ties.
            def behind(split):
                return (
                    filled[split] / SPLITS[split],
                    total[split] / SPLITS[split],
                    split,
                )

            split = min(SPLITS, key=behind)
            filled[split] += len(group)
            total[split] += len(group)
            chosen |= dict.fromkeys(group, split)
    return chosen


# The archive


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    """A zip of `files`: stored, names sorted, one fixed date; written beside `path` and renamed
    when complete.
    """
    path = Path(path)
    scratch = path.with_name(path.name + ".part")
    with zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, (2022, 6, 4, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, files[name])
    os.replace(scratch, path)


def to_json(value: object) -> bytes:
    "Readable JSON, one fixed form."
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def manifest(entries: list[dict]) -> bytes:
    "One split's JSON: a line for each picture, else compact, for the archive does not compress."
    lines = (json.dumps(entry, ensure_ascii=False, separators=(",", ":")) for entry in entries)
    return ('{"data":[\n' + ",\n".join(lines) + "\n]}\n").encode()


def survey(root: Path) -> tuple[dict[str, dict], list[dict]]:
    """All stamps that have a picture and a description, with their recordings, and the list of what
    is left out.
    """
    stamps, dropped = {}, []
    for path in sorted(root.rglob("*.txt")):
        folder = path.relative_to(root).with_suffix("")
        if folder.as_posix().startswith(NOT_PICTURES):
            continue
        stamps[folder.as_posix()] = {
            "texts": read_descriptions(path),
            "category": folder.parts[0],
            "folder": folder.parent.as_posix(),
            "picture": any(path.with_suffix(kind).exists() for kind in (".svg", ".png")),
            "captions": [],
        }
    found = []
    for path in sorted([*root.rglob("*_desc*.ogg"), *root.rglob("*_desc*.wav")]):
        name = path.relative_to(root).as_posix()
        if name.startswith(NOT_PICTURES):
            continue
        parts = re.fullmatch(r"(.*)_desc(?:_([A-Za-z_]+))?\.(ogg|wav)", name)
        found.append((name, path, parts and parts[1], parts and (parts[2] or "en")))
    counts = collections.Counter(language for _, _, stem, language in found if stem in stamps)
    for name, path, stem, language in found:
        if stem is None:
            reason = "file name of no stamp"
        elif stem not in stamps:
            reason = "no description of this stamp"
        elif not stamps[stem]["picture"]:
            reason = "no picture of this stamp"
        elif counts[language] < RARE:
            reason = f"language with fewer than {RARE} recordings"
        elif language not in stamps[stem]["texts"]:
            reason = "no description in this language"
        else:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            stamps[stem]["captions"].append(
                {"file": name, "path": path, "language": language, "digest": digest}
            )
            continue
        dropped.append({"file": name, "language": language, "reason": reason})
    return stamps, dropped


def licences(root: Path) -> dict[str, bytes]:
    "The files of the archive that say whose it is."
    copyright_text = (root / "../../doc" / PACKAGE / "copyright").resolve().read_bytes()
    licence = GPL.read_bytes() if GPL.exists() else b""
    if hashlib.sha256(licence).hexdigest() != GPL_DIGEST:
        raise SystemExit(f"{GPL}: not the expected text of the licence; build on a Debian system")
    notice = NOTICE.format(version=sources.SOURCES[PACKAGE].version).encode()
    return {"COPYRIGHT": copyright_text, "COPYING": licence, "NOTICE": notice}


def convert_all(stamps: dict[str, dict], dropped: list[dict], pool) -> dict[str, tuple]:
    "{digest: convert's answer}; recordings that are of no use leave the stamps, in place."
    unique = {}  # one conversion for each different recording: many stamps share one
    for stamp in stamps.values():
        for caption in stamp["captions"]:
            unique.setdefault(caption["digest"], caption["path"])
    converted = dict(zip(unique, pool.map(convert, unique.values(), chunksize=16)))
    for stamp in stamps.values():
        kept = []
        for caption in stamp["captions"]:
            if reason := converted[caption["digest"]][2]:
                facts = {"file": caption["file"], "language": caption["language"]}
                dropped.append(facts | {"reason": reason})
            else:
                kept.append(caption)
        stamp["captions"] = kept
    return converted


class Counted:
    "What the report counts while the manifests are written."

    def __init__(self):
        self.seconds, self.captions = collections.Counter(), collections.Counter()
        self.abridged, self.wavs = [], {}

    def add(self, uttid: str, language: str, split: str, text: str, length: float) -> None:
        self.seconds[language] += length
        self.captions[language] += 1
        self.captions[split, language] += 1
        if len(text) / length > 40:
            self.abridged.append(uttid)


def entry_of(name, stamp, split, converted, files, counted) -> dict:
    "The entry of one stamp; its recordings go into files."
    label, captions = name.replace("/", "-"), []
    for caption in stamp["captions"]:
        language, (data, length, _) = caption["language"], converted[caption["digest"]]
        uttid, text = f"{label}-{language}", stamp["texts"][language]
        # Stamps that share a recording share the file; the name is that of the first.
        wav = counted.wavs.setdefault((caption["digest"], language), f"wavs/{uttid}.ogg")
        files[wav] = data
        facts = {"text": text, "speaker": f"tuxpaint-{language}", "uttid": uttid}
        captions.append(facts | {"wav": wav, "language": language})
        counted.add(uttid, language, split, text, length)
    return {
        "image": f"images/{label}.webp",
        "captions": captions,
        "concepts": nouns(stamp["texts"]["en"]),
        "scene": {"category": stamp["category"], "folder": stamp["folder"]},
    }


def report_of(stamps, manifests, counted, dropped, left_out) -> dict:
    captions, seconds = counted.captions, counted.seconds
    languages = sorted(seconds, key=lambda language: (-captions[language], language))
    by_split = {split: {} for split in manifests}
    for split, numbers in by_split.items():
        for language in languages:
            numbers[language] = captions[language if split == "all" else (split, language)]
    reasons = collections.Counter((item["reason"], item["language"] or "?") for item in dropped)
    dropped_counts = {}
    for (reason, language), n in sorted(reasons.items()):
        dropped_counts.setdefault(reason, {})[language] = n
    categories = collections.Counter(stamp["category"] for stamp in stamps.values())
    return {
        "pictures": {split: len(entries) for split, entries in manifests.items()},
        "captions": by_split,
        "seconds": {language: round(seconds[language], 1) for language in languages},
        "recordings": len(counted.wavs),
        "categories": dict(sorted(categories.items())),
        "dropped_counts": dropped_counts,
        "dropped_stamps": left_out,
        "dropped": sorted(dropped, key=lambda item: item["file"]),
        "abridged": sorted(counted.abridged),
    }


def build(out: Path, workers: int) -> dict:
    "Write the archive and the report; returns the report."
    root = sources.fetch(PACKAGE) / "usr/share/tuxpaint/stamps"
    files = licences(root)
    stamps, dropped = survey(root)
    with multiprocessing.Pool(workers) as pool:
        converted = convert_all(stamps, dropped, pool)
        left_out = []
        for name, stamp in list(stamps.items()):
            if not stamp["picture"] or not stamp["captions"]:
                reason = "no recording" if stamp["picture"] else "no picture"
                left_out.append({"stamp": name, "reason": reason})
                del stamps[name]
        pictures = pool.starmap(render, [(root, name) for name in stamps], chunksize=8)

    split_of, counted = split_stamps(stamps, SEED), Counted()
    manifests = {split: [] for split in ("all", *SPLITS)}
    for (name, stamp), picture in zip(stamps.items(), pictures):
        entry = entry_of(name, stamp, split_of[name], converted, files, counted)
        files[entry["image"]] = picture
        for split in ("all", split_of[name]):
            manifests[split].append(entry)
    files |= {f"{split}.json": manifest(entries) for split, entries in manifests.items()}
    write_archive(out, files)

    report = report_of(stamps, manifests, counted, dropped, left_out)
    write_whole(out.with_name(out.stem + "_report.json"), to_json(report))
    return report


def write_whole(path: Path, content: bytes) -> None:
    scratch = path.with_name(path.name + ".part")
    scratch.write_bytes(content)
    os.replace(scratch, path)


def main() -> None:
    "Build the archive and print the counts."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("stamps.zip"), help="archive to write"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args()
    report = build(args.out, args.workers)
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {size:.1f} MB, {report['recordings']} different recordings")
    for key in ("pictures", "captions", "seconds", "dropped_counts", "dropped_stamps"):
        print(f"{key}: {json.dumps(report[key], ensure_ascii=False)}")


if __name__ == "__main__":
    main()
