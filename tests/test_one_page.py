"The method on one page and the library: equal losses, gradients, teacher, queue and recall."

import ast
import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from speechimg import distillation, mining, queue, retrieval, sic, sim
from speechimg.alignment import Alignment
from speechimg.core import Config
from speechimg.data import collate
from speechimg.model import Embedded

SMALL = {"STEPS": 9, "BATCH": 6, "START": 3, "FINE": 2, "RAMP": 4, "QUEUE": 16, "SIBLINGS": 4}
NEAR = {"atol": 1e-5, "rtol": 1e-5}


def cells(root):
    "The code cells of the page, without the lines that only Jupyter understands."
    cells = json.loads((root / "nbs" / "00_page.ipynb").read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [source for source in sources if "%pip" not in source]


def is_definition(node):
    "Imports, functions, classes and settings in capitals; nothing that computes."
    if isinstance(node, ast.Assign):
        names = [name.id for name in ast.walk(node.targets[0]) if isinstance(name, ast.Name)]
        return all(name.isupper() for name in names)
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


@pytest.fixture
def page(root):
    "What the page defines, with small settings."
    found = {}
    for source in cells(root):
        kept = [node for node in ast.parse(source).body if is_definition(node)]
        exec(compile(ast.Module(kept, []), "00_page.ipynb", "exec"), found)
    assert SMALL.keys() <= found.keys()
    found.update(SMALL)
    return found


def cell_with(root, text):
    "The one cell of the page that holds this text."
    (found,) = [source for source in cells(root) if text in source]
    return found


class Toy(SimpleNamespace):
    "As much of a Features as the page uses."

    def __len__(self):
        return len(self.speech)


@pytest.fixture
def toy():
    "Twenty-four recordings of eight pictures: noise of the right shapes."
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 12, (24,), generator=generator)
    frames = [torch.randn(n, 384, generator=generator).numpy() for n in lengths.tolist()]
    return Toy(
        speech=frames,
        lengths=lengths.numpy(),
        image=list(torch.randn(8, 25, 320, generator=generator).numpy()),
        image_of=torch.arange(24) % 8,
        ids=torch.arange(24) % 8,
        groups=torch.arange(24) % 8 // 2,
        uttids=[""] * 24,
    )


def unit(*shape, seed):
    return nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


# One formula at a time


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


def test_targets_and_the_coarse_loss(page):
    ids, key_ids = torch.tensor([5, 3, 5, 8]), torch.tensor([5, 3, 5, 8, 3, 9, 5])
    labels = page["id_targets"](ids, key_ids)
    assert_close(labels, sic.id_targets(ids, key_ids), **NEAR)

    leaves = [unit(*shape, seed=seed) for seed, shape in enumerate([(4, 6)] * 2 + [(7, 6)] * 2)]
    leaves = [leaf.requires_grad_() for leaf in [*leaves, torch.tensor(0.3)]]
    *embeddings, tau = leaves
    teacher = unit(4, 6, seed=9)
    soft = page["soft_targets"](teacher, embeddings[3], labels, tau, 0.3)
    logits = sic.similarity_logits(teacher, embeddings[3], tau.detach())
    assert_close(soft, distillation.soft_targets(logits, labels, 0.3), **NEAR)
    assert not soft.requires_grad

    ours, (to_image, to_speech) = page["coarse_loss"](*embeddings, (soft, labels), tau)
    theirs = sic.sic_loss(*embeddings, (soft, labels), tau)
    assert_close(ours, theirs.loss, **NEAR)
    assert_close(to_image, theirs.speech_to_image, **NEAR)
    assert_close(to_speech, theirs.image_to_speech, **NEAR)
    for one, other in zip(gradients(ours, leaves), gradients(theirs.loss, leaves)):
        assert_close(one, other, **NEAR)


def test_negatives_are_drawn_alike(page):
    ids, logits = torch.tensor([1, 2, 1, 3, 4]), 3 * torch.randn(5, 5)
    for seed in range(40):
        draws = [torch.Generator().manual_seed(seed) for _ in range(2)]
        ours = page["hard_negatives"](logits, ids, draws[0])
        assert torch.equal(ours, mining.sample_negatives(logits, ids, draws[1]))


