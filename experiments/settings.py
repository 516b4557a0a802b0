"""What helped the coarse stage learn, measured: the same short training, one thing changed at a
time.

    python experiments/settings.py [NAME ...]    # appends what is not in data/experiments.jsonl

Each run is `speechimg train --corpus scenes` with the reference's settings, cut to 600 steps
with matching left out (it starts later) and siblings from step 300 on; then one change. The
figures are of the validation split: coarse R@1, R@5 and R@10, speech to picture, and the swap
probe.
"""

import json
import shutil
import sys
from pathlib import Path

STEPS = 600
RUNS = {
    "reference settings": {},
    "siblings from the first step": {"siblings_start_step": 0},
    "no siblings drawn together": {"siblings": 0.0},
    "teacher and queue from the first steps": {"student_steps": 0, "queue_warmup_steps": 300},
    "single things only, for 200 steps": {"singles_first": 200},
    "no augmentation": {"augment": False},
}


def run(name: str, change: dict, out: Path) -> dict:
    "Train once and return the line for the file."
    from speechimg.core import Config, read_json
    from speechimg.train import train

    settings = read_json(Path("data/models/reference/train.json")) | {
        "steps": STEPS,
        "student_steps": STEPS,
        "queue_warmup_steps": STEPS,
        "sim_start_step": STEPS,
        "siblings_start_step": STEPS // 2,
        "evaluate_every": STEPS,
        "checkpoint_every": STEPS,
    }
    settings |= change
    shutil.rmtree(out, ignore_errors=True)
    metrics = read_json(
        train(Config.from_dict(settings), "scenes", out, progress=False) / "metrics.json"
    )
    shutil.rmtree(out)
    coarse = metrics["validation"]["coarse"]["speech_to_image"]
    figures = {f"coarse_r{k}": round(coarse[k], 1) for k in ("1", "5", "10")} | {
        "swap_coarse": round(metrics["validation"]["swap"]["coarse"], 1)
    }
    return {
        "name": name,
        "change": change,
        "seed": metrics["seed"],
        "steps": STEPS,
        "seconds": round(metrics["seconds"]),
        **figures,
    }


def main(names: list[str]) -> None:
    path = Path("data/experiments.jsonl")
    known = (
        {json.loads(line)["name"] for line in path.read_text().splitlines()}
        if path.exists()
        else set()
    )
    for name in names or RUNS:
        if name in known:
            continue
        line = run(
            name, RUNS[name], Path("runs", "experiment-" + name.replace(" ", "-").replace(",", ""))
        )
        print(line, flush=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
