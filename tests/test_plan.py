"The plan of a training, against runs that really happen, counts by hand, and the plan with something left out."

import socket
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from speechimg.core import Config, InputError, write_json
from speechimg.data import augment_speech
from speechimg.run import plan as room
from speechimg.run.plan import Live, amount, assumed, measure, plan, profile_step, report

SMALL = dict(
    width=32,
    dim=16,
    heads=2,
    speech_depth=1,
    image_depth=1,
    fusion_depth=1,
    max_seconds=2.0,
    queue_size=64,
)
# Four layers of fusion, so that the activations are the largest thing: what a convolution takes inside itself for a moment no plan foresees.
TINY = SMALL | dict(
    fusion_depth=4, heads=4, towers="paper", speech_model="tiny", image_model="tiny"
)
CONFIGS = {
    "light": SMALL,
    "small": SMALL | dict(towers="small"),
    "half": SMALL | dict(precision="bfloat16"),
    "learning": TINY | dict(finetune="both"),
    "checkpointing": TINY | dict(finetune="both", checkpointing=True),
    "cached": TINY | dict(qformer=True),
    "uncached": TINY | dict(cache_towers=False, speech_layers="last"),
    "tokens": TINY
    | dict(queue_size=256, token_slots=128, negatives="queue", negatives_per_anchor=2),
}


def foreseen(planned, pairs):
    return planned["fixed"] + pairs * planned["per_pair"]


# what is alive


class Forgetful(Live):  # frees nothing
    def gone(self, key):
        self.sizes.pop(key)


class Views(Live):  # counts every tensor that it sees, views too
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        if torch.is_tensor(made):
            self.now += made.nbytes
        self.peak = max(self.peak, self.now)
        return made


def counted(kind):
    x = torch.zeros(100)
    with kind([x]) as live:
        x.view(10, 10).mul_(2)  # nothing new
        y = x + 1  # 400
        z = (y * y).sum()  # 400 more for a moment, then 4
        seen = [live.now, live.peak]
        del y, z
        seen.append(live.now)
    return seen


def test_live_counts_as_by_hand():
    assert counted(Live) == [404, 804, 0]
    assert counted(Forgetful) != [404, 804, 0] and counted(Views) != [404, 804, 0]


def test_memory_from_before_is_not_counted():
    layer, x = torch.nn.Linear(10, 10), torch.zeros(5, 10)
    with Live([*layer.parameters(), x]) as live:
        layer(x).detach()
    with Live([x]) as ignorant:
        layer(x).detach()
    assert (
        live.peak == 200 and ignorant.peak >= live.peak + 400
    )  # the transposed weight is a view of the weight


# foreseen and measured


@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_is_what_a_run_takes(name):
    config, pairs = Config(**CONFIGS[name]), 24
    planned, measured = plan(config, seconds=config.max_seconds), measure(config, pairs, steps=2)
    assert foreseen(planned, pairs) == pytest.approx(measured["bytes"], rel=0.1)
    assert pairs * planned["saved_per_pair"] == pytest.approx(measured["saved"], rel=0.1)
    assert measured["seconds"] > 0


@pytest.mark.parametrize("name", ["small", "learning"])
def test_augmentation_stretches_the_longest_recordings(name):
    "Memory is for the longest batch as training sees it; the plan without the stretch is too small for that."
    config, pairs = Config(**CONFIGS[name] | {"max_seconds": 4.0}), 24
    measured, planned = measure(config, pairs, steps=1)["saved"], plan(config)
    assert planned["longest"] == pytest.approx(
        4.4
    ) and "4.4 s, the longest that the config admits, stretched" in report(planned)
    assert (
        measured * 0.99 < pairs * planned["saved_per_pair"] < measured * 1.05
    )  # the longest of 24 draws is a little shorter than the longest there can be
    unstretched = plan(replace(config, augment=False))
    assert unstretched["longest"] == 4.0 and pairs * unstretched["saved_per_pair"] < 0.98 * measured


