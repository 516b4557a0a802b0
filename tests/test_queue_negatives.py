"Negatives from the queue: a memory of tokens, and the step that draws its wrong partners from it."

import copy
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from toys import tiny_batch, tiny_step

import speechimg.alignment as step_room
from speechimg.alignment import Alignment, encode
from speechimg.run.queue_negatives import (
    QueueAlignment,
    TokenMemory,
    TokenQueue,
    gather,
    half_precision,
)

# ---- the memory


def pairs(ids):
    "Embeddings that tell whose they are, of both sides, and the ids."
    ids = torch.as_tensor(ids)
    speech = torch.stack([ids.float(), torch.zeros(len(ids))], 1)
    return speech, speech.flip(1), ids


def token_queue():
    return TokenQueue(4, 2, token_slots=2, token_width=2, speech_length=3, image_length=2)


def whole(n, length):
    "Tokens of ones for n pairs: (speech, mask, image)."
    mask = torch.ones(n, length, dtype=torch.bool)
    return torch.ones(n, length, 2), mask, torch.ones(n, 2, 2)


@given(
    size=st.integers(2, 7),
    slots=st.integers(1, 7),
    batches=st.lists(st.integers(0, 12), max_size=6),
)
def test_token_memory_equals_a_plain_list(size, slots, batches):
    slots, seen = min(slots, size), 0
    queue = TokenQueue(size, 2, slots, token_width=1, speech_length=3, image_length=2)
    for n in batches:
        length = 1 + seen % 5  # shorter and longer than what is kept
        ids = torch.arange(seen, seen + n)
        places = torch.arange(length)[None, :, None] / 8
        tokens = ids.float()[:, None, None].expand(n, length, 1) + places
        image = ids.float()[:, None, None].expand(n, 2, 1)
        queue.enqueue(*pairs(ids), tokens, torch.ones(n, length, dtype=torch.bool), image)
        seen += n
    kept = queue.tokens()
    assert sorted(kept.ids.tolist()) == list(range(max(0, seen - slots), seen))
    for row, item in enumerate(kept.ids.tolist()):
        assert kept.speech[row, 0] == item and kept.image[row, 1] == item
        assert (kept.image_tokens[row] == item).all()
        valid = int(kept.speech_mask[row].sum())
        expected = (item + torch.arange(3) / 8) * (torch.arange(3) < valid)
        assert_close(kept.speech_tokens[row, :, 0].float(), expected.half().float())


def test_tokens_are_half_precision_bounded_and_clean():
    queue = token_queue()
    speech = torch.full((3, 5, 2), 1e6, requires_grad=True)
    mask = torch.tensor([[True, True, False, False, False]]).expand(3, 5)
    garbage = speech.masked_fill(~mask[..., None], torch.nan)
    queue.enqueue(*pairs([1, 2, 3]), garbage, mask, torch.full((3, 2, 2), -1e6))
    kept = queue.tokens()
    assert kept.speech_tokens.dtype == kept.image_tokens.dtype == torch.float16
    assert kept.speech_tokens.isfinite().all() and kept.image_tokens.isfinite().all()
    assert not kept.speech_tokens.requires_grad
    assert kept.speech_mask.tolist() == [[True, True, False]] * 2
    assert not kept.speech_tokens[:, 2:].any()
    shapes = [buffer.shape for buffer in queue.memory.buffers()]
    for _ in range(5):
        queue.enqueue(*pairs([4, 5, 6]), garbage, mask, torch.ones(3, 2, 2))
    assert shapes == [buffer.shape for buffer in queue.memory.buffers()]


def test_a_slot_is_wiped_before_a_shorter_utterance_enters():
    queue = token_queue()
    queue.enqueue(*pairs([1, 2]), *whole(2, 3))
    queue.enqueue(*pairs([3, 4]), *whole(2, 1))
    assert queue.tokens().speech_mask.sum(1).tolist() == [1, 1]
    assert not queue.tokens().speech_tokens[:, 1:].any()


