"""Answers to an assignment: code that runs after the library's own functions and replaces some."""

RIGHT = {  # right, and written differently
    "loops": """
def id_targets(ids, key_ids):
    table = torch.zeros(len(ids), len(key_ids))
    for i, mine in enumerate(ids.tolist()):
        same = [j for j, other in enumerate(key_ids.tolist()) if other == mine and mine >= 0]
        if not same:
            raise ValueError(f"nothing shows {mine}")
        for j in same:
            table[i, j] = 1 / len(same)
    return table


def one_way(who, whom, q, heat):
    z = similarity_logits(who, whom, heat)
    total = 0
    for i in range(len(z)):
        total = total - sum(
            q[i, j].detach() * (z[i, j] - torch.logsumexp(z[i], 0)) for j in range(z.shape[1])
        )
    return total / len(z), z


def sic_loss(speech, image, speech_keys, image_keys, targets, temperature):
    pair = targets if isinstance(targets, tuple) else (targets, targets)
    (first, z), (second, y) = (
        one_way(speech, image_keys, pair[0], temperature),
        one_way(image, speech_keys, pair[1], temperature),
    )
    return SicOutput(0.5 * first + 0.5 * second, z, y)
""",
    "einsum": """
def similarity_logits(queries, keys, temperature):
    if not temperature > 0:
        raise ValueError("temperature")
    if queries.shape[-1] != keys.shape[-1]:
        raise ValueError("width")
    return (
        torch.einsum("bd,nd->bn", queries.to(torch.float32), keys.to(torch.float32)) / temperature
    )
""",
}

WRONG = {  # name: (code, numbers of the checks that it must fail, part of a message)
    "ids ignored": (
        """
def id_targets(ids, key_ids):
    if min(ids.tolist()) < 0 or set(ids.tolist()) - set(key_ids.tolist()):
        raise ValueError("ids")
    return torch.eye(len(ids), len(key_ids))
""",
        [1, 3],
        "Ids are ignored",
    ),
    "rows not divided": (
        """
def id_targets(ids, key_ids):
    same = ids[:, None] == key_ids[None, :]
    if ids.min() < 0 or not same.any(1).all():
        raise ValueError("ids")
    return same.float()
""",
        [1, 3],
        "rows do not sum to 1",
    ),
    "nothing refused": (
        """
def id_targets(ids, key_ids):
    same = (ids[:, None] == key_ids[None, :]).float()
    return same / same.sum(1, keepdim=True).clamp_min(1)
""",
        [2],
        "is accepted",
    ),
    "multiplied": (
        """
def similarity_logits(queries, keys, temperature):
    if not temperature > 0:
        raise ValueError("temperature")
    return queries.float() @ keys.float().T * temperature
""",
        [4, 6, 7, 8, 10],
        "multiplied by the temperature",
    ),
    "half precision": (
        """
def similarity_logits(queries, keys, temperature):
    if not temperature > 0:
        raise ValueError("temperature")
    return (queries @ keys.T).float() / temperature
""",
        [10],
        "convert first",
    ),
    "multiplied in the loss": (
        """
def sic_loss(speech, image, speech_keys, image_keys, targets, temperature):
    q, r = targets if isinstance(targets, tuple) else (targets, targets)
    z = similarity_logits(speech, image_keys, 1.0) * temperature
    y = similarity_logits(image, speech_keys, 1.0) * temperature
    first, second = (-(t.detach() * x.log_softmax(1)).sum(1).mean() for t, x in ((q, z), (r, y)))
    return SicOutput((first + second) / 2, z, y)
""",
        [6, 8, 10],
        "multiplied by the temperature",
    ),
    "wrong axis": (
        """
def sic_loss(speech, image, speech_keys, image_keys, targets, temperature):
    q, r = targets if isinstance(targets, tuple) else (targets, targets)
    z, y = (
        similarity_logits(speech, image_keys, temperature),
        similarity_logits(image, speech_keys, temperature),
    )
    loss = lambda t, x: -(t.detach() * x.log_softmax(0)).sum(1).mean()
    return SicOutput((loss(q, z) + loss(r, y)) / 2, z, y)
""",
        [8],
        "softmax over the queries",
    ),
    "one direction": (
        """
def sic_loss(speech, image, speech_keys, image_keys, targets, temperature):
    q, r = targets if isinstance(targets, tuple) else (targets, targets)
    z, y = (
        similarity_logits(speech, image_keys, temperature),
        similarity_logits(image, speech_keys, temperature),
    )
    return SicOutput(-(q.detach() * z.log_softmax(1)).sum(1).mean(), z, y)
""",
        [8, 9, 10],
        "first direction alone",
    ),
    "mean over all cells": (
        """
def sic_loss(speech, image, speech_keys, image_keys, targets, temperature):
    q, r = targets if isinstance(targets, tuple) else (targets, targets)
    z, y = (
        similarity_logits(speech, image_keys, temperature),
        similarity_logits(image, speech_keys, temperature),
    )
    return SicOutput(
        (-(q.detach() * z.log_softmax(1)).mean() - (r.detach() * y.log_softmax(1)).mean()) / 2, z, y
    )
""",
        [5, 6, 8, 10],
        "mean over all cells",
    ),
    "detach missing": (
        """
def sic_loss(speech, image, speech_keys, image_keys, targets, temperature):
    q, r = targets if isinstance(targets, tuple) else (targets, targets)
    z, y = (
        similarity_logits(speech, image_keys, temperature),
        similarity_logits(image, speech_keys, temperature),
    )
    return SicOutput(
        (-(q * z.log_softmax(1)).sum(1).mean() - (r * y.log_softmax(1)).sum(1).mean()) / 2, z, y
    )
""",
        [9],
        "detach them",
    ),
    "own keys": (
        """
def sic_loss(speech, image, speech_keys, image_keys, targets, temperature):
    q, r = targets if isinstance(targets, tuple) else (targets, targets)
    z, y = (
        similarity_logits(speech, speech_keys, temperature),
        similarity_logits(image, image_keys, temperature),
    )
    return SicOutput(
        (
            -(q.detach() * z.log_softmax(1)).sum(1).mean()
            - (r.detach() * y.log_softmax(1)).sum(1).mean()
        )
        / 2,
        z,
        y,
    )
""",
        [7, 8, 10],
        "recordings ask the picture keys",
    ),
}
