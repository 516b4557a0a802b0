"""Measure a trained model and put it where the project keeps its own.

    python experiments/publish.py runs/reference data/models/reference

Writes config.json, model.safetensors, a model card and metrics.json: what the training said of
itself, and what the model scores on everything that ships. README's tables are read from that file.
"""

import datetime
import shlex
import sys
from pathlib import Path


def measure(model) -> dict:
    "The model's scores on test scenes, in the held-out style, on new voices, and on people."
    from speechimg.corpora import find, load_corpus, load_probe, splits
    from speechimg.retrieval import evaluate, evaluate_corpus, load_features, swap_trials

    figures = {}
    for split in ("test", "test_style", "voice"):
        if split in splits(find("scenes")):
            corpus = load_corpus("scenes", split)
            features = load_features(model, corpus)
            probe = swap_trials(load_probe("scenes"), corpus, features) if split == "test" else None
            figures[split] = evaluate(model, features, probe=probe)
            print(f"measured scenes/{split}", flush=True)
    figures["stamps_en"] = evaluate_corpus(model, "stamps", "all", language="en")
    print("measured stamps", flush=True)
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