def test_stretch_is_what_augmentation_does():
    "Ten thousand recordings: none becomes longer than STRETCH says, one nearly."
    lengths = torch.full((10_000,), 1000)
    _, new = augment_speech(torch.zeros(10_000, 1000, 1), lengths, torch.Generator().manual_seed(0))
    assert 1.099 < new.max() / 1000 <= room.STRETCH


def test_seconds_of_a_step_are_foreseen_from_those_of_another():
    "Operations per second measured once: within a factor of three for a model of another size."
    known, other, pairs = (
        Config(**SMALL | dict(towers="small")),
        Config(**SMALL | dict(towers="small", width=128, heads=4, max_seconds=6.0, batch_size=16)),
        24,
    )
    tflops = (
        pairs * plan(known, seconds=2.0)["flops_per_pair"] / measure(known, pairs)["seconds"] / 1e12
    )
    planned, measured = (
        plan(other, seconds=6.0, tflops=tflops),
        measure(other, other.batch_size)["seconds"],
    )
    assert 1 / 3 < other.batch_size / planned["pairs_per_second"] / measured < 3
    assert planned["hours"] * 3600 == pytest.approx(
        other.steps * other.batch_size / planned["pairs_per_second"]
    )
    assert f"{other.batch_size / planned['pairs_per_second']:.2g} s per step" in report(
        planned
    ) and "pairs/s" in report(planned)


def coarse_only(alignment, batch):
    return sum(side.embedding.sum() for side in room.encode(alignment.model, batch))


def nothing_kept(alignment, batch):
    with torch.no_grad():
        loss = REHEARSE(alignment, batch)
    return loss + 0 * alignment.model.temperature


def no_wrong_pairs(alignment, batch):
    alignment.config = replace(alignment.config)
    alignment.config.negatives_per_anchor = 0
    return REHEARSE(alignment, batch)


REHEARSE = room.rehearse


def test_a_plan_that_leaves_something_out_is_noticed(monkeypatch):
    config, pairs = Config(**SMALL | dict(fusion_depth=4)), 24
    measured = measure(config, pairs, steps=2)["bytes"]
    assert foreseen(plan(config), pairs) == pytest.approx(measured, rel=0.1)
    for mutant in (coarse_only, nothing_kept, no_wrong_pairs):
        monkeypatch.setattr(room, "rehearse", mutant)
        assert foreseen(plan(config), pairs) < 0.9 * measured, mutant


def test_without_numbers_it_counts_the_same(monkeypatch):
    config = Config(**CONFIGS["learning"])
    without = profile_step(config, 3, 2.0)
    monkeypatch.setattr(room, "numberless", nullcontext)
    numbers = profile_step(config, 3, 2.0)
    assert (
        without["flops"] == numbers["flops"] > 0
        and without["parameters"] == numbers["parameters"]
        and without["bytes"] == numbers["bytes"]
    )
    assert without["peak"] == pytest.approx(numbers["peak"], rel=0.01) and without[
        "saved"
    ] == pytest.approx(numbers["saved"], rel=0.01)


def test_torch_is_left_as_it_was():
    convert, layer = torch.nn.Module._apply, torch.nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), room.numberless():
        1 / 0
    assert torch.nn.Module._apply is convert and layer.double().weight.dtype == torch.float64
    assert type(torch.zeros(1)) is torch.Tensor


# the figures


def test_parts_by_hand():
    config = Config(**CONFIGS["tokens"])
    planned = plan(config)
    parts, trained = planned["bytes"], planned["parameters"]["trained"]
    assert parts["gradients"] == 4 * trained and parts["moments"] == 8 * trained
    assert (
        parts["queue"] == 2 * 256 * 16 * 4 + 256 * 8 + 8
    )  # two rings of float32, ids and pointer of int64
    frames, stretched, patches = (
        (32_000 - 80) // 320,
        (35_200 - 80) // 320,
        1 + 1 + 16,
    )  # the reader adds a [CLS] to each
    assert (
        parts["tokens"]
        == 128 * ((1 + stretched) * 32 * 2 + (1 + stretched) + patches * 32 * 2 + 8) + 8
    )
    assert (
        planned["disk"]["per_recording"] == frames * 3 * 32 * 2
        and planned["disk"]["per_picture"] == 17 * 32 * 2
    )


