"""Make the words that light towers know before any training, and the pictures that nobody took.

    python data/build_words.py    # words.json, words.safetensors, class-patches.safetensors

From the training recordings and drawings of `things` and the classes of ImageNet; closed form, but
for the patches, which are found by two hundred steps. About two minutes, nearly all of them for the
features of ears and eyes, which are cached.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from speechimg.core import cache_dir
from speechimg.corpora import load_corpus
from speechimg.data import FileReader
from speechimg.files.cache import FeatureCache
from speechimg.files.decode import decode_audio, decode_image
from speechimg.towers.lite import LiteImage, class_vectors, imagined_patches, pooled
from speechimg.towers.whisper import WhisperSpeech
from speechimg.towers.words import Words, fit_ears, fit_eyes, save_words

HERE = Path(__file__).resolve().parent
CARRIERS = {"a", "an", "the", "some"}


def is_bare(text, word):
    "Is nothing said but the word, with its article, perhaps in the plural?"
    said = [one for one in text.lower().split() if one not in CARRIERS]
    return len(said) <= len(word.split())


def features_of(split):
    "(corpus, the word of each picture, FileReader) of a split of things."
    corpus = load_corpus("things", split)
    words = [picture.concepts[0] for picture in corpus.pictures]
    return corpus, words, FileReader(corpus, FeatureCache(cache_dir()), 8e9, None)


def bare_recordings(split):
    "[(word, (384,) mean of its frames), ...] of what is said without a sentence around it."
    corpus, words, reader = features_of(split)
    bare = [one for one in corpus.captions if is_bare(one.text, words[one.image])]
    name = "decode_audio 1 max_seconds=20.0"  # the key of the cache that a training uses
    paths = [one.wav for one in bare]
    frames, _ = reader.load(paths, WhisperSpeech(), name, lambda *a: decode_audio(*a, 20.0))
    means = [torch.tensor(np.asarray(one)).float().mean(0) for one in frames]
    return list(zip([words[one.image] for one in bare], means))


def drawings():
    "(words (n,), patches (n, P, 320)) of the training pictures."
    corpus, words, reader = features_of("train")
    paths = [picture.path for picture in corpus.pictures]
    grids, _ = reader.load(paths, LiteImage(), "decode_image 1", decode_image)
    return words, torch.tensor(np.stack([np.asarray(one) for one in grids])).float()


def kinds_of_words():
    "{word: classes of ImageNet} of the split that has no pictures."
    pictures = load_corpus("things", "words").pictures
    return {picture.concepts[0]: sorted(picture.classes) for picture in pictures}


def fit():
    "(Words, the patches that its mean picture was made of)."
    spoken = bare_recordings("train") + bare_recordings("words")
    names = sorted({word for word, _ in spoken})
    places = torch.tensor([names.index(word) for word, _ in spoken])
    shown, patches = drawings()
    with torch.no_grad():
        summaries = torch.cat([pooled(some) for some in patches.split(64)])  # (n, 1280)
    plain, kinds = summaries.mean(0), kinds_of_words()
    drawn = [summaries[[word == name for word in shown]] for name in names]
    ears = fit_ears(torch.stack([mean for _, mean in spoken]), places, len(names))
    basis, pictured = fit_eyes([kinds.get(name, []) for name in names], drawn, plain)
    print(f"{len(names):,} words from {len(spoken):,} recordings")
    return Words(names, *ears, plain, basis, pictured), patches.flatten(0, 1)


def main():
    words, patches = fit()
    save_words(words, HERE / "towers")
    usual, spread = patches.mean(0), patches.std(0)
    imagined = imagined_patches(class_vectors(), words.plain, usual, spread)
    summaries = F.normalize(pooled(imagined[:, None]) - words.plain, dim=1)
    nearest = (summaries @ class_vectors().T).argmax(1) == torch.arange(1000)
    save_file({"patches": imagined.half()}, HERE / "towers" / "class-patches.safetensors")
    print(f"{100 * nearest.float().mean():.1f} % of the imagined pictures lie nearest their class")


if __name__ == "__main__":
    main()
