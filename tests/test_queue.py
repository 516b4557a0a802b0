"The slow teacher and the ring: oracles, properties, and for each known pitfall its mutant."

import copy
import math

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import caught, loop_contrastive_loss, loop_id_targets, ring_ids
from torch import nn
from torch.testing import assert_close

from speechimg.queue import EmbeddingQueue, make_teacher, ring_slots, update_momentum
from speechimg.sic import id_targets, sic_loss


def pairs(ids, dim=2):
    "(speech, image, ids) whose embeddings say which item they are."
    ids = torch.as_tensor(ids, dtype=torch.long)
    speech, image = torch.zeros(len(ids), dim), torch.zeros(len(ids), dim)
    speech[:, 0], image[:, 1] = ids.float(), ids.float()
    return speech, image, ids


# ---- the ring ----


def check_ring(Queue):
    for size, batches in (
        (12, [5] * 4),
        (8, [3, 20, 2]),
        (4, [4, 4]),
        (3, [7, 7, 1]),
        (5, [1] * 13),
    ):
        queue, n = Queue(size, 2), 0
        for batch in batches:
            queue.enqueue(*pairs(range(n, n + batch)))
            n += batch
            assert queue.ids.tolist() == ring_ids(n, size)
            assert int(queue.pointer) == n % size
            used = queue.ids >= 0
            assert_close(queue.speech[used, 0], queue.ids[used].float())
            assert_close(queue.image[used, 1], queue.ids[used].float())


class DividesOnly(EmbeddingQueue):
    "The batch size must divide the length."

    @torch.no_grad()
    def enqueue(self, speech, image, ids):
        assert self.size % len(ids) == 0
        super().enqueue(speech, image, ids)


class SliceOnly(EmbeddingQueue):
    "Assigns a slice, which does not go round the end."

    @torch.no_grad()
    def enqueue(self, speech, image, ids):
        start = int(self.pointer)
        for ring, values in ((self.speech, speech), (self.image, image), (self.ids, ids)):
            ring[start : start + len(ids)] = values
        self.pointer.add_(len(ids)).remainder_(self.size)


class CutsTheEnd(SliceOnly):
    "What does not fit before the end is dropped."

    @torch.no_grad()
    def enqueue(self, speech, image, ids):
        fits = min(len(ids), self.size - int(self.pointer))
        super().enqueue(speech[:fits], image[:fits], ids[:fits])


class KeepsTheFirst(EmbeddingQueue):
    "Of more than K items the first K stay."

    @torch.no_grad()
    def enqueue(self, speech, image, ids):
        super().enqueue(speech[: self.size], image[: self.size], ids[: self.size])


def test_pitfall_07_any_batch_size():
    check_ring(EmbeddingQueue)


@pytest.mark.parametrize("mutant", [DividesOnly, SliceOnly, CutsTheEnd, KeepsTheFirst])
def test_pitfall_07_mutants(mutant):
    caught(check_ring, mutant, RuntimeError)


@given(size=st.integers(1, 12), batches=st.lists(st.integers(0, 30), max_size=8))
def test_ring_equals_a_plain_list(size, batches):
    queue, ring, written = EmbeddingQueue(size, 2), [-1] * size, 0
    for n in batches:
        queue.enqueue(*pairs(range(written, written + n)))
        for item in range(written, written + n):  # the loop that anyone believes
            ring[item % size] = item
        written += n
    assert queue.ids.tolist() == ring and int(queue.pointer) == written % size
    assert sorted(queue.filled()[2].tolist()) == list(range(max(0, written - size), written))


def test_ring_slots_by_hand():
    newest, slots = ring_slots(torch.tensor(3), 3, 4)
    assert newest.tolist() == [0, 1, 2] and slots.tolist() == [3, 0, 1]
    newest, slots = ring_slots(torch.tensor(3), 6, 4)
    assert newest.tolist() == [2, 3, 4, 5] and slots.tolist() == [1, 2, 3, 0]


def test_new_queue_is_empty():
    queue = EmbeddingQueue(5, 3)
    assert queue.speech.shape == queue.image.shape == (5, 3)
    assert queue.ids.tolist() == [-1] * 5 and queue.pointer == 0
    assert [tuple(x.shape) for x in queue.filled()] == [(0, 3), (0, 3), (0,)]