@pytest.mark.parametrize(
    "shapes",
    [
        None,
        ((2, 3, 5), (2, 3), (2, 2, 2)),
        ((1, 3, 2), (1, 3), (2, 2, 2)),
        ((2, 3, 2), (2, 4), (2, 2, 2)),
        ((2, 3, 2), (2, 3), (2, 3, 2)),
        ((2, 3, 2), (2, 3), (1, 2, 2)),
        ((2, 3), (2, 3), (2, 2, 2)),
    ],
)
def test_tokens_that_do_not_fit_change_nothing(shapes):
    queue = token_queue()
    queue.enqueue(*pairs([1, 2]), *whole(2, 3))
    before = copy.deepcopy(queue.state_dict())
    given = [None] * 3
    if shapes:
        given = [torch.zeros(shapes[0]), torch.ones(shapes[1]).bool(), torch.zeros(shapes[2])]
    with pytest.raises(ValueError, match="enqueue"):
        queue.enqueue(*pairs([3, 4]), *given)
    assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())


def test_embeddings_that_do_not_fit_change_nothing():
    "What the plain queue refuses leaves the tokens alone, too."
    queue = token_queue()
    queue.enqueue(*pairs([1, 2]), *whole(2, 3))
    before = copy.deepcopy(queue.state_dict())
    speech, image, ids = pairs([3, 4])
    with pytest.raises(ValueError):
        queue.enqueue(speech[:, :1], image, ids, *whole(2, 3))
    with pytest.raises(ValueError):
        queue.enqueue(speech, image, -ids, *whole(2, 3))
    assert all(torch.equal(before[name], value) for name, value in queue.state_dict().items())


def test_sizes_that_make_no_sense():
    with pytest.raises(ValueError, match="token_slots"):
        TokenQueue(4, 2, 5, 1, 1, 1)
    with pytest.raises(ValueError, match="token_slots"):
        TokenQueue(4, 2, 0, 1, 1, 1)
    with pytest.raises(ValueError):
        TokenMemory(0, 1, 1, 1)


def test_an_empty_queue_remembers_nothing():
    queue = token_queue()
    queue.enqueue(*pairs([1, 2, 3]), *whole(3, 3))
    queue.reset()
    assert len(queue.tokens().ids) == 0 == queue.pointer and (queue.ids == -1).all()
    assert not any(buffer.any() for name, buffer in queue.memory.named_buffers() if name != "entry")


def test_names_of_the_tensors_stay():
    "So that checkpoints of other versions load."
    expected = ["speech", "image", "ids", "pointer"]
    expected += [f"memory.{name}" for name in ("speech", "mask", "image", "entry", "pointer")]
    assert list(token_queue().state_dict()) == expected


# ---- the step


def queue_step(**settings):
    return tiny_step(QueueAlignment, (4, 4), **{"negatives": "queue"} | settings)


def test_negatives_from_the_queue():
    """Teacher tokens in half precision, once there are some and the warm-up is over.

    Until then those of the batch. All of it differentiable.
    """
    alignment, drawn, right = queue_step(token_slots=3, queue_warmup_steps=2), [], None

    def spy(logits, ids, generator=None, key_ids=None, *options, **named):
        drawn.append((ids if key_ids is None else key_ids).tolist())
        return right(logits, ids, generator, key_ids, *options, **named)

    # from the queue: 2 x 4 right, 2 x 4 wrong
    steps = ([1, 2, 3, 4], 12), ([5, 6, 7, 8], 12), ([6, 9, 10, 11], 16)
    right = step_room.sample_negatives
    with patch.object(step_room, "sample_negatives", spy):
        for step, (ids, judged) in enumerate(steps):
            batch = tiny_batch(ids, seed=step, frames=3 + step)
            output = alignment(batch, step, torch.Generator().manual_seed(0))
            assert output.sim_logits.shape == (judged, 2) and output.loss.isfinite()
            output.loss.backward()
            alignment.update(output)
    assert [sorted(ids) for ids in drawn[::2]] == [[1, 2, 3, 4], [5, 6, 7, 8], [6, 7, 8]]
    assert alignment.queue.tokens().speech_tokens.dtype == torch.float16


def spied_match(alignment, seen):
    "Write down which tokens meet."
    match = alignment.model.match

    def spy(speech, mask, image, pairs):
        seen.append((speech[pairs[0]], image[pairs[1]]))
        return match(speech, mask, image, pairs)

    return spy


def are_of(tokens, ones):
    "Which rows of tokens begin with one of these?"
    return [any(torch.equal(row[: len(one)], one) for one in ones) for row in tokens]