def test_the_fine_loss(page):
    logits, rows = torch.randn(9, 2, requires_grad=True), []
    wrong_image, wrong_speech = torch.tensor([1, 2, 0]), torch.tensor([2, 2, 1])

    def matcher(speech, mask, image):
        rows.extend(zip(speech[:, 0, 0].tolist(), mask[:, 0].tolist(), image[:, 0, 0].tolist()))
        return logits

    numbers = torch.arange(3.0)[:, None, None]
    ours = page["fine_loss"](matcher, numbers, numbers[..., 0], numbers, wrong_image, wrong_speech)
    assert_close(ours, sim.sim_loss(*logits.split(3)), **NEAR)
    right, pictures, recordings = rows[:3], rows[3:6], rows[6:]
    assert right == [(0, 0, 0), (1, 1, 1), (2, 2, 2)]
    assert pictures == [(0, 0, 1), (1, 1, 2), (2, 2, 0)]
    assert recordings == [(2, 2, 0), (2, 2, 1), (1, 1, 2)]  # each with its own mask


def test_teacher_and_queue(page):
    student, ours = nn.Linear(3, 4), nn.Linear(3, 4)
    theirs = copy.deepcopy(ours)
    page["follow"](ours, student, 0.9)
    queue.update_momentum(theirs, student, 0.9)
    for one, other in zip(ours.parameters(), theirs.parameters()):
        assert_close(one, other, **NEAR)

    kept, ring = page["EMPTY"], queue.EmbeddingQueue(7, page["WIDTH"])
    for seed in range(4):
        new = unit(3, page["WIDTH"], seed=seed), unit(3, page["WIDTH"], seed=9 + seed)
        ids = torch.arange(3) + 3 * seed
        kept = page["enqueue"](kept, (*new, ids), 7)
        ring.enqueue(*new, ids)
    same_keys(kept, ring)


def same_keys(kept, ring):
    "The same pairs, in whatever order."
    for one, other in zip(sorted_keys(*kept), sorted_keys(*ring.filled())):
        assert_close(one, other, **NEAR)


def sorted_keys(speech, image, ids):
    order = sorted(range(len(ids)), key=lambda row: (ids[row], *speech[row, :2].tolist()))
    return speech[order], image[order], ids[order]


def test_padding_is_not_heard(page):
    towers, frames = page["Towers"]().eval(), torch.randn(1, 9, 384)
    alone = towers.speech(frames, torch.tensor([9]))
    padded = torch.cat([frames, torch.full((1, 6, 384), 7.0)], 1)
    tokens, mask, embedding = towers.speech(padded, torch.tensor([9]))
    assert mask.sum() == mask[0, : alone[1].shape[1]].sum() == alone[1].sum()
    assert_close(tokens[mask], alone[0][0], **NEAR)
    assert_close(embedding, alone[2], **NEAR)


# The whole of it


class Encoders(nn.Module):
    "The towers of the page, as the library calls them."

    speech_tower = image_tower = SimpleNamespace()  # no part of them is prepared beforehand

    def __init__(self, towers):
        super().__init__()
        self.towers = towers

    def encode_speech(self, features, lengths):
        return Embedded(*self.towers.speech(features, lengths))

    def encode_image(self, features):
        return Embedded(*self.towers.image(features))


class Model(nn.Module):
    "The student of the page, as the library expects a model."

    speech_tower = image_tower = Encoders.speech_tower

    def __init__(self, page, towers, matcher, tau):
        super().__init__()
        self.encoders, self.matcher, self.temperature = Encoders(towers), matcher, tau
        self.config = Config(
            dim=page["WIDTH"],
            width=page["WIDTH"],
            precision="float32",
            queue_size=page["QUEUE"],
            momentum=page["MOMENTUM"],
            alpha=page["ALPHA"],
            alpha_ramp_steps=page["RAMP"],
            student_steps=page["START"],
            queue_warmup_steps=page["START"],
            sim_start_step=page["FINE"],
        )

    def encode_speech(self, features, lengths):
        return self.encoders.encode_speech(features, lengths)

    def encode_image(self, features):
        return self.encoders.encode_image(features)

    def match(self, speech, mask, image, pairs=None):
        if pairs is not None:
            speech, mask, image = speech[pairs[0]], mask[pairs[0]], image[pairs[1]]
        return self.matcher(speech, mask, image)


