"""What the frozen towers know before any training: a spoken word finds its picture in closed form.

    python experiments/word_finder.py              # needs espeak-ng and flite

Nothing is learnt by steps. A word is the mean of what the ears say of it in the voices of one
program, whitened by how recordings of one word differ; the questions come from another program.
A word's picture is the mean of its class vectors. The pictures are those of the training split of
`stamps`, by their written nouns: no recording of a person is used.
"""

import argparse
import io
import subprocess
import time

import numpy as np
import soundfile
import soxr
import torch
import torch.nn.functional as F

from speechimg.corpora import load_corpus
from speechimg.towers.lite import LiteImage, class_words, pooled, word_vectors
from speechimg.towers.whisper import WhisperSpeech
from speechimg.towers.words import SHARPNESS, whitening

TAUGHT = ("en-us+m3", "en-gb+f2", "en-us+f5", "en-gb-scotland+m1")  # of espeak-ng
ASKED = ("rms", "awb")  # of flite


def spoken(word, voice):
    "(n,) at 16 kHz: a program says a word with its article; silence around it is cut off."
    text = f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
    command = ["espeak-ng", "-v", voice, "--stdout", text]
    if voice in ASKED:
        command = ["flite", "-voice", voice, "-t", text, "-o", "/dev/stdout"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    wave, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    wave = soxr.resample(wave, rate, 16_000)
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    wave = wave[loud[0] : loud[-1] + 1]
    return torch.from_numpy(0.5 * wave / np.abs(wave).max())


def heard(words, voices, ears):
    "(voices, words, 384): means of frames."
    clips = [spoken(word, voice) for voice in voices for word in words]
    means = [frames.astype(np.float32).mean(0) for frames in ears.many(clips)]
    return torch.tensor(np.stack(means)).unflatten(0, (len(voices), len(words)))


def recall(scores, right):  # (q, n), (q, n) bool
    "R@1, 5, 10 in %: is a right one among the first k?"
    found = right.gather(1, scores.argsort(1, descending=True))
    return " / ".join(f"{100 * found[:, :k].any(1).float().mean():.1f}" for k in (1, 5, 10))


def main():
    parser = argparse.ArgumentParser(description="A spoken word finds its picture, untrained.")
    parser.add_argument("--others", type=int, default=100, help="further words to confuse it with")
    options = parser.parse_args()
    stamps = load_corpus("stamps", "train")
    shown = [one.concepts[0] if one.concepts else "" for one in stamps.pictures]
    nouns = sorted(set(shown) & set(class_words()))
    others = [word for word in class_words() if word not in nouns and word.isalpha()]
    order = np.random.default_rng(0).permutation(len(others))[: options.others]
    words = nouns + [others[place] for place in order]
    ears, eyes, start = WhisperSpeech(), LiteImage(), time.process_time()
    taught = heard(words, TAUGHT, ears)
    asked = heard(nouns, ASKED, ears).flatten(0, 1)  # (q, 384)
    usual, means = taught.mean((0, 1)), taught.mean(0)
    target = torch.arange(len(nouns)).repeat(len(ASKED))
    pictures = [stamps.load_picture(place) for place in range(len(shown))]
    summary = pooled(torch.tensor(np.stack(eyes.many(pictures))).float())
    summary = F.normalize(summary - summary.mean(0), dim=1)  # (n, 1280)
    vectors = torch.stack([F.normalize(word_vectors(word).mean(0), dim=0) for word in words])
    right = torch.tensor([[noun == one for one in shown] for noun in nouns])
    print(f"{len(words)} words, {len(nouns)} asked for, {len(shown)} pictures")
    print("the written word -> picture", recall(vectors[: len(nouns)] @ summary.T, right))
    for name, space in (
        ("plain", torch.eye(384)),
        ("whitened", whitening((taught - means).flatten(0, 1))),
    ):
        centroids = F.normalize((means - usual) @ space, dim=1)  # (w, 384)
        likeness = F.normalize((asked - usual) @ space, dim=1) @ centroids.T  # (q, w)
        itself = torch.eye(len(words), dtype=torch.bool)[target]
        wished = (SHARPNESS * likeness).softmax(1) @ vectors  # (q, 1280)
        print(f"{name}: speech -> word", recall(likeness, itself), end="; ")
        print("speech -> picture", recall(wished @ summary.T, right[target]))
    print(f"{time.process_time() - start:.0f} s of one core")


if __name__ == "__main__":
    main()
