"""The paper's questions at our scale: every run behind nbs/14_results.ipynb, one JSON line each in
data/results.jsonl.

    python experiments/results.py                  # all that is missing: hours
    python experiments/results.py ablation noise     # only these experiments
    python experiments/results.py --list             # what there is, and what is done

A run that was stopped goes on from its checkpoint. A line that is there is not measured again;
to measure it anew, delete it. A line holds the experiment, the row, the seed, the settings that
differ from the defaults, the commit, seconds, and the figures.

Every model is trained in two stages, of 500 and 800 steps. Stage 1 is the same for all rows of a
seed: contrastive learning within the batch. Stage 2 begins with its weights, an empty queue and
a fresh schedule, and is what the rows differ in. All rows see the same data in the same order
for the same number of steps, at the same rates; nothing was tuned for any of them. Siblings are
not put into the same batch, as nobody could for a corpus of photographs; the experiment of that
name shows what it would change. The test split is looked at once, at the end of each run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS, RUNS = ROOT / "data" / "results.jsonl", ROOT / "runs" / "results"
SEEDS, FIRST, SECOND = (0, 1, 2), 500, 800  # steps of the two stages
COMMON = {
    "towers": "light",
    "precision": "bfloat16",
    "batch_size": 64,
    "siblings": 0.0,
    "score_mode": "logits",
    "checkpoint_every": 100,
}
ALONE = COMMON | {
    "sim_weight": 0.0,
    "alpha": 0.0,
    "queue_size": 64,
}  # contrastive learning within the batch, the student's own keys
STAGE_1 = (
    ALONE
    | {"learning_rate": 1.5e-3}
    | {name: FIRST for name in ("steps", "evaluate_every", "student_steps", "queue_warmup_steps")}
)
STAGE_2 = COMMON | {
    "learning_rate": 1e-3,
    "steps": SECOND,
    "evaluate_every": SECOND,
    "student_steps": 0,
    "queue_warmup_steps": 0,
    "alpha_ramp_steps": 188,
    "queue_size": 1024,
}
COARSE = {"sim_weight": 0.0, "alpha": 0.0}
ROWS = {  # the ablation: what stage 2 is made of
    "in-batch": STAGE_2 | ALONE | {"student_steps": SECOND, "queue_warmup_steps": SECOND},
    "+ queue": STAGE_2 | COARSE,
    "+ matching, random negatives": STAGE_2 | {"alpha": 0.0, "negative_sampling": "random"},
    "+ matching, hard negatives of the batch": STAGE_2 | {"alpha": 0.0},
    "+ matching, hard negatives of the queue": STAGE_2
    | {"alpha": 0.0, "negatives": "queue", "token_slots": 1024},
    "+ distillation (everything)": STAGE_2,
}
HARD, EVERYTHING = list(ROWS)[3], list(ROWS)[5]
HEARD, UNHEARD = (
    ("ca", "fr", "bg", "ru", "ro", "es"),
    ("be", "el", "da", "nl", "en"),
)  # languages of `stamps`, for training and not
SNAPSHOTS = (100, 200, 400, 800)  # steps after which the mined negatives are looked at


@dataclass
class Run:
    "One training and what is measured after it."

    experiment: str
    row: str
    seed: int
    config: dict = field(default_factory=dict)
    start: str | None = None  # the run whose model it begins with
    noise: int = 0  # percent of the training captions that are moved to a wrong picture
    measures: tuple = ("test",)  # functions below

    @property
    def name(self) -> str:
        return f"{self.experiment}/{self.row}/{self.seed}"

    @property
    def folder(self) -> Path:
        return RUNS / "".join(letter if letter.isalnum() else "-" for letter in self.name)


def plan() -> list[Run]:
    "All runs, those that others begin with first."
    runs = []

    def add(*arguments, **options):
        runs.append(Run(*arguments, **options))
        return runs[-1].name

    first = {}
    for seed in SEEDS:
        first[seed] = add("stage 1", "0 % noise", seed, STAGE_1 | {"seed": seed})
        for row, settings in ROWS.items():
            measures = ("test", "zero_shot") if row in ("in-batch", EVERYTHING) else ("test",)
            add(
                "ablation",
                row,
                seed,
                settings | {"seed": seed},
                first[seed],
                measures=measures + (("mined",) if (row, seed) == (HARD, 0) else ()),
            )
    for seed in SEEDS:
        add("languages", "six languages", seed, STAGE_1 | {"seed": seed}, measures=("languages",))
    add("depth", "everything", 0, measures=("depth",), start=f"ablation/{EVERYTHING}/0")
    # distillation softens the contrastive targets, so it is tested by the contrastive loss alone
    for seed in SEEDS:
        for noise in (0, 20, 40):
            start = (
                add(
                    "stage 1",
                    f"{noise} % noise",
                    seed,
                    STAGE_1 | {"seed": seed},
                    noise=noise,
                    measures=(),
                )
                if noise
                else first[seed]
            )
            for row, alpha in (("without", {"alpha": 0.0}), ("with", {})):
                if (
                    noise or row == "with"
                ):  # without noise and without distillation: the row "+ queue"
                    add(
                        "noise",
                        f"{noise} %, {row} distillation",
                        seed,
                        STAGE_2 | {"sim_weight": 0.0, "seed": seed} | alpha,
                        start,
                        noise,
                    )
    # what would make mined negatives hard: siblings, which share nouns with the anchor, in each
    # batch
    for seed in SEEDS:
        for row, settings in {
            "random negatives": {"negative_sampling": "random"},
            "hard negatives": {},
        }.items():
            add(
                "siblings",
                row,
                seed,
                STAGE_2 | {"alpha": 0.0, "siblings": 1.0, "seed": seed} | settings,
                first[seed],
            )
    for seed in SEEDS:
        for size in (64, 12_000):
            add(
                "queue size",
                str(size),
                seed,
                STAGE_2 | COARSE | {"queue_size": size, "seed": seed},
                first[seed],
            )
        for momentum in (0.0, 0.999):
            add(
                "momentum",
                str(momentum),
                seed,
                STAGE_2 | COARSE | {"momentum": momentum, "seed": seed},
                first[seed],
            )
        for heat in (0.02, 0.2):
            fixed = {"temperature": heat, "temperature_min": heat, "temperature_max": heat}
            add(
                "temperature",
                f"fixed at {heat}",
                seed,
                STAGE_2 | COARSE | fixed | {"seed": seed},
                first[seed],
            )
        from_queue = ROWS["+ matching, hard negatives of the queue"] | {
            "negative_sampling": "random",
            "seed": seed,
        }
        add(
            "queue negatives", "random", seed, from_queue, first[seed]
        )  # is it the queue, or how hard its negatives are?
        add(
            "negatives",
            "2",
            seed,
            STAGE_2 | {"alpha": 0.0, "negatives_per_anchor": 2, "seed": seed},
            first[seed],
        )
    return runs


# What a model is trained on


def moved(corpus, percent: int, seed: int):
    """The corpus with so many of its captions moved to a picture of another meaning: their labels
    are wrong, and nobody is told."""
    from dataclasses import replace

    import torch

    from speechimg.corpora import Corpus
    from speechimg.train import generator_for

    generator, captions = generator_for(seed, 7, percent), list(corpus.captions)
    chosen = torch.randperm(len(captions), generator=generator)[
        : round(len(captions) * percent / 100)
    ].tolist()
    meaning = [corpus.pictures[caption.image].id for caption in captions]
    for row in chosen:
        other = row
        while meaning[other] == meaning[row]:
            other = int(torch.randint(len(captions), (), generator=generator))
        captions[row] = replace(captions[row], image=corpus.captions[other].image)
    return Corpus(
        corpus.name, corpus.split, corpus.pictures, captions, corpus.store, corpus.skipped
    )


def corpus_of(run: Run):
    """A function split -> Corpus for training: scenes, with noise in the labels or without, or six
    languages of stamps."""
    from speechimg.corpora import load_corpus

    def scenes(split):
        corpus = load_corpus("scenes", split)
        return moved(corpus, run.noise, run.seed) if split == "train" and run.noise else corpus

    def stamps(split):
        return only(load_corpus("stamps", split), lambda caption: caption.language in HEARD)

    return stamps if run.experiment == "languages" else scenes


def only(corpus, wanted):
    "The captions for which wanted(caption) holds, and their pictures."
    return corpus.subset([row for row, caption in enumerate(corpus.captions) if wanted(caption)])


# What is measured


def recalls(model, features, k: int = 16, probe=None) -> dict:
    """Recall of the coarse ranking, and of the fine one by matching alone and by both stages
    together; one fusion of each pair serves both."""
    import torch

    from speechimg.retrieval import embed, pair_scorer, percent, rerank, swap_accuracy

    embeddings, found = embed(model, features), {}
    coarse, temperature = embeddings.speech @ embeddings.image.T, model.temperature.item()
    for direction in ("speech_to_image", "image_to_speech"):
        scores = coarse if direction == "speech_to_image" else coarse.T
        score, table = (
            pair_scorer(model, embeddings, direction),
            torch.full(scores.shape, torch.nan),
        )

        def once(query, candidate):
            new = table[query, candidate].isnan()
            if new.any():
                table[query[new], candidate[new]] = score(query[new], candidate[new])
            return table[query, candidate]

        ranked = {"coarse": scores}
        if model.config.sim_weight:
            ranked |= {
                "sim": rerank(scores, once, k, "sim"),
                "fine": rerank(scores / temperature, once, k, "sum"),
            }
        for stage, one in ranked.items():
            found.setdefault(stage, {})[direction] = percent(
                one if direction == "speech_to_image" else one.T, embeddings.image_of, direction
            )
    if probe is not None:
        found["swap"] = swap_accuracy(model, embeddings, probe)
        if not model.config.sim_weight:
            found["swap"].pop("fine")
    return found


def test(model, run: Run) -> dict:
    "The test split of scenes, with the swap probe."
    from speechimg.corpora import load_corpus, load_probe
    from speechimg.retrieval import load_features, swap_trials

    corpus = load_corpus("scenes", "test")
    features = load_features(model, corpus)
    return recalls(model, features, probe=swap_trials(load_probe("scenes"), corpus, features))


def zero_shot(model, run: Run) -> dict:
    "What is new, one thing at a time: 200 pictures of pairs with two captions each, and people."
    from speechimg.corpora import load_corpus
    from speechimg.retrieval import evaluate_corpus, load_features

    voice = load_corpus("scenes", "voice")
    pictures, found = {picture.path for picture in voice.pictures}, {}
    for name, split in (
        ("nothing new", "train"),
        ("voices", "voice"),
        ("compositions", "val"),
        ("voices and compositions", "test"),
        ("voices, compositions and style", "test_style"),
    ):
        corpus, counts = load_corpus("scenes", split), {}
        for row, caption in enumerate(corpus.captions):
            picture = corpus.pictures[caption.image]
            if picture.scene["kind"] == "pair" and (split != "train" or picture.path in pictures):
                counts.setdefault(caption.image, []).append(row)
        chosen = [row for rows in list(counts.values())[:200] for row in rows[:2]]
        features = load_features(model, corpus.subset(chosen))
        found[name] = {"queries": len(features), "pictures": len(features.image)} | recalls(
            model, features
        )
    people = evaluate_corpus(model, "stamps", "all", "en")
    return found | {"people, stamps": people}


def languages(model, run: Run) -> dict:
    """Recall per language and kind of picture, and from one language's recording to another's of
    the same picture."""
    import torch

    from speechimg.corpora import load_corpus
    from speechimg.retrieval import embed, load_features, percent

    found, vectors = {}, {}
    for split in ("train", "test"):
        corpus = load_corpus("stamps", split)
        features = load_features(model, corpus)
        embeddings = embed(model, features)
        spoken = [corpus.captions[row].language for row in features.captions]
        for language in HEARD + UNHEARD:
            rows = torch.tensor([language == one for one in spoken])
            own = features.image_of[rows]
            found[f"{language}, {split}"] = {
                "queries": len(own),
                "pictures": len(embeddings.image),
            } | percent(embeddings.speech[rows] @ embeddings.image.T, own)
            if split == "test":
                vectors[language] = {
                    int(image): vector for image, vector in zip(own, embeddings.speech[rows])
                }
    return found | {"between": between(vectors)}


def between(vectors: dict) -> dict:
    """{language: {language: R@10 in percent}}: which recordings of the second are nearest to one of
    the first, among up to 60 shared pictures."""
    import torch

    from speechimg.retrieval import recall_at_k

    found = {}
    for one in vectors:
        for other in vectors:
            shared = sorted(vectors[one].keys() & vectors[other].keys())[:60]
            if one == other or len(shared) < 30:
                continue
            scores = (
                torch.stack([vectors[one][image] for image in shared])
                @ torch.stack([vectors[other][image] for image in shared]).T
            )
            recall = recall_at_k(scores, torch.arange(len(shared)))["speech_to_image"]
            found.setdefault(one, {})[other] = {"pictures": len(shared)} | {
                str(k): round(value, 2) for k, value in recall.items()
            }
    return found


def mined(model, run: Run) -> dict:
    """Whom the first stage takes for the right picture: for 64 recordings of val, at several
    moments of the training."""
    import safetensors.torch
    import torch

    from speechimg.corpora import load_corpus
    from speechimg.mining import negative_probabilities
    from speechimg.retrieval import embed, load_features
    from speechimg.sic import similarity_logits

    corpus, found = load_corpus("scenes", "val"), {}
    firsts = list(
        {caption.image: row for row, caption in reversed(list(enumerate(corpus.captions)))}.values()
    )
    chosen = corpus.subset(sorted(firsts)[::4][:64])
    features, pictures = load_features(model, chosen), chosen.pictures
    scene = [pictures[int(index)].scene for index in features.image_of]
    for step in (0, *SNAPSHOTS):
        weights = safetensors.torch.load_file(run.folder / f"snapshot-{step}.safetensors")
        model.load_state_dict(weights)
        embeddings = embed(model, features)
        image = embeddings.image[features.image_of]
        probability = negative_probabilities(
            similarity_logits(embeddings.speech, image, model.temperature.detach()), features.ids
        )
        share = {
            "a noun": lambda a, b: bool(set(a["nouns"]) & set(b["nouns"])),
            "both nouns": lambda a, b: set(a["nouns"]) == set(b["nouns"]),
            "the background": lambda a, b: a["background"] == b["background"],
            "the drawing style": lambda a, b: a["style"] == b["style"],
        }
        same = {
            what: torch.tensor([[rule(one, other) for other in scene] for one in scene])
            for what, rule in share.items()
        }
        other = ~torch.eye(len(scene), dtype=torch.bool)
        found[str(step)] = {
            "shares": {
                what: [
                    round(100 * float((probability * there).sum(1).mean()), 2),
                    round(100 * float(there[other].float().mean()), 2),
                ]
                for what, there in same.items()
            },
            "likeliest": [likeliest(features, pictures, probability, row) for row in LOOKED_AT],
            "top probability": round(float(probability.max(1).values.mean()), 4),
        }
    return found


LOOKED_AT = range(0, 64, 8)


def likeliest(features, pictures, probability, row) -> dict:
    "What the first stage takes for the right picture of one recording."
    best = int(probability[row].argmax())
    return {
        "uttid": features.uttids[row],
        "probability": round(float(probability[row].max()), 3),
        "picture": pictures[int(features.image_of[best])].path,
        "uttid of it": features.uttids[best],
    }


def depth(model, run: Run) -> dict:
    """Recall and seconds against k, the number of candidates that are re-ranked, speech to picture
    on test."""
    from speechimg.corpora import load_corpus
    from speechimg.retrieval import embed, load_features, pair_scorer, percent, rerank

    features = load_features(model, load_corpus("scenes", "test"))
    embeddings, found = embed(model, features), {}
    coarse, queries = (
        embeddings.speech @ embeddings.image.T,
        slice(0, None, 5),
    )  # one caption of each picture
    coarse, own = coarse[queries], embeddings.image_of[queries]
    part = embeddings._replace(
        speech=embeddings.speech[queries],
        speech_tokens=embeddings.speech_tokens[queries],
        image_of=own,
    )
    for k in (1, 2, 4, 8, 16, 32, 64, 128):
        start = time.perf_counter()
        fine = rerank(coarse / model.temperature.item(), pair_scorer(model, part), k, "sum")
        seconds, hit = (
            time.perf_counter() - start,
            (coarse.argsort(1, descending=True)[:, :k] == own[:, None]).any(1),
        )
        sim = rerank(coarse, pair_scorer(model, part), k, "sim")
        found[str(k)] = {
            "seconds": round(seconds, 3),
            "queries": len(own),
            "ceiling": round(100 * float(hit.float().mean()), 2),
        } | {"fine": percent(fine, own), "sim": percent(sim, own)}
    return found


# Running


def finished() -> dict[str, dict]:
    "{name of a run: its line}."
    lines = (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )
    return {f"{line['experiment']}/{line['row']}/{line['seed']}": line for line in lines}


def carry_out(run: Run) -> None:
    "Train, measure, and leave line.json in the run's folder. Goes on where it was stopped."
    import torch

    from speechimg.core import Config, read_json, write_json
    from speechimg.retrieval import load_model
    from speechimg.train import train

    torch.set_num_threads(1)
    begin, by_name = time.perf_counter(), {other.name: other for other in plan()}
    start = by_name[run.start].folder if run.start else None
    run.folder.mkdir(parents=True, exist_ok=True)
    if "mined" in run.measures:
        shutil.copy(start / "model.safetensors", run.folder / "snapshot-0.safetensors")

    def snapshot(row):
        if "mined" in run.measures and row["step"] in SNAPSHOTS:
            import safetensors.torch

            weights = safetensors.torch.load_file(
                run.folder / f"checkpoint-{row['step']}" / "model.safetensors"
            )
            safetensors.torch.save_file(
                {name.removeprefix("model."): one for name, one in weights.items()},
                run.folder / f"snapshot-{row['step']}.safetensors",
            )

    if run.config:
        if not (run.folder / "metrics.json").exists():
            train(
                Config.from_dict(run.config),
                corpus_of(run),
                run.folder,
                resume=True,
                start=start,
                on_step=snapshot,
                progress=False,
            )
        metrics, model = read_json(run.folder / "metrics.json"), load_model(run.folder)
    else:  # nothing to train
        metrics, model = {"seconds": 0.0, "steps": 0, "validation": None}, load_model(start)
    figures = {}
    for name in run.measures:
        figures |= {name: globals()[name](model, run)}
    defaults = {item.name: item.default for item in fields(Config)}
    line = {
        "experiment": run.experiment,
        "row": run.row,
        "seed": run.seed,
        "start": run.start,
        "noise": run.noise,
        "config": {name: value for name, value in run.config.items() if value != defaults[name]},
        "commit": commit(),
        "steps": metrics["steps"],
        "training_seconds": round(metrics["seconds"], 1),
        "seconds": round(time.perf_counter() - begin, 1),
        "torch": torch.__version__,
        "threads": 1,
        "temperature": round(model.temperature.item(), 4),
        "validation": metrics["validation"],
        "figures": figures,
    }
    write_json(run.folder / "line.json", line)


def commit() -> str:
    "The commit of the working tree, with a + where something differs from it."

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (
        "+" if git("status", "--porcelain", "--", "speechimg", "experiments/results.py") else ""
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Run the experiments of nbs/14_results.ipynb that are missing."
    )
    parser.add_argument(
        "experiments",
        nargs="*",
        help="only these, by name; --list says what there is",
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help="start no run after so many minutes")
    options = parser.parse_args()
    from speechimg.core import atomic_write

    runs = plan()
    if options.one:
        carry_out(next(run for run in runs if run.name == options.one))
        return 0
    done, working, begin = finished(), {}, time.monotonic()
    if options.list:
        for run in runs:
            print(f"{'done' if run.name in done else '    '}  {run.name}")
        return 0
    wanted = {
        run.name for run in runs if not options.experiments or run.experiment in options.experiments
    }
    by_name = {run.name: run for run in runs}
    for name in list(wanted):
        while by_name[name].start:
            name = by_name[name].start
            wanted.add(name)
    waiting, failed = [run for run in runs if run.name in wanted and run.name not in done], 0

    def ready(run):
        return (
            run.start is None
            or (by_name[run.start].folder / "model.safetensors").exists()
            and run.start not in working
        )

    for run in runs:  # a model that somebody needs and that was cleaned away
        if (
            run.name in done
            and run.config
            and not (run.folder / "model.safetensors").exists()
            and any(other.start == run.name for other in waiting)
        ):
            waiting.insert(0, run)
    while waiting or working:
        while len(working) < options.jobs and not (
            options.until and time.monotonic() - begin > 60 * options.until
        ):
            run = next((run for run in waiting if ready(run)), None)
            if run is None:
                break
            waiting.remove(run)
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            log = (
                (RUNS / "log.txt").open("a")
                if RUNS.exists() or not RUNS.mkdir(parents=True)
                else None
            )
            working[run.name] = subprocess.Popen(
                [sys.executable, __file__, "--one", run.name],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )
        if not working:
            break
        time.sleep(1)
        for name, process in list(working.items()):
            if process.poll() is None:
                continue
            del working[name]
            if process.returncode:
                failed += 1
                print(f"failed  {name}: see {(RUNS / 'log.txt').relative_to(ROOT)}", flush=True)
                continue
            line = json.loads((by_name[name].folder / "line.json").read_text())
            for checkpoint in by_name[name].folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            if name not in finished():
                with RESULTS.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            print(f"done    {name}  {line['seconds']:.0f} s", flush=True)
    lines = finished()
    with atomic_write(RESULTS, "w") as file:  # in the order of the plan
        own = [
            name for name in lines if name not in by_name
        ]  # what somebody added stays, at the end
        file.writelines(
            json.dumps(lines[name]) + "\n"
            for name in [*(run.name for run in runs if run.name in lines), *own]
        )
    print(f"{len(lines)} of {len(runs)} runs are in {RESULTS.relative_to(ROOT)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
