"Toys that several tests share."

import torch
from torch import nn

from speechimg.alignment import Alignment
from speechimg.attention import Encoded
from speechimg.core import Config
from speechimg.data import Batch
from speechimg.model import SpeechImageModel

STEP_WIDTH = 4


class LinearTower(nn.Module):
    "A linear layer with dropout; [CLS] is the mean of the valid tokens."

    width, front_end = STEP_WIDTH, None

    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear, self.drop = nn.Linear(2, STEP_WIDTH), nn.Dropout(dropout)

    def forward(self, features, lengths=None):
        lengths = torch.full((len(features),), features.shape[1]) if lengths is None else lengths
        mask = torch.arange(features.shape[1]) < lengths[:, None]
        tokens = self.drop(self.linear(features)).masked_fill(~mask[..., None], 0)
        mean = tokens.sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return Encoded(torch.cat([mean, tokens], 1), torch.cat([mask[:, :1], mask], 1))


def tiny_step(kind=Alignment, lengths=(), dropout=0.0, **settings):
    "A tiny Alignment in training mode whose teacher differs from its student."
    defaults = {
        "width": STEP_WIDTH,
        "dim": 3,
        "heads": 1,
        "fusion_depth": 1,
        "dropout": 0.0,
        "queue_size": 6,
        "queue_warmup_steps": 0,
        "alpha_ramp_steps": 0,
        "alpha": 0.4,
        "temperature": 0.2,
        "momentum": 0.9,
        "batch_size": 4,
        "precision": "float32",
    }
    torch.manual_seed(0)
    towers = LinearTower(dropout), LinearTower(dropout)
    alignment = kind(SpeechImageModel(Config(**defaults | settings), *towers), *lengths)
    with torch.no_grad():
        for parameter in alignment.teacher.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return alignment.train()


def tiny_batch(ids, seed=1, frames=5):
    "Random pairs with these image ids; recordings of 2 to `frames` frames."
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, frames + 1, (len(ids),), generator=generator)
    lengths[0] = frames
    return Batch(
        torch.randn(len(ids), frames, 2, generator=generator),
        lengths,
        torch.randn(len(ids), 3, 2, generator=generator),
        torch.tensor(ids),
        [f"u{i}" for i in range(len(ids))],
    )
