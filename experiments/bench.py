"""Speed, in figures: the training step, its loader, re-ranking, search, growth with size, start-up.
Mostly ratios of two things measured in turn.

    python experiments/bench.py               # all parts, to data/bench.json and bench.md
    python experiments/bench.py step rerank   # some of them; the others stay as they are
    python experiments/bench.py --quick       # tiny sizes, to see that it works

Each part runs in a process of its own, on one thread; medians over repeats. "Before" is the same
measurement of the code of commit BEFORE, in the same run, where the clone holds that commit;
else what the report said last. Features that the cache lacks are computed first: minutes more.
"""

import argparse
import io
import json
import math
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

ROOT, SEED, BEFORE = Path(__file__).resolve().parent.parent, 0, "b00b428"
SETS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "bf16",
)  # instructions that decide how fast products are
LINEAR = 1.1  # exponent that still counts as linear: 1, and what the clock adds
TINY = {
    "words": 0,
    "width": 16,
    "dim": 16,
    "heads": 2,
    "batch_size": 8,
    "queue_size": 64,
    "speech_depth": 1,
    "image_depth": 1,
}


def seconds(work):
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def in_turn(repeats, *works):
    "Median seconds of each; what disturbs the machine disturbs all of them."
    for work in works:
        work()  # the first call also reserves memory
    times = [[seconds(work) for work in works] for _ in range(repeats)]
    return [median(column) for column in zip(*times)]


def figure(value, unit, aim=None, met=None, **sizes):
    "One line of the report; met is None where there is no aim."
    return {"value": round(value, 4), "unit": unit, "aim": aim, "met": met} | sizes


