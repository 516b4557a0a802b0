"""Make the words that frozen towers know before any training, and the pictures that nobody took.

    python data/build_words.py    # all that is in data/towers from words.* on

The words are those of `things`, their sounds its training recordings, and sentences around every
word that are made here by the same voices and thrown away again (espeak-ng and flite; about a
quarter of an hour on two cores). The ears are taught where to listen, in turns with a fit in closed
form; the pictures are class vectors and training drawings. No carrier and no voice of val or test
speaks here. A line of figures on val goes to data/words.jsonl.
"""

import argparse
import json
import math
import multiprocessing
import random
import re
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import build_scenes as scenes
import build_things as things
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from speechimg.core import atomic_write, cache_dir
from speechimg.corpora import load_corpus
from speechimg.data import augment_speech
from speechimg.files.ahead import FileReader
from speechimg.files.cache import FeatureCache
from speechimg.files.decode import decode_audio, decode_image
from speechimg.speech import frame_mask
from speechimg.towers.lite import LiteImage, pooled
from speechimg.towers.whisper import WhisperSpeech
from speechimg.towers.words import (
    SHARPNESS,
    Listen,
    SpokenWords,
    Words,
    fit_ears,
    fit_eyes,
    gist,
    save_words,
)

HERE = Path(__file__).resolve().parent
SEED, BATCH, RATE = 2412, 64, 2e-3
ARTICLES = {"a", "an", "the", "some"}
BEGINNINGS = (
    "there {be}|show me|I can see|look at|find|please find|do you have|a photo of|a drawing of|"
    "we saw|here {be}|I am looking for|can you see|give me|search for|he has|where did you put|"
    "the children want|nobody likes|I dream of|he talked about|you should take|my brother draws|"
    "we never had|they keep|is that|this {be}|that {be} not|she sold|I want to see|pictures of|"
    "tell me about|my uncle owns|did he break|please draw|we are waiting for|she was afraid of|"
    "he was hiding behind|it fell on|the shop sells|I just heard about|everybody talks about|"
    "you forgot|I remember|a man with|a girl with|someone dropped|I prefer|the story of|"
    "he is pointing at"
).split("|")
QUALITIES = (
    "||||big|red|old|beautiful|green|new|heavy|tiny|broken|blue|funny|black|white|yellow|"
    "strange looking"
).split("|")
ENDINGS = (
    "||||over there|for me|yesterday|in the corner|again|from here|at home|please|on the table|"
    "in the kitchen|under the bridge|every day|next to the door|at school|on monday|"
    "near the river|all the time|with my father|after lunch|in this picture|on the left|"
    "on the right|in the street|for the party|in summer|too|tomorrow|at night|if you can|"
    "by the way"
).split("|")


# Sentences


def named(word, rng):
    "The word with an article and perhaps a quality, or in the plural."
    places, quality = things.slots(word), rng.choice(QUALITIES)
    form = rng.choice(("many", "the", "one", "one", "one"))
    if word in things.PROPER:
        return word
    if form == "many" and places["s"]:
        return f"{quality} {places['s']}".strip()
    if form == "the" or not places["n"]:
        return f"the {quality} {word}"
    thing = f"{quality} {word}".strip()
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def sentence(word, rng):
    "Something that people might say with this word in it."
    if rng.random() < 0.2:
        places = things.slots(word)
        fitting = [
            one
            for one in things.CARRIERS["train"]
            if all(places[key] for key in re.findall(r"{(\w+)}", one))
        ]
        return rng.choice(fitting).format(**places)
    beginning = rng.choice(BEGINNINGS).format(**things.slots(word))
    parts = beginning if rng.random() < 0.93 else "", named(word, rng), rng.choice(ENDINGS)
    return " ".join(" ".join(parts).split())


def voice(rng):
    engine, name = rng.choice(things.VOICES["train"][rng.choice((0, 0, 0, 1, 1))])
    rate, pitch = round(rng.uniform(0.92, 1.28), 3), round(rng.uniform(0.8, 1.25), 3)
    return {"engine": engine, "name": name, "rate": rate, "pitch": pitch}


def spoken_frames(jobs):  # [(word's place, text, voice, seed)]
    "Worker: [(word's place, frames)] of what the programs say, in rooms and over telephones."
    torch.set_num_threads(1)
    said = [" ".join(things.SPELT.get(part, part) for part in job[1].split()) for job in jobs]
    waves = scenes.synthesise([(text, job[2]) for text, job in zip(said, jobs)])
    clips = []
    for (_, _, who, seed), (wave, rate) in zip(jobs, waves):
        rng = random.Random(seed)
        wave = scenes.finish(wave, rate, who, rng, rng.random() < 0.6)
        if rng.random() < 0.15:  # a telephone hears up to 4 kHz
            narrow = scenes.soxr.resample(wave, scenes.RATE, 8000)
            wave = scenes.soxr.resample(narrow, 8000, scenes.RATE)
        clips.append(torch.from_numpy(np.clip(wave, -1, 1).astype(np.float32)))
    return list(zip([job[0] for job in jobs], WhisperSpeech().many(clips)))


