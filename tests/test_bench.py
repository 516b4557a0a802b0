"Speed: a tiny version of each part of experiments/bench.py, the report, and what must hold."

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import bench
import pytest
import torch
from torch.testing import assert_close

from speechimg.attention import Attention, Block, attend
from speechimg.retrieval import Embeddings, pair_scorer
from speechimg.sim import MultimodalEncoder

ROOT = bench.ROOT


def in_this_process(part, quick, code=ROOT):
    "Instead of bench.child, which starts a process for each part."
    return json.loads(json.dumps(bench.PARTS[part](quick)))


@pytest.mark.slow
@pytest.mark.parametrize("part", bench.PARTS)
def test_a_tiny_version_of_each_part(part, monkeypatch):
    monkeypatch.setattr(bench, "BEFORE", "no-such-commit")
    if part != "loader":  # one of them as all are run in earnest
        monkeypatch.setattr(bench, "child", in_this_process)
    said = []
    report = bench.bench([part], quick=True, say=said.append)
    assert json.loads(json.dumps(report)) == report and report[part]["figures"]
    for name, one in report[part][
        "figures"
    ].items():  # at sizes this small a growth is noise, and may fall
        assert math.isfinite(one["value"]) and (one["value"] >= 0 or one["unit"] == "exponent"), (
            name
        )
    assert (
        set(report[part]["machine"]) >= {"cores", "threads", "instructions", "torch"}
        and "before" not in report[part]
    )
    assert bench.table(report).count("\n") == 2 + len(report[part]["figures"]) and len(said) >= len(
        report[part]["figures"]
    )
    if part == "rerank":
        assert all(one["met"] for name, one in report[part]["figures"].items() if "order" in name)


# the report


def line(value, **more):
    return {"figures": {"one": bench.figure(value, "ms", "at most 2", value <= 2)}} | more


def test_parts_are_merged_and_a_comparison_stays():
    old = {
        "step": line(3.0, before={"commit": "abc", "figures": {"one": bench.figure(9.0, "ms")}}),
        "start": line(1.0),
    }
    both = bench.merged(old, {"loader": line(2.0), "step": line(1.5)})
    assert (
        list(both) == ["step", "loader", "start"]
        and both["step"]["figures"]["one"]["value"] == 1.5
        and both["step"]["before"]["commit"] == "abc"
    )
    assert bench.table(both).splitlines()[2:4] == [
        "| one | 9 ms | 1.5 ms | at most 2 | yes |",
        "| one |  | 2 ms | at most 2 | yes |",
    ]
    assert "**no**" in bench.table({"step": line(3.0)})


def test_numbers_by_hand():
    assert bench.middle(
        [{"a": {"b": 1.0}, "n": 3}, {"a": {"b": 5.0}, "n": 3}, {"a": {"b": 2.0}, "n": 3}]
    ) == {"a": {"b": 2.0}, "n": 3}
    assert bench.exponent([1, 2, 4, 8], [1.0, 1.0, 2.0, 4.0]) == pytest.approx(1.0)
    assert bench.exponent([1, 2, 4, 8], [1.0, 4.0, 16.0, 64.0]) == pytest.approx(2.0)
    seen = []
    bench.in_turn(2, lambda: seen.append("a"), lambda: seen.append("b"))
    assert "".join(seen) == "ababab"


def test_the_committed_report_is_whole():
    report = json.loads((ROOT / "data" / "bench.json").read_text())
    assert list(report["parts"]) == list(bench.PARTS) and (
        ROOT / "data" / "bench.md"
    ).read_text() == bench.table(report["parts"])
    assert all(report["parts"][part]["before"]["commit"] == bench.BEFORE for part in bench.COMPARED)


# what counts as a product


def test_products_are_all_that_is_multiplied():
    layer, convolution, x = torch.nn.Linear(4, 3), torch.nn.Conv1d(2, 2, 3), torch.randn(5, 4)

    def names(work):
        return sorted(one.overloadpacket.__name__ for one, _, _ in bench.products(work))

    assert names(lambda: torch.relu(layer(x)).sum().backward()) == [
        "addmm",
        "mm",
    ]  # x itself wants no gradient
    assert names(lambda: convolution(torch.randn(1, 2, 7)).sum().backward()) == [
        "convolution",
        "convolution_backward",
    ]
    query = torch.randn(2, 2, 5, 4, requires_grad=True)
    calls = bench.products(
        lambda: (
            torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
        )
    )
    assert len(calls) == 6 and all(
        function(*arguments).shape[0] == 4 for function, arguments, _ in calls
    )
    for function, arguments, options in bench.products(lambda: layer(x).sum().backward()):
        assert not {id(one) for one in arguments} & {id(x), id(layer.weight)} and torch.is_tensor(
            function(*arguments, **options)
        )


# the fast way equals the plain one


def crowd(depth=2, dim=16, pictures=7, recordings=9):
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    fusion = MultimodalEncoder(dim, depth, 4).eval()
    speech = [
        torch.randn(int(n), dim, generator=draw)
        for n in torch.randint(1, 9, (recordings,), generator=draw)
    ]
    return fusion, speech, torch.randn(pictures, 5, dim, generator=draw)