def test_no_queue_and_no_pairs():
    queue = EmbeddingQueue(0, 2)
    queue.enqueue(*pairs([1, 2]))
    assert len(queue.filled()[2]) == 0
    queue = EmbeddingQueue(4, 2)
    queue.enqueue(*pairs([]))
    assert queue.pointer == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("whole", [torch.int64, torch.int32, torch.int16])
def test_any_precision_comes_in_and_float32_is_kept(dtype, whole):
    queue = EmbeddingQueue(4, 2)
    speech, image, ids = pairs([1, 2, 3])
    queue.enqueue(speech.to(dtype).requires_grad_(), image.to(dtype), ids.to(whole))
    assert queue.speech.dtype == torch.float32 and queue.ids.dtype == torch.int64
    assert not queue.speech.requires_grad and queue.ids.tolist() == [1, 2, 3, -1]


def bad_calls():
    speech, image, ids = pairs([3, 4])
    yield "negative", speech, image, torch.tensor([3, -1])
    yield "(2, 2)", speech[:, :1], image, ids
    yield "(2, 2)", speech, image[:1], ids
    yield "(2, 2)", speech[:1], image, ids
    yield "whole numbers", speech, image, ids.float()
    yield "whole numbers", speech, image, ids[:, None]
    yield "whole numbers", speech, image, ids > 0
    yield "(1, 2)", speech, image, ids[:1]


@pytest.mark.parametrize("call", list(bad_calls()), ids=lambda call: call[0])
def test_a_refused_call_changes_nothing(call):
    words, *arguments = call
    queue = EmbeddingQueue(4, 2)
    queue.enqueue(*pairs([0, 1, 2]))
    before = copy.deepcopy(queue.state_dict())
    with pytest.raises(ValueError, match="enqueue") as error:
        queue.enqueue(*arguments)
    assert words in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())


@pytest.mark.parametrize("arguments", [(-1, 2), (4, 0)])
def test_impossible_queues_are_refused(arguments):
    with pytest.raises(ValueError):
        EmbeddingQueue(*arguments)


# ---- when to write, what to read ----


def unit(n, dim, generator):
    return nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1)


def step_right(queue, speech, image, slow_speech, slow_image, ids, tau):
    old_speech, old_image, old_ids = queue.filled()
    targets = id_targets(ids, torch.cat([ids, old_ids]))
    loss = sic_loss(
        speech,
        image,
        torch.cat([slow_speech, old_speech]),
        torch.cat([slow_image, old_image]),
        targets,
        tau,
    ).loss
    queue.enqueue(slow_speech, slow_image, ids)
    return loss


def step_too_early(queue, speech, image, slow_speech, slow_image, ids, tau):
    queue.enqueue(slow_speech, slow_image, ids)
    old_speech, old_image, old_ids = queue.filled()
    targets = id_targets(ids, torch.cat([ids, old_ids]))
    return sic_loss(
        speech,
        image,
        torch.cat([slow_speech, old_speech]),
        torch.cat([slow_image, old_image]),
        targets,
        tau,
    ).loss


def step_empty_slots_as_keys(queue, speech, image, slow_speech, slow_image, ids, tau):
    targets = id_targets(ids, torch.cat([ids, queue.ids]))
    loss = sic_loss(
        speech,
        image,
        torch.cat([slow_speech, queue.speech]),
        torch.cat([slow_image, queue.image]),
        targets,
        tau,
    ).loss
    queue.enqueue(slow_speech, slow_image, ids)
    return loss


def check_step(step):
    generator, queue = torch.Generator().manual_seed(0), EmbeddingQueue(16, 6)
    for ids in ([1, 2, 3, 4], [5, 1, 6, 7], [8, 9, 2, 2]):
        ids, (speech, image, slow_speech, slow_image) = (
            torch.tensor(ids),
            (unit(4, 6, generator) for _ in range(4)),
        )
        before = queue.filled()
        keys = [torch.cat(both) for both in zip((slow_speech, slow_image), before)]
        y = loop_id_targets(ids, [*ids, *before[2]])  # the batch first, then the queue as it was
        expected = loop_contrastive_loss(speech, image, *keys, y, y, 0.2)
        loss = step(queue, speech, image, slow_speech, slow_image, ids, 0.2)
        assert abs(float(loss) - expected) < 1e-4, (float(loss), expected)