def test_whose_tokens_they_are_does_not_give_the_answer_away():
    """Each pair, right or wrong, has one side of the student's and one of the teacher's.

    Equally often either way round.
    """
    alignment, seen = queue_step(token_slots=4), []
    alignment.update(alignment(tiny_batch([1, 2, 3, 4], seed=1), 0))
    for parameter in alignment.teacher.parameters():
        parameter.add_(0.5)  # so that one can tell whose tokens they are
    alignment.model.match = spied_match(alignment, seen)
    batch = tiny_batch([6, 7, 8], seed=2)
    output = alignment(batch, 1, torch.Generator().manual_seed(0))
    with torch.no_grad():
        student = encode(alignment.model, batch)
    (spoken, shown), sides = seen[0], [side.tokens for side in student]
    online = are_of(spoken, sides[0]), are_of(shown, sides[1])
    # right, right, wrong picture, wrong recording
    assert online[0] == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    assert online[1] == [not own for own in online[0]] and output.sim_logits.shape == (12, 2)
    confident = torch.tensor([[0.0, 1.0]] * 6 + [[1.0, 0.0]] * 6)
    alignment.model.match = lambda *_: confident
    judged = alignment(batch, 1, torch.Generator().manual_seed(0))
    assert judged.sim_accuracy == 1 and abs(judged.sim.item() - math.log(1 + math.exp(-1))) < 1e-6


def test_each_wrong_partner_is_the_one_that_was_drawn():
    "By the student's queries and the teacher's keys; its own tokens are read, and no others."
    alignment, seen, asked = queue_step(token_slots=4), [], []
    alignment.update(alignment(tiny_batch([1, 2, 3, 4], seed=1), 0))
    memory = alignment.queue.tokens()
    alignment.model.match = spied_match(alignment, seen)
    batch, picks = tiny_batch([6, 7, 8], seed=2), (torch.tensor([2, 0, 3]), torch.tensor([1, 1, 0]))

    def drawn(logits, *_, **__):
        asked.append(logits)
        return picks[len(asked) - 1]

    with patch.object(step_room, "sample_negatives", drawn):
        alignment(batch, 1)
    student = encode(alignment.model, batch)
    assert_close(asked[0], student.speech.embedding @ memory.image.T / 0.2)
    assert_close(asked[1], student.image.embedding @ memory.speech.T / 0.2)
    spoken, shown = seen[0]
    assert torch.equal(shown[6:9], memory.image_tokens[picks[0]].float())
    length = memory.speech_tokens.shape[1]
    assert torch.equal(spoken[9:, :length], memory.speech_tokens[picks[1]].float())


def test_while_matching_is_off_tokens_are_kept_all_the_same():
    alignment = queue_step(token_slots=4, sim_start_step=2)
    for step, ids in enumerate(([1, 2], [3, 4], [5, 6])):
        output = alignment(tiny_batch(ids, seed=step), step, torch.Generator().manual_seed(0))
        alignment.update(output)
        assert len(output.sim_logits) == (0, 0, 8)[step]
    assert sorted(alignment.queue.tokens().ids.tolist()) == [3, 4, 5, 6]


def test_tokens_kept_for_nothing_change_nothing():
    "With negatives of the batch the step is that of a plain Alignment."
    batch, results = tiny_batch([1, 2, 1, 3]), []
    for alignment in (tiny_step(Alignment), queue_step(token_slots=4, negatives="batch")):
        alignment.update(alignment(tiny_batch([7, 8], seed=3), 0, torch.Generator().manual_seed(0)))
        results.append(alignment(batch, 1, torch.Generator().manual_seed(0)))
    for name in ("loss", "speech_to_image", "sim_logits"):
        assert torch.equal(*(getattr(output, name) for output in results)), name


# ---- tokens side by side


def test_gather_pads_and_converts():
    short, long = torch.ones(2, 2, 3), torch.ones(1, 4, 3, dtype=torch.float16)
    rows = gather([(short, torch.tensor([1])), (long, torch.tensor([0, 0]))])
    assert rows.shape == (3, 4, 3) and rows.dtype == torch.float32
    assert rows[0, 2:].eq(0).all() and rows[1:].eq(1).all()
    one = torch.tensor([0])
    mask = gather([(torch.ones(2, 2).bool(), one), (torch.ones(1, 4).bool(), one)])
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


def test_half_precision_is_cut_and_not_infinite():
    assert half_precision(torch.tensor([1e6, -1e6, 0.5])).tolist() == [65504, -65504, 0.5]
