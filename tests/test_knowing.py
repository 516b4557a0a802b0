"""Words that frozen towers know, several corpora as one, and towers that put both beside what is
learnt.
"""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tower_checks
from PIL import Image
from safetensors.torch import load, save
from torch.testing import assert_close
from tower_checks import check_copy, check_gradients, check_order, check_padding

from speechimg.alignment import Alignment
from speechimg.core import Config, InputError
from speechimg.corpora import load_corpus
from speechimg.data import Batch, Features
from speechimg.files.cache import FeatureCache
from speechimg.files.mixture import Mixture, corpus_or_mixture, side_by_side
from speechimg.model import SpeechImageModel, add_word
from speechimg.retrieval import Embeddings
from speechimg.towers import light, lite
from speechimg.towers.light import (
    LightImageTower,
    LightSpeechTower,
    beside,
)
from speechimg.towers.lite import LiteImage, class_vectors, pooled
from speechimg.towers.whisper import WhisperSpeech
from speechimg.towers.words import (
    SPACE,
    Listen,
    SeenThings,
    SpokenWords,
    Words,
    asks_for_one,
    empty_words,
    fit_ears,
    fit_eyes,
    group_means,
    heard,
    load_words,
    save_words,
    whitening,
)
from speechimg.train import make_optimizer

FRAMES, LENGTHS = torch.randn(3, 40, 384, generator=torch.Generator().manual_seed(3)), [40, 9, 1]
PATCHES = torch.randn(3, 25, 320, generator=torch.Generator().manual_seed(4))