def test_pitfall_06_enqueue_after_loss():
    check_step(step_right)
    caught(check_step, step_too_early)


def test_empty_slots_are_no_keys():
    caught(check_step, step_empty_slots_as_keys)


def check_sentinel(Queue):
    queue = Queue(4, 2)
    ids = torch.tensor([3, 4])
    assert torch.equal(
        id_targets(ids, torch.cat([ids, queue.ids])), torch.eye(2, 6)
    )  # as if there were no queue
    with pytest.raises(ValueError, match="negative"):
        queue.enqueue(*pairs([-1, 2]))


class AnythingGoes(EmbeddingQueue):
    "Stores negative ids as well."

    def check(self, speech, image, ids):
        pass


class EmptyIsZero(EmbeddingQueue):
    "Marks an empty slot by an id that an image may have."

    def __init__(self, size, dim):
        super().__init__(size, dim)
        self.ids.fill_(3)


def test_pitfall_08_sentinel_never_matches():
    check_sentinel(EmbeddingQueue)
    for mutant in (AnythingGoes, EmptyIsZero):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check_sentinel(mutant)


def check_stages(Queue):
    queue = Queue(6, 2)
    queue.enqueue(*pairs([1, 2, 3, 4]))
    resumed = Queue(6, 2)
    resumed.load_state_dict(queue.state_dict())
    for name, value in queue.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)
    assert resumed.ids.tolist() == [1, 2, 3, 4, -1, -1] and resumed.pointer == 4
    resumed.reset()
    assert resumed.ids.tolist() == [-1] * 6 and resumed.pointer == 0
    assert len(resumed.filled()[2]) == 0 and not resumed.speech.any()


class Forgets(EmbeddingQueue):
    "Buffers that are not saved."

    def __init__(self, size, dim):
        super().__init__(size, dim)
        for name in ("speech", "image", "ids", "pointer"):
            value = getattr(self, name)
            delattr(self, name)
            self.register_buffer(name, value, persistent=False)


class HalfReset(EmbeddingQueue):
    "A new stage that keeps the old pointer."

    def reset(self):
        for buffer in (self.speech, self.image):
            buffer.zero_()
        self.ids.fill_(-1)


class NoReset(EmbeddingQueue):
    "A new stage that keeps the old keys."

    def reset(self):
        pass


def test_pitfall_09_reset_for_a_new_stage_keep_for_a_resumed_run():
    check_stages(EmbeddingQueue)
    for mutant in (Forgets, HalfReset, NoReset):
        caught(check_stages, mutant)
    with pytest.raises(RuntimeError, match="size mismatch"):
        EmbeddingQueue(7, 2).load_state_dict(EmbeddingQueue(6, 2).state_dict())


def test_pitfall_10_resume_is_bitwise(tmp_path):
    straight, first, resumed = (EmbeddingQueue(6, 2) for _ in range(3))
    for n in range(0, 24, 4):
        straight.enqueue(*pairs(range(n, n + 4)))
    for n in range(0, 12, 4):
        first.enqueue(*pairs(range(n, n + 4)))
    safetensors.torch.save_file(first.state_dict(), tmp_path / "queue.safetensors")
    resumed.load_state_dict(safetensors.torch.load_file(tmp_path / "queue.safetensors"))
    for n in range(12, 24, 4):
        resumed.enqueue(*pairs(range(n, n + 4)))
    assert straight.state_dict().keys() == resumed.state_dict().keys()
    assert all(
        torch.equal(value, resumed.state_dict()[name])
        for name, value in straight.state_dict().items()
    )