def plainly(fusion, speech, image):
    "A pair on its own, through all of every block."
    x = speech[None]
    for block in fusion.blocks:
        x = block(x, context=image[None])
    return fusion.verdict(fusion.norm(x[:, 0]))[0]


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("room", [1, 2**28])  # bytes for prepared pictures: one at a time, or all
def test_many_pairs_equal_one_at_a_time(depth, room):
    fusion, speech, image = crowd(depth)
    rows, columns = torch.arange(9).repeat_interleave(7), torch.arange(7).repeat(9)
    shuffled = torch.randperm(63)
    found = fusion.judge_many(
        speech, image, (rows[shuffled], columns[shuffled]), batch_size=8, room=room
    )
    expected = torch.stack(
        [plainly(fusion, speech[q], image[c]) for q, c in zip(rows[shuffled], columns[shuffled])]
    )
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("direction", ["speech_to_image", "image_to_speech"])
def test_the_ranks_of_the_plain_loop(direction):
    fusion, speech, image = crowd()
    model = torch.nn.Module()
    model.fusion = fusion
    seen = Embeddings(None, None, speech, image, None)
    coarse = torch.randn(9, 7) if direction == "speech_to_image" else torch.randn(7, 9)
    expected, candidates = bench.plain_loop(
        model, seen, coarse, torch.arange(len(coarse)), 4, direction
    )()
    found = pair_scorer(model, seen, direction)(
        torch.arange(len(coarse)).repeat_interleave(4), candidates.flatten()
    ).view(-1, 4)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.argsort(1), expected.argsort(1))
    assert not torch.equal(candidates.argsort(1), expected.argsort(1))


def test_gradients_of_chosen_pairs_equal_those_of_copies():
    fusion, speech, image = crowd()
    tokens = torch.nn.utils.rnn.pad_sequence(speech, batch_first=True).requires_grad_()
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(one) for one in speech])[:, None]
    image.requires_grad_()
    pairs = torch.tensor([0, 0, 3, 8, 1]), torch.tensor([1, 1, 6, 0, 6])
    wanted = [tokens, image, *fusion.parameters()]
    results = [
        torch.autograd.grad(out.square().sum(), wanted)
        for out in (
            fusion(tokens, mask, image, pairs),
            fusion(tokens[pairs[0]], mask[pairs[0]], image[pairs[1]]),
        )
    ]
    for one, other in zip(*results):
        assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_half_precision_is_attention(masked):
    query, key, value = (torch.randn(3, 2, n, 8, requires_grad=True) for n in (4, 6, 6))
    mask = torch.arange(6) < torch.tensor([6, 4, 1])[:, None] if masked else None
    half = [one.detach().bfloat16().requires_grad_() for one in (query, key, value)]
    exact, close = attend(query, key, value, mask), attend(*half, mask)
    assert_close(close.float(), exact, atol=0.03, rtol=0.03)
    for one, other in zip(
        torch.autograd.grad(close.float().sin().sum(), half),
        torch.autograd.grad(exact.sin().sum(), (query, key, value)),
    ):
        assert_close(one.float(), other, atol=0.05, rtol=0.05)
    if masked:
        half[1].data[1, :, 4:], half[2].data[1, :, 4:] = (
            99.0,
            -99.0,
        )  # behind the end: no bit changes
        assert torch.equal(attend(*half, mask), close)


def test_the_first_token_alone_is_the_first_of_all():
    torch.manual_seed(0)
    block, x, mask = (
        Block(8, 2).eval(),
        torch.randn(3, 5, 8),
        torch.arange(5) < torch.tensor([5, 3, 1])[:, None],
    )
    assert_close(block.think(block.listen(x, mask, 1)), block(x, mask)[:, :1])
    attention = Attention(8, 2)
    assert_close(attention(x, mask=mask, answers=attention.answers(x)), attention(x, mask=mask))


# start-up: what is imported, not how long it takes


def imported(code):
    told = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print('\\n' + ' '.join(sys.modules))"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name.partition(".")[0] for name in told.stdout.splitlines()[-1].split()}


HEAVY = {"torch", "numpy", "huggingface_hub", "pandas", "matplotlib", "scipy", "IPython"}


def test_importing_the_package_does_not_wait_for_torch():
    assert not imported("import speechimg") & HEAVY


@pytest.mark.parametrize("arguments", ["--help", "train --help", "search --help"])
def test_help_does_not_wait_for_torch(arguments):
    called = f"try: main({arguments.split()!r})\nexcept SystemExit: pass\n"
    run = f"from speechimg.cli import main\n{called}"
    assert not imported(f"exec({run!r})") & HEAVY


def test_a_plain_loop_is_plain():
    "It pads to the longest recording there is, and asks query by query."
    fusion, speech, image = crowd()
    seen, shapes = Embeddings(None, None, speech, image, None), []
    fusion.blocks[0].register_forward_pre_hook(
        lambda block, inputs: shapes.append(tuple(inputs[0].shape))
    )
    bench.plain_loop(
        SimpleNamespace(fusion=fusion),
        seen,
        torch.randn(9, 7),
        torch.tensor([4, 2]),
        3,
        "speech_to_image",
    )()
    assert shapes == [(3, max(map(len, speech)), 16)] * 2