def spy_on_loop(page):
    "What the page's loop does, step by step, while it does it: a list that fills."
    seen, losses, follow = [], page["losses"], page["follow"]

    def weights():
        return [*page["student"].parameters(), *page["matcher"].parameters(), page["tau"]]

    def spied_losses(student, teacher, matcher, tau, queue, batch, step, generator):
        draws = torch.Generator().set_state(generator.get_state())
        coarse, fine, keys = losses(student, teacher, matcher, tau, queue, batch, step, generator)
        seen.append(SimpleNamespace(batch=batch, draws=draws, coarse=coarse, fine=fine))
        return coarse, fine, keys

    def spied_follow(teacher, student, momentum):  # the optimiser has made its step
        assert len(seen) == page["step"] + 1
        seen[-1].gradients = [copy.deepcopy(weight.grad) for weight in weights()]
        seen[-1].weights = [weight.detach().clone() for weight in weights()]
        follow(teacher, student, momentum)

    page.update(losses=spied_losses, follow=spied_follow)
    return seen


def without_dropout(*modules):
    "The only draws left are those of batches and negatives."
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            if isinstance(part, nn.MultiheadAttention):
                part.dropout = 0.0


def test_the_loop_takes_the_steps_of_the_library(page, root, toy):
    page["train"] = toy
    exec(cell_with(root, "copy.deepcopy(student)"), page)
    page.update(SMALL)
    without_dropout(page["student"], page["teacher"], page["matcher"])
    with torch.no_grad():
        page["tau"].fill_(0.9)  # out of its range: both limit it
    parts = copy.deepcopy((page["student"], page["matcher"], page["tau"]))
    alignment = Alignment(Model(page, *parts)).train()
    seen = spy_on_loop(page)
    exec(cell_with(root, "for step in range(STEPS)"), page)
    assert len(seen) == SMALL["STEPS"]
    assert any(len(set(one.batch.ids.tolist())) < SMALL["BATCH"] for one in seen)  # one id twice

    model = alignment.model
    weights = [*model.encoders.parameters(), *model.matcher.parameters(), model.temperature]
    for step, ours in enumerate(seen):
        output = alignment(ours.batch, step, ours.draws)
        alignment.zero_grad()
        output.loss.backward()
        assert_close(ours.coarse.detach(), output.sic, **NEAR)
        assert_close(ours.fine.detach(), output.sim, **NEAR)
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        for one, weight in zip(ours.gradients, weights):
            assert (one is None) == (weight.grad is None)
            if one is not None:
                assert_close(one, weight.grad, atol=1e-5, rtol=1e-4)
        with torch.no_grad():  # the optimiser is torch's on both sides: take over what it did
            for weight, moved in zip(weights, ours.weights):
                weight.copy_(moved)
        alignment.update(output)
    assert norm > 0

    for one, other in zip(page["teacher"].parameters(), alignment.teacher.parameters()):
        assert_close(one, other, **NEAR)
    same_keys(page["queue"], alignment.queue)


# Recall


def test_recall_before_and_after_reranking(page, toy):
    ours, matcher = page["Towers"]().eval(), page["Matcher"]().eval()
    tau = torch.tensor(0.1)
    asked = collate(toy, torch.arange(len(toy)))
    pictures = torch.stack([torch.tensor(one) for one in toy.image])
    coarse, best, final = page["answer"](ours, matcher, tau, asked, pictures, 3)
    model = Model(page, ours, matcher, tau).eval()
    with torch.no_grad():
        speech = model.encoders.encode_speech(asked.speech, asked.speech_lengths)
        image = model.encoders.encode_image(pictures)

        def score_pairs(queries, candidates):
            logits = model.match(*speech[:2], image.tokens, (queries, candidates))
            return logits[:, 1] - logits[:, 0]

        cosines = speech.embedding @ image.embedding.T
        assert_close(coarse, cosines / tau, **NEAR)
        expected = retrieval.rerank(cosines / tau, score_pairs, 3, "sum")
    assert_close(final, expected.gather(1, best), atol=1e-4, rtol=1e-4)
    for scores, candidates in ((coarse, None), (final, best)):
        full = scores
        if candidates is not None:
            full = torch.full_like(coarse, -1e9).scatter(1, candidates, scores)
        theirs = retrieval.recall_at_k(full, toy.image_of, (1, 2, 3))["speech_to_image"]
        theirs = pytest.approx(list(theirs.values()), abs=1e-4)
        assert page["recall"](full, toy.image_of, (1, 2, 3)) == theirs