def check_reading(Queue):
    queue = Queue(4, 2)
    queue.enqueue(*pairs([1, 2, 3, 4]))
    before = copy.deepcopy(queue.state_dict())
    speech, image, ids = queue.filled()
    assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())
    query = torch.ones(2, requires_grad=True)
    loss = (speech @ query).square().sum()  # keeps the keys for its backward
    queue.enqueue(*pairs([5, 6]))
    assert ids.tolist() == [1, 2, 3, 4]  # the keys of this step stay what they were
    loss.backward()


class Views(EmbeddingQueue):
    "Hands out the rings themselves."

    def filled(self):
        return self.speech, self.image, self.ids


def test_pitfall_13_reading_changes_nothing_and_writing_does_not_reach_back():
    check_reading(EmbeddingQueue)
    caught(check_reading, Views)


# ---- the teacher ----


def check_closed_form(update):
    generator = torch.Generator().manual_seed(0)
    for m in (0.0, 0.5, 0.9, 0.995, 1.0):
        teacher = nn.Linear(3, 2).double()
        student, start = copy.deepcopy(teacher), teacher.weight.detach().clone()
        thetas = [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(7)]
        for theta in thetas:
            student.weight.data.copy_(theta)
            update(teacher, student, m)
        expected = m**7 * start + (1 - m) * sum(
            m ** (6 - t) * theta for t, theta in enumerate(thetas)
        )
        assert_close(teacher.weight.detach(), expected)


@torch.no_grad()
def swapped_weights(teacher, student, momentum):
    for slow, fast in zip(teacher.parameters(), student.parameters()):
        slow.lerp_(fast, momentum)


def test_ema_closed_form():
    check_closed_form(update_momentum)
    caught(check_closed_form, swapped_weights)


def test_half_life_is_138():
    teacher, student = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(teacher.weight)
    nn.init.zeros_(student.weight)
    path = []
    for _ in range(139):
        update_momentum(teacher, student, 0.995)
        path.append(teacher.weight.item())
    assert path[137] > 0.5 > path[138]
    assert round(math.log(0.5) / math.log(0.995), 1) == 138.3


def test_pitfall_13_once_per_optimiser_step():
    "Four calls per step are another teacher: m to the fourth."
    once, often = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    student = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(once.weight), nn.init.zeros_(often.weight), nn.init.ones_(student.weight)
    update_momentum(once, student, 0.9**4)
    for _ in range(4):
        update_momentum(often, student, 0.9)
    assert_close(once.weight, often.weight)


def check_precision(update, student_dtype):
    teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False).to(student_dtype)
    nn.init.ones_(teacher.weight)
    nn.init.constant_(student.weight, 1.05)
    for _ in range(1000):
        update(teacher, student, 0.995)
    target = student.weight.item()  # 1.05, or its neighbour in half precision
    expected = target + (1 - target) * 0.995**1000
    assert teacher.weight.dtype == torch.float32
    assert abs(teacher.weight.item() - expected) < 2e-4, teacher.weight.item()


@torch.no_grad()
def in_half(teacher, student, momentum):
    for slow, fast in zip(teacher.parameters(), student.parameters()):
        slow.copy_(slow.to(torch.float16) * momentum + fast.to(torch.float16) * (1 - momentum))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pitfall_14_teacher_in_float32(dtype):
    check_precision(update_momentum, dtype)
    caught(lambda update: check_precision(update, dtype), in_half)


def test_pitfall_14_numbers():
    teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(teacher.weight)
    nn.init.constant_(student.weight, 1.05)
    for _ in range(1000):
        update_momentum(teacher, student, 0.995)
    assert round(teacher.weight.item(), 4) == 1.0497
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match="float32"):
            update_momentum(nn.Linear(1, 1, bias=False).to(dtype), student, 0.995)


def check_in_place(update):
    teacher = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    student = copy.deepcopy(teacher)
    view, addresses = (
        teacher[0].weight.detach()[0],
        [p.data_ptr() for p in [*teacher.parameters(), *teacher.buffers()]],
    )
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    update(teacher, student, 0.5)
    assert addresses == [p.data_ptr() for p in [*teacher.parameters(), *teacher.buffers()]]
    assert_close(view, teacher[0].weight.detach()[0])


