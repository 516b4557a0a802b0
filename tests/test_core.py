"core: errors in one line, files whole or not at all, settings that cannot be misspelt; attention."

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from forked import Child
from hypothesis import given
from hypothesis import strategies as st
from oracles import loop_attention
from torch import nn

from speechimg import core
from speechimg.attention import Attention, Block, clean
from speechimg.core import Config, InputError, atomic_write

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def complaint(make, *arguments, **options):
    "The message of the InputError that this raises: one line with place, problem and remedy."
    with pytest.raises(InputError) as caught:
        make(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text and caught.value.where and caught.value.problem and caught.value.remedy
    return text


# Errors


@given(st.text(), st.text(), st.text())
def test_an_error_is_one_line_and_survives_pickling(where, problem, remedy):
    error = InputError(where, problem, remedy)
    assert len(str(error).splitlines()) == 1
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


# Files


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, mode):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path, mode) as file:
            file.write("new" if mode == "w" else b"new")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["results.json"]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_bytes(b"old")

    def write():
        with atomic_write(path) as file:
            file.write(b"half")
            file.flush()
            print("writing", flush=True)
            time.sleep(60)

    process = Child(write, os.environ, subprocess.DEVNULL, subprocess.PIPE, subprocess.DEVNULL)
    assert process.stdout.read(8) == b"writing\n" and len(os.listdir(tmp_path)) == 2
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    assert path.read_bytes() == b"old"
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_atomic_write_makes_folders_and_keeps_text_utf8(tmp_path):
    core.write_json(tmp_path / "a" / "b.json", {"name": "été"})
    assert core.read_json(tmp_path / "a" / "b.json") == {"name": "été"}


def test_json_without_nan(tmp_path):
    core.write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError):
        core.write_json(tmp_path / "a.json", float("nan"))
    assert core.read_json(tmp_path / "a.json") == 1


@given(st.binary(max_size=40))
def test_any_bytes_are_json_or_an_input_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(content)
    try:
        expected = json.loads(content.decode("utf-8"))
    except ValueError:
        assert "a.json" in complaint(core.read_json, path)
    else:
        assert repr(core.read_json(path)) == repr(expected)


def test_missing_json_names_the_file(tmp_path):
    assert "none.json" in complaint(core.read_json, tmp_path / "none.json")
    assert "cannot be read" in complaint(core.read_json, tmp_path)


# Settings


def test_a_config_survives_its_file(tmp_path):
    config = Config(width=12, heads=3, alpha=1, negatives="queue", token_slots=7, augment=False)
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "values, words",
    [
        ({"widht": 3}, ["widht", "did you mean width?"]),
        ({"zzz": 3}, ["zzz", "temperature"]),
        ({"steps": "3"}, ["steps", "'3'", "whole number"]),
        ({"steps": 3.0}, ["steps", "whole number"]),
        ({"steps": True}, ["steps", "whole number"]),
        ({"steps": None}, ["steps", "None"]),
        ({"augment": 1}, ["augment", "true or false"]),
        ({"towers": ["light"]}, ["towers", "text"]),
        ({"towers": "larger"}, ["towers", "larger", "light, small"]),
        ({"steps": 0}, ["steps", "at least 1"]),
        ({"alpha": 1.01}, ["alpha", "at most 1"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "finite"]),
        ({"width": 10, "heads": 3}, ["heads", "10"]),
        ({"temperature": 0.9}, ["temperature", "0.9"]),
        ({"token_slots": 2000}, ["token_slots", "1024"]),
        ({"negatives": "queue"}, ["negatives", "token_slots"]),
        ([1], ["list"]),
        (None, ["NoneType"]),
    ],
)
def test_wrong_settings_are_named(tmp_path, values, words):
    text = complaint(Config.from_dict, values)
    assert all(word in text for word in words), text
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert "run.json" in complaint(Config.load, tmp_path / "run.json")


