"The step: against a plain loop in float64, and against each mistake that one could make in it."

import copy
import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from oracles import loop_step
from torch import nn
from toys import LinearTower as ToyTower
from toys import tiny_batch as batch_of
from toys import tiny_step as make

import speechimg.alignment as model_room
import speechimg.model as towers_room
from speechimg.alignment import Alignment, encode
from speechimg.core import Config, InputError
from speechimg.data import Batch
from speechimg.model import SpeechImageModel
from speechimg.queue import make_teacher, update_momentum


def fill(alignment, ids=(7, 1, 8), seed=5):
    "Put random unit vectors into the queue."
    generator = torch.Generator().manual_seed(seed)
    keys = nn.functional.normalize(torch.randn(2, len(ids), 3, generator=generator), dim=-1)
    alignment.queue.enqueue(*keys, torch.tensor(ids))


def hardest(logits, ids, generator=None, key_ids=None, count=1, hard=True):
    "Instead of a draw: the best-scored wrong keys, so that a loop can follow."
    allowed = ids[:, None] != (ids if key_ids is None else key_ids)[None]
    best = logits.masked_fill(~allowed, -torch.inf).topk(count, 1)
    return best.indices.masked_fill(best.values == -torch.inf, -1)


def state(alignment):
    return {name: tensor.clone() for name, tensor in alignment.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def check_step(kind=Alignment):
    "A step equals the loops, with ids that repeat in the batch and in the queue."
    for ids, step, settings in (
        ([1, 2, 1, 3], 3, {}),
        ([1, 2, 3, 4], 0, {"alpha_ramp_steps": 4}),
        ([5], 1, {}),
        ([5, 5, 5], 1, {}),
        ([1, 2, 1, 3], 0, {"queue_warmup_steps": 1}),
        ([1, 2, 3], 2, {"alpha": 0.0}),
    ):
        alignment, batch = make(kind, **settings), batch_of(ids)
        fill(alignment)
        sic, sim = loop_step(alignment, batch, step)
        output = alignment(batch, step)
        assert (
            output.speech_to_image.dtype
            == output.image_to_speech.dtype
            == output.loss.dtype
            == torch.float32
        )
        torch.testing.assert_close(output.sic.item(), sic, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(output.sim.item(), sim, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(output.loss.item(), sic + sim, rtol=2e-5, atol=2e-5)
        assert output.speech_to_image.shape == (
            len(ids),
            len(ids) + (3 if step >= alignment.config.queue_warmup_steps else 0),
        )


def test_step_equals_loops(monkeypatch):
    monkeypatch.setattr(model_room, "sample_negatives", hardest)
    check_step()


class EnqueueFirst(Alignment):
    "Pitfall 6."

    def forward(self, batch, step, generator=None):
        with torch.no_grad():
            speech, image = encode(self.teacher, batch)
        self.queue.enqueue(speech.embedding, image.embedding, batch.ids)
        return super().forward(batch, step, generator)


class EmptySlotsCount(Alignment):
    "Pitfall 8: the zeros of empty slots as keys."

    def forward(self, *arguments):
        self.queue.filled = lambda: (self.queue.speech, self.queue.image, self.queue.ids)
        return super().forward(*arguments)


class NoWarmUp(Alignment):
    "The queue counts from the first step."

    def forward(self, batch, step, generator=None):
        self.config = replace(self.config, queue_warmup_steps=0)
        return super().forward(batch, step, generator)


@contextmanager
def patched(name, wrong):
    room = model_room if hasattr(model_room, name) else towers_room
    right = getattr(room, name)
    setattr(room, name, lambda *arguments, **options: wrong(right, *arguments, **options))
    try:
        yield
    finally:
        setattr(room, name, right)


def online_keys(right, encoders, batch):
    if next(encoders.parameters()).requires_grad:  # a teacher's never do
        online_keys.student = encoders
    return right(online_keys.student, batch)


def swapped(right, speech, image, speech_keys, image_keys, targets, temperature):
    return right(speech, image, image_keys, speech_keys, targets, temperature)


def summed(right, *arguments):
    output = right(*arguments)
    return output._replace(loss=output.loss * len(arguments[0]))


def multi_hot(right, ids, key_ids):
    return (right(ids, key_ids) > 0).float()


def ids_ignored(right, ids, key_ids):
    return torch.eye(len(ids), len(key_ids))


def not_normalised(right, encoded, projection):
    return right(encoded, projection)._replace(embedding=projection(encoded.tokens[:, 0]))


def times_tau(right, queries, keys, temperature):
    return right(queries, keys, 1.0) * temperature


def teacher_as_student(right, logits, targets, alpha):
    return right(logits.flip(1), targets, alpha)


def own_negatives(right, logits, ids, *options):
    return right(logits, torch.arange(len(ids)), None, torch.arange(len(ids)))


def wrong_rows(right, own, pictures, recordings):
    "Wrong recordings that are the anchors themselves."
    (speech, image), sizes = right(own, pictures, recordings)
    return (torch.cat([speech[: sum(sizes[:2])], image[sum(sizes[:2]) :]]), image), sizes


def right_last(right, logits, sizes, *weight):
    "Labels for another order than that of the rows."
    return right(logits, sizes[::-1], *weight)


@pytest.mark.parametrize("kind", [EnqueueFirst, EmptySlotsCount, NoWarmUp])
def test_check_step_finds_wrong_order(kind, monkeypatch):
    monkeypatch.setattr(model_room, "sample_negatives", hardest)
    with pytest.raises(AssertionError):
        check_step(kind)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("encode", online_keys),
        ("sic_loss", swapped),
        ("sic_loss", summed),
        ("id_targets", multi_hot),
        ("id_targets", ids_ignored),
        ("project", not_normalised),
        ("soft_targets", teacher_as_student),
        ("sample_negatives", own_negatives),
        ("meetings", wrong_rows),
        ("judged", right_last),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_check_step_finds_wrong_formulas(name, wrong, monkeypatch):
    "Pitfalls 5 and 34."
    monkeypatch.setattr(model_room, "sample_negatives", hardest)
    with patched(name, wrong), pytest.raises(AssertionError):
        check_step()


def test_order_moves_the_loss():
    "Pitfall 6 in numbers: the loss of the naive order is another one, though no weight differs."
    right, wrong = make(sim_weight=0.0), make(EnqueueFirst, sim_weight=0.0)
    assert (
        abs(
            right(batch_of([1, 2, 3, 4]), 1).loss.item()
            - wrong(batch_of([1, 2, 3, 4]), 1).loss.item()
        )
        > 0.1
    )


# ---- what moves, and when


def check_updates(kind=Alignment):
    "forward moves nothing; update moves teacher and queue once, however many micro-batches."
    alignment, before = make(kind), None
    before = state(alignment)
    outputs = [alignment(batch_of([1, 2], seed), 5) for seed in range(4)]
    alignment.eval()(batch_of([1, 2]), 5)
    assert same(before, state(alignment)), "forward changed something"
    alignment.train().update(*outputs)
    slow, fast = (
        dict(alignment.teacher.named_parameters()),
        dict(alignment.model.encoders.named_parameters()),
    )
    for name, parameter in slow.items():
        torch.testing.assert_close(parameter, 0.9 * before[f"teacher.{name}"] + 0.1 * fast[name])
    assert alignment.queue.pointer == 8 % 6 and (alignment.queue.ids >= 0).sum() == 6
    with pytest.raises(RuntimeError):
        alignment.update(outputs[0])
    with pytest.raises(RuntimeError):
        alignment.eval().update(alignment(batch_of([3]), 5))


class UpdateInForward(Alignment):
    def forward(self, *arguments):
        output = super().forward(*arguments)
        update_momentum(self.teacher, self.model.encoders, 0.9)
        return output


class UpdatePerMicroBatch(Alignment):
    def update(self, *outputs):
        for output in outputs:
            super().update(output)


class UpdateTwice(Alignment):
    def update(self, *outputs):
        super().update(*outputs)
        update_momentum(self.teacher, self.model.encoders, 0.9)


class UpdateInEval(Alignment):
    def update(self, *outputs):
        was = self.training
        self.train()
        super().update(*outputs)
        self.train(was)


def test_updates():
    check_updates()


@pytest.mark.parametrize("kind", [UpdateInForward, UpdatePerMicroBatch, UpdateTwice, UpdateInEval])
def test_check_updates_finds(kind):
    "Pitfall 13."
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_updates(kind)


def test_order_of_updates_equals_the_papers_recipe():
    "Teacher and queue move after the optimiser; moved inside the step they give the same."
    ours, theirs = make(sim_weight=0.0), make(sim_weight=0.0)
    for alignment in (ours, theirs):
        alignment.teacher = make_teacher(alignment.model.encoders)
    ways = [torch.optim.SGD(one.model.parameters(), 0.1) for one in (ours, theirs)]
    for step in range(5):
        batch = batch_of([step, step + 1, step + 2], seed=step)
        output = ours(batch, step)
        update_momentum(
            theirs.teacher, theirs.model.encoders, 0.9
        )  # before the teacher reads the batch
        expected = theirs(batch, step)
        assert output.loss.item() == expected.loss.item()
        for optimizer, one in zip(ways, (output, expected)):
            optimizer.zero_grad()
            one.loss.backward()
        theirs.queue.enqueue(*expected.keys)  # before the optimiser step
        for optimizer in ways:
            optimizer.step()
        ours.update(output)
    assert same(
        {k: v for k, v in state(ours).items() if "queue" in k},
        {k: v for k, v in state(theirs).items() if "queue" in k},
    )


def check_temperature(kind=Alignment):
    alignment = make(kind)
    for start, end in ((0.9, 0.5), (-0.3, 0.001), (0.1, 0.1)):
        with torch.no_grad():
            alignment.model.temperature.fill_(start)
        output = alignment(batch_of([1, 2, 3]), 1)
        assert math.isclose(alignment.model.temperature.item(), end, rel_tol=1e-6)
        s, i = (side.embedding for side in encode(alignment.model, batch_of([1, 2, 3])))
        torch.testing.assert_close(
            output.speech_to_image[0, 0].item() * end,
            (s[0] @ output.keys.image[0]).item(),
            rtol=1e-4,
            atol=1e-4,
        )


def test_temperature_is_clamped():
    check_temperature()


def test_check_temperature_finds():
    "Pitfall 18: no clamp; multiplied instead of divided."
    with (
        patched("clamp_temperature", lambda right, *arguments: None),
        pytest.raises((AssertionError, ValueError)),
    ):
        check_temperature()

    def sic_times(right, *arguments):
        return right(*arguments[:-1], 1 / arguments[-1])

    with patched("sic_loss", sic_times), pytest.raises(AssertionError):
        check_temperature()


def check_teacher_precision(prepare=lambda alignment: alignment):
    "Pitfall 14: however the towers compute, the teacher is float32 and moves by the right amount."
    alignment = prepare(make(precision="bfloat16", momentum=0.995))
    for parameter in alignment.teacher.parameters():
        assert parameter.dtype == torch.float32
    with torch.no_grad():
        for parameter in alignment.teacher.parameters():
            parameter.fill_(1.0)
        for parameter in alignment.model.encoders.parameters():
            parameter.fill_(1.05)
    for step in range(50):
        alignment.update(alignment(batch_of([1, 2], step), step))
    for parameter in alignment.teacher.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 1.05 - 0.05 * 0.995**50))


def test_teacher_is_float32():
    check_teacher_precision()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_check_teacher_precision_finds(dtype):
    def lower(alignment):
        alignment.teacher.to(dtype)
        return alignment

    with pytest.raises(AssertionError):
        check_teacher_precision(lower)


def check_quiet_teacher(kind=Alignment):
    "Pitfall 17: the teacher does not drop out while the student does."
    alignment, batch = make(kind, dropout=0.5), batch_of([1, 2, 3])
    one, other = alignment(batch, 1), alignment(batch, 1)
    assert torch.equal(one.keys.speech, other.keys.speech) and not torch.equal(
        one.speech_to_image, other.speech_to_image
    )


def test_quiet_teacher():
    class Noisy(Alignment):
        train = nn.Module.train

    check_quiet_teacher()
    with pytest.raises(AssertionError):
        check_quiet_teacher(Noisy)


def test_gradient_goes_to_the_student_alone():
    alignment = make()
    fill(alignment)
    alignment(batch_of([1, 2, 3, 4]), 5).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in alignment.model.parameters())
    assert all(p.grad is None for p in alignment.teacher.parameters())
    assert alignment.model.temperature.grad != 0


