"""Loops that anyone believes: the formulas of the method, one number at a time, in plain Python.

They are slow on purpose and use nothing of the library but the towers and the two-way verdict of a
model that they are given. Every number is a Python float, so float64.
"""

import itertools
import math

import pytest
import torch

from speechimg.alignment import encode

BOTH = ("speech_to_image", "image_to_speech")


def caught(check, mutant, *other_errors):
    "The check must fail on the mutant: on a wrong number, or in one of these other ways."
    with pytest.raises((AssertionError, *other_errors)):
        check(mutant)


# ---- attention


def loop_attention(module, x, context, mask):
    "One row, one head, one query at a time, with the padding cut off."
    d = x.shape[-1] // module.heads
    out = torch.zeros_like(x)
    for b in range(len(x)):
        valid = context[b][mask[b]]
        q, k, v = module.query(x[b]), module.key(valid), module.value(valid)
        for h in range(module.heads):
            part = slice(h * d, (h + 1) * d)
            for t in range(len(q)):
                weights = (k[:, part] @ q[t, part] / d**0.5).exp()
                out[b, t, part] = weights @ v[:, part] / weights.sum()
    return module.output(out)


# ---- contrast: similarities, targets, loss


def cross_entropy(logits, target):
    "-sum_c target_c log softmax(logits)_c"
    top = max(logits)
    total = top + math.log(sum(math.exp(z - top) for z in logits))
    return sum(q * (total - z) for q, z in zip(target, logits))


def softmax(logits):
    top = max(logits)
    shares = [math.exp(z - top) for z in logits]
    return [share / sum(shares) for share in shares]


def loop_similarities(queries, keys, tau):
    "query . key / tau, a list of rows."
    queries, keys = [one.tolist() for one in queries], [one.tolist() for one in keys]
    return [[sum(x * y for x, y in zip(one, key)) / tau for key in keys] for one in queries]


def loop_id_targets(ids, key_ids):
    "An equal share for each key that has the query's own id."
    hits = [[float(int(key) == int(own)) for key in key_ids] for own in ids]
    return [[hit / sum(row) for hit in row] for row in hits]


def as_rows(x):
    return x.tolist() if torch.is_tensor(x) else x


def loop_soft_targets(logits, targets, alpha):
    "alpha softmax(logits) + (1 - alpha) targets, as rows of a float64 tensor."
    rows = [
        [alpha * p + (1 - alpha) * y for p, y in zip(softmax(z), own)]
        for z, own in zip(as_rows(logits), as_rows(targets))
    ]
    return torch.tensor(rows, dtype=torch.float64)


def loop_contrast(logits, targets):
    "Mean cross-entropy of one direction."
    losses = [cross_entropy(z, list(map(float, own))) for z, own in zip(logits, targets)]
    return sum(losses) / len(losses)


def loop_contrastive_loss(speech, image, speech_keys, image_keys, to_image, to_speech, tau):
    "The mean of both directions; to_image and to_speech are the targets over the keys."
    there = loop_contrast(loop_similarities(speech, image_keys, tau), to_image)
    back = loop_contrast(loop_similarities(image, speech_keys, tau), to_speech)
    return (there + back) / 2


# ---- negatives and matching


def loop_probabilities(logits, ids, key_ids=None):
    "P(c | b) that key c is drawn as the negative of query b, as a float64 tensor."
    key_ids = ids if key_ids is None else key_ids
    P = torch.zeros(logits.shape, dtype=torch.float64)
    for b in range(len(ids)):
        others = [c for c in range(len(key_ids)) if key_ids[c] != ids[b] and key_ids[c] >= 0]
        for c in others:
            P[b, c] = 1 / sum((logits[b, k].double() - logits[b, c].double()).exp() for k in others)
    return P


def loop_matching_loss(positive, negative_image, negative_speech):
    "Mean cross-entropy of all rows of two logits: right pairs are class 1, all others class 0."
    groups = ((positive, [0, 1]), (negative_image, [1, 0]), (negative_speech, [1, 0]))
    losses = [cross_entropy(row, label) for rows, label in groups for row in rows.tolist()]
    return sum(losses) / len(losses) if losses else 0.0


# ---- the step: all of it, with a sampler that takes the best-scored wrong keys


def loop_embeddings(side, head):
    "[CLS] of each row through a projection, as unit vectors in float64."
    rows = [head.weight.double() @ one[0].double() + head.bias.double() for one in side.tokens]
    return [row / row.square().sum().sqrt() for row in rows]


def loop_read(encoders, batch):
    "(Sides, speech vectors, image vectors) of a student or a teacher."
    with torch.no_grad():
        sides = encode(encoders, batch)
    speech = loop_embeddings(sides.speech, encoders.speech_projection)
    return sides, speech, loop_embeddings(sides.image, encoders.image_projection)


