"""Answers to an assignment: code that runs after the library's own functions and replaces some."""

RIGHT = {  # right, and written differently
    "loops": """
import math


def alpha_ramp(step, ramp_steps, alpha):
    if step < 0 or ramp_steps < 0:
        raise ValueError("steps")
    if alpha < 0 or alpha > 1:
        raise ValueError("alpha")
    if ramp_steps == 0:
        return alpha
    return alpha * min(1, step / ramp_steps)


def soft_targets(teacher_logits, targets, alpha):
    if tuple(teacher_logits.shape) != tuple(targets.shape) or alpha < 0 or alpha > 1:
        raise ValueError("soft_targets")
    rows = []
    for z, y in zip(teacher_logits.tolist(), targets.tolist()):
        if alpha == 0:
            rows.append(y)
            continue
        e = [math.exp(one - max(z)) for one in z]
        rows.append([alpha * p / sum(e) + (1 - alpha) * t for p, t in zip(e, y)])
    return torch.tensor(rows)


def target_entropy(targets):
    return torch.tensor(
        sum(-q * math.log(q) for row in targets.tolist() for q in row if q > 0) / len(targets)
    )
""",
    "detached": """
def alpha_ramp(step, ramp_steps, alpha):
    if min(step, ramp_steps) < 0 or not 0.0 <= alpha <= 1.0:
        raise ValueError("alpha_ramp")
    return alpha if ramp_steps <= step else alpha / ramp_steps * step


def soft_targets(teacher_logits, targets, alpha):
    if teacher_logits.shape != targets.shape:
        raise ValueError("shapes")
    if not 0 <= alpha <= 1:
        raise ValueError("alpha")
    labels = targets.detach().to(torch.float32)
    if not alpha:
        return labels
    opinion = torch.log_softmax(teacher_logits.detach(), dim=-1, dtype=torch.float32).exp()
    return torch.lerp(labels, opinion, float(alpha))


def target_entropy(targets):
    q = targets.detach().float()
    return torch.where(q > 0, -q * q.clamp_min(1e-30).log(), 0.0).sum(-1).mean()
""",
}

CHECKED = """
def soft_targets(teacher_logits, targets, alpha):
    if teacher_logits.shape != targets.shape or not 0 <= alpha <= 1:
        raise ValueError("soft_targets")
    z, y = teacher_logits.detach().float(), targets.detach().float()
    if alpha == 0:
        return y
"""
RAMP = """
def alpha_ramp(step, ramp_steps, alpha):
    if step < 0 or ramp_steps < 0 or not 0 <= alpha <= 1:
        raise ValueError("alpha_ramp")
"""

WRONG = {  # name: (code, numbers of the checks that it must fail, part of a message)
    "one step early": (
        RAMP
        + """
    return alpha * min(1, (step + 1) / max(1, ramp_steps))
""",
        [1, 3, 12],
        "one step early",
    ),
    "one step late": (
        RAMP
        + """
    return alpha * min(1, max(0, step - 1) / ramp_steps) if ramp_steps else alpha
""",
        [1, 3, 12],
        "one step late",
    ),
    "never ends": (
        RAMP
        + """
    return alpha * step / ramp_steps if ramp_steps else alpha
""",
        [1, 3, 12],
        "The ramp never ends",
    ),
    "divided by zero": (
        RAMP
        + """
    return alpha * min(1, step / ramp_steps)
""",
        [2],
        "division by zero",
    ),
    "any ramp accepted": (
        """
def alpha_ramp(step, ramp_steps, alpha):
    return alpha * min(1, step / ramp_steps) if ramp_steps else alpha
""",
        [2],
        "is accepted",
    ),
    "alpha on the wrong term": (
        CHECKED
        + """
    return (1 - alpha) * z.softmax(1) + alpha * y
""",
        [4, 8, 9, 12],
        "Alpha is on the wrong term",
    ),
    "softmax over the queries": (
        CHECKED
        + """
    return alpha * z.softmax(0) + (1 - alpha) * y
""",
        [4, 8, 9, 12],
        "The softmax runs over the queries",
    ),
    "softmax of everything": (
        CHECKED
        + """
    return alpha * z.flatten().softmax(0).reshape(z.shape) + (1 - alpha) * y
""",
        [8, 9, 12],
        "soft_targets with alpha",
    ),
    "mixed before the softmax": (
        CHECKED
        + """
    return (alpha * z + (1 - alpha) * y).softmax(1)
""",
        [4, 8, 9, 12],
        "mixed before the softmax",
    ),
    "labels keep their weight": (
        CHECKED
        + """
    return alpha * z.softmax(1) + y
""",
        [4, 8, 9, 12],
        "The label should lose weight",
    ),
    "detach missing": (
        """
def soft_targets(teacher_logits, targets, alpha):
    if teacher_logits.shape != targets.shape or not 0 <= alpha <= 1:
        raise ValueError("soft_targets")
    if alpha == 0:
        return targets.float()
    return alpha * teacher_logits.float().softmax(1) + (1 - alpha) * targets.float()
""",
        [5],
        "a gradient flows into the teacher's logits",
    ),
    "detach missing where alpha is 0": (
        """
def soft_targets(teacher_logits, targets, alpha):
    if teacher_logits.shape != targets.shape or not 0 <= alpha <= 1:
        raise ValueError("soft_targets")
    if alpha == 0:
        return targets.float()
    return (alpha * teacher_logits.float().softmax(1) + (1 - alpha) * targets.float()).detach()
""",
        [5],
        "with alpha 0: a gradient flows into the labels",
    ),
    "softmax in half precision": (
        """
def soft_targets(teacher_logits, targets, alpha):
    if teacher_logits.shape != targets.shape or not 0 <= alpha <= 1:
        raise ValueError("soft_targets")
    y = targets.detach().float()
    return alpha * teacher_logits.detach().softmax(1).float() + (1 - alpha) * y if alpha else y
""",
        [9],
        "made in half precision",
    ),
    "half precision goes out": (
        """
def soft_targets(teacher_logits, targets, alpha):
    if teacher_logits.shape != targets.shape or not 0 <= alpha <= 1:
        raise ValueError("soft_targets")
    y = targets.detach()
    return alpha * teacher_logits.detach().softmax(1) + (1 - alpha) * y if alpha else y
""",
        [9],
        "the type is not",
    ),
    "a broken teacher gets through": (
        CHECKED.replace("if alpha == 0", "if alpha < 0")
        + """
    return alpha * z.softmax(1) + (1 - alpha) * y
""",
        [6],
        "do not ask the teacher",
    ),
    "0 log 0": (
        """
def target_entropy(targets):
    q = targets.detach().float()
    return -(q * q.log()).sum(1).mean()
""",
        [10, 11, 12],
        "0 * log 0 is NaN",
    ),
    "bits": (
        """
def target_entropy(targets):
    q = targets.detach().float()
    return torch.special.entr(q).sum(1).mean() / torch.tensor(2.0).log()
""",
        [10, 11, 12],
        "This is in bits",
    ),
    "mean over all cells": (
        """
def target_entropy(targets):
    return torch.special.entr(targets.detach().float()).mean()
""",
        [10, 11, 12],
        "mean over all cells",
    ),
    "entropy with a gradient": (
        """
def target_entropy(targets):
    q = targets.float()
    return -(q * q.clamp_min(1e-12).log()).sum(1).mean()
""",
        [11],
        "a gradient flows into the targets",
    ),
}