# ---- padding, precision, matching


def test_garbage_behind_the_valid_length_changes_nothing():
    batch = batch_of([1, 2, 3, 4])
    dirty, longer = batch.speech.clone(), torch.full((4, 9, 2), torch.nan)
    for row, length in enumerate(batch.speech_lengths):
        dirty[row, length:] = 1e6
    longer[:, :5] = dirty
    expected = make()(batch, 1, torch.Generator().manual_seed(0))
    for speech in (dirty, longer.nan_to_num(7e7)):
        output = make()(replace(batch, speech=speech), 1, torch.Generator().manual_seed(0))
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(output.sim_logits, expected.sim_logits)


def test_negatives_bring_their_own_mask(monkeypatch):
    "Pitfall 24: a wrong recording with the anchor's mask is another recording."
    monkeypatch.setattr(model_room, "sample_negatives", hardest)
    match = SpeechImageModel.match

    def masks_of_anchors(model, tokens, mask, image, pairs=None):
        if pairs is None:  # the oracle, pair by pair
            return match(model, tokens, mask, image)
        spoken, seen = pairs
        return match(model, tokens[spoken], mask[seen], image[seen])

    monkeypatch.setattr(SpeechImageModel, "match", masks_of_anchors)
    with pytest.raises(AssertionError):
        check_step()


