"""Answers to an assignment: code that runs after the library's own functions and replaces some."""

RIGHT = {  # right, and written differently
    "python's own": """
def split_pictures(n_pictures, shares, generator):
    if (
        not shares
        or any(share <= 0 for share in shares.values())
        or not 0.999 < sum(shares.values()) < 1.001
    ):
        raise ValueError("shares")
    order, found = torch.randperm(n_pictures, generator=generator).tolist(), {}
    for split in list(shares)[1:]:
        size = max(1, int(n_pictures * shares[split] + 1e-6))
        found[split], order = sorted(order[:size]), order[size:]
    if not order:
        raise ValueError("too few")
    return {list(shares)[0]: sorted(order), **found}


def luck(right, queries, chance):
    table = [1.0]  # how likely so many right are, query by query
    for _ in range(queries):
        table = [a * (1 - chance) + b * chance for a, b in zip([*table, 0.0], [0.0, *table])]
    return sum(weight for number, weight in enumerate(table) if number >= right)
""",
    "loops": """
def paired_interval(before, after, pictures, generator, draws=2000):
    if (
        before.dim() != 1
        or before.shape != after.shape
        or before.shape != pictures.shape
        or before.numel() == 0
    ):
        raise ValueError("shapes")
    groups = {}
    for a, b, name in zip(before.tolist(), after.tolist(), pictures.tolist()):
        groups.setdefault(name, []).append(100 * (b - a))
    groups, means = list(groups.values()), []
    for picks in torch.randint(len(groups), (draws, len(groups)), generator=generator).tolist():
        values = [value for pick in picks for value in groups[pick]]
        means.append(sum(values) / len(values))
    everything = [value for group in groups for value in group]
    means = torch.tensor(means).sort().values
    return Interval(
        sum(everything) / len(everything),
        float(means[int(0.025 * draws)]),
        float(means[int(0.975 * draws)]),
    )
""",
}

SPLIT = """
def split_pictures(n_pictures, shares, generator):
    if not shares or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError("shares")
    first, *others = shares
    sizes = {split: max(1, int(n_pictures * shares[split] + 1e-9)) for split in others}
    sizes = {first: n_pictures - sum(sizes.values()), **sizes}
    if sizes[first] < 1:
        raise ValueError("too few")
    places = torch.randperm(n_pictures, generator=generator).tolist()
    found = {}
    for split, size in sizes.items():
        found[split], places = sorted(places[:size]), places[size:]
    return found
"""

PAIRED = """
def paired_interval(before, after, pictures, generator, draws=2000):
    if (
        before.dim() != 1
        or before.shape != after.shape
        or before.shape != pictures.shape
        or before.numel() == 0
    ):
        raise ValueError("shapes")
    change, (names, place) = 100 * (after - before).double(), pictures.unique(return_inverse=True)
    total = torch.zeros(len(names), dtype=torch.double).scatter_add(0, place, change)
    drawn = torch.randint(len(names), (draws, len(names)), generator=generator)
    means = total[drawn].sum(1) / place.bincount()[drawn].sum(1)
    return Interval(
        change.mean().item(),
        *means.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist(),
    )
"""

ROWS = """
wary = caption_rows


def caption_rows(pictures, recordings, sentences, splits, language="en"):
    found = wary(pictures, recordings, sentences, splits, language)
    CHANGE
    return found
"""

