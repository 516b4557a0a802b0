"""Measure a trained model and put it where the project keeps its own.

    python experiments/publish.py runs/reference data/models/reference

Writes config.json, model.safetensors, a model card and metrics.json: what the training said of
itself, and what the model scores on everything that ships. README's tables are read from that file.
"""

import datetime
import shlex
import sys
from pathlib import Path


def any_of_noun(model, corpus, rows) -> dict:
    "Recall of both stages when every picture counts that shows one of the things asked for."
    from dataclasses import replace

    import torch

    from speechimg.retrieval import STAGES, embed, load_features, two_stages

    asked = replace(corpus, captions=[corpus.captions[row] for row in rows])
    stages = two_stages(model, embed(model, load_features(model, asked)), 16)
    shown = [set(picture.concepts) for picture in corpus.pictures]
    nouns = [shown[caption.image] for caption in asked.captions]
    right = torch.tensor([[bool(some & other) for other in shown] for some in nouns])  # (n, m)
    recall = {"queries": len(rows), "pictures": len(shown)}
    for stage, scores in zip(STAGES, stages):
        found = right.gather(1, scores.argsort(dim=1, descending=True, stable=True))
        share = {k: found[:, :k].any(1).float().mean().item() for k in (1, 5, 10)}
        recall[stage] = {str(k): round(100 * value, 3) for k, value in share.items()}
    return recall


def words(model) -> dict:
    "How people and synthetic voices find things by a single noun, bare and within a sentence."
    from speechimg.corpora import load_corpus
    from speechimg.retrieval import evaluate_corpus

    stamps = load_corpus("stamps", "all")
    english = [row for row, one in enumerate(stamps.captions) if one.language == "en"]
    figures = {"stamps_en": evaluate_corpus(model, "stamps", "all", language="en")}
    figures["stamps_en_noun"] = any_of_noun(model, stamps, english)
    for split in ("test", "test_sentences"):
        things = load_corpus("things", split)
        kinds = [things.pictures[one.image].scene.get("kind") for one in things.captions]
        for kind in ("picture", "style"):  # what is new: the drawing, or its style, too
            rows = [row for row, other in enumerate(kinds) if other == kind]
            if rows:
                figures[f"things_{split}_{kind}"] = any_of_noun(model, things, rows)
    print("measured words", flush=True)
    return figures


def measure(model) -> dict:
    "The model's scores on test scenes, in the held-out style, on new voices, on words and people."
    from speechimg.corpora import find, load_corpus, load_probe, splits
    from speechimg.retrieval import evaluate, load_features, load_model, swap_trials

    figures = {}
    for split in ("test", "test_style", "voice"):
        if split in splits(find("scenes")):
            corpus = load_corpus("scenes", split)
            features = load_features(model, corpus)
            probe = swap_trials(load_probe("scenes"), corpus, features) if split == "test" else None
            figures[split] = evaluate(model, features, probe=probe)
            print(f"measured scenes/{split}", flush=True)
    figures |= words(model)
    if model.words:  # what training began with
        figures["untrained"] = words(load_model("untrained"))
    return figures


def publish(run: Path, folder: Path) -> dict:
    "Measure the model of a run, copy it to `folder`, and return what metrics.json now holds."
    from speechimg.core import read_json
    from speechimg.retrieval import load_model

    metrics = read_json(run / "metrics.json")
    recipe = folder / "train.json"
    if recipe.exists():  # the run's own word for it names a file that is not in the project
        words = ["speechimg", "train", "--corpus", metrics["corpus"]]
        words += ["--config", recipe.as_posix(), "--out", run.as_posix()]
        metrics |= {"words": words, "command": shlex.join(words)}
    model = load_model(run)
    model.run = metrics | {
        "name": folder.name,
        "date": datetime.date.today().isoformat(),
        "evaluations": measure(model),
    }
    model.save_pretrained(folder)
    return model.run


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python experiments/publish.py RUN FOLDER")
    from speechimg.core import InputError

    try:
        publish(Path(sys.argv[1]), Path(sys.argv[2]))
    except InputError as problem:
        sys.exit(f"publish: {problem}")
    print(
        f"{sys.argv[2]} holds the model and its metrics; `make notebooks` puts them into the tables"
    )