def test_settings_of_a_file_only_override():
    assert Config.from_dict({"steps": 5}) == Config(steps=5)
    assert isinstance(Config(temperature_max=1).temperature_max, float)


def test_parts_are_inherited_and_flat():
    "Three parts, no name twice; some twenty settings are for learners, and each says what it is."
    parts = [core.ModelSettings, core.MethodSettings, core.TrainingSettings]
    names = [item.name for part in parts for item in fields(part)]
    assert sorted(names) == sorted(Config().to_dict()) and len(names) == len(set(names))
    assert 15 <= len(Config.essentials()) <= 25 and set(Config.essentials()) <= set(names)
    assert all(item.metadata["about"] for item in fields(Config))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_files_of_older_versions_load(tmp_path, precision):
    core.write_json(tmp_path / "old.json", {"precision": precision})
    assert Config.load(tmp_path / "old.json").precision == precision
    assert Config().precision == "auto"


# Precision


def processor(monkeypatch, able=True, widest="AVX512"):
    "A processor that can do this, as PyTorch tells it."
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: able)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: widest)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def test_precision_follows_the_processor(monkeypatch):
    processor(monkeypatch)
    assert core.resolved_precision("auto", "cpu") == "bfloat16"
    assert core.resolved_precision("float32", "cpu") == "float32"
    processor(monkeypatch, able=False)
    assert core.resolved_precision("auto", torch.device("cpu")) == "float32"
    assert core.resolved_precision("bfloat16", "cpu") == "bfloat16"
    processor(monkeypatch, widest="AVX2")  # what ATEN_CPU_CAPABILITY=avx2 makes of it
    assert core.resolved_precision("auto", "cpu") == "float32"


@pytest.mark.parametrize(
    "cap, native",
    [
        *(("AVX2", False), ("avx512_core", False), ("AVX512_CORE_VNNI", False)),
        *(("AVX512_CORE_BF16", True), ("avx512_core_amx", True), ("DEFAULT", True), ("", True)),
        ("something new", False),
    ],
)
@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_precision_obeys_the_cap(monkeypatch, name, cap, native):
    processor(monkeypatch)
    monkeypatch.setenv(name, cap)
    assert core.resolved_precision("auto", "cpu") == ("bfloat16" if native else "float32")


def test_precision_is_float32_when_nobody_knows(monkeypatch):
    processor(monkeypatch)
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert core.resolved_precision("auto", "cpu") == "float32"
    assert core.resolved_precision("auto", "meta") == "float32"


@pytest.mark.parametrize("native", [True, False])
def test_precision_of_a_gpu_does_not_count_imitation(monkeypatch, native):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    expected = "bfloat16" if native else "float32"
    assert core.resolved_precision("auto", "cuda") == expected


@pytest.mark.slow
def test_pytorch_held_back_means_float32():
    "Read by PyTorch once, at its start: so in a process of its own."
    code = "import torch\nfrom speechimg import core\n"
    code += "torch.cpu._is_avx512_bf16_supported = lambda: True\n"
    code += "print(torch.backends.cpu.get_cpu_capability(), core.resolved_precision('auto', 'cpu'))"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "float32"


# Seeds and folders


def test_generators_do_not_notice_other_draws():
    first = torch.rand(3, generator=core.seed_everything(3))
    generator = core.seed_everything(3)
    torch.rand(5)
    assert torch.equal(torch.rand(3, generator=generator), first)