def sentences_around(words, each):
    "[(word's place, frames (T, 384)), ...]: so many sentences around each word."
    rng = random.Random(SEED)
    jobs = [
        (place, sentence(word, rng), voice(rng), f"{SEED} {turn} {word}")
        for turn in range(each)
        for place, word in enumerate(words)
    ]
    rng.shuffle(jobs)
    parts, made = [jobs[start : start + 100] for start in range(0, len(jobs), 100)], []
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=start) as pool:
        for part in pool.map(spoken_frames, parts):
            made += part
            print(f"\r{len(made):,} of {len(jobs):,} sentences", end="", flush=True)
    print()
    return made


# Recordings and drawings of things


def features_of(split, name="things"):
    "(corpus, the word of each picture, FileReader) of a split."
    corpus = load_corpus(name, split)
    words = [picture.concepts[0] for picture in corpus.pictures]
    return corpus, words, FileReader(corpus, FeatureCache(cache_dir()), 8e9, None)


def recordings(split, name="things"):
    "[(word, text, frames), ...] of a split."
    corpus, words, reader = features_of(split, name)
    key = "decode_audio 2 max_seconds=20.0"  # the key of the cache that a training uses
    paths = [one.wav for one in corpus.captions]
    frames, _ = reader.load(paths, WhisperSpeech(), key, lambda *a: decode_audio(*a, 20.0))
    return [(words[one.image], one.text, each) for one, each in zip(corpus.captions, frames)]


def is_bare(text, word):
    "Is nothing said but the word, with its article, perhaps in the plural?"
    said = [one for one in text.lower().split() if one not in ARTICLES]
    return len(said) <= len(word.split())


def drawings(split):
    "(words (n,), patches (n, P, 320)) of its pictures."
    corpus, words, reader = features_of(split)
    paths = [picture.path for picture in corpus.pictures]
    grids, _ = reader.load(paths, LiteImage(), "decode_image 2", decode_image)
    return words, torch.tensor(np.stack([np.asarray(one) for one in grids])).float()


def kinds_of_words():
    "{word: classes of ImageNet} of the split that has no pictures."
    pictures = load_corpus("things", "words").pictures
    return {picture.concepts[0]: sorted(picture.classes) for picture in pictures}


# Fit


def padded(clips):
    "(B, T, 384) float32 and (B,) lengths."
    clips = [torch.as_tensor(np.asarray(one)).float() for one in clips]
    return pad_sequence(clips, batch_first=True), torch.tensor([len(one) for one in clips])


@torch.no_grad()
def listened(listen, clips):
    "(n, 384): what it makes of all clips, like lengths together."
    order = sorted(range(len(clips)), key=lambda row: len(clips[row]))
    found = torch.zeros(len(clips), 384)
    for start in range(0, len(order), 128):
        rows = order[start : start + 128]
        frames, lengths = padded([clips[row] for row in rows])
        found[rows] = listen(frames, frame_mask(lengths, frames))
    return found