def exponent(sizes, times):
    "p of time ~ size^p, over the larger half of the sizes: 1 = linear."
    (x, *_, y), (s, *_, t) = sizes[len(sizes) // 2 - 1 :], times[len(times) // 2 - 1 :]
    return math.log(t / s) / math.log(y / x)


# The training step


def workshop(quick, **settings):
    """The reference configuration on some of scenes, past the start of matching: .config .features
    .alignment .optimizer .items .steps"""
    from speechimg.alignment import Alignment
    from speechimg.core import Config, read_json, seed_everything
    from speechimg.corpora import load_corpus
    from speechimg.model import SpeechImageModel
    from speechimg.retrieval import load_features
    from speechimg.train import Steps, batches, make_optimizer, some_of

    config = Config.from_dict(
        read_json(ROOT / "data/models/reference/train.json") | (TINY if quick else {}) | settings
    )
    seed_everything(SEED)
    model = SpeechImageModel(config)
    features = load_features(
        model, some_of(load_corpus("scenes", "train"), 64 if quick else 640, SEED)
    )
    alignment, late = Alignment(model).train(), config.sim_start_step + config.alpha_ramp_steps
    items = [(late + place, *item[1:]) for place, item in zip(range(8), batches(config, features))]
    return SimpleNamespace(
        config=config,
        features=features,
        alignment=alignment,
        optimizer=make_optimizer(model, config),
        items=items,
        steps=Steps(config, features),
    )


def stepper(shop):
    "A function that does a step, always on the same batch: of a few, the one of middle length."
    import torch

    from speechimg.train import train_step

    ready = sorted(
        (shop.steps[item] for item in shop.items), key=lambda one: one[2][0].speech.shape[1]
    )
    number, _, parts, state = ready[len(ready) // 2]
    return lambda: train_step(
        shop.alignment, shop.optimizer, parts, number, torch.Generator().set_state(state)
    )


def products(work):
    """What work multiplies: [(operation, arguments)], forward and backward, on tensors of the same
    sizes, strides and precision."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    kept, calls, aten = {}, [], torch.ops.aten
    counted = {
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "convolution_backward",
    }  # the recurrent layer consists of mm and addmm

    def ready(x):
        if not torch.is_tensor(x):
            return x
        key = (tuple(x.shape), x.stride(), x.dtype)
        if key not in kept:
            kept[key] = (
                torch.randn(1 + sum((n - 1) * step for n, step in zip(*key[:2])))
                .to(x.dtype)
                .as_strided(*key[:2])
            )
        return kept[key]

    def attention(
        query, key
    ):  # an attention counts as its two products, backward as the four that give three gradients
        heads, (asks, answers, size) = (
            query.shape[0] * query.shape[1],
            (query.shape[2], key.shape[2], query.shape[3]),
        )

        def part(*shape):
            return ready(query.new_empty(heads, *shape))

        return part(asks, size), part(answers, size), part(asks, answers)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name = function.overloadpacket.__name__
            if name in counted:
                calls.append((function, [ready(one) for one in arguments], options or {}))
            elif name.startswith("_scaled_dot_product"):
                backward = name.endswith("backward")
                q, k, weights = attention(*arguments[1:3] if backward else arguments[:2])
                pairs = (
                    [(q, k.mT), (weights, k)] + [(weights.mT, q), (weights.mT, q)]
                    if backward
                    else [(q, k.mT), (weights, k)]
                )
                calls.extend((aten.bmm.default, pair, {}) for pair in pairs)
            return function(*arguments, **(options or {}))

    with Watch():
        work()
    return calls


def step(quick):
    "The training step of the reference configuration, and nothing but its products"
    import torch

    work = stepper(workshop(quick))
    calls = products(work)

    def bare():
        with torch.no_grad():
            for function, arguments, options in calls:
                function(*arguments, **options)

    times = in_turn(3 if quick else 12, work, bare)
    return {"step": times[0], "bare": times[1], "products": len(calls)}


# The loader


def loader(quick):
    """Batches made by one worker while the step runs: how long the step waits, of what the batches
    take"""
    import torch

    from speechimg.data import one_ahead
    from speechimg.train import Steps, train_step

    shop, count = workshop(quick, workers=1), 6 if quick else 24
    items = (shop.items * count)[:count]
    work = [lambda item=item: shop.steps[item] for item in items]
    alone = sum(seconds(one) for one in work)
    waits, steps = [], []
    source = one_ahead(
        torch.utils.data.DataLoader(
            Steps(shop.config, shop.features), None, sampler=items, num_workers=1
        )
    )
    for _ in items:
        begin = time.perf_counter()
        number, _, parts, state = next(source)
        waits.append(time.perf_counter() - begin)
        steps.append(
            seconds(
                lambda: train_step(
                    shop.alignment,
                    shop.optimizer,
                    parts,
                    number,
                    torch.Generator().set_state(state),
                )
            )
        )
    hidden = 100 * (
        1 - min(1, sum(waits[2:]) / (alone / count * (count - 2)))
    )  # the first ones wait for the worker to start
    return {
        "figures": {
            "loader time hidden behind the step, one worker": figure(
                hidden,
                "%",
                "over 95 %",
                hidden > 95,
                batches=count,
                batch_size=shop.config.batch_size,
            ),
            "loader time without a worker, share of the step": figure(
                100 * alone / sum(steps), "%"
            ),
        }
    }


# Re-ranking


def gallery(quick):
    """The reference model and the Embeddings of 1,000 pictures and their 5,000 recordings (test and
    test_style of scenes)."""
    import torch

    from speechimg.corpora import load_corpus
    from speechimg.retrieval import Embeddings, embed, load_features, load_model

    model = load_model("reference")
    corpora = [load_corpus("scenes", split) for split in ("test", "test_style")]
    if quick:
        corpora = [load_corpus("scenes", "val").subset(range(80))]
    parts = [embed(model, load_features(model, corpus)) for corpus in corpora]
    offset = [0, len(parts[0].image)]
    joined = [
        torch.cat([getattr(part, name) for part in parts])
        for name in ("speech", "image", "image_tokens")
    ]
    image_of = torch.cat([part.image_of + more for part, more in zip(parts, offset)])
    return model, Embeddings(
        joined[0], joined[1], sum((part.speech_tokens for part in parts), []), joined[2], image_of
    )


def plain_loop(model, embeddings, coarse, queries, k, direction):
    """As ALBEF's public evaluation: query by query, topk, k pairs of fully padded tokens through
    all of every block -> (queries, k) scores, candidates."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    lengths = torch.tensor([len(tokens) for tokens in embeddings.speech_tokens])
    speech = pad_sequence(embeddings.speech_tokens, batch_first=True)
    mask, fusion, scores, found = (
        torch.arange(speech.shape[1]) < lengths[:, None],
        model.fusion,
        [],
        [],
    )

    def judge(query):
        best = coarse[query].topk(k).indices
        query = query.expand(k)
        rows, pictures = (query, best) if direction == "speech_to_image" else (best, query)
        x, valid, seen = speech[rows], mask[rows], embeddings.image_tokens[pictures]
        for block in fusion.blocks:
            x = block(x, valid, context=seen)
        scores.append(fusion.verdict(fusion.norm(x[:, 0]))[:, 1])
        found.append(best)

    def run():
        scores.clear(), found.clear()
        with torch.inference_mode():
            for query in queries:
                judge(query)
        return torch.stack(scores), torch.stack(found)

    return run


def rerank(quick):
    """Re-ranking both ways: a plain loop over some queries, and the library over more of them, yet
    fewer than all, so that less is shared"""
    import torch

    from speechimg.retrieval import pair_scorer

    model, embeddings = gallery(quick)
    k, few, result = (8, 2, {}) if quick else (128, 6, {})
    for direction in ("speech_to_image", "image_to_speech"):
        coarse = embeddings.speech @ embeddings.image.T
        if direction == "image_to_speech":
            coarse = coarse.T
        queries = torch.randperm(len(coarse), generator=torch.Generator().manual_seed(SEED))[
            : 64 if direction == "speech_to_image" else 256
        ]
        scorer, candidates = (
            pair_scorer(model, embeddings, direction),
            coarse[queries].topk(k).indices,
        )
        plain = plain_loop(model, embeddings, coarse, queries[:few], k, direction)

        def fast():
            return scorer(queries.repeat_interleave(k), candidates.flatten()).view(-1, k)

        slow, quick_one = in_turn(1 if quick else 2, plain, fast)
        (expected, found), got = plain(), fast()[:few]
        assert torch.equal(found, candidates[:few])
        order = got.argsort(1, descending=True)
        sorted_as = expected.gather(1, order)  # the plain scores in the fast order: may only fall
        result[direction] = {
            "plain_pair": slow / few / k,
            "fast_pair": quick_one / len(queries) / k,
            "difference": (expected - got).abs().max().item(),
            "same_order": bool((order == expected.argsort(1, descending=True)).all()),
            "worst_swap": (sorted_as[:, 1:] - sorted_as[:, :-1]).clamp(min=0).max().item(),
            "queries": few,
            "queries_at_once": len(queries),
            "queries_in_all": len(coarse),
            "k": k,
        }
    return result | {"pictures": len(embeddings.image), "recordings": len(embeddings.speech)}


# Search, and growth with size


def stored(model, count):
    """What open_gallery would return for so many pictures; random vectors, and the tokens of one
    picture for all of them."""
    import torch

    draw = torch.Generator().manual_seed(SEED)
    vectors = torch.nn.functional.normalize(
        torch.randn(count, model.config.dim, generator=draw), dim=-1
    )
    tokens = torch.randn(
        1, model.image_tower.front_end.size**2 // 1024 + 1, model.config.width, generator=draw
    ).expand(count, -1, -1)
    from speechimg.retrieval import Embeddings

    return SimpleNamespace(pictures=[SimpleNamespace(path="picture")] * count), Embeddings(
        None, vectors, None, tokens, None
    )


def wave(length):
    import torch

    return torch.randn(round(16_000 * length), generator=torch.Generator().manual_seed(SEED)) / 10


def search(quick):
    """One recording of 4 seconds against many stored pictures: embedded, ranked, 16 candidates
    re-ranked"""
    from speechimg.retrieval import load_model
    from speechimg.retrieval import search as find

    model, counts, heard = (
        load_model("reference"),
        (250, 2500) if quick else (25_000, 250_000),
        wave(4),
    )
    galleries = [stored(model, count) for count in counts]
    times = in_turn(
        2 if quick else 9,
        *(lambda one=one: find(model, heard, one, top=10, rerank=16) for one in galleries),
    )
    figures = {
        f"search among {count:,} stored pictures": figure(1000 * one, "ms", repeats=9)
        for count, one in zip(counts, times)
    }
    growth = times[1] / times[0]
    return {
        "figures": figures
        | {
            "search among ten times as many": figure(
                growth, "times as long", "at most 10", growth <= 10
            )
        }
    }


def curves(quick):
    "Time against size of the gallery, candidates k, length of a clip, pairs in a batch"
    import torch

    from speechimg.retrieval import embed, load_model, two_stages

    model, repeats, kept = load_model("reference"), 2 if quick else 5, {}
    top = 2 if quick else 4
    sizes = [1000 * 4**place for place in range(top)]
    _, images = stored(model, sizes[-1])
    frames = torch.as_tensor(model.speech_tower.front_end(wave(4)))
    heard = embed(model, SimpleNamespace(speech=[frames] * 4, image=[], image_of=None))

    def ask(count, k):
        return lambda: two_stages(
            model,
            heard._replace(image=images.image[:count], image_tokens=images.image_tokens[:count]),
            k,
        )

    kept["gallery, pictures"] = sizes, in_turn(repeats, *(ask(count, 16) for count in sizes))
    many = [16 * 2**place for place in range(top)]
    kept["candidates k"] = many, in_turn(repeats, *(ask(1000, k) for k in many))
    lengths = [2 * 2**place for place in range(top)]
    clips = [torch.as_tensor(model.speech_tower.front_end(wave(length))) for length in lengths]

    def whole(clip):  # the tower, and 16 pictures re-ranked
        some = embed(model, SimpleNamespace(speech=[clip] * 4, image=[], image_of=None))
        two_stages(
            model, some._replace(image=images.image[:64], image_tokens=images.image_tokens[:64]), 16
        )

    kept["clip, seconds"] = (
        lengths,
        in_turn(repeats, *(lambda clip=clip: whole(clip) for clip in clips)),
    )
    batch = [8 * 2**place for place in range(top)]
    kept["batch, pairs"] = (
        batch,
        in_turn(repeats, *(stepper(workshop(quick, batch_size=size)) for size in batch)),
    )
    return {
        "figures": {
            f"growth with {name}": figure(
                p := exponent(*pair), "exponent", "linear or less", p <= LINEAR
            )
            for name, pair in kept.items()
        },
        "curves": {
            name: {"sizes": sizes, "milliseconds": [round(1000 * one, 2) for one in times]}
            for name, (sizes, times) in kept.items()
        },
    }


# Start-up


def start(quick):
    "Importing everything beyond torch, and the command line's --help, each in fresh processes"
    names = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "speechimg").rglob("*.py")
        if not path.stem.startswith("_")
    )
    timed = (
        "import json, sys, time, torch\n"
        "begin, after = time.perf_counter(), []\n"
        "for names in json.loads(sys.argv[1]):\n"
        "    [__import__(name) for name in names]\n"
        "    after.append(time.perf_counter() - begin)\n"
        "print(json.dumps(after))"
    )
    # one more of them in each row; each time counts from the first
    rows = [["speechimg"], ["speechimg.train", "speechimg.retrieval"], names]

    def python(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env=environment(ROOT),
        ).stdout

    def imports():
        return json.loads(python("-c", timed, json.dumps(rows)))

    if not quick:
        imports()  # from here on compiled
    # whatever disturbs makes it longer
    package, main, every = map(min, zip(*(imports() for _ in range(1 if quick else 5))))
    told = min(
        seconds(lambda: python("-m", "speechimg.cli", "--help")) for _ in range(1 if quick else 5)
    )
    return {
        "figures": {
            "import speechimg, beyond torch": figure(package, "s", "under 0.3 s", package < 0.3),
            "import speechimg.train and speechimg.retrieval, beyond torch": figure(
                main, "s", "under 0.3 s", main < 0.3
            ),
            "import of every module, beyond torch": figure(every, "s", modules=len(names)),
            "speechimg --help": figure(told, "s", "under 0.5 s", told < 0.5),
        }
    }