def toy_words(count=7, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def unit(*shape):
        return F.normalize(torch.randn(shape, generator=generator), dim=-1)

    names = [f"word{place}" for place in range(count)]
    basis = torch.linalg.qr(unit(1280, SPACE)).Q
    usual, whitener = unit(384), torch.eye(384) + 0.01 * unit(384, 384)
    ears, eyes = (usual, whitener, unit(count, 384)), (unit(1280), basis, unit(count, SPACE))
    lone = torch.randn(387, generator=generator) / 20
    return Words(names, Listen().state_dict(), *ears, *eyes, lone)  # all frames alike


def one_frame(x):  # (n, 384)
    "Recordings of a single frame, and their mask."
    return x[:, None], torch.ones(len(x), 1, dtype=torch.bool)


@pytest.fixture
def seven(monkeypatch):
    monkeypatch.setattr(light, "load_words", toy_words)
    return Config(towers="light", width=16, heads=2, dim=SPACE + 16, words=7, fusion_depth=1)


# Words


def test_the_scatter_behind_the_whitening_is_round():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    white = x @ whitening(x, 0.0)
    assert_close(white.T @ white / len(x), torch.eye(5), rtol=0, atol=1e-3)
    shrunk = x @ whitening(x, 0.3)
    spread = torch.linalg.eigvalsh(shrunk.T @ shrunk / len(x))
    assert spread.min() < 0.5 < spread.max()  # not wholly round


def test_ears_find_the_word_whose_direction_counts_not_the_loudest():
    "Two words differ by a little in one direction; all recordings by much in another."
    generator, count = torch.Generator().manual_seed(1), 40
    said = torch.arange(2).repeat(count)
    x = 0.1 * torch.randn(2 * count, 384, generator=generator)
    x[:, 0] += 30 * torch.randn(2 * count, generator=generator)  # the voice
    x[:, 1] += said.float() - 0.5  # the word
    usual, whitener, spoken = fit_ears(x, said, 2)
    fresh = 0.1 * torch.randn(50, 384, generator=generator)
    fresh[:, 0] += 30 * torch.randn(50, generator=generator)
    fresh[:, 1] += 0.5  # all say the second word

    def right(space, centres):
        return ((fresh - usual) @ space @ centres.T).argmax(1).float().mean().item()

    plain = F.normalize(group_means(x, said, 2) - usual, dim=1)
    assert right(whitener, spoken) > 0.95 > right(torch.eye(384), plain)


def test_eyes_weigh_classes_and_drawings():
    drawn = class_vectors()[7:8] + torch.ones(1280)  # its plain picture is all ones
    none = torch.zeros(0, 1280)
    basis, pictured = fit_eyes([[3], [], [], [3]], [none, drawn, none, drawn], torch.ones(1280))
    assert basis.shape == (1280, SPACE) and pictured.shape == (4, SPACE)
    assert_close(basis.T @ basis, torch.eye(SPACE), rtol=0, atol=1e-4)
    classes = F.normalize(class_vectors() @ basis, dim=1)
    assert (classes @ pictured[0]).argmax() == 3 and (classes @ pictured[1]).argmax() == 7
    assert not pictured[2].any()  # nobody knows
    both = classes[[3, 7]] @ pictured[3]
    assert both[0] > both[1] > 0.1  # class vectors count three times


def test_shares_are_the_formula():
    known, x = toy_words(), torch.randn(4, 384, generator=torch.Generator().manual_seed(5))
    spoken = SpokenWords(known)
    white = F.normalize((x - known.usual) @ known.whitener, dim=1)
    shares = torch.softmax(30 * white @ known.spoken.T, 1)
    assert_close(
        spoken.shares(*one_frame(x)), shares, rtol=0, atol=2e-3
    )  # numbers rest in half precision
    picture = F.normalize(shares @ known.pictured, dim=1)
    assert_close(spoken(*one_frame(x)), picture, rtol=0, atol=5e-3)
    seen = F.normalize((pooled(PATCHES) - known.plain) @ known.basis, dim=1)
    assert_close(SeenThings(known)(PATCHES), seen, rtol=0, atol=2e-3)


def test_heard_names_the_nearest_or_nobody():
    known = toy_words()
    spoken = SpokenWords(known)
    mean = known.usual + torch.linalg.solve(known.whitener.T, known.spoken[4])
    found = heard(spoken, mean[None], top=3)
    assert found[0][0] == "word4" and len(found) == 3
    assert [share for _, share in found] == sorted((share for _, share in found), reverse=True)
    away = torch.randn(384, generator=torch.Generator().manual_seed(6))
    away -= known.spoken.T @ torch.linalg.lstsq(known.spoken.T, away[:, None]).solution[:, 0]
    away = known.usual + torch.linalg.solve(known.whitener.T, away)
    assert heard(spoken, away[None]) == []


def test_words_travel_and_damage_is_named(tmp_path):
    known = toy_words()
    save_words(known, tmp_path)
    back = load_words(tmp_path)
    assert back.names == known.names
    for name, one in known.tensors().items():
        assert_close(back.tensors()[name], one, rtol=2e-3, atol=2e-3)
    whole = (tmp_path / "words.safetensors").read_bytes()
    foreign = save({"usual": torch.zeros(384)})
    for broken in (whole[: len(whole) // 2], b"", foreign):
        (tmp_path / "words.safetensors").write_bytes(broken)
        with pytest.raises(InputError, match="words.safetensors"):
            load_words(tmp_path)
    (tmp_path / "words.safetensors").write_bytes(whole)
    for text in ('["one"]', "{}", "[1, 2]", "{"):
        (tmp_path / "words.json").write_text(text)
        with pytest.raises(InputError, match="words"):
            load_words(tmp_path)


def test_the_shipped_words_know_drawings_that_nobody_showed():
    "Written words, so that no recording is needed; by chance 0.6 % come first."
    known, val, eyes = load_words(), load_corpus("things", "val"), LiteImage()
    shown = [i for i, one in enumerate(val.pictures) if one.concepts[0] in known.names]
    grids = torch.tensor(np.stack(eyes.many([val.load_picture(place) for place in shown])))
    seen = SeenThings(known)(grids)  # (m, SPACE)
    asked = [known.names.index(val.pictures[place].concepts[0]) for place in shown]
    scores = known.pictured[asked] @ seen.T
    first = (scores.argmax(1) == torch.arange(len(shown))).float().mean().item()
    assert first > 0.35, f"{first:.2f}"


# Several corpora as one


def test_corpora_side_by_side_keep_their_families_and_nothing_else():
    scenes, things = load_corpus("scenes", "val"), load_corpus("things", "val")
    both = side_by_side([scenes, things])
    assert len(both.pictures) == len(scenes.pictures) + len(things.pictures)
    for part, first in ((scenes, 0), (things, len(scenes.pictures))):
        mine = both.pictures[first : first + len(part.pictures)]
        for key in ("id", "group"):
            here = np.array([getattr(one, key) for one in mine])
            there = np.array([getattr(one, key) for one in part.pictures])
            same = (here[:, None] == here) == (there[:, None] == there)
            assert same.all(), key
    ids = [{one.id for one in both.pictures[s]} for s in (slice(0, 300), slice(300, None))]
    groups = [{one.group for one in both.pictures[s]} for s in (slice(0, 300), slice(300, None))]
    assert not ids[0] & ids[1] and (groups[0] & groups[1]) <= {-1}
    last = both.captions[-1]
    assert both.read(last.wav) == things.read(things.captions[-1].wav)
    assert both.pictures[last.image].concepts == things.pictures[things.captions[-1].image].concepts
    assert len({one.uttid for one in both.captions}) == len(both.captions)
    assert both.fingerprint() != side_by_side([things, scenes]).fingerprint()


def test_a_fifth_of_a_corpus_is_trained_on_and_all_of_it_validated():
    whole, fifth = Mixture("scenes+things"), Mixture("scenes+things/5")
    things = load_corpus("things", "train")
    taken = [one.uttid for one in fifth("train").captions if one.uttid.startswith("things/")]
    assert taken == [f"things/{one.uttid}" for one in things.captions[::5]]
    assert len(fifth("val").captions) == len(whole("val").captions)


def test_names_of_mixtures(tmp_path):
    assert corpus_or_mixture("scenes") == "scenes"
    folder = tmp_path / "a+b"
    folder.mkdir()
    assert corpus_or_mixture(str(folder)) == str(folder)  # a folder of that name is meant
    mixed = corpus_or_mixture("scenes+things")
    assert mixed.__name__ == "scenes+things" and mixed("no such split") is None
    assert list(Mixture("my/corpus+things/5").every.items()) == [("my/corpus", 1), ("things", 5)]
    for wrong in ("scenes+scenes", "scenes+", "+", "scenes+things/0", "things/5+things"):
        with pytest.raises(InputError, match="corpora"):
            Mixture(wrong)


def test_words_without_pictures_are_refused(tmp_path):
    few = load_corpus("things", "words").subset(range(3))
    with pytest.raises(InputError, match="classes in place of pictures"):
        Features(few, len, len, FeatureCache(tmp_path), progress=False)


# Towers


def test_listening_begins_with_the_mean():
    mask = torch.arange(40) < torch.tensor(LENGTHS)[:, None]
    listen = Listen(384)
    for row, length in enumerate(LENGTHS):
        expected = FRAMES[row, :length].mean(0)
        assert_close(listen(FRAMES, mask)[row], expected, rtol=0, atol=1e-5)
    torch.nn.init.normal_(listen.weigh.weight)
    spoilt = FRAMES.masked_fill(~mask[..., None], torch.nan)
    assert torch.equal(listen(spoilt, mask), listen(FRAMES, mask))
    alone = listen(FRAMES[1:2, :9], mask[1:2, :9])
    assert_close(listen(FRAMES, mask)[1:2], alone, rtol=0, atol=1e-5)


def test_likeness_beside_is_shared_out():
    generator = torch.Generator().manual_seed(8)
    known, learnt = (F.normalize(torch.randn(2, 5, n, generator=generator), dim=-1) for n in (6, 3))
    share = torch.tensor([[0.0], [0.2], [0.5], [0.9], [1.0]])
    first, second = (beside(known[side], learnt[side], share) for side in (0, 1))
    assert_close(first.norm(dim=1), torch.ones(5))
    parts = (known[0] * known[1]).sum(1), (learnt[0] * learnt[1]).sum(1)
    expected = share[:, 0] * parts[0] + (1 - share[:, 0]) * parts[1]
    assert_close((first * second).sum(1), expected)


@pytest.mark.parametrize("count", [0, 7])
def test_speech_tower(count, monkeypatch):
    monkeypatch.setattr(light, "load_words", toy_words)
    more = {"towers": "light", "words": count, "dim": 300}
    tower = tower_checks.make(LightSpeechTower, **more)
    check_padding(tower, tokens_of=lambda length: -(-length // 2))
    check_order(tower_checks.make(LightSpeechTower), FRAMES[:1], FRAMES[:1].flip(1))
    assert tower.known_dim == (SPACE if count else 0)


def test_towers_learn_and_copy():
    for kind, given in ((LightSpeechTower, (FRAMES, None)), (LightImageTower, (PATCHES, None))):
        check_gradients(tower_checks.make(kind), *given)
        check_copy(tower_checks.make(kind), *given)


def test_vectors_lie_beside_each_other_whatever_is_padded(seven):
    torch.manual_seed(0)
    model = SpeechImageModel(seven).eval()
    lengths = torch.tensor(LENGTHS)
    with torch.no_grad():
        torch.nn.init.normal_(model.speech_tower.known.words.listen.weigh.weight)
        vectors = model.encode_speech(FRAMES, lengths).embedding
        spoilt = FRAMES.clone()
        for clip, length in zip(spoilt, LENGTHS):
            clip[length:] = torch.nan
        assert torch.equal(model.encode_speech(spoilt, lengths).embedding, vectors)
        pictures = model.encode_image(PATCHES).embedding
    assert vectors.shape == pictures.shape == (3, SPACE + 16)
    assert_close(vectors.norm(dim=1), torch.ones(3))
    shares = vectors[:, :SPACE].square().sum(1)
    assert shares.min() > 0 and shares.max() < 1 and shares.std() > 1e-3  # each by itself
    assert_close(pictures[:, :SPACE].square().sum(1), torch.full((3,), 0.5))


def test_what_is_known_never_learns(seven):
    torch.manual_seed(0)
    model = SpeechImageModel(seven)
    before = copy.deepcopy(model.state_dict())
    named = dict(model.named_parameters())
    known = [one for name, one in named.items() if ".known." in name]
    assert known and not any(one.requires_grad for one in known)  # where to listen
    heard_ = model.encode_speech(FRAMES, torch.tensor(LENGTHS)).embedding
    seen = model.encode_image(PATCHES).embedding
    F.cross_entropy(20 * heard_ @ seen.T, torch.arange(3)).backward()
    assert named["encoders.speech_projection.weight"].grad.any()
    make_optimizer(model, seven).step()
    for name, one in model.state_dict().items():
        if ".words." in name or ".things." in name:
            assert torch.equal(one, before[name]), name


def test_a_step_and_a_journey(seven, tmp_path):
    "Teacher, queue and files hold the known part, too."
    torch.manual_seed(0)
    model = SpeechImageModel(seven)
    alignment = Alignment(model).train()
    ids, names = torch.arange(3), ["a", "b", "c"]
    batch = Batch(FRAMES, torch.tensor(LENGTHS), PATCHES, ids, names)
    output = alignment(batch, 0, torch.Generator().manual_seed(0))
    output.loss.backward()
    alignment.update(output)
    assert alignment.queue.speech.shape[1] == SPACE + 16
    model.eval().save_pretrained(tmp_path)
    back = SpeechImageModel.from_pretrained(str(tmp_path))
    with torch.no_grad():
        given = FRAMES, torch.tensor(LENGTHS)
        assert torch.equal(model.encode_speech(*given).embedding, back.encode_speech(*given)[2])
        assert torch.equal(model.encode_image(PATCHES)[2], back.encode_image(PATCHES)[2])


def test_settings_that_cannot_be():
    for wrong in ({"words": 7}, {"towers": "light", "words": 7, "dim": SPACE}):
        with pytest.raises(InputError, match="words"):
            Config(**wrong)
    with pytest.raises(InputError, match="number of words that ship"):
        LightSpeechTower(Config(towers="light", words=3, dim=300))
    empty = LightImageTower(Config(towers="light", words=3, dim=300), weights=False)
    assert empty.known.things.basis.shape == (1280, SPACE) and empty_words(3).spoken.shape[0] == 3


def test_a_model_before_training_is_the_word_finder(seven):
    model = SpeechImageModel(seven).eval()
    model.speech_tower.known.words.lone[-1] = 1e4
    with torch.no_grad():
        vectors = model.encode_speech(FRAMES[:1], None).embedding
        expected = SpokenWords(toy_words())(*one_frame(FRAMES[:1].mean(1)))
    assert_close(vectors[:, :SPACE], expected, rtol=0, atol=1e-3)
    assert vectors[:, SPACE:].abs().max() < 1e-6


def test_the_untrained_model_ranks_as_what_is_known_and_its_fine_stage_as_the_coarse_one():
    from speechimg.retrieval import load_model, two_stages

    model = load_model("untrained")
    rows = torch.randn(4, 40, 384, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        spoken = model.encode_speech(rows, None)
        seen = model.encode_image(PATCHES)
    assert_close(spoken.embedding[:, :SPACE].norm(dim=1), torch.ones(4))
    both = Embeddings(spoken.embedding, seen.embedding, list(spoken.tokens), seen.tokens, None)
    coarse, fine = two_stages(model, both, 3)
    assert torch.equal(coarse.argsort(1), fine.argsort(1))


def test_scenes_and_single_things_are_told_apart():
    "By voices that the fit has not heard; people's own are not looked at here."
    spoken, ears, found = SpokenWords(load_words()), WhisperSpeech(), {}
    for name, split in (("things", "val"), ("things", "val_sentences"), ("scenes", "val")):
        corpus = load_corpus(name, split)
        clips = [torch.as_tensor(ears(corpus.load_wave(row))) for row in range(0, 160, 4)]
        shares = [asks_for_one(spoken, *whole(clip)) for clip in clips]
        found[name, split] = torch.cat(shares).median().item()
    assert found["things", "val"] > 0.9 and found["things", "val_sentences"] > 0.8
    assert found["scenes", "val"] < 0.1


def whole(clip):  # (T, 384)
    "A batch of one, and its mask."
    return clip[None].float(), torch.ones(1, len(clip), dtype=torch.bool)


# A vocabulary that grows


def test_a_word_of_ones_own(seven, tmp_path):
    model = SpeechImageModel(seven).eval()
    wave = torch.randn(9000, generator=torch.Generator().manual_seed(0)) / 10
    picture = Image.new("RGB", (60, 40), "teal")
    add_word(model, "zorp", [wave], [picture])
    assert model.words[-1] == "zorp" and len(model.words) == model.config.words == 8
    assert model.heard(wave)[0][0] == "zorp" and "zorp (" in model.told(wave)
    look = model.image_tower.known.things(
        torch.as_tensor(model.image_tower.front_end(picture))[None]
    )
    assert_close(model.speech_tower.known.words.pictured[-1].float(), look[0], rtol=0, atol=1e-3)
    add_word(model, "word3", [wave], [picture])  # one of that name is replaced
    assert len(model.words) == 8 and model.words[-1] == "word3" and model.words.count("word3") == 1
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "words.json").read_text()) == model.words
    back = SpeechImageModel.from_pretrained(str(tmp_path))
    assert back.words == model.words and back.heard(wave) == model.heard(wave)
    for names in (model.words[:-1], "zorp", [3]):
        (tmp_path / "words.json").write_text(json.dumps(names))
        with pytest.raises(InputError, match="words.json"):
            SpeechImageModel.from_pretrained(str(tmp_path))
    with pytest.raises(InputError, match="zorp: cannot be added"):
        add_word(model, "zorp", [], [picture])


def test_a_model_without_words_says_nothing():
    model = SpeechImageModel(Config(towers="small", width=16, heads=2, dim=8, fusion_depth=1))
    assert model.words == [] and model.heard(torch.zeros(9000)) == []
    assert model.told(torch.zeros(9000)) == ""
    with pytest.raises(InputError, match="cannot be added"):
        add_word(model, "zorp", [torch.zeros(9000)], [Image.new("RGB", (9, 9))])


def test_a_model_of_the_first_light_towers_is_told_what_it_is(tmp_path):
    SpeechImageModel(Config(width=16, heads=2, dim=8, fusion_depth=1)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {"encoders.speech_tower.norm_frames.weight": torch.ones(96)}
    file.write_bytes(save(load(file.read_bytes()) | old))
    with pytest.raises(InputError, match="first light towers.*train it again"):
        SpeechImageModel.from_pretrained(str(tmp_path))
