"""Answers to an assignment: code that runs after the library's own functions and replaces some."""

RIGHT = {  # right, and written differently
    "loops": """
def allowed_keys(logits, ids, key_ids=None):
    others = ids if key_ids is None else key_ids
    if tuple(logits.shape) != (len(ids), len(others)):
        raise ValueError("shapes")
    table = torch.zeros(len(ids), len(others), dtype=torch.bool)
    for b in range(len(ids)):
        for c in range(len(others)):
            table[b, c] = bool(
                ids[b] != others[c] and others[c] >= 0 and torch.isfinite(logits[b, c])
            )
    return table


def negative_probabilities(logits, ids, key_ids=None):
    table, fine = torch.zeros(logits.shape), allowed_keys(logits, ids, key_ids)
    for b, row in enumerate(logits.detach().float()):
        if fine[b].any():
            table[b, fine[b]] = row[fine[b]].softmax(0)
    return table


def sample_negatives(logits, ids, generator=None, key_ids=None, count=1, hard=True):
    if count < 1:
        raise ValueError("count")
    fine, found = allowed_keys(logits, ids, key_ids), []
    chances = negative_probabilities(logits, ids, key_ids) if hard else fine.float()
    for b in range(len(ids)):
        left, row = fine[b].nonzero().flatten().tolist(), []
        while left and len(row) < count:
            weights = chances[b, left].double() + 1e-200
            row.append(left.pop(int(torch.multinomial(weights, 1, generator=generator))))
        found.append(row + [-1] * (count - len(row)))
    found = torch.tensor(found)
    return found[:, 0] if count == 1 else found
""",
    "Gumbel": """
def negative_probabilities(logits, ids, key_ids=None):
    fine = allowed_keys(logits, ids, key_ids)
    z = torch.where(fine, logits.detach().float(), torch.tensor(-torch.inf))
    e = (z - z.amax(1, keepdim=True).clamp_min(-1e30)).exp() * fine
    return e / e.sum(1, keepdim=True).clamp_min(1e-20)


@torch.no_grad()
def sample_negatives(logits, ids, generator=None, key_ids=None, count=1, hard=True):
    if count <= 0:
        raise ValueError("count")
    fine = allowed_keys(logits, ids, key_ids)
    noise = -torch.empty(logits.shape).exponential_(generator=generator).log()
    z = (noise + (logits.float() if hard else 0)).masked_fill(~fine, -torch.inf)
    best = z.topk(min(count, z.shape[1]), dim=1)
    index = best.indices.masked_fill(best.values == -torch.inf, -1)
    index = torch.nn.functional.pad(index, (0, count - index.shape[1]), value=-1)
    return index.squeeze(1) if count == 1 else index
""",
}

FIT = """
def allowed_keys(logits, ids, key_ids=None):
    key_ids = ids if key_ids is None else key_ids
    if logits.shape != (len(ids), len(key_ids)):
        raise ValueError("shapes")
"""
DRAW = """
@torch.no_grad()
def sample_negatives(logits, ids, generator=None, key_ids=None, count=1, hard=True):
    if count < 1:
        raise ValueError("count")
    fine = allowed_keys(logits, ids, key_ids)
    weights = negative_probabilities(logits, ids, key_ids).clamp_min(1e-30) * fine
    weights = weights if hard else fine.float()
    weights = torch.where(fine.any(1, keepdim=True), weights, torch.ones_like(weights))
    picks = torch.full((len(ids), count), -1)
    some = min(count, logits.shape[1])
"""

