"""`make demo`: what the trained model can do, and how a small one learns.

Writes runs/demo/answers.html.

python tools/demo.py [--seconds 60]   # how long the small model trains
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("runs", "demo")
RECORDINGS = 1500  # how many the small model trains on: reading them is part of the wait, once
# in one minute only the coarse stage has a chance, on keys of its own
SMALL = json.loads((ROOT / "tools" / "demo.json").read_text(encoding="utf-8"))

STARTED = time.monotonic()
COLOURED = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def paint(text: str, code: str) -> str:
    "Text in a colour of the terminal, where there is one."
    return f"\033[{code}m{text}\033[0m" if COLOURED else text


def heading(number: int, text: str, explanation: str) -> None:
    "The start of a part of the demo."
    print(f"\n{paint(f'{number}  {text}', '1;36')}\n   {paint(explanation, '2')}\n", flush=True)


def bar(percent: float, width: int = 30) -> str:
    "A percentage as a row of blocks, to an eighth of a block."
    eighths = round(8 * width * max(0.0, min(100.0, percent)) / 100)
    blocks = "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")
    return paint(blocks.ljust(width), "32") if COLOURED else blocks.ljust(width)


def recall_lines(stages: dict, direction: str | None = None) -> None:
    "One line per stage: R@1, R@5 and R@10 in percent, and R@1 as a bar."
    for stage in ("coarse", "fine"):
        recall = stages[stage][direction] if direction else stages[stage]
        figures = "".join(f"{recall[k]:8.1f}" for k in ("1", "5", "10"))
        print(f"   {stage:<22}{figures}   {bar(recall['1'])}")


def columns(title: str) -> None:
    print(f"   {paint(f'{title:<22}', '1')}{'R@1':>8}{'R@5':>8}{'R@10':>8}")


def evaluate_reference(model) -> None:
    "Part 1: the test scenes."
    from speechimg.corpora import load_corpus, load_probe
    from speechimg.retrieval import evaluate, load_features, swap_trials

    corpus = load_corpus("scenes", "test")
    features = load_features(model, corpus)
    result = evaluate(model, features, probe=swap_trials(load_probe("scenes"), corpus, features))
    for direction, title in (
        ("speech_to_image", "speech to picture"),
        ("image_to_speech", "picture to speech"),
    ):
        columns(title)
        recall_lines({stage: result[stage] for stage in ("coarse", "fine")}, direction)
    if result["swap"]:
        asked = "which of two pictures that differ only in who is where? chance is 50"
        print(f"   {paint('swap probe', '1')}  ({asked})")
        for stage, value in result["swap"].items():
            print(f"   {stage:<22}{value:8.1f}{'':16}   {bar(value)}")
    counted = f"{len(features):,} recordings, {len(features.image):,} pictures"
    print(f"   {counted}, {result['pairs']:,} pairs read together, {result['seconds']:.0f} s")


def evaluate_people(model) -> None:
    "Part 2: human voices, and pictures of another kind."
    from speechimg.retrieval import evaluate_corpus

    result = evaluate_corpus(model, "stamps", "all", language="en")
    for part, title in (("nouns", "things it was taught"), ("all", "all things")):
        if result[part]:
            columns(title)
            recall_lines(result[part])
            print(f"   {result[part]['queries']} recordings, {result['pictures']} pictures")


def human_queries(stamps, count: int = 6) -> list[int]:
    "English recordings, drawn by the lot that README shows, too."
    import torch

    english = [row for row, caption in enumerate(stamps.captions) if caption.language == "en"]
    order = torch.randperm(len(english), generator=torch.Generator().manual_seed(0))
    return [english[place] for place in order[:count].tolist()]


def place_of(hits, path: str, stage: str = "rank") -> int:
    "Where a picture came."
    return next(getattr(hit, stage) for hit in hits if hit.path == path)


def answer_people(model) -> Path:
    "Part 3: six recordings, the first pictures for each, and a page to look at and listen to."
    from speechimg.corpora import load_corpus
    from speechimg.look.page import Answer, write_page
    from speechimg.retrieval import load_model, open_gallery, search

    stamps, plain, answers = load_corpus("stamps", "all"), load_model("untrained"), []
    gallery, plainly = open_gallery(model, "stamps"), open_gallery(plain, "stamps")
    every = len(gallery[0].pictures)
    print(f"   place of its picture among {every}:    no training   coarse   fine")
    for row in human_queries(stamps):
        caption, wave = stamps.captions[row], stamps.load_wave(row)
        path = stamps.pictures[caption.image].path
        hits = search(model, wave, gallery, top=every)
        before = place_of(search(plain, wave, plainly, top=every), path)
        places = f"{before:14}{place_of(hits, path, 'before'):9}{place_of(hits, path):7}"
        print(f"   {paint(f'“{caption.text}”'.ljust(34), '1')}{places}")
        concepts = [gallery[0].pictures[hit.picture].concepts for hit in hits[:3]]
        print(f"      it heard: {model.told(wave)}")
        print(f"      it answers: {' | '.join(', '.join(one) or '?' for one in concepts)}")
        answers.append(Answer(f"“{caption.text}”", wave, gallery[0], hits[:10]))
    page = OUT / "answers.html"
    write_page(page, answers, "Six people, and the pictures found")
    print(f"\n   {paint('Open this page to see and hear it:', '1')}  {page}")
    print(f"   {paint(page.resolve().as_uri(), '4;34')}")
    return page


def prepare() -> None:
    "Compute what parts 2 to 4 want from the cache: the other core does this during part 1."
    import torch

    from speechimg.core import Config
    from speechimg.corpora import load_corpus
    from speechimg.model import SpeechImageModel
    from speechimg.retrieval import load_features, load_model, open_gallery
    from speechimg.train import some_of

    torch.set_num_threads(1)
    reference, stamps = load_model("reference"), load_corpus("stamps", "all")
    load_features(
        reference,
        stamps.subset(
            [row for row, caption in enumerate(stamps.captions) if caption.language == "en"]
        ),
    )
    open_gallery(reference, "stamps")
    small = SpeechImageModel(Config(**SMALL))
    for split in ("val", "train"):
        load_features(small, some_of(load_corpus("scenes", split), RECORDINGS, small.config.seed))


class TimeIsUp(Exception):
    "The small model has trained for as long as it may."


def train_small(seconds: float) -> None:
    "Part 4: a model from nothing, on part of the scenes, until the time is up."
    from speechimg.core import Config
    from speechimg.corpora import load_corpus
    from speechimg.train import train

    pictures = len(load_corpus("scenes", "val").pictures)
    shutil.rmtree(OUT / "small", ignore_errors=True)
    asked = f"speech to picture, coarse, among {pictures} pictures it does not train on"
    print(f"   {paint('step seconds', '1')}{'R@1':>8}{'R@5':>8}{'R@10':>8}   {asked}")
    chance = [100 * min(1, k / pictures) for k in (1, 5, 10)]
    figures = "".join(f"{percent:8.1f}" for percent in chance)
    print(f"   {'chance':<12}{figures}   {bar(chance[-1])}", flush=True)
    begin = None

    def watch(row: dict) -> None:
        nonlocal begin
        begin = begin or time.monotonic()  # features are there by now: only training counts
        spent = time.monotonic() - begin
        if "coarse_r1" in row:
            figures = "".join(f"{row[f'coarse_r{k}']:8.1f}" for k in (1, 5, 10))
            print(f"   {row['step']:4}{spent:8.0f}{figures}   {bar(row['coarse_r10'])}", flush=True)
            if spent > seconds:
                raise TimeIsUp

    try:
        options = {"limit": RECORDINGS, "on_step": watch, "progress": False}
        train(Config(**SMALL), "scenes", OUT / "small", **options)
    except TimeIsUp:
        pass
    finally:
        shutil.rmtree(OUT / "small", ignore_errors=True)
    print("   (the bar is R@10; `make reference` trains the full model,")
    print("   `make small` one without any pretrained part)")


PARTS = [  # title, explanation
    (
        "Scenes nobody has shown it",
        "synthetic voices and combinations of things that training did not hold",
    ),
    (
        "People nobody has let it hear",
        "human recordings of the stamps in a drawing program, whose pictures it never saw either",
    ),
    ("Six of those recordings, answered", "drawn by lot, among all stamps"),
    (
        "A small model, from nothing",
        "frozen ears and eyes; all that reads them starts from random numbers",
    ),
]


def show(seconds: float, ahead: subprocess.Popen, cores: int) -> None:
    "The four parts; the last one waits for what the other core prepared."
    from speechimg.retrieval import load_model

    model = load_model("reference")
    parts = (evaluate_reference, evaluate_people, answer_people)
    for number, (part, (title, explanation)) in enumerate(zip(parts, PARTS), 1):
        heading(number, title, explanation)
        part(model)
    heading(4, f"{PARTS[3][0]}, in {seconds:.0f} seconds", PARTS[3][1])
    if ahead.poll() is None:
        print("   reading its recordings and pictures, once ...\n", flush=True)
    ahead.wait()
    torch_threads(cores)
    train_small(seconds)


def torch_threads(count: int | None = None) -> int:
    "How many threads torch uses; with a count, that many from now on."
    import torch

    if count:
        torch.set_num_threads(count)
    return torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="See what the trained model can do, and watch a small one learn."
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long the small model trains")
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.chdir(ROOT)
    warnings.simplefilter("ignore")
    from speechimg.core import InputError

    if options.prepare:
        return prepare()
    OUT.mkdir(parents=True, exist_ok=True)
    cores = torch_threads()
    torch_threads(max(1, cores // 2))  # the other half is for prepare()
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    ahead = subprocess.Popen([sys.executable, __file__, "--prepare"], **silent)
    try:
        show(options.seconds, ahead, cores)
    except InputError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("\ndemo: stopped")
    finally:
        ahead.terminate()  # nothing is lost: what it had finished is in the cache
        ahead.wait()
    print(f"\n{paint('Done', '1;32')} in {time.monotonic() - STARTED:.0f} s. Next:")
    print(f"{paint('make lab', '1')} opens the notebooks, {paint('make test', '1')} proves it all.")


if __name__ == "__main__":
    main()