WRONG = {  # name: (code, numbers of the checks that it must fail, part of a message)
    "no lot": (
        SPLIT.replace(
            "torch.randperm(n_pictures, generator=generator).tolist()", "list(range(n_pictures))"
        ),
        [3],
        "deal by lot",
    ),
    "generator ignored": (
        SPLIT.replace(
            "torch.randperm(n_pictures, generator=generator)", "torch.randperm(n_pictures)"
        ),
        [3],
        "the same seed should give the same splits",
    ),
    "rounded to the nearest": (
        SPLIT.replace(
            "int(n_pictures * shares[split] + 1e-9)", "round(n_pictures * shares[split])"
        ),
        [1, 3],
        "rounded to the nearest",
    ),
    "an empty split": (
        SPLIT.replace(
            "max(1, int(n_pictures * shares[split] + 1e-9))",
            "int(n_pictures * shares[split] + 1e-9)",
        ),
        [2],
        "each gets at least one",
    ),
    "too few is accepted": (
        SPLIT.replace("if sizes[first] < 1:", "if False:"),
        [2],
        "2 pictures for 3 splits",
    ),
    "not ascending": (
        SPLIT.replace("sorted(places[:size])", "places[:size]"),
        [1],
        "should ascend",
    ),
    "captions dealt, not pictures": (
        SPLIT.replace(
            "found[split], places = sorted(places[:size]), places[size:]",
            "found[split] = sorted(places[:size])",
        ),
        [1],
        "in two splits, or in none",
    ),
    "no list is wrong": (
        """
def caption_rows(pictures, recordings, sentences, splits, language="en"):
    entries = [{"image": name, "captions": []} for name in pictures]
    for (wav, place, speaker), text in zip(recordings, sentences):
        uttid = wav.split("/")[-1].rsplit(".", 1)[0]
        entries[place]["captions"].append(
            {"uttid": uttid, "wav": wav, "text": text, "speaker": speaker, "language": language}
        )
    return {split: [entries[place] for place in places] for split, places in splits.items()}
""",
        [5, 7],
        "is accepted",
    ),
    "the whole path is the uttid": (
        ROWS.replace(
            "CHANGE",
            (
                "[one.update(uttid=one['wav']) for entries in found.values() for entry in "
                "entries for one in entry['captions']]"
            ),
        ),
        [4, 6],
        "the file's name without folder and ending",
    ),
    "language forgotten": (
        ROWS.replace(
            "CHANGE",
            (
                "[one.update(language='en') for entries in found.values() for entry in "
                "entries for one in entry['captions']]"
            ),
        ),
        [6],
        "'language': 'fr'",
    ),
    "minus one is a place": (
        """
wary = caption_rows


def caption_rows(pictures, recordings, sentences, splits, language="en"):
    return wary(
        pictures,
        [
            (wav, place % len(pictures) if place < 0 else place, speaker)
            for wav, place, speaker in recordings
        ],
        sentences,
        splits,
        language,
    )
""",
        [7],
        "a recording of picture -1",
    ),
    "exactly so many": (
        """
def luck(right, queries, chance):
    return (
        math.comb(queries, math.ceil(right))
        * chance ** math.ceil(right)
        * (1 - chance) ** (queries - math.ceil(right))
    )
""",
        [8, 9],
        "exactly two: at least two",
    ),
    "more than so many": (
        """
def luck(right, queries, chance):
    return sum(
        math.comb(queries, n) * chance**n * (1 - chance) ** (queries - n)
        for n in range(int(right) + 1, queries + 1)
    )
""",
        [8, 9],
        "two count as well",
    ),
    "queries drawn, not pictures": (
        PAIRED.replace(
            "pictures.unique(return_inverse=True)",
            "torch.arange(len(pictures)).unique(return_inverse=True)",
        ),
        [11, 12],
        "not single queries",
    ),
    "a share": (
        PAIRED.replace("100 * (after - before)", "(after - before)"),
        [10, 11, 12],
        "percentage points are wanted",
    ),
    "the wrong way round": (
        PAIRED.replace("(after - before)", "(before - after)"),
        [10, 11, 12],
        "This is before - after",
    ),
    "mean over pictures": (
        PAIRED.replace("change.mean().item()", "(total / place.bincount()).mean().item()"),
        [10, 12],
        "take that over the queries",
    ),
    "not paired": (
        PAIRED.replace(
            "means = total[drawn].sum(1) / place.bincount()[drawn].sum(1)",
            (
                "again = torch.randint(len(names), (draws, len(names)), "
                "generator=generator)\n"
                "    sums = [100 * torch.zeros(len(names), "
                "dtype=torch.double).scatter_add(0, place, one.double()) for one in (before, "
                "after)]\n"
                "    means = sums[1][drawn].sum(1) / place.bincount()[drawn].sum(1) - "
                "sums[0][again].sum(1) / place.bincount()[again].sum(1)"
            ),
        ),
        [11, 12],
        "subtract first",
    ),
}