WRONG = {  # name: (code, numbers of the checks that it must fail, part of a message)
    "only the diagonal": (
        FIT
        + """
    return ~torch.eye(len(ids), len(key_ids), dtype=torch.bool) & (key_ids >= 0) & logits.isfinite()
""",
        [1, 2, 3, 5, 6, 7, 8, 11, 12, 13],
        "two captions of one image are called wrong pairs",
    ),
    "empty slots": (
        FIT
        + """
    return (ids[:, None] != key_ids) & logits.isfinite()
""",
        [1, 3, 6, 8, 12, 13],
        "an empty slot is drawn",
    ),
    "the opposite": (
        FIT
        + """
    return (ids[:, None] == key_ids) & (key_ids >= 0) & logits.isfinite()
""",
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],
        "This is the opposite",
    ),
    "broken logits": (
        FIT
        + """
    return (ids[:, None] != key_ids) & (key_ids >= 0)
""",
        [3, 13],
        "NaN or infinite is allowed",
    ),
    "shapes not looked at": (
        """
def allowed_keys(logits, ids, key_ids=None):
    key_ids = ids if key_ids is None else key_ids
    n = min(logits.shape[1], len(key_ids))
    return (ids[:, None] != key_ids[:n]) & (key_ids[:n] >= 0) & logits[:, :n].isfinite()
""",
        [2],
        "is accepted",
    ),
    "wrong axis": (
        """
@torch.no_grad()
def negative_probabilities(logits, ids, key_ids=None):
    fine = allowed_keys(logits, ids, key_ids)
    return logits.float().masked_fill(~fine, -torch.inf).softmax(0).masked_fill(~fine, 0)
""",
        [4, 5, 6, 7, 11],
        "The softmax runs over the queries",
    ),
    "empty row NaN": (
        """
@torch.no_grad()
def negative_probabilities(logits, ids, key_ids=None):
    fine = allowed_keys(logits, ids, key_ids)
    return logits.float().masked_fill(~fine, -torch.inf).softmax(1)
""",
        [5],
        "a row without a valid negative is NaN",
    ),
    "-10000": (
        """
@torch.no_grad()
def negative_probabilities(logits, ids, key_ids=None):
    fine = allowed_keys(logits, ids, key_ids)
    return logits.float().masked_fill(~fine, -10_000.0).softmax(1)
""",
        [5],
        "makes an empty row even",
    ),
    "masked after the softmax": (
        """
@torch.no_grad()
def negative_probabilities(logits, ids, key_ids=None):
    return logits.float().softmax(1).masked_fill(~allowed_keys(logits, ids, key_ids), 0)
""",
        [4, 5, 6, 7, 13],
        "its share is missing",
    ),
    "underflow": (
        """
@torch.no_grad()
def negative_probabilities(logits, ids, key_ids=None):
    weights = logits.float().softmax(1).masked_fill(~allowed_keys(logits, ids, key_ids), 0)
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-30)
""",
        [7, 13],
        "took all of the softmax",
    ),
    "softmax in half precision": (
        """
@torch.no_grad()
def negative_probabilities(logits, ids, key_ids=None):
    fine = allowed_keys(logits, ids, key_ids)
    return logits.masked_fill(~fine, -torch.inf).softmax(1).masked_fill(~fine, 0).float()
""",
        [7],
        "made in half precision",
    ),
    "gradient": (
        """
def negative_probabilities(logits, ids, key_ids=None):
    fine = allowed_keys(logits, ids, key_ids)
    return logits.float().masked_fill(~fine, -torch.inf).softmax(1).masked_fill(~fine, 0)
""",
        [7],
        "the result asks for gradients",
    ),
    "generator ignored": (
        DRAW
        + """
    index = torch.multinomial(weights, some)
    picks[:, :some] = torch.where(fine.gather(1, index), index, -1)
    return picks[:, 0] if count == 1 else picks
""",
        [10],
        "the generator is ignored",
    ),
    "a new generator each time": (
        DRAW
        + """
    index = torch.multinomial(
        weights, some, generator=torch.Generator().manual_seed(generator.initial_seed())
    )
    picks[:, :some] = torch.where(fine.gather(1, index), index, -1)
    return picks[:, 0] if count == 1 else picks
""",
        [10],
        "it must move on",
    ),
    "the hardest": (
        DRAW
        + """
    index = (
        (weights + 1e-3 * torch.rand(weights.shape, generator=generator))
        .masked_fill(~fine, -1)
        .topk(some)
        .indices
    )
    picks[:, :some] = torch.where(fine.gather(1, index), index, -1)
    return picks[:, 0] if count == 1 else picks
""",
        [11],
        "always the hardest is taken",
    ),
    "always even": (
        DRAW.replace("weights if hard else ", "")
        + """
    index = torch.multinomial(weights, some, generator=generator)
    picks[:, :some] = torch.where(fine.gather(1, index), index, -1)
    return picks[:, 0] if count == 1 else picks
""",
        [11],
        "although hard is True",
    ),
    "always hard": (
        DRAW.replace(" if hard else fine.float()", "")
        + """
    index = torch.multinomial(weights, some, generator=generator)
    picks[:, :some] = torch.where(fine.gather(1, index), index, -1)
    return picks[:, 0] if count == 1 else picks
""",
        [12],
        "equally likely",
    ),
    "with repetition": (
        DRAW
        + """
    index = torch.multinomial(weights, count, replacement=True, generator=generator)
    picks = torch.where(fine.gather(1, index), index, -1)
    return picks[:, 0] if count == 1 else picks
""",
        [9, 13],
        "all must be different",
    ),
    "used up": (
        DRAW
        + """
    index = torch.multinomial(weights, some, generator=generator)
    picks[:, :some] = torch.where(fine.any(1, keepdim=True), index, -1)
    return picks[:, 0] if count == 1 else picks
""",
        [9, 13],
        "once the others are used up",
    ),
    "nothing to draw": (
        """
@torch.no_grad()
def sample_negatives(logits, ids, generator=None, key_ids=None, count=1, hard=True):
    if count < 1:
        raise ValueError("count")
    fine = allowed_keys(logits, ids, key_ids)
    weights = negative_probabilities(logits, ids, key_ids).clamp_min(1e-30) * fine
    weights = weights if hard else fine.float()
    index = torch.multinomial(weights, count, generator=generator)
    return (
        torch.where(fine.gather(1, index), index, -1).squeeze(1)
        if count == 1
        else torch.where(fine.gather(1, index), index, -1)
    )
""",
        [8, 13],
        "refuses a row without any weight",
    ),
}
