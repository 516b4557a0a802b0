"""Answers to an assignment: code that runs after the library's own functions and replaces some."""

CHANCE = """
from math import comb


def hit_probability(above, tied, positive, k):
    found = []
    for g, t, p in zip(above.tolist(), tied.tolist(), positive.tolist()):
        r = max(0, min(k - g, t))
        found.append(1 - comb(t - p, r) / comb(t, r))
    return torch.tensor(found)
"""

RECALL = """
def recall_at_k(scores, image_of, ks=(1, 5, 10)):
    if scores.dim() != 2 or len(image_of) != len(scores):
        raise ValueError("shapes")
    there = (image_of >= 0) & (image_of < scores.shape[1])
    if torch.isnan(scores).any() or not there.all():
        raise ValueError("values")
    answers = {"speech_to_image": [], "image_to_speech": []}
    for row, owner in zip(scores, image_of):
        answers["speech_to_image"].append(counted(row, [int(owner)]))
    for image in range(scores.shape[1]):
        mine = (image_of == image).nonzero().flatten().tolist()
        if mine:
            answers["image_to_speech"].append(counted(scores[:, image], mine))
    return {
        way: {
            k: 100 * float(hit_probability(*torch.tensor(counts).T, k).double().mean()) for k in ks
        }
        for way, counts in answers.items()
    }


def counted(row, right):
    best = row[right].max()
    return int((row > best).sum()), int((row == best).sum()), int((row[right] == best).sum())
"""

RERANK = """
def rerank(coarse, score_pairs, k, mode="sim", chunk=8192):
    if mode not in ("sim", "sum") or coarse.isnan().any():
        raise ValueError(mode)
    n = coarse.shape[1]
    if k == 0 or len(coarse) == 0:
        return coarse.clone()
    k = min(k, n)
    final = coarse.float().clone()
    for query, row in enumerate(coarse):
        order = row.argsort(descending=True, stable=True)
        chosen, others = order[:k], order[k:]
        fine = torch.cat(
            [score_pairs(torch.full_like(some, query), some) for some in chosen.split(chunk)]
        ).float()
        if mode == "sum":
            fine = fine + row[chosen].float()
        if not fine.isfinite().all():
            raise ValueError("not finite")
        final[query, chosen] = fine
        levels = row[others].unique().flip(0)
        for level, value in enumerate(levels, 1):
            same = others[row[others] == value]
            final[query, same] = fine.min() - level * max(1.0, abs(float(fine.min())) / 1000)
    return final
"""


def changed(code: str, *changes: tuple[str, str]) -> str:
    "An answer with a mistake put into it."
    for old, new in changes:
        assert old in code, old
        code = code.replace(old, new)
    return code


RIGHT = {  # right, and written differently
    "loops": CHANCE + RECALL + RERANK,
    "other tensors": """
def hit_probability(above, tied, positive, k):
    free = torch.minimum((k - above).clamp(min=0), tied).double()
    log = lambda n, r: torch.lgamma(n + 1.0) - torch.lgamma(r + 1.0) - torch.lgamma(n - r + 1.0)
    wrong = (tied - positive).double()
    miss = torch.where(
        free > wrong, 0.0, (log(wrong, torch.minimum(free, wrong)) - log(tied.double(), free)).exp()
    )
    return 1 - miss


def recall_at_k(scores, image_of, ks=(1, 5, 10)):
    if scores.ndim != 2 or image_of.shape != (scores.shape[0],) or not torch.equal(scores, scores):
        raise ValueError
    m = scores.shape[1]
    if int(image_of.min()) < 0 or int(image_of.max()) >= m:
        raise ValueError
    scores = scores.double()
    mine = torch.nn.functional.one_hot(image_of, m).bool()

    def one_way(table, mask):
        best = table.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
        asks, same = mask.any(1), table == best
        counts = ((table > best).sum(1)[asks], same.sum(1)[asks], (same & mask).sum(1)[asks])
        return {k: float(100 * hit_probability(*counts, k).mean()) for k in ks}

    return dict(speech_to_image=one_way(scores, mine), image_to_speech=one_way(scores.T, mine.T))


def rerank(coarse, score_pairs, k, mode="sim", chunk=8192):
    if mode != "sim" and mode != "sum":
        raise ValueError(mode)
    if not torch.equal(coarse, coarse):
        raise ValueError("NaN")
    q, n = coarse.shape
    k = min(max(k, 0), n)
    if k * q == 0:
        return coarse
    wide = coarse.double()
    order = wide.argsort(dim=1, descending=True, stable=True)
    chosen = order[:, :k].flatten()
    who = torch.arange(q)[:, None].expand(q, k).flatten()
    fine = torch.zeros(q * k, dtype=torch.double)
    for start in range(0, q * k, chunk):
        part = slice(start, start + chunk)
        fine[part] = score_pairs(who[part], chosen[part]).double()
    if mode == "sum":
        fine = fine + wide[who, chosen]
    if not bool(fine.abs().lt(float("inf")).all()):
        raise ValueError("not finite")
    worst = fine.view(q, k).min(1).values
    floor = worst - 1 - (wide.max() - wide.min())  # in double precision, room enough for any order
    final = floor[:, None] - (1 + worst.abs()[:, None]) * (wide.amax(1, keepdim=True) - wide)
    final[who, chosen] = fine
    return final
""",
}

