"The plan of a training, against runs that really happen, counts by hand, and plans with holes."

import socket
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch

from speechimg import alignment as step_room
from speechimg.alignment import Alignment
from speechimg.core import Config, InputError, write_json
from speechimg.data import augment_speech
from speechimg.run import plan as room
from speechimg.run.plan import Live, amount, assumed, measure, plan, profile_steps, report

SMALL = dict(
    width=32,
    dim=16,
    heads=2,
    speech_depth=1,
    image_depth=1,
    fusion_depth=1,
    max_seconds=2.0,
    queue_size=64,
    precision="float32",
)
# Four layers of fusion, so that the activations are the largest thing: what a convolution takes
# inside itself for a moment no plan foresees.
TINY = SMALL | dict(
    fusion_depth=4, heads=4, towers="paper", speech_model="tiny", image_model="tiny"
)
CONFIGS = {
    "light": SMALL,
    "small": SMALL | dict(towers="small"),
    "half": SMALL | dict(fusion_depth=4, precision="bfloat16"),
    "learning": TINY | dict(finetune="both"),
    "checkpointing": TINY | dict(finetune="both", checkpointing=True),
    "cached": TINY | dict(qformer=True),
    "uncached": TINY | dict(cache_towers=False, speech_layers="last"),
    "tokens": TINY
    | dict(queue_size=256, token_slots=128, negatives="queue", negatives_per_anchor=2),
}
PAIRS = 12
NO_MATTER = {"steps": 1, "batch_size": 64, "accumulate": 1}  # what a count does not depend on
COUNTED = {}


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    "Many tests plan the same model: each is counted once for all of them."

    def remembered(config, batches):
        key = str((replace(config, **NO_MATTER).to_dict(), batches))
        if key not in COUNTED:
            COUNTED[key] = profile_steps(config, batches)
        return COUNTED[key]

    monkeypatch.setattr(room, "profile_steps", remembered)


@cache
def measured(name):
    return measure(Config(**CONFIGS[name]), PAIRS, steps=2)


def foreseen(planned, pairs=PAIRS):
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


def slowly(*names):
    "Large towers, which take seconds each: left out by `make check`."
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "name", ["small", "light", *slowly(*sorted({*CONFIGS} - {"small", "light"}))]
)
@pytest.mark.slow
def test_the_plan_is_what_a_run_takes(name):
    planned, taken = plan(Config(**CONFIGS[name])), measured(name)
    assert foreseen(planned) == pytest.approx(taken["bytes"], rel=0.1)
    assert PAIRS * planned["saved_per_pair"] == pytest.approx(taken["saved"], rel=0.1)
    assert taken["seconds"] > 0


@pytest.mark.parametrize("name", ["small", *slowly("learning")])
def test_augmentation_stretches_the_longest_recordings(name):
    "Memory is for the longest batch as training sees it; without the stretch it is too small."
    config, saved = Config(**CONFIGS[name]), measured(name)["saved"]
    planned = plan(config)
    assert planned["longest"] == pytest.approx(2.2)
    assert "2.2 s, the longest that the config admits, stretched" in report(planned)
    # the longest of 12 draws is a little shorter than the longest there can be
    assert saved * 0.99 < PAIRS * planned["saved_per_pair"] < saved * 1.05
    unstretched = plan(replace(config, augment=False))
    assert unstretched["longest"] == 2.0 and PAIRS * unstretched["saved_per_pair"] < 0.99 * saved


def test_stretch_is_what_augmentation_does():
    "Ten thousand recordings: none becomes longer than STRETCH says, one nearly."
    lengths = torch.full((10_000,), 1000)
    _, new = augment_speech(torch.zeros(10_000, 1000, 1), lengths, torch.Generator().manual_seed(0))
    assert 1.099 < new.max() / 1000 <= room.STRETCH


@pytest.mark.slow
def test_seconds_of_a_step_are_foreseen_from_those_of_another():
    "Operations per second measured once: within a factor of three for a model of another size."
    known = Config(**CONFIGS["small"] | dict(augment=False))
    other = replace(known, width=128, heads=4, max_seconds=4.0, batch_size=PAIRS)
    operations = PAIRS * plan(known, seconds=2.0)["flops_per_pair"]
    tflops = operations / measure(known, PAIRS)["seconds"] / 1e12
    planned = plan(other, seconds=4.0, tflops=tflops)
    per_step = PAIRS / planned["pairs_per_second"]
    assert 1 / 3 < per_step / measure(other, PAIRS, steps=2)["seconds"] < 3
    assert planned["hours"] * 3600 == pytest.approx(other.steps * per_step)
    assert f"{per_step:.2g} s per step" in report(planned) and "pairs/s" in report(planned)


def coarse_only(patch):
    patch.setattr(room, "EVERYTHING_ON", -1)


def nothing_kept(patch):
    class Forgetting(Alignment):
        def forward(self, *arguments, **options):
            with torch.no_grad():
                output = super().forward(*arguments, **options)
            output.loss = output.loss + 0 * self.model.temperature
            return output

    patch.setattr(room, "Alignment", Forgetting)


def no_wrong_pairs(patch):
    def none(logits, ids, *_, **__):
        return torch.full((len(ids), 1), -1)

    patch.setattr(step_room, "wrong_partners", none)