def test_folders_can_be_moved(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECHIMG_DATA", str(tmp_path))
    monkeypatch.setenv("SPEECHIMG_CACHE", str(tmp_path / "a" / "cache"))
    assert core.data_dir() == tmp_path
    assert core.cache_dir() == tmp_path / "a" / "cache" and core.cache_dir().is_dir()
    monkeypatch.setenv("SPEECHIMG_DATA", str(tmp_path / "nowhere"))
    assert "nowhere" in complaint(core.data_dir)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPEECHIMG_CACHE", str(tmp_path / "file" / "cache"))
    assert "SPEECHIMG_CACHE" in complaint(core.cache_dir)


def test_the_clone_has_its_data_without_being_told(monkeypatch, tmp_path):
    monkeypatch.delenv("SPEECHIMG_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert str(core.data_dir()) == os.path.join(ROOT, "data")


# Start-up: what is imported, each row in a fork of a process that has imported PyTorch and no more

IMPORTS = """
import json, os, sys
import einops, numpy, torch
before = set(sys.modules)
for names in sys.argv[1:]:
    if not os.fork():
        exec(f"import {names}")
        print(json.dumps([names, sorted(set(sys.modules) - before)]), flush=True)
        os._exit(0)
    os.wait()
"""
PLOTS = {"matplotlib", "seaborn"}
EVERY = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(Path(ROOT, "speechimg").rglob("*.py"))
    if not path.stem.startswith("_")
]
FILES = {"pandas", "soundfile", "soxr", "PIL", "torchaudio", "tqdm"}
TOWERS = {"torchaudio"}
OTHERS = {"transformers", "mteb", "datasets", "scipy", "IPython", "ipywidgets", "tensorboard"}
LIGHT = {  # modules: what they must not bring along
    **{f"speechimg.{one}": PLOTS | FILES | {"IPython", "fastcore"} for one in ("core", "data")},
    "speechimg.corpora": PLOTS | FILES | {"IPython", "fastcore"},
    "speechimg.speech, speechimg.image, speechimg.towers.light": PLOTS | TOWERS,
    "speechimg.look.explore, speechimg.look.attention_view, speechimg.look.studio": {
        *("ipywidgets", "anywidget", "matplotlib.pyplot", "seaborn")
    },
    "speechimg.run.mteb": {"mteb", "datasets", "transformers", "pandas"},
    ", ".join(EVERY): PLOTS | TOWERS | OTHERS | {"pandas", "soxr"},
}


@pytest.fixture(scope="module")
def imported():
    "What importing brings along: {modules: names}."
    command = [sys.executable, "-c", IMPORTS, *LIGHT, "pandas"]
    environment = os.environ | {"PYTHONPATH": ROOT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {names: set(brought) for names, brought in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("names", LIGHT, ids=range(len(LIGHT)))
def test_importing_is_light(names, imported):
    assert set(names.split(", ")) <= imported[names] and not imported[names] & LIGHT[names]
    assert "pandas" in imported["pandas"]


# Attention


def check_attention(make):
    "Equal to the loop; rubbish behind the mask changes no bit."
    torch.manual_seed(0)
    module, x, context = make(12, 3), torch.randn(3, 4, 12), torch.randn(3, 5, 12)
    mask = torch.arange(5) < torch.tensor([[5], [2], [1]])
    expected = loop_attention(module, x, context, mask)
    torch.testing.assert_close(module(x, context, mask), expected)
    for rubbish in (1e30, float("inf"), float("nan")):
        spoilt = context.masked_fill(~mask[..., None], rubbish)
        assert torch.equal(module(x, spoilt, mask), module(x, context, mask))
        torch.testing.assert_close(module.weights(x, spoilt, mask).sum(-1), torch.ones(3, 3, 4))


class Unmasked(Attention):
    "Padding takes part."

    def forward(self, x, context=None, mask=None):
        return super().forward(x, context)


class OnlyBooleans(Attention):
    "The mask hides the scores, but the values behind it stay what they are: zero times NaN is NaN."

    def forward(self, x, context=None, mask=None):
        context = x if context is None else context
        q, k, v = (
            self.split(layer(y))
            for layer, y in ((self.query, x), (self.key, context), (self.value, context))
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask[:, None, None], -torch.inf)
        return self.output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Multiplied(Attention):
    "Zeros by multiplication."

    def forward(self, x, context=None, mask=None):
        context = (x if context is None else context) * mask[..., None]
        return super().forward(x, context, mask) + 0 * context.sum()


class ZerosAreNothing(Attention):
    "Zero tokens instead of a mask: their score is the bias' score, not minus infinity."

    def forward(self, x, context=None, mask=None):
        return super().forward(x, clean(x if context is None else context, mask))


class SmallConstant(Attention):
    "Subtracts 10 000 in half precision, then adds the score: large scores win (pitfall 20)."

    def forward(self, x, context=None, mask=None):
        q, k, v = (
            self.split(layer(y))
            for layer, y in ((self.query, x), (self.key, context), (self.value, context))
        )
        scores = q @ k.mT / q.shape[-1] ** 0.5 + torch.where(mask, 0.0, -1e4)[:, None, None]
        return self.output((scores.softmax(-1) @ v.nan_to_num()).transpose(1, 2).flatten(2))


def test_attention_is_the_formula_and_padding_is_nothing():
    check_attention(Attention)


@pytest.mark.parametrize(
    "wrong", [Unmasked, OnlyBooleans, Multiplied, ZerosAreNothing, SmallConstant]
)
def test_the_check_notices_wrong_attention(wrong):
    with pytest.raises(AssertionError):
        check_attention(wrong)


def test_attention_takes_half_precision():
    module, x = Attention(8, 2).bfloat16(), torch.randn(2, 3, 8).bfloat16()
    mask = torch.tensor([[True, False, False], [True, True, True]])
    out = module(x, mask=mask)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert module.weights(x, mask=mask).dtype == torch.float32


# Blocks


def check_block(make):
    "Padding changes no bit and comes out as zero; without it the same; gradients stay finite."
    torch.manual_seed(0)
    block = make(8, 2, cross=True).eval()
    x, context = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    mask, context_mask = (
        torch.arange(5) < torch.tensor([[5], [3], [1]]),
        torch.arange(4) < torch.tensor([[1], [4], [2]]),
    )
    out = block(x, mask, context, context_mask)
    assert (out[~mask] == 0).all()
    for rubbish in (1e30, float("nan")):
        spoilt = [
            y.masked_fill(~m[..., None], rubbish) for y, m in ((x, mask), (context, context_mask))
        ]
        assert torch.equal(block(spoilt[0], mask, spoilt[1], context_mask), out)
    for b in range(3):
        n, s = int(mask[b].sum()), int(context_mask[b].sum())
        torch.testing.assert_close(
            block(x[b : b + 1, :n], None, context[b : b + 1, :s], None)[0], out[b, :n]
        )
    spoilt = x.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    block(spoilt, mask, context, context_mask).sum().backward()
    assert all(p.grad.isfinite().all() for p in block.parameters()) and spoilt.grad.isfinite().all()


class NoContextMask(Block):
    "The fusion forgets the padding of the other stream (pitfall 24)."

    def forward(self, x, mask=None, context=None, context_mask=None):
        return super().forward(x, mask, context, None)


class NoSelfMask(Block):
    "The stream's own padding is looked at."

    def forward(self, x, mask=None, context=None, context_mask=None):
        out = super().forward(x, None, context, context_mask)
        return out if mask is None else clean(out, mask)


class LeavesRubbish(Block):
    "What comes out at padded places is not zero."

    def forward(self, x, mask=None, context=None, context_mask=None):
        return super().forward(x, mask, context, context_mask) + self.norm_feed.bias + 1


def test_blocks_ignore_padding():
    check_block(Block)


@pytest.mark.parametrize("wrong", [NoContextMask, NoSelfMask, LeavesRubbish])
def test_the_check_notices_wrong_blocks(wrong):
    with pytest.raises(AssertionError):
        check_block(wrong)


def test_a_block_is_what_it_says():
    "Dropout off and all linear maps zero: the residual path alone is left."
    block, x = Block(4, 2), torch.randn(1, 3, 4)
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
    assert torch.equal(block(x), x)
    with pytest.raises(AssertionError):
        block(x, None, x)


def test_a_setting_costs_nothing():
    "Config is checked at every replacement, so it has to be quick."
    start = time.process_time()
    for _ in range(100):
        Config()
    assert time.process_time() - start < 1