def loop_ramp(step, steps):
    return min(1, step / steps) if steps else 1


def loop_step(alignment, batch, step):
    "(contrastive loss, matching loss) of a step whose negatives are the best-scored wrong keys."
    config, queue = alignment.config, alignment.queue
    tau = alignment.model.temperature.item()
    tau = min(max(tau, config.temperature_min), config.temperature_max)
    sides, *fast = loop_read(alignment.model.encoders, batch)  # speech, image
    _, *slow = loop_read(alignment.teacher, batch)
    old = [slot for slot in range(queue.size) if queue.ids[slot] >= 0]
    old = old if step >= config.queue_warmup_steps else []
    keys = slow[1] + [queue.image[slot] for slot in old], slow[0] + [queue.speech[s] for s in old]
    keys = [[key.double() for key in both] for both in keys]
    targets = loop_id_targets(batch.ids, [*batch.ids, *(queue.ids[slot] for slot in old)])
    alpha = config.alpha * loop_ramp(step, config.alpha_ramp_steps)
    logits = [loop_similarities(*both, tau) for both in zip(fast, keys)]
    opinions = [loop_similarities(*both, tau) for both in zip(slow, keys)]
    soft = [loop_soft_targets(one, targets, alpha) for one in opinions]
    losses = [loop_contrast(*both) for both in zip(logits, soft)]
    return sum(losses) / 2, loop_matching(alignment.model, sides, logits, batch.ids.tolist())


def loop_matching(model, sides, logits, ids):
    "Mean cross-entropy of right pairs and of the best-scored wrong ones, judged one by one."

    def judge(spoken, seen, label):
        speech = sides.speech.tokens[spoken, None], sides.speech.mask[spoken, None]
        verdict = model.match(*speech, sides.image.tokens[seen, None])[0].tolist()
        return cross_entropy(verdict, [1 - label, label])

    losses = []
    for b in range(len(ids)):
        wrong = [c for c in range(len(ids)) if ids[c] != ids[b]]
        losses.append(judge(b, b, 1))
        if wrong:
            losses.append(judge(b, max(wrong, key=lambda c: logits[0][b][c]), 0))
            losses.append(judge(max(wrong, key=lambda c: logits[1][b][c]), b, 0))
    return sum(losses) / len(losses)


# ---- the queue


def ring_ids(n_items, size):
    "What a ring of this size holds after items 0 ... n_items - 1: the newest of each slot, or -1."
    return [j + size * ((n_items - 1 - j) // size) if j < n_items else -1 for j in range(size)]


# ---- recall and re-ranking


def every_order(row, right, k):
    "Share of the orders of candidates that respect the scores with a right one in the first k."
    hits = orders = 0
    for order in itertools.permutations(range(len(row))):
        if any(row[a] < row[b] for a, b in zip(order, order[1:])):
            continue
        orders += 1
        hits += any(place in right for place in order[:k])
    return hits / orders


def closed_form(row, right, k):
    "The same by the formula of method 1.8, one query at a time."
    best = max(row[place] for place in right)
    above, tied = sum(one > best for one in row), sum(one == best for one in row)
    positive = sum(row[place] == best for place in right)
    places = min(k - above, tied)
    return 0.0 if places <= 0 else 1 - math.comb(tied - positive, places) / math.comb(tied, places)


def loop_recall(scores, image_of, ks=(1, 5, 10), one=closed_form):
    "Recall in both directions, query by query; images without recordings ask for nothing."
    rows, owners = scores.tolist(), image_of.tolist()
    columns = [[row[image] for row in rows] for image in range(len(rows[0]))]
    there = {k: [one(row, {owner}, k) for row, owner in zip(rows, owners)] for k in ks}
    captions = [
        [place for place, owner in enumerate(owners) if owner == image]
        for image in range(len(columns))
    ]
    back = {
        k: [one(column, right, k) for column, right in zip(columns, captions) if right] for k in ks
    }
    return {
        name: {k: 100 * sum(part[k]) / len(part[k]) for k in ks}
        for name, part in zip(BOTH, (there, back))
    }


def loop_rerank(coarse, score_pairs, k, mode="sim"):
    "The order that each query should end with: lists of candidates, best first."
    orders = []
    for query, row in enumerate(coarse.tolist()):
        ranked = sorted(range(len(row)), key=lambda place: (-row[place], place))
        some = ranked[: min(k, len(row))]
        fine = {
            place: score_pairs(torch.tensor([query]), torch.tensor([place])).item()
            + (row[place] if mode == "sum" else 0)
            for place in some
        }
        orders.append(sorted(some, key=lambda place: (-fine[place], place)) + ranked[len(some) :])
    return orders