def rebinding(teacher, student, momentum):
    for slow, fast in zip(teacher.parameters(), student.parameters()):
        slow.data = slow.data * momentum + fast.data * (1 - momentum)


def test_pitfall_15_in_place():
    check_in_place(update_momentum)
    caught(check_in_place, rebinding)


def test_pitfall_16_copy_after_a_forward():
    student = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3))
    student(torch.randn(1, 2, 5)).sum().backward()
    teacher = make_teacher(student)
    x = torch.randn(1, 2, 5)
    assert_close(teacher(x), student(x).detach())
    update_momentum(teacher, student, 0.9)


def check_teacher(make):
    student = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).bfloat16().train()
    teacher = make(student)
    x = torch.randn(8, 4)
    assert torch.equal(teacher(x), teacher(x))  # no dropout in the keys
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher(x).requires_grad
    assert all(p.dtype == torch.float32 for p in teacher.parameters())
    assert (
        student.training
        and next(student.parameters()).requires_grad
        and next(student.parameters()).dtype == torch.bfloat16
    )
    assert teacher[0].weight.data_ptr() != student[0].weight.data_ptr()


def test_pitfall_17_the_teacher_does_not_drop_out():
    check_teacher(make_teacher)
    for mutant in (
        lambda s: copy.deepcopy(s).float().requires_grad_(False),
        lambda s: copy.deepcopy(s).float().eval(),
        lambda s: copy.deepcopy(s).eval().requires_grad_(False),
        lambda s: s.float().eval().requires_grad_(False),
    ):
        caught(check_teacher, mutant, RuntimeError)


def check_everything_follows(update):
    student = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    teacher = make_teacher(student)
    student[0].weight.requires_grad_(False)  # frozen for a while: still followed
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    student(torch.randn(16, 2) + 5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    update(teacher, student, 0.75)
    for name, _ in student.named_parameters():
        assert_close(teacher.state_dict()[name], before[name] + 0.25)
    for name, buffer in student.named_buffers():
        assert torch.equal(teacher.state_dict()[name], buffer)
    assert teacher[1].num_batches_tracked == 1


@torch.no_grad()
def only_trainable(teacher, student, momentum):
    for slow, fast in zip(teacher.parameters(), student.parameters()):
        if fast.requires_grad:
            slow.lerp_(fast, 1 - momentum)
    for slow, fast in zip(teacher.buffers(), student.buffers()):
        slow.copy_(fast)


@torch.no_grad()
def no_buffers(teacher, student, momentum):
    for slow, fast in zip(teacher.parameters(), student.parameters()):
        slow.lerp_(fast, 1 - momentum)


def test_every_parameter_and_buffer_follows():
    check_everything_follows(update_momentum)
    caught(check_everything_follows, only_trainable)
    caught(check_everything_follows, no_buffers)


def check_mismatch(update):
    for other in (
        nn.Linear(2, 4),
        nn.Linear(2, 3, bias=False),
        nn.Sequential(nn.Linear(2, 3)),
        nn.BatchNorm1d(3),
        nn.Linear(3, 2),
    ):
        teacher = nn.Linear(2, 3)
        before = copy.deepcopy(teacher.state_dict())
        try:
            update(teacher, other, 0.5)
        except ValueError as error:
            assert "update_momentum" in str(error)
        else:
            raise AssertionError("networks that differ must be refused")
        assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_networks_that_differ_are_refused_before_anything_moves():
    check_mismatch(update_momentum)
    caught(check_mismatch, no_buffers, RuntimeError)
    for momentum in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="momentum"):
            update_momentum(nn.Linear(1, 1), nn.Linear(1, 1), momentum)


def test_buffers_that_differ_are_refused():
    teacher, student = nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    with pytest.raises(ValueError, match="buffers"):
        update_momentum(teacher, student, 0.5)


def test_shared_parameters_move_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(2, 2, bias=False)
            self.two = nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

    student = Tied()
    teacher = make_teacher(student)
    nn.init.zeros_(teacher.one.weight), nn.init.ones_(student.one.weight)
    update_momentum(teacher, student, 0.9)
    assert_close(teacher.two.weight, torch.full((2, 2), 0.1))