def test_bfloat16_is_close_and_losses_stay_float32():
    batch = batch_of(list(range(8)))
    full, half = (
        make(precision=precision)(batch, 1, torch.Generator().manual_seed(0))
        for precision in ("float32", "bfloat16")
    )
    assert (
        half.loss.dtype
        == half.speech_to_image.dtype
        == half.sim_logits.dtype
        == half.keys.speech.dtype
        == torch.float32
    )
    torch.testing.assert_close(half.sic, full.sic, rtol=2e-2, atol=2e-2)
    half.loss.backward()


def test_matching_starts_when_told():
    alignment = make(sim_start_step=3)
    early, late = alignment(batch_of([1, 2, 3]), 2), alignment(batch_of([1, 2, 3]), 3)
    assert early.sim == 0 and len(early.sim_logits) == 0 and early.loss == early.sic
    assert late.sim > 0 and late.sim_logits.shape == (9, 2)


@pytest.mark.parametrize(
    "ids, count, rows",
    [
        ([1, 2, 3, 4], 1, 12),
        ([1, 2, 3, 4], 2, 20),
        ([1, 2, 3, 4], 9, 28),
        ([5, 5, 5], 1, 3),
        ([5], 2, 1),
        ([1, 1, 2], 2, 11),
    ],
)
def test_rows_of_the_fused_call(ids, count, rows):
    "B right pairs and, per direction, as many wrong ones as there are, all different."
    output = make(negatives_per_anchor=count)(batch_of(ids), 1, torch.Generator().manual_seed(0))
    assert output.sim_logits.shape == (rows, 2) and output.loss.isfinite()