def test_what_fits_fits_and_one_more_does_not():
    planned = plan(Config(**SMALL), memory=0.5)
    room_for = 0.9 * 0.5 * 2**30
    most = planned["largest_micro_batch"]
    assert foreseen(planned, most) <= room_for < foreseen(planned, most + 1)
    assert plan(Config(**SMALL), memory=0.001)[
        "largest_micro_batch"
    ] == 0 and "not one pair" in report(plan(Config(**SMALL), memory=0.001))


def test_steps_epochs_and_hours():
    planned = plan(Config(**SMALL, batch_size=60, accumulate=7, steps=1000), pairs=6000, tflops=2.0)
    assert (
        planned["steps_per_epoch"] == 100
        and planned["epochs"] == 10
        and planned["micro_batch"] == 9
    )
    assert planned["hours"] == pytest.approx(
        1000 * 60 * planned["flops_per_pair"] / 2e12 / 3600, rel=1e-6
    )
    half = plan(Config(**SMALL, batch_size=60), pairs=6000, memory=0.02)
    if half["largest_micro_batch"]:
        assert half["accumulate_needed"] == -(-60 // min(60, half["largest_micro_batch"]))


def test_longer_recordings_and_more_learning_cost_more():
    short, long = (plan(Config(**SMALL | {"max_seconds": seconds})) for seconds in (2.0, 8.0))
    assert long["per_pair"] > 2 * short["per_pair"]
    learning, saving = (
        profile_step(Config(**CONFIGS[name]), 2, 2.0) for name in ("learning", "checkpointing")
    )
    assert saving["saved"] < learning["saved"] and saving["flops"] > learning["flops"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"pairs": 0},
        {"seconds": -1.0},
        {"memory": 0.0},
        {"tflops": float("nan")},
        {"memory": float("inf")},
    ],
)
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(InputError, match=f"--{list(wrong)[0]}"):
        plan(Config(**SMALL), **wrong)


def test_amounts():
    assert [amount(value) for value in (0, 1, 999, 1000, 12_345, 999_999_999, 2e15, 3e18)] == [
        "0 B",
        "1 B",
        "999 B",
        "1.00 kB",
        "12.3 kB",
        "1000 MB",
        "2.00 PB",
        "3000 PB",
    ]
    assert amount(246e9, "FLOP") == "246 GFLOP"


def test_what_a_config_calls_assumed_is_told(tmp_path):
    write_json(tmp_path / "mine.json", {"momentum": 0.99, "assumed": ["momentum", "alpha"]})
    assert assumed(str(tmp_path / "mine.json")) == ["momentum", "alpha"] and assumed(None) == []
    assert "momentum, alpha" in report(plan(Config(**SMALL)) | {"assumed": ["momentum", "alpha"]})
    Config.load(tmp_path / "mine.json")


@pytest.mark.slow  # a minute on a busy machine
def test_large_towers_are_planned_without_a_network_and_without_memory(monkeypatch):
    def refuse(*_):
        raise AssertionError("a plan downloads nothing")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    planned = plan(
        Config(towers="paper", finetune="both", speech_model="hubert_base", max_seconds=4.0)
    )
    assert (
        1.05e9 < sum(planned["parameters"][kind] for kind in ("trained", "frozen")) < 1.1e9
    )  # HuBERT base 94 million, ViT-g 986 million
    assert planned["needed"] > 17e9 and replace(Config(), steps=1).steps == 1


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize(
    "name", ["flickr8k-base", "spokencoco-large"]
)  # flickr8k-large is planned like the last
def test_the_shipped_configurations_fit_a_gpu_of_80_gib(name):
    config = Config.load(name)
    planned = plan(config)
    assert (
        config.augment
        and planned["longest"] == pytest.approx(8.8)
        and planned["micro_batch"] == 32 <= planned["largest_micro_batch"]
    )
