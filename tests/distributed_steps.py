"""Three steps of training on made-up features, by as many processes as torchrun starts; test_distributed.py compares the results.

python distributed_steps.py OUT.safetensors '{"setting": value}' [mistake]
"""

import json
import sys
from types import SimpleNamespace

import safetensors.torch
import torch
from torch.nn.parallel import DistributedDataParallel

import speechimg.alignment as alignment_room
import speechimg.run.distributed as distributed_room
from speechimg.alignment import Alignment
from speechimg.core import Config, seed_everything
from speechimg.data import Batch
from speechimg.model import SpeechImageModel
from speechimg.run.distributed import average, processes
from speechimg.run.queue_negatives import QueueAlignment
from speechimg.towers.light import LightImage, LightImageTower, LightSpeechTower
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
}


def pairs(step):
    "Seven pairs of five pictures with 4 to 10 frames."
    generator = generator_for(9, step)
    lengths = torch.randint(4, 11, (7,), generator=generator)
    lengths[-1] = 12  # the longest one is in the last process's part
    return (
        torch.randn(7, 12, 96, generator=generator),
        lengths,
        torch.randn(7, 4, 320, generator=generator),
        torch.tensor([3, 1, 4, 1, 5, 9, 3]) + 10 * step,
    )


def part(step, rows):
    "A Batch of these pairs, padded only as far as they need."
    speech, lengths, image, ids = pairs(step)
    rows = torch.tensor(rows)
    most = int(lengths[rows].max())
    return Batch(
        speech[rows, :most].masked_fill(
            (torch.arange(most) >= lengths[rows, None])[..., None], 0.0
        ),
        lengths[rows],
        image[rows],
        ids[rows],
        [str(row) for row in rows.tolist()],
    )


def put_back(mistake):
    "Make a mistake on purpose: a comparison that does not notice would be worth nothing."
    if mistake == "no gradient":
        distributed_room._AllRows.backward = staticmethod(
            lambda context, gradient: (
                gradient.split(context.counts)[distributed_room.world().rank],
                None,
            )
        )
    if mistake == "own keys":  # each process believes that it is alone
        alone = {
            "world": lambda: distributed_room.World(0, 1),
            "row_counts": lambda n, device: [n],
            "longest": lambda T, device: T,
            "sum_over_all": lambda number, device: number,
            "all_rows": lambda x, counts=None: x.detach(),
            "all_rows_with_gradient": lambda x, counts=None: x,
        }
        for name, function in alone.items():
            setattr(alignment_room, name, function)
    if mistake == "other draws":
        right = alignment_room.sample_negatives
        alignment_room.sample_negatives = lambda logits, ids, generator, *rest: right(
            logits, ids, torch.Generator().manual_seed(distributed_room.world().rank + 5), *rest
        )
    if mistake == "unequal parts":
        alignment_room.sum_over_all = lambda number, device: number * distributed_room.world().size


def make(model):
    "The step that a config asks for."
    return QueueAlignment(model, 14, 5) if model.config.token_slots else Alignment(model)


def main(out, settings, mistake=""):
    torch.set_num_threads(1)
    put_back(mistake)
    config = Config.from_dict(TINY | json.loads(settings))
    with processes() as world:
        seed_everything(0)
        front = SimpleNamespace(size=64, feature_dim=LightImage.feature_dim)
        towers = LightSpeechTower(config), LightImageTower(config, front)
        alignment = make(SpeechImageModel(config, *towers)).train()
        if world.rank:
            torch.nn.init.normal_(
                alignment.model.fusion.verdict.weight
            )  # the processes start alike only if somebody sees to it
        stepper = (
            alignment
            if world.size == 1
            else DistributedDataParallel(
                alignment, broadcast_buffers=False, find_unused_parameters=True
            )
        )
        optimizer, found = make_optimizer(alignment.model, config), {}
        for group in optimizer.param_groups:
            group["eps"] = (
                1e-3  # a gradient that is 0 but for rounding (biases of keys) must not become a step
            )
        for step in range(config.steps):
            mine = share(list(range(7)), world.size)[world.rank]
            outputs, norm = train_step(
                stepper,
                optimizer,
                [part(step, rows) for rows in share(mine, config.accumulate)],
                step,
                generator_for(0, 4, step),
            )
            loss = torch.tensor([average_of(outputs, "loss")], dtype=torch.float64)
            average([loss])
            found |= {f"{step}/loss": loss, f"{step}/norm": torch.tensor(norm, dtype=torch.float64)}
            found |= {
                f"{step}/gradient/{name}": p.grad.clone()
                for name, p in alignment.model.named_parameters()
                if p.grad is not None
            }
            found |= {f"{step}/{name}": one.clone() for name, one in alignment.state_dict().items()}
        safetensors.torch.save_file(
            {name: one.contiguous() for name, one in found.items()}, f"{out}.{world.rank}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