def teach(listen, fitted, clips, places, is_sentence, steps, generator):
    "Where to listen, while the words stay as they are: `steps` of them, in place."
    usual, whitener, spoken = fitted
    kinds = [is_sentence.nonzero()[:, 0], (~is_sentence).nonzero()[:, 0]]
    optimizer = torch.optim.AdamW(listen.parameters(), lr=RATE, weight_decay=0.02)
    for step in range(steps):
        part = step / steps
        height = min(1, (step + 1) / 50) * (1 + math.cos(math.pi * part)) / 2
        optimizer.param_groups[0]["lr"] = RATE * height
        drawn = [
            kind[torch.randint(len(kind), (n,), generator=generator)]
            for kind, n in zip(kinds, (38, BATCH - 38))
        ]
        rows = torch.cat(drawn).tolist()
        frames, lengths = augment_speech(*padded([clips[row] for row in rows]), generator)
        means = listen(frames, frame_mask(lengths, frames)) - usual
        likeness = F.normalize(means @ whitener, dim=1) @ spoken.T  # (B, W)
        loss = F.cross_entropy(SHARPNESS * likeness, places[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(listen.parameters(), 1.0)
        optimizer.step()


def fit(names, spoken, sentences, turns, steps):
    "(Listen, usual, whitener, spoken words): taught and fitted in turns."
    clips = [frames for *_, frames in spoken] + [frames for _, frames in sentences]
    places = [names.index(word) for word, *_ in spoken] + [place for place, _ in sentences]
    places = torch.tensor(places)
    long = [not is_bare(text, word) for word, text, _ in spoken] + [True] * len(sentences)
    long = torch.tensor(long)
    listen, generator = Listen(), torch.Generator().manual_seed(SEED)
    some = torch.cat([torch.as_tensor(np.asarray(one)).float() for one in clips[::10]])
    listen.centre.copy_(some.mean(0))
    listen.spread.copy_(some.std(0))
    bare = (~long).nonzero()[:, 0]
    means = listened(listen, [clips[row] for row in bare.tolist()])
    fitted = fit_ears(means, places[bare], len(names))
    for turn in range(turns):
        teach(listen, fitted, clips, places, long, steps, generator)
        fitted = fit_ears(listened(listen, clips), places, len(names))
        print(f"turn {turn + 1} of {turns}")
    return listen, *fitted


def gists(listen, spoken):  # from recordings
    "(n, 386)"
    rows = []
    for start in range(0, len(spoken), BATCH):
        frames, lengths = padded([one[2] for one in spoken[start : start + BATCH]])
        with torch.no_grad():
            rows.append(gist(listen, frames, frame_mask(lengths, frames)))
    return torch.cat(rows)


def lone_or_not(listen):
    "(387,): weights and bias of a logistic regression; things ask for one thing, scenes do not."
    rows = [gists(listen, recordings("train", name)) for name in ("things", "scenes")]
    x, usual, spread = torch.cat(rows), torch.cat(rows).mean(0), torch.cat(rows).std(0)
    target = torch.cat([torch.ones(len(rows[0])), torch.zeros(len(rows[1]))])
    even = torch.cat([torch.full((len(one),), 0.5 / len(one)) for one in rows])  # both count alike
    torch.manual_seed(SEED)
    line = nn.Linear(x.shape[1], 1)
    optimizer = torch.optim.Adam(line.parameters(), 1e-2, weight_decay=1e-3)
    for _ in range(400):
        logits = line((x - usual) / spread)[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits, target, even, reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = line.weight[0].detach() / spread
    return torch.cat([weights, line.bias.detach() - weights @ usual])


# Figures on val


def recall(scores, right):  # (q, n), (q, n) bool
    order = scores.argsort(1, descending=True)
    found = right.gather(1, order)
    return {str(k): round(100 * found[:, :k].any(1).float().mean().item(), 1) for k in (1, 5, 10)}


def measure(words):
    "Recordings of words that were taught -> word, and -> any of val's pictures that shows it."
    spoken, found = SpokenWords(words), {}
    shown, patches = drawings("val")
    pictures = F.normalize(F.normalize(pooled(patches) - words.plain, dim=1) @ words.basis, dim=1)
    for split in ("val", "val_sentences"):
        known = [one for one in recordings(split) if one[0] in words.names]
        frames, lengths = padded([one[2] for one in known])
        with torch.no_grad():
            shares = spoken.shares(frames, frame_mask(lengths, frames))
            scores = spoken(frames, frame_mask(lengths, frames)) @ pictures.T
        itself = F.one_hot(
            torch.tensor([words.names.index(one[0]) for one in known]), len(spoken.names)
        )
        right = torch.tensor([[one[0] == word for word in shown] for one in known])
        found[split] = {"queries": len(known), "word": recall(shares, itself.bool())}
        found[split]["picture"] = recall(scores, right)
    return found


def look_at(names):
    "(plain, basis, pictured) of what the words look like."
    shown, patches = drawings("train")
    with torch.no_grad():
        summaries = torch.cat([pooled(some) for some in patches.split(64)])  # (n, 1280)
    plain, kinds = summaries.mean(0), kinds_of_words()
    drawn = [summaries[[word == name for word in shown]] for name in names]
    eyes = fit_eyes([kinds.get(name, []) for name in names], drawn, plain)
    usual, spread = patches.flatten(0, 1).mean(0), patches.flatten(0, 1).std(0)
    save_even("image", usual, spread)
    return plain, *eyes


def save_even(side, usual, spread):
    "What the readers of the light towers take each number from, and divide it by."
    with atomic_write(HERE / "towers" / f"even-{side}.safetensors") as file:
        file.write(save({"usual": usual.float(), "spread": spread.float()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=14, help="sentences around each word")
    parser.add_argument("--turns", type=int, default=4, help="of teaching and fitting")
    parser.add_argument("--steps", type=int, default=700, help="of each turn's teaching")
    options, start = parser.parse_args(), time.perf_counter()
    spoken = recordings("train") + recordings("words")
    names = sorted({word for word, *_ in spoken})
    sentences = sentences_around(names, options.each)
    listen, *ears = fit(names, spoken, sentences, options.turns, options.steps)
    save_even("speech", listen.centre, listen.spread)
    words = Words(names, listen.state_dict(), *ears, *look_at(names), lone_or_not(listen))
    save_words(words, HERE / "towers")

    facts = vars(options) | {"seed": SEED, "words": len(names), "recordings": len(spoken)}
    facts |= measure(words) | {"seconds": round(time.perf_counter() - start)}
    with open(HERE / "words.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