def test_always_no_costs_the_entropy_of_a_third():
    "Class ratio 1:2, so a head without any knowledge reaches H(1/3) = 0.6365."
    alignment = make()
    with torch.no_grad():
        alignment.model.fusion.verdict.weight.zero_()
        alignment.model.fusion.verdict.bias.copy_(torch.tensor([math.log(2 / 3), math.log(1 / 3)]))
    output = alignment(batch_of([1, 2, 3, 4]), 1)
    assert abs(output.sim.item() - 0.6365) < 1e-4 and abs(output.sim_accuracy - 2 / 3) < 1e-6


def test_student_keys_at_first():
    """Before student_steps the keys are the student's own, with gradient, and nothing is softened.

    Afterwards alpha starts at 0.
    """
    alignment = make(student_steps=2, alpha_ramp_steps=4, sim_weight=0.0)
    batch = batch_of([1, 2, 3])
    early, late = alignment(batch, 1), alignment(batch, 2)
    with torch.no_grad():
        speech, image = encode(alignment.model.encoders, batch)
    torch.testing.assert_close(early.speech_to_image, speech.embedding @ image.embedding.T / 0.2)
    assert early.alpha == late.alpha == 0 and alignment(batch, 4).alpha == 0.2
    assert not early.keys.speech.requires_grad and not torch.equal(
        early.keys.speech, late.keys.speech
    )
    gradients = [
        torch.autograd.grad(output.loss, alignment.model.encoders.image_projection.weight)[0]
        for output in (early, late)
    ]
    assert not torch.allclose(*gradients)