WRONG = {  # name: (code, numbers of the checks that it must fail, part of a message)
    "ties won": (
        """
def hit_probability(above, tied, positive, k):
    return (above < k).double()
""",
        [1, 2, 3, 6, 7],
        "as if the right answer came first",
    ),
    "ties lost": (
        """
def hit_probability(above, tied, positive, k):
    return (above + tied - positive < k).double()
""",
        [1, 2, 3, 6, 7],
        "as if the right answer came last",
    ),
    "with replacement": (
        """
def hit_probability(above, tied, positive, k):
    places = (k - above).clamp(min=0).minimum(tied)
    return 1 - (1 - positive / tied) ** places
""",
        [1, 2, 3, 6, 7],
        "draws with replacement",
    ),
    "overflow": (
        """
def hit_probability(above, tied, positive, k):
    places = (k - above).clamp(min=0).minimum(tied)
    whole = lambda n: torch.tensor([float(torch.arange(1, int(x) + 1).double().prod()) for x in n])
    misses = (
        whole(tied - positive)
        / whole((tied - positive - places).clamp(min=0))
        / (whole(tied) / whole(tied - places))
    )
    return 1 - torch.where(places > tied - positive, 0.0, misses)
""",
        [2],
        "NaN",
    ),
    "sorted": (
        changed(
            RECALL,
            (
                (
                    "    return int((row > best).sum()), int((row == best).sum()), "
                    "int((row[right] == best).sum())"
                ),
                (
                    "    order = (-row.double()).argsort(stable=True).tolist()\n"
                    "    return min(order.index(place) for place in right), 1, 1"
                ),
            ),
        ),
        [3, 6, 7],
        "broken by the place in the matrix",
    ),
    "ties won in recall": (
        changed(RECALL, ("int((row == best).sum()), int((row[right] == best).sum())", "1, 1")),
        [3, 6, 7],
        "as if the right answer came first",
    ),
    "each caption asks": (
        changed(
            RECALL,
            (
                '            answers["image_to_speech"].append(counted(scores[:, image], mine))',
                (
                    '            answers["image_to_speech"] += [counted(scores[:, image], '
                    "[one]) for one in mine]"
                ),
            ),
        ),
        [3, 4, 6, 7],
        "Each caption asks for itself",
    ),
    "silent pictures ask": (
        changed(
            RECALL,
            (
                "        if mine:\n            answers",
                (
                    "        if not mine:\n"
                    "            answers['image_to_speech'].append((len(scores), 1, 1))\n"
                    "        else:\n            answers"
                ),
            ),
        ),
        [3, 4, 6, 7],
        "A picture without recordings asks, too",
    ),
    "a share": (changed(RECALL, ("100 * ", "")), [3, 4, 6, 7], "take percent"),
    "NaN is a score": (
        changed(RECALL, ("torch.isnan(scores).any() or ", "")),
        [5],
        "is accepted",
    ),
    "NaN is best": (
        changed(
            RECALL,
            ("torch.isnan(scores).any() or ", ""),
            (
                "def counted(row, right):",
                "def counted(row, right):\n    row = row.double().nan_to_num(torch.inf)",
            ),
        ),
        [5],
        "is accepted",
    ),
    "minus a hundred": (
        changed(
            RERANK,
            (
                "final[query, same] = fine.min() - level * max(1.0, abs(float(fine.min())) / 1000)",
                "final[query, same] = -100 - level",
            ),
        ),
        [8, 12],
        "begin below the worst candidate",
    ),
    "all the same": (
        changed(
            RERANK,
            ("fine.min() - level * max(1.0, abs(float(fine.min())) / 1000)", "fine.min() - 1000"),
        ),
        [8, 11, 12],
        "does not keep the coarse order",
    ),
    "minus infinity": (
        changed(
            RERANK, ("fine.min() - level * max(1.0, abs(float(fine.min())) / 1000)", "-torch.inf")
        ),
        [8, 11, 12],
        "no finite score",
    ),
    "coarse scores stay": (
        changed(
            RERANK, ("fine.min() - level * max(1.0, abs(float(fine.min())) / 1000)", "float(value)")
        ),
        [8, 11, 12],
        "gets past one of them",
    ),
    "a step of 1": (
        changed(RERANK, ("level * max(1.0, abs(float(fine.min())) / 1000)", "level")),
        [12],
        "too small to count",
    ),
    "ties undone": (
        changed(
            RERANK,
            (
                (
                    "        for level, value in enumerate(levels, 1):\n"
                    "            same = others[row[others] == value]\n"
                    "            final[query, same]"
                ),
                (
                    "        for level, one in enumerate(others.tolist(), 1):\n"
                    "            final[query, one]"
                ),
            ),
        ),
        [11],
        "had equal coarse scores",
    ),
    "k too large": (
        changed(
            RERANK,
            ("    k = min(k, n)\n", ""),
            (
                "chosen, others = order[:k], order[k:]",
                "chosen, others = order[: len(row.topk(k).indices)], order[k:]",
            ),
        ),
        [10],
        "it means all of it",
    ),
    "the last of equals": (
        changed(
            RERANK,
            (
                "row.argsort(descending=True, stable=True)",
                "n - 1 - row.flip(0).argsort(descending=True, stable=True)",
            ),
        ),
        [11],
        "the lower index comes first",
    ),
    "candidates pooled": (
        changed(
            RERANK,
            (
                "        chosen, others = order[:k], order[k:]",
                (
                    "        chosen = coarse.argsort(dim=1, descending=True, stable=True)[:, "
                    ":k].unique()\n        others = order[~torch.isin(order, chosen)]"
                ),
            ),
        ),
        [8, 9, 11, 13],
        "candidates of another query are judged",
    ),
    "mode ignored": (
        changed(RERANK, ('if mode == "sum":', "if False:")),
        [9, 11],
        "The coarse scores are forgotten",
    ),
    "fine NaN is best": (
        changed(
            RERANK,
            (
                (
                    "        if not fine.isfinite().all():\n"
                    '            raise ValueError("not finite")\n'
                ),
                "        fine = fine.nan_to_num(1e6)\n",
            ),
        ),
        [10],
        "is accepted",
    ),
    "everybody judged": (
        changed(
            RERANK,
            ("chosen.split(chunk)", "chosen.split(n)"),
            (
                "final = coarse.float().clone()",
                (
                    "final = coarse.float().clone()\n"
                    "    score_pairs(*torch.cartesian_prod(torch.arange(len(coarse)), "
                    "torch.arange(n)).T)"
                ),
            ),
        ),
        [9, 13],
        "pairs at once",
    ),
    "half precision": (
        changed(RERANK, ("return final", "return final.to(coarse.dtype)")),
        [12],
        "lose their order in half precision",
    ),
}