# The report


PARTS = {
    "step": step,
    "loader": loader,
    "rerank": rerank,
    "search": search,
    "curves": curves,
    "start": start,
}
COMPARED = ("step", "rerank")  # with the code before


def environment(code):
    return os.environ | {
        "PYTHONPATH": str(code),
        "OMP_NUM_THREADS": "1",
        "SPEECHIMG_DATA": str(ROOT / "data"),
        "SPEECHIMG_CACHE": os.environ.get("SPEECHIMG_CACHE") or str(ROOT / ".cache"),
    }


def child(part, quick, code=ROOT):
    "What a part finds, in a process of its own, with the library that lies in a folder."
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--one",
        part,
        *(["--quick"] if quick else []),
    ]
    done = subprocess.run(command, cwd=code, env=environment(code), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{part}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def earlier(folder):
    "The folder, with the library as it was at BEFORE; None in a clone that lacks the commit."
    packed = subprocess.run(["git", "archive", BEFORE, "speechimg"], cwd=ROOT, capture_output=True)
    if packed.returncode:
        return None
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def middle(results):
    "Several results of one part as one: the median of each number, the rest from the last."
    if isinstance(results[0], dict):
        return {name: middle([one[name] for one in results]) for name in results[0]}
    return median(results) if isinstance(results[0], float) else results[-1]


def of_step(found):
    ratio = found["step"] / found["bare"]
    return {
        "training step / its bare products": figure(
            ratio,
            "times",
            "at most 1.5",
            ratio <= 1.5,
            products=found["products"],
            bare_ms=round(1000 * found["bare"], 1),
        ),
        "training step": figure(1000 * found["step"], "ms"),
    }


def of_rerank(found):
    figures = {}
    for direction in ("speech_to_image", "image_to_speech"):
        one, way = found[direction], direction.replace("_", " ")
        ratio, hours = one["plain_pair"] / one["fast_pair"], one["queries_in_all"] * one["k"]
        figures[f"re-ranking, {way}: plain loop / library"] = figure(
            ratio, "times", "at least 5", ratio >= 5, **one
        )
        figures[f"re-ranking, {way}: all {one['queries_in_all']:,} queries, by time per pair"] = (
            figure(hours * one["fast_pair"], "s", plain_seconds=round(hours * one["plain_pair"], 1))
        )
        figures[f"re-ranking, {way}: largest step against the plain order"] = figure(
            one["worst_swap"],
            "logits",
            "at most 0.00001",
            one["worst_swap"] <= 1e-5,
            same_order=one["same_order"],
        )
    return figures


def measured(part, quick, say):
    "A part of the report; for some, with the figures of the code before."
    if part not in COMPARED:
        return child(part, quick)
    figures = of_step if part == "step" else of_rerank
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        old, found = earlier(folder), {"before": [], "after": []}
        if old is None:
            say(f"{part}: this clone does not hold {BEFORE}; nothing to compare with")
        for _ in range(1 if quick or part == "rerank" else 2):  # in turn, too
            if old:
                found["before"].append(child(part, quick, old))
            found["after"].append(child(part, quick))
    report = {"figures": figures(middle(found["after"]))}
    if old:
        report |= {"before": {"commit": BEFORE, "figures": figures(middle(found["before"]))}}
    return report


def machine():
    import importlib.metadata as installed

    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {
        "cores": os.cpu_count(),
        "threads": 1,
        "processor": platform.machine(),
        "instructions": [one for one in SETS if one in flags.split()],
        "python": platform.python_version(),
        "system": platform.system(),
        **{name: installed.version(name) for name in ("torch", "numpy")},
    }


def bench(parts, quick=False, say=lambda line: None):
    "Measure some parts -> {part: its report}."
    report = {}
    for part in parts:
        begin = time.monotonic()
        report[part] = (
            {"what": " ".join(PARTS[part].__doc__.split())}
            | measured(part, quick, say)
            | {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
        )
        report[part]["seconds"] = round(time.monotonic() - begin, 1)
        for name, one in report[part]["figures"].items():
            met = {None: "", True: ", met", False: ", MISSED"}[one["met"]]
            say(f"{name}: {one['value']:.4g} {one['unit']}{met}")
    return report


def merged(old, new):
    """Reports of parts, the new ones in place of the old; a comparison that could not be made again
    stays, with its commit."""
    for part, one in new.items():
        if "before" in old.get(part, {}):
            one.setdefault("before", old[part]["before"])
    both = old | new
    return {name: both[name] for name in PARTS if name in both}


def table(parts):
    "The report as a table in markdown."

    def short(one):
        return f"{one['value']:,.4g} {one['unit']}" if one else ""

    lines = ["| figure | before | measured | aim | met |", "| --- | --- | --- | --- | --- |"]
    for part in parts.values():
        before = part.get("before", {}).get("figures", {})
        for name, one in part["figures"].items():
            met = "" if one["met"] is None else "yes" if one["met"] else "**no**"
            cells = [name, short(before.get(name)), short(one), one["aim"] or "", met]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which; all when left out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "data", help="folder of bench.json and bench.md"
    )
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)  # what a child is asked
    chosen = parser.parse_args()
    if chosen.one:
        import torch

        torch.set_num_threads(1)
        print("\n" + json.dumps(PARTS[chosen.one](chosen.quick)))
        return 0
    sys.path.insert(0, str(ROOT))
    from speechimg.core import atomic_write, read_json, write_json

    path = chosen.out / "bench.json"
    old = read_json(path)["parts"] if path.exists() else {}
    for part in chosen.parts or PARTS:  # written after each: a later one may be interrupted
        old = merged(old, bench([part], chosen.quick, lambda line: print(line, flush=True)))
        write_json(
            path,
            {
                "seed": SEED,
                "seconds": round(sum(one["seconds"] for one in old.values()), 1),
                "parts": old,
            },
        )
        with atomic_write(chosen.out / "bench.md", "w") as file:
            file.write(table(old))
    print(table(old))
    return 0


if __name__ == "__main__":
    sys.exit(main())