# ---- ids, empty queue, stages


def test_empty_queue_and_bad_ids():
    "Pitfall 8: an empty queue adds no key; ids are never negative."
    output = make()(batch_of([3, 4]), 9)
    assert output.speech_to_image.shape == (2, 2)
    with pytest.raises(ValueError):
        make()(batch_of([-1, 4]), 9)


def test_a_new_stage_starts_with_an_empty_queue(tmp_path):
    "Pitfall 9: what is saved holds no queue and no teacher; no second stage can inherit them."
    first = make()
    first.update(first(batch_of([1, 2, 3]), 1))
    first.model.save_pretrained(tmp_path)
    assert not any(
        "queue" in name or "teacher" in name
        for name in safetensors.torch.load_file(tmp_path / "model.safetensors")
    )
    second = Alignment(
        SpeechImageModel.from_pretrained(tmp_path, speech_tower=ToyTower(), image_tower=ToyTower())
    )
    assert (second.queue.ids == -1).all() and second.queue.pointer == 0
    assert same(
        dict(second.teacher.named_parameters()), dict(first.model.encoders.named_parameters())
    )


# ---- files


def load(folder):
    return SpeechImageModel.from_pretrained(folder, speech_tower=ToyTower(), image_tower=ToyTower())


def test_saved_and_loaded(tmp_path):
    model = make().model
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert (
        same(model.state_dict(), again.state_dict())
        and again.config == model.config
        and not again.training
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_damaged_files_are_input_errors(tmp_path):
    model = make().model
    model.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    tensors = safetensors.torch.load(whole)
    broken = {
        "truncated": whole[:-9],
        "empty": b"",
        "surplus": safetensors.torch.save(tensors | {"more": torch.zeros(1)}),
        "missing": safetensors.torch.save({k: v for k, v in tensors.items() if k != "temperature"}),
        "shape": safetensors.torch.save(tensors | {"temperature": torch.zeros(2)}),
    }
    for data in broken.values():
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(InputError) as error:
            load(tmp_path)
        assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError):
        load(tmp_path)
    with pytest.raises(InputError):
        SpeechImageModel._load_as_pickle(model, "x.bin", "cpu", True)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError):
        load(tmp_path)


def test_size_of_the_reference_shape(tmp_path):
    "At the default width a saved model stays below 15 MB."
    SpeechImageModel(Config()).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 15e6


def test_every_size_of_tower_takes_a_step():
    "light and small, from features of their own shapes, deep copied for the teacher."
    for towers, speech, image in (
        ("light", (3, 20, 384), (3, 25, 320)),
        ("small", (3, 60, 64), (3, 3, 96, 96)),
    ):
        config = Config(
            towers=towers,
            width=16,
            dim=8,
            speech_depth=1,
            image_depth=1,
            fusion_depth=1,
            heads=2,
            queue_size=4,
            queue_warmup_steps=0,
        )
        alignment = Alignment(SpeechImageModel(config)).train()
        batch = Batch(
            torch.randn(speech),
            torch.tensor([speech[1], 12, 9]),
            torch.rand(image),
            torch.tensor([1, 2, 3]),
            list("abc"),
        )
        output = alignment(batch, 0, torch.Generator().manual_seed(0))
        output.loss.backward()
        alignment.update(output)
        assert output.loss.isfinite() and copy.deepcopy(alignment.model) is not None


def test_a_start_of_another_size_is_refused_by_its_file(tmp_path):
    "Whoever fills a model from a file gets one line that names it, not PyTorch's list of sizes."
    from speechimg.run.checkpoints import begin_with

    settings = {"towers": "small", "dim": 8, "heads": 2, "fusion_depth": 1}
    SpeechImageModel(Config(width=16, **settings)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="model.safetensors"):
        begin_with(SpeechImageModel(Config(width=32, **settings)), tmp_path)