@pytest.fixture(scope="module")
def deep():
    "A config, and the most bytes that a run of it holds."
    config = Config(**SMALL | dict(fusion_depth=4))
    return config, measure(config, PAIRS, steps=2)["bytes"]


@pytest.mark.parametrize("leave_out", [None, coarse_only, nothing_kept, no_wrong_pairs])
def test_a_count_that_leaves_something_out_is_noticed(leave_out, deep, monkeypatch):
    config, taken = deep
    if leave_out:
        leave_out(monkeypatch)
    [counted] = profile_steps(config, [(PAIRS, 2.2)])
    total = sum(counted["bytes"].values()) + counted["peak"] + counted["batch"]
    if leave_out:
        assert total < 0.9 * taken
    else:
        assert total == pytest.approx(taken, rel=0.1)


@pytest.mark.parametrize("name", ["tokens", *slowly("learning")])
@pytest.mark.slow
def test_without_numbers_it_counts_the_same(name, monkeypatch):
    "Nor does it matter what the model was used for before."
    config = Config(**CONFIGS[name])
    before = [(2, 2.0)] if name == "tokens" else []
    *_, without = profile_steps(config, [*before, (3, 2.0)])
    monkeypatch.setattr(room, "numberless", nullcontext)
    monkeypatch.setattr(room, "Live", lambda known=(), blind=False: Live(known))
    [numbers] = profile_steps(config, [(3, 2.0)])
    assert without["flops"] == numbers["flops"] > 0
    assert without["parameters"] == numbers["parameters"]
    assert without["bytes"] == numbers["bytes"]
    assert without["peak"] == pytest.approx(numbers["peak"], rel=0.01)
    assert without["saved"] == pytest.approx(numbers["saved"], rel=0.01)


def test_auto_is_planned_as_a_gpu_takes_it():
    config = Config(**SMALL | dict(precision="auto"))
    planned, half = plan(config), plan(replace(config, precision="bfloat16"))
    assert planned == half and planned["precision"] == "bfloat16" and planned["tflops"] == 100


def test_torch_is_left_as_it_was():
    convert, layer = torch.nn.Module._apply, torch.nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), room.numberless():
        1 / 0
    assert torch.nn.Module._apply is convert and layer.double().weight.dtype == torch.float64
    assert type(torch.zeros(1)) is torch.Tensor


# the figures


@pytest.mark.slow
def test_parts_by_hand():
    planned = plan(Config(**CONFIGS["tokens"]))
    parts, trained = planned["bytes"], planned["parameters"]["trained"]
    assert parts["gradients"] == 4 * trained and parts["moments"] == 8 * trained
    # two rings of float32, ids and pointer of int64
    assert parts["queue"] == 2 * 256 * 16 * 4 + 256 * 8 + 8
    frames, stretched = (32_000 - 80) // 320, (35_200 - 80) // 320
    patches = 1 + 1 + 16  # the reader adds a [CLS] to each
    slot = (1 + stretched) * 32 * 2 + (1 + stretched) + patches * 32 * 2 + 8
    assert parts["tokens"] == 128 * slot + 8
    assert planned["disk"]["per_recording"] == frames * 3 * 32 * 2
    assert planned["disk"]["per_picture"] == 17 * 32 * 2


def test_what_fits_fits_and_one_more_does_not():
    planned = plan(Config(**SMALL), memory=0.5)
    room_for = 0.9 * 0.5 * 2**30
    most = planned["largest_micro_batch"]
    assert foreseen(planned, most) <= room_for < foreseen(planned, most + 1)
    nothing = plan(Config(**SMALL), memory=0.001)
    assert nothing["largest_micro_batch"] == 0 and "not one pair" in report(nothing)


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


@pytest.mark.slow
def test_longer_recordings_and_more_learning_cost_more():
    short, long = (plan(Config(**SMALL | {"max_seconds": seconds})) for seconds in (2.0, 8.0))
    assert long["per_pair"] > 2 * short["per_pair"]
    learning, saving = (plan(Config(**CONFIGS[name])) for name in ("learning", "checkpointing"))
    assert saving["saved_per_pair"] < learning["saved_per_pair"]
    assert saving["flops_per_pair"] > learning["flops_per_pair"]


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


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a plan downloads nothing")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.slow  # seconds
def test_large_towers_are_counted_without_a_network_and_without_memory(no_network):
    config = Config(towers="paper", finetune="both", speech_model="hubert_base")
    with room.numberless():
        counted = room.parts(room.ready(config, 2, 1.0)[0])
    # HuBERT base 94 million, ViT-g 986 million
    assert 1.05e9 < sum(counted["parameters"][kind] for kind in ("trained", "frozen")) < 1.1e9
    assert sum(counted["bytes"].values()) > 17e9


@pytest.mark.slow  # seconds
@pytest.mark.parametrize("name", ["flickr8k-base", "spokencoco-large"])
def test_the_shipped_configurations_fit_a_gpu_of_80_gib(name, no_network):
    "A step of one micro-batch itself is counted; flickr8k-large is planned like the last."
    config = replace(Config.load(name), precision="bfloat16")
    longest, micro_batch = config.max_seconds * room.STRETCH, config.batch_size // config.accumulate
    assert config.augment and longest == pytest.approx(8.8) and micro_batch == 32
    [counted] = profile_steps(config, [(micro_batch, longest)])
    needed = sum(counted["bytes"].values()) + counted["batch"] + counted["peak"]
    assert needed <= room.SHARE * 80 * 2**30
