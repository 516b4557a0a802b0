"""Steps of training on made-up features, by as many processes as torchrun starts.

    python distributed_steps.py OUT '{"case": [{"setting": value}, "mistake"]}'

Each process writes what it has after each step to OUT.RANK; test_distributed.py compares.
"""

import json
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from unittest.mock import patch

import safetensors.torch
import torch
from torch.nn.parallel import DistributedDataParallel

import speechimg.alignment as alignment_room
from speechimg.alignment import Alignment
from speechimg.core import Config, seed_everything
from speechimg.data import Batch
from speechimg.model import SpeechImageModel
from speechimg.run.distributed import AllRows, Share, average, processes, world
from speechimg.run.queue_negatives import QueueAlignment
from speechimg.towers.light import LightImageTower, LightSpeechTower
from speechimg.towers.lite import LiteImage
from speechimg.train import average_of, generator_for, make_optimizer, share, train_step

TINY = {
    "width": 16,
    "dim": 8,
    "heads": 2,
    "fusion_depth": 1,
    "speech_depth": 1,
    "image_depth": 1,
    "batch_size": 7,
    "steps": 3,
    "queue_size": 9,
    "queue_warmup_steps": 1,
    "alpha_ramp_steps": 2,
    "warmup_steps": 0,
    "learning_rate": 1e-2,
    "sim_start_step": 0,
    "augment": False,
    "captions_per_image": 0,
    "precision": "float32",
}


def pairs(step):
    "Seven pairs of five pictures with 4 to 10 frames."
    generator = generator_for(9, step)
    lengths = torch.randint(4, 11, (7,), generator=generator)
    lengths[-1] = 12  # the longest one is in the last process's part
    return (
        torch.randn(7, 12, 384, generator=generator),
        lengths,
        torch.randn(7, 4, 320, generator=generator),
        torch.tensor([3, 1, 4, 1, 5, 9, 3]) + 10 * step,
    )


def part(step, rows):
    "A Batch of these pairs, padded only as far as they need."
    speech, lengths, image, ids = pairs(step)
    rows = torch.tensor(rows)
    most = int(lengths[rows].max())
    behind = torch.arange(most) >= lengths[rows, None]
    frames = speech[rows, :most].masked_fill(behind[..., None], 0.0)
    return Batch(frames, lengths[rows], image[rows], ids[rows], [str(row) for row in rows.tolist()])


# ---- mistakes: a comparison that does not notice them would be worth nothing


def no_gradient(context, gradient):
    "A row that served another process learns nothing from it."
    return gradient.split(context.counts)[world().rank], None


class Alone(Share):
    "Each process believes that it is alone."

    def __init__(self, count, device):
        self.counts, self.alone, self.first = [count], True, 0

    def all(self, x):
        return x

    def all_tokens(self, tokens, mask):
        return tokens, mask

    def mine(self, x):
        return x


def other_draws(logits, ids, generator, *options):
    "Each process draws from a source of its own."
    source = torch.Generator().manual_seed(world().rank + 5)
    return right_draws(logits, ids, source, *options)


def other_rows(share, x):
    "My logits in the rows of the first process, whoever I am."
    return torch.nn.functional.pad(x, (0, 0, 0, sum(share.counts) - len(x)))


right_draws = alignment_room.sample_negatives
MISTAKES = {
    "": [],
    "no gradient": [(AllRows, "backward", staticmethod(no_gradient))],
    "own keys": [
        (alignment_room, "Share", Alone),
        (alignment_room, "average", lambda tensors: None),
    ],
    "other draws": [(alignment_room, "sample_negatives", other_draws)],
    "other rows": [(Share, "among_all", other_rows)],
    "unequal parts": [(Share, "weight", lambda share, mine, of_all: 1.0)],
}


# ---- the steps


def start(config):
    "(Alignment, what is called for a step, optimiser); the processes start differently on purpose."
    seed_everything(0)
    front = SimpleNamespace(size=64, feature_dim=LiteImage.feature_dim)
    model = SpeechImageModel(config, LightSpeechTower(config), LightImageTower(config, front))
    alignment = QueueAlignment(model, 14, 5) if config.token_slots else Alignment(model)
    alignment.train()
    if world().rank:  # they end alike only if somebody sees to it
        torch.nn.init.normal_(alignment.model.fusion.verdict.weight)
    optimizer = make_optimizer(alignment.model, config)
    for group in optimizer.param_groups:
        # A gradient that is 0 but for rounding (biases of keys) must not become a step.
        group["eps"] = 1e-3
    if world().size == 1:
        return alignment, alignment, optimizer
    options = {"broadcast_buffers": False, "find_unused_parameters": True}
    return alignment, DistributedDataParallel(alignment, **options), optimizer


def steps(settings):
    "{name: tensor}: loss, gradients, weights, teacher and queue after each step."
    config = Config.from_dict(TINY | settings)
    alignment, stepper, optimizer = start(config)
    found = {}
    for step in range(config.steps):
        mine = share(list(range(7)), world().size)[world().rank]
        parts = [part(step, rows) for rows in share(mine, config.accumulate)]
        outputs, norm = train_step(stepper, optimizer, parts, step, generator_for(0, 4, step))
        loss = torch.tensor([average_of(outputs, "loss")], dtype=torch.float64)
        average([loss])
        found |= {f"{step}/loss": loss, f"{step}/norm": torch.tensor(norm, dtype=torch.float64)}
        for name, parameter in alignment.model.named_parameters():
            if parameter.grad is not None:
                found[f"{step}/gradient/{name}"] = parameter.grad.clone()
        found |= {f"{step}/{name}": one.clone() for name, one in alignment.state_dict().items()}
    return found


def main(out, cases):
    torch.set_num_threads(1)
    with processes():
        found = {}
        for case, (settings, mistake) in json.loads(cases).items():
            with ExitStack() as stack:
                for place, name, wrong in MISTAKES[mistake]:
                    stack.enter_context(patch.object(place, name, wrong))
                found |= {f"{case}: {name}": one for name, one in steps(settings).items()}
        tensors = {name: one.contiguous() for name, one in found.items()}
        safetensors.torch.save_file(tensors, f"{out}.{world().rank}")


if __name__ == "__main__":
    main(*sys.argv[1:])
