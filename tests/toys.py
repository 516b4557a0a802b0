"Toys that several tests share."

import numpy as np
import torch
from torch import nn

from speechimg.alignment import Alignment
from speechimg.attention import Block, Encoded
from speechimg.core import Config
from speechimg.data import Batch, speech_mask
from speechimg.model import SpeechImageModel

# the smallest model that has every part
TINY = {
    "width": 16,
    "dim": 8,
    "heads": 2,
    "fusion_depth": 1,
    "speech_depth": 1,
    "image_depth": 1,
}
# a training in which everything happens: twelve steps, three checkpoints, two evaluations
TINY_RUN = TINY | {
    "batch_size": 4,
    "steps": 12,
    "queue_size": 9,
    "queue_warmup_steps": 3,
    "alpha_ramp_steps": 6,
    "warmup_steps": 2,
    "checkpoint_every": 4,
    "evaluate_every": 6,
    "learning_rate": 3e-3,
    "sim_start_step": 2,
}
STEP_WIDTH = 4


def tiny_model(**settings):
    "An untrained model of this size, the same each time."
    torch.manual_seed(0)
    return SpeechImageModel(Config(**TINY | settings)).eval()


class Ears:
    "Front end: mean loudness in eight bands of the spectrum, a frame every `frame` samples."

    feature_dim = 8

    def __init__(self, frame=1600):
        self.frame, self.params = frame, f"toy ears {frame}"

    def __call__(self, wave):
        frames = np.asarray(wave)[: len(wave) // self.frame * self.frame].reshape(-1, self.frame)
        spectrum = np.abs(np.fft.rfft(frames))[:, : self.frame // 2]
        bands = spectrum.reshape(len(frames), 8, self.frame // 16).mean(-1)
        return np.log1p(bands).astype(np.float16)


class Eyes:
    "Front end: mean colour of 4 x 4 squares."

    params, feature_dim = "toy eyes", 3

    def __call__(self, picture):
        return np.asarray(picture.resize((4, 4)), dtype=np.float32).reshape(16, 3) / 255


class BlockTower(nn.Module):
    "A linear layer, [CLS], one attention block with dropout."

    def __init__(self, config, front_end, length):
        super().__init__()
        self.front_end, self.width = front_end, config.width
        self.linear = nn.Linear(front_end.feature_dim, config.width)
        self.cls = nn.Parameter(torch.randn(config.width))
        self.positions = nn.Parameter(torch.randn(length, config.width))
        self.block = Block(config.width, config.heads, config.dropout)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, features, lengths=None):
        lengths = torch.full((len(features),), features.shape[1]) if lengths is None else lengths
        x = self.linear(features) + self.positions[: features.shape[1]]
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1)
        mask = speech_mask(lengths + 1, x.shape[1])
        return Encoded(self.norm(self.block(x, mask)), mask)


def toy_towers(config):
    "Towers whose features cost next to nothing, for a whole training."
    return BlockTower(config, Ears(), 64), BlockTower(config, Eyes(), 16)


class LinearTower(nn.Module):
    "A linear layer with dropout; [CLS] is the mean of the valid tokens."

    def __init__(self, dropout=0.0, front_end=None, width=STEP_WIDTH):
        super().__init__()
        self.front_end, self.width = front_end, width
        features = front_end.feature_dim if front_end else 2
        self.linear, self.drop = nn.Linear(features, width), nn.Dropout(dropout)

    def forward(self, features, lengths=None):
        lengths = torch.full((len(features),), features.shape[1]) if lengths is None else lengths
        mask = speech_mask(lengths, features.shape[1])
        tokens = self.drop(self.linear(features)).masked_fill(~mask[..., None], 0)
        mean = tokens.sum(1, keepdim=True) / lengths[:, None, None]
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
