"""The paper's towers: HuBERT (hubert, 05a) and BLIP-2 (large, 05b), as tiny random networks of the
very same classes.

For each trap there is the mistake put back, which the check must catch.
"""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchaudio
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from miniature import make_corpus
from PIL import Image
from torch import nn
from torch.testing import assert_close
from tower_checks import Deaf, check_order, check_padding

from speechimg.core import Config, InputError
from speechimg.files.cache import FeatureCache, sha256
from speechimg.towers import blip2 as large
from speechimg.towers import hubert
from speechimg.towers.blip2 import CLIP, Blip2Tower, load_blip2, paper_towers
from speechimg.towers.hubert import (
    TINY_HUBERT,
    Frozen,
    HubertTower,
    LayerMean,
    Waves,
    hubert_frames,
    hubert_layers,
    load_hubert,
    rate_factors,
)

HERE = Path(__file__).resolve().parent
TINY = Config(
    towers="paper",
    speech_model="tiny",
    image_model="tiny",
    width=16,
    heads=2,
    speech_depth=1,
    image_depth=1,
    dropout=0.0,
)
MODES = {
    "group_norm": TINY_HUBERT,
    "layer_norm": TINY_HUBERT
    | {
        "extractor_mode": "layer_norm",
        "encoder_layer_norm_first": True,
        "extractor_conv_bias": True,
    },
}


def change(**values):
    return Config(**{**TINY.to_dict(), **values})


def network(mode="group_norm"):
    torch.manual_seed(3)
    return torchaudio.models.wav2vec2_model(**MODES[mode]).eval()


def tower(kind=HubertTower, mode=None, weights=True, **values):
    backbone = network(mode) if mode else None
    torch.manual_seed(0)
    return kind(change(**values), backbone=backbone, weights=weights).eval()


def sound(samples, seed=1):
    return 0.3 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def picture(width=48, height=32):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def batch(tower, waves):
    features = [torch.from_numpy(tower.front_end(wave)).float() for wave in waves]
    return nn.utils.rnn.pad_sequence(features, batch_first=True), torch.tensor(
        [len(one) for one in features]
    )


def pixels(tower, pictures):
    features = torch.stack([torch.from_numpy(tower.front_end(one)).float() for one in pictures])
    return features / 255 if features.dim() == 4 else features


def learning(tower):
    return {name: p for name, p in tower.named_parameters() if p.requires_grad}


# Frames


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "samples, frames", [(400, 1), (719, 1), (720, 2), (16_000, 49), (102_400, 319)]
)
def test_frames_are_counted_as_the_network_does(mode, samples, frames):
    with torch.no_grad():
        heard, _ = network(mode)(sound(samples)[None])
    assert heard.shape[1] == hubert_frames(samples) == frames
    assert round(samples / 320) == frames or samples in (
        719,
        16_000,
        102_400,
    )  # the usual mistake, one too many


@given(st.integers(400, 400_000))
def test_frames_equal_seven_convolutions(samples):
    frames = samples
    for _, kernel, stride in TINY_HUBERT["extractor_conv_layer_config"]:
        frames = (frames - kernel) // stride + 1
    assert hubert_frames(samples) == frames


@pytest.mark.parametrize("values", [{}, {"cache_towers": False}, {"finetune": "speech"}])
@pytest.mark.parametrize("samples", [1, 10, 399, 400])
def test_a_clip_shorter_than_a_frame_has_one_frame(values, samples):
    ears = tower(**values)
    features = ears.front_end(sound(samples).numpy())
    assert len(features) == ears.front_end.frames(samples)
    spoken = ears(*batch(ears, [sound(samples), sound(5_000)]))
    assert spoken.mask.sum(1).tolist() == [2, 1 + 15] and spoken.tokens.isfinite().all()


def test_the_front_end_says_how_many_frames_it_gives():
    for values in ({}, {"cache_towers": False}):
        front_end = tower(**values).front_end
        for samples in (3, 400, 719, 720, 4_321):
            assert len(front_end(sound(samples))) == front_end.frames(samples)


# Padding


@pytest.mark.parametrize("mode", MODES)
def test_alone_it_is_what_torchaudio_says(mode):
    model, wave = network(mode), sound(8_000)[None]
    with torch.no_grad():
        (expected, _), (layers, lengths) = (
            model.extract_features(wave),
            hubert_layers(model, wave, torch.tensor([8_000])),
        )
        if mode == "layer_norm":
            expected[-1] = model(wave)[0]  # extract_features leaves out the norm at the end
    assert lengths.tolist() == [24] and len(layers) == len(expected) == 3
    for mine, theirs in zip(layers, expected):
        assert_close(mine, theirs, rtol=0, atol=1e-5)


def listened(model, wave, padding):  # ours
    layers, lengths = hubert_layers(
        model, F.pad(wave, (0, padding))[None], torch.tensor([len(wave)])
    )
    return layers[-1][0, : lengths[0]]


def naive(model, wave, padding):
    layers, _ = model.extract_features(F.pad(wave, (0, padding))[None], torch.tensor([len(wave)]))
    return layers[-1][0, : hubert_frames(len(wave))]


def check_company(way, model):
    "A clip says the same whatever length it is padded to."
    with torch.no_grad():
        for padding in (1, 500, 16_000):
            assert_close(
                way(model, sound(6_000), padding), way(model, sound(6_000), 0), rtol=0, atol=2e-5
            )


@pytest.mark.parametrize("mode", MODES)
def test_company_changes_nothing(mode):
    check_company(listened, network(mode))


def test_the_naive_base_model_hears_its_neighbours():
    with pytest.raises(AssertionError):
        check_company(naive, network("group_norm"))
    with torch.no_grad():
        moved = naive(network(), sound(6_000), 16_000) - naive(network(), sound(6_000), 0)
    assert moved.abs().max() > 0.1  # and not by rounding


def test_positions_that_see_padding_are_caught():
    class Leaky(nn.Module):  # spoilt: padding is not silent when the positional convolution comes
        def __init__(self, inner):
            super().__init__()
            self.inner, self.embed_dim = inner, inner.embed_dim

        def forward(self, x):
            return self.inner(x.masked_fill(x == 0, 1.0))

    model = network("layer_norm")
    model.encoder.transformer.pos_conv_embed = Leaky(model.encoder.transformer.pos_conv_embed)
    with pytest.raises(AssertionError):
        check_company(listened, model)


def test_attention_to_padding_is_caught(monkeypatch):
    model = network("layer_norm")
    for layer in model.encoder.transformer.layers:
        forward = layer.forward
        monkeypatch.setattr(layer, "forward", lambda x, mask=None, forward=forward: forward(x))
    with pytest.raises(AssertionError):
        check_company(listened, model)


def test_masked_statistics_equal_the_formula():
    norm, x, lengths = (
        nn.GroupNorm(4, 4),
        torch.randn(3, 4, 500),
        torch.tensor([500, 431, 402]),
    )  # at least 400: shorter waves are padded
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    block = nn.Module()
    block.layer_norm, block.kernel_size, block.stride = norm, 1, 1
    block.conv = lambda wave: x.clone()
    extractor = nn.Module()
    extractor.conv_layers = [block]
    heard, frames = hubert.listen(extractor, torch.zeros(3, 500), lengths)
    valid = (torch.arange(500) < lengths[:, None])[:, None]
    mean = (x * valid).sum(-1, keepdim=True) / lengths.view(3, 1, 1)
    variance = ((x - mean).square() * valid).sum(-1, keepdim=True) / lengths.view(3, 1, 1)
    expected = F.gelu(
        (x - mean) / (variance + norm.eps).sqrt() * norm.weight[:, None] + norm.bias[:, None]
    )
    assert frames.tolist() == lengths.tolist()
    for mine, theirs, n in zip(heard, rearrange(expected, "b c t -> b t c"), lengths):
        assert_close(mine[:n], theirs[:n])


def test_padding_of_cached_features():
    check_padding(tower())


def test_padding_of_the_last_layer():
    check_padding(tower(speech_layers="last"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("values", [{"cache_towers": False}, {"finetune": "speech"}])
def test_padding_of_waves(mode, values):
    check_padding(tower(mode=mode, **values), frames=5_000, tokens_of=hubert_frames)


def test_a_reader_that_attends_to_padding_is_caught():
    ears = tower()
    ears.reader.blocks[0] = Deaf(ears.reader.blocks[0])
    with pytest.raises(AssertionError):
        check_padding(ears)


def test_a_forgotten_mask_is_caught(monkeypatch):
    monkeypatch.setattr(
        hubert, "frame_mask", lambda lengths, x: torch.ones(x.shape[:2], dtype=torch.bool)
    )
    with pytest.raises(AssertionError):
        check_padding(tower(cache_towers=False), frames=5_000, tokens_of=hubert_frames)


def test_order_is_heard_and_seen(monkeypatch):
    frames = torch.randn(4, 20, 96)
    check_order(tower(), frames, frames.flip(1))
    for qformer, tokens in ((False, 17), (True, 4)):
        patches = torch.randn(4, tokens, 32)
        check_order(tower(Blip2Tower, qformer=qformer), patches, patches.flip(1))
    monkeypatch.setattr(hubert, "position_codes", lambda length, width: torch.zeros(length, width))
    with pytest.raises(AssertionError):
        check_order(tower(), frames, frames.flip(1))


# Loudness


def test_which_checkpoint_wants_normalised_waves():
    assert hubert.hubert_facts("hubert_large")[1] and not hubert.hubert_facts("hubert_base")[1]
    with torch.device("meta"):
        assert HubertTower(
            change(speech_model="hubert_large", cache_towers=False)
        ).front_end.normalise


def test_normalised_over_the_true_length():
    wave = 0.1 * sound(4_000) + 0.2
    heard = Waves(True)(wave)[:, 0].astype(np.float32)
    assert abs(heard.mean()) < 1e-3 and abs(heard.std() - 1) < 0.02
    padded = F.pad(wave, (0, 4_000))
    wrong = F.layer_norm(padded, padded.shape)[:4_000].numpy()  # what torchaudio's wrapper does
    assert np.abs(wrong - heard).max() > 0.5
    assert_close(torch.from_numpy(Waves(False)(wave)[:, 0]).float(), wave, rtol=1e-3, atol=1e-4)
    short = Waves(True)(sound(100))[:, 0].astype(np.float32)  # normalised first, padded after
    assert abs(short[:100].std() - 1) < 0.01 and not short[100:].any()


@pytest.mark.parametrize("values", [{}, {"cache_towers": False}, {"finetune": "speech"}])
def test_silence_is_finite(values):
    for speech_model in ("tiny", "hubert_large"):
        ears = tower(mode="layer_norm", speech_model=speech_model, **values)
        for samples in (1, 800, 4_000):
            assert ears(*batch(ears, [torch.zeros(samples), sound(3_000)])).tokens.isfinite().all()


# Layers


def test_the_mean_of_layers_equals_a_loop():
    mean, x = LayerMean(5), torch.randn(2, 7, 5 * 3)
    nn.init.normal_(mean.weights)
    shares = mean.weights.exp() / mean.weights.exp().sum()
    expected = torch.zeros(2, 7, 3)
    for layer in range(5):
        expected = expected + shares[layer] * x[:, :, 3 * layer : 3 * layer + 3]
    assert_close(mean(x), expected)
    wrong = torch.einsum("btwl,l->btw", x.view(2, 7, 3, 5), shares)  # axes in the other order
    assert not torch.allclose(wrong, expected)


def test_layers_lie_side_by_side_and_are_normalised():
    ears, wave = tower(), sound(2_000)
    features = ears.front_end(wave)
    with torch.no_grad():
        layers, _ = (
            load_hubert("tiny").eval().extract_features(torch.from_numpy(Waves()(wave)).float().T)
        )
    assert features.shape == (hubert_frames(2_000), 96) and features.dtype == np.float16
    for index, layer in enumerate(layers):
        assert_close(
            torch.from_numpy(features[:, 32 * index : 32 * index + 32]).float(),
            F.layer_norm(layer[0], (32,)),
            rtol=0,
            atol=5e-3,
        )
    last = tower(speech_layers="last")
    assert np.array_equal(last.front_end(wave), features[:, 64:]) and not any(
        "mean" in name for name in last.state_dict()
    )


def test_loud_layers_fit_float16():
    model = network("layer_norm")
    for layer in model.encoder.transformer.layers:
        layer.feed_forward.output_dense.weight.data *= 1e7
    with torch.no_grad():
        assert (
            max(
                layer.abs().max()
                for layer in hubert_layers(model, sound(2_000)[None], torch.tensor([2_000]))[0][:2]
            )
            > 65_504
        )
    torch.manual_seed(0)
    assert np.isfinite(HubertTower(TINY, backbone=model).front_end(sound(2_000))).all()


# Frozen


@pytest.mark.parametrize("mode", MODES)
def test_cached_and_not_cached_say_the_same(mode):
    waves = [sound(5_000), sound(900, 2), sound(50, 3)]
    cached, live, tuned = (
        tower(mode=mode, **values)
        for values in ({}, {"cache_towers": False}, {"finetune": "speech"})
    )
    expected = cached(*batch(cached, waves))
    for other in (live, tuned):
        found = other(*batch(other, waves))
        assert torch.equal(found.mask, expected.mask)
        assert_close(found.tokens, expected.tokens, rtol=0, atol=1e-2)
    features, lengths = live.prepare(*batch(live, waves))
    assert_close(features, batch(cached, waves)[0], rtol=0, atol=1e-2)
    assert lengths.tolist() == batch(cached, waves)[1].tolist() and not features.requires_grad
    again = live.prepare(features, lengths)
    assert (
        again[0] is features
        and again[1] is lengths
        and torch.equal(live(features, lengths).tokens, live(*batch(live, waves)).tokens)
    )
    raw = batch(tuned, waves)
    assert tuned.prepare(*raw)[0] is raw[0]


def test_pictures_cached_and_not_cached_say_the_same():
    for qformer in (False, True):
        cached, live, tuned = (
            tower(Blip2Tower, qformer=qformer, **values)
            for values in ({}, {"cache_towers": False}, {"finetune": "image"})
        )
        pictures = [picture(), picture(32, 32)]
        expected = cached(pixels(cached, pictures))
        assert expected.mask.all() and expected.tokens.shape == (2, 1 + (4 if qformer else 17), 16)
        for other in (live, tuned):
            assert_close(other(pixels(other, pictures)).tokens, expected.tokens, rtol=0, atol=1e-2)
        features, lengths = live.prepare(pixels(live, pictures))
        assert (
            lengths is None
            and torch.equal(live(features).tokens, live(pixels(live, pictures)).tokens)
            and live.prepare(features)[0] is features
        )
        raw = pixels(tuned, pictures)
        assert tuned.prepare(raw)[0] is raw
        assert_close(
            cached(pixels(cached, pictures[1:])).tokens, expected.tokens[1:], rtol=0, atol=1e-5
        )


def test_a_frozen_network_is_one_and_in_no_checkpoint():
    for kind, input_ in (
        (HubertTower, lambda t: batch(t, [sound(900)])),
        (Blip2Tower, lambda t: (pixels(t, [picture()]),)),
    ):
        live = tower(kind, cache_towers=False)
        live(*input_(live))
        held = live.frozen.on("cpu")
        twin = copy.deepcopy(live).train()
        assert twin.frozen.on("cpu") is held and twin.front_end is not None and not held.training
        names = {id(p) for p in live.parameters()} | {id(b) for b in live.buffers()}
        assert not names & {id(p) for p in held.parameters()} and len(live.state_dict()) < 60
        assert all(not p.requires_grad for p in held.parameters())
        twin.train()(*input_(twin)).tokens.sum().backward()
        assert all(p.grad is None for p in held.parameters()) and all(
            p.grad is not None for p in twin.parameters()
        )
        with torch.no_grad():
            moved = copy.deepcopy(live).to(torch.float64).frozen
        assert (
            next(moved.on("cpu").parameters()).dtype == torch.float32
        )  # .double(), .float() of a teacher do not reach it


def test_a_second_copy_of_the_network_would_be_noticed(monkeypatch):
    monkeypatch.delattr(Frozen, "__deepcopy__")
    live = tower(cache_towers=False)
    live(*batch(live, [sound(900)]))
    assert copy.deepcopy(live).frozen.on("cpu") is not live.frozen.on("cpu")


def test_a_network_is_loaded_only_when_needed(tmp_path, monkeypatch):
    count = []
    monkeypatch.setattr(
        hubert, "load_hubert", lambda *arguments: count.append(1) or load_hubert("tiny")
    )
    cache, wave = FeatureCache(tmp_path), sound(900)
    for _ in range(3):
        torch.manual_seed(0)
        ears = HubertTower(TINY)
        cache.get(
            sha256(wave.numpy().tobytes()), ears.front_end.params, lambda: ears.front_end(wave)
        )
    assert len(count) == 1


def test_front_ends_travel_to_other_processes():
    for kind, thing in ((HubertTower, sound(900)), (Blip2Tower, picture())):
        for values in ({}, {"cache_towers": False}, {"finetune": "both"}):
            front_end = tower(kind, **values).front_end
            expected, twin = front_end(thing), pickle.loads(pickle.dumps(front_end))
            assert twin.params == front_end.params and np.array_equal(twin(thing), expected)
    assert (
        pickle.loads(pickle.dumps(tower().frozen)).network is None
    )  # a recipe travels, not a gigabyte


def test_cache_keys_tell_what_differs(tmp_path):
    towers = [
        tower(),
        tower(speech_layers="last"),
        tower(cache_towers=False),
        tower(mode="group_norm"),
        tower(mode="group_norm"),
    ]
    assert len({one.front_end.params for one in towers}) == 5
    assert len({Waves(True).params, Waves(False).params}) == 2
    first, second = (save_blip2(tmp_path / name, seed) for seed, name in enumerate("ab"))
    sights = [
        tower(Blip2Tower, **values)
        for values in (
            {},
            {"qformer": True},
            {"cache_towers": False},
            {"image_model": first},
            {"image_model": second},
        )
    ]
    assert len({one.front_end.params for one in sights}) == 5
    assert (
        str(tmp_path) not in sights[-1].front_end.params
    )  # a folder that moves keeps its features


# Fine-tuned


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", ["weighted", "last"])
def test_everything_but_the_convolutions_learns(mode, layers):
    ears = tower(mode=mode, finetune="speech", speech_layers=layers).train()
    (
        ears(*batch(ears, [sound(5_000), sound(900)])).tokens * torch.randn(16)
    ).square().sum().backward()
    for name, parameter in ears.named_parameters():
        if "feature_extractor" in name:
            assert not parameter.requires_grad and parameter.grad is None, name
        else:
            assert (
                parameter.grad is not None
                and parameter.grad.isfinite().all()
                and parameter.grad.any()
            ), name


@pytest.mark.parametrize("qformer", [False, True])
def test_the_whole_picture_network_learns(qformer):
    sight = tower(Blip2Tower, finetune="image", qformer=qformer).train()
    (
        sight(pixels(sight, [picture(), picture(32, 48)])).tokens * torch.randn(16)
    ).square().sum().backward()
    for name, parameter in sight.named_parameters():
        assert (
            parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
        ), name


@pytest.mark.filterwarnings("ignore")
def test_the_old_weight_norm_forbade_copies():
    convolution = nn.utils.weight_norm(
        nn.Conv1d(4, 4, 3), dim=2
    )  # what torchaudio's models once had
    convolution(torch.randn(1, 4, 9))
    with pytest.raises(RuntimeError):
        copy.deepcopy(convolution)
    state = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in network().state_dict().items()
    }
    assert any("weight_g" in name for name in state)
    load_hubert("tiny").load_state_dict(state)  # such files still load


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_teacher_is_a_copy_made_at_any_time(checkpointing):
    ears, sight = paper_towers(change(finetune="both", dropout=0.3, checkpointing=checkpointing))
    for one, inputs in (
        (ears, batch(ears, [sound(5_000), sound(900)])),
        (sight, (pixels(sight, [picture()]),)),
    ):
        one.train()(*inputs).tokens.sum().backward()  # weight norm once forbade a copy from here on
        with torch.no_grad():
            assert not torch.equal(one(*inputs).tokens, one(*inputs).tokens)  # dropout is on ...
        teacher = copy.deepcopy(one).float().eval().requires_grad_(False)
        first, second, mine = (
            teacher(*inputs).tokens,
            teacher(*inputs).tokens,
            one.eval()(*inputs).tokens,
        )
        assert torch.equal(first, second) and torch.equal(
            first, mine
        )  # ... in a student, not in a teacher
        assert {id(p) for p in teacher.parameters()}.isdisjoint({id(p) for p in one.parameters()})


def test_dropout_is_what_the_config_says():
    for share in (0.0, 0.2):
        for one in paper_towers(change(finetune="both", dropout=share, qformer=True)):
            shares = [m.p for m in one.backbone.modules() if isinstance(m, nn.Dropout)]
            shares += [
                v
                for m in one.backbone.modules()
                for k, v in vars(m).items()
                if k in ("dropout", "attention_dropout")
            ]
            assert len(shares) > 2 and set(shares) == {share}
    ears = tower(finetune="speech")
    ears.backbone.encoder.transformer.layer_drop = (
        1.0  # would skip every layer in torchaudio's own forward
    )
    inputs = batch(ears, [sound(900)])
    assert torch.equal(ears.train()(*inputs).tokens, ears.eval()(*inputs).tokens)


def step(one, inputs, seed=0):
    one.train().zero_grad()
    torch.manual_seed(seed)
    loss = (one(*inputs).tokens * torch.linspace(-1, 1, one.width)).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in learning(one).items()}


@pytest.mark.parametrize("kind", [HubertTower, Blip2Tower])
def test_checkpointing_changes_no_number(kind):
    values = dict(
        finetune="both", dropout=0.2, qformer=True
    )  # the same draws of dropout both times, too
    plain, saving = (
        tower(kind, checkpointing=checkpointing, **values) for checkpointing in (False, True)
    )
    inputs = (
        batch(plain, [sound(5_000), sound(900)])
        if kind is HubertTower
        else (pixels(plain, [picture(), picture(32, 48)]),)
    )
    (loss, expected), (again, found) = step(plain, inputs), step(saving, inputs)
    assert_close(again, loss)
    assert_close(found, expected)


@pytest.mark.parametrize("kind", [HubertTower, Blip2Tower])
def test_checkpointing_computes_again(kind):
    counts = {}
    for checkpointing in (False, True):
        one, count = tower(kind, finetune="both", checkpointing=checkpointing), []
        layers = (
            one.backbone.encoder.transformer.layers
            if kind is HubertTower
            else one.backbone.vision.encoder.layers
        )
        inner = layers[0].feed_forward if kind is HubertTower else layers[0].mlp
        inner.register_forward_pre_hook(
            lambda *arguments: count.append(1)
        )  # the second time stops as soon as it has what it needs
        step(one, batch(one, [sound(900)]) if kind is HubertTower else (pixels(one, [picture()]),))
        counts[checkpointing] = len(count)
    assert counts == {False: 1, True: 2}


@pytest.mark.parametrize("values", [{"cache_towers": False}, {"finetune": "both"}])
@pytest.mark.parametrize("kind", [HubertTower, Blip2Tower])
def test_bfloat16_is_finite_and_close(kind, values):
    one = tower(kind, qformer=True, **values)
    inputs = (
        batch(one, [sound(5_000), sound(900), torch.zeros(700)])
        if kind is HubertTower
        else (pixels(one, [picture(), picture(32, 48)]),)
    )
    expected = one(*inputs).tokens
    with torch.autocast("cpu", torch.bfloat16):
        found = one(*inputs).tokens.float()
        assert_close(one(*one.prepare(*inputs)).tokens.float(), found, rtol=0, atol=0)
    assert (
        found.isfinite().all()
        and F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99
    )
    if kind is HubertTower and not values.get("finetune"):  # padding matters in no precision
        with torch.autocast("cpu", torch.bfloat16):
            alone = one(*batch(one, [sound(900)])).tokens.float()
        assert (found[1, : alone.shape[1]] - alone[0]).abs().max() < 0.1
    one.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = one(*inputs).tokens.float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in learning(one).values())


# Learning rates


def test_rates_fall_from_the_top():
    factors = rate_factors(tower(finetune="speech"), 0.5)

    def layer(n):
        return {v for k, v in factors.items() if f"transformer.layers.{n}." in k}

    assert (layer(2), layer(1), layer(0)) == ({1.0}, {0.5}, {0.25})
    assert (
        {v for k, v in factors.items() if "feature_projection" in k or "pos_conv" in k}
        == {0.125}
        == {factors["backbone.encoder.transformer.layer_norm.weight"]}
    )
    assert all(v == 1 for k, v in factors.items() if not k.startswith("backbone"))
    assert (
        rate_factors(tower(finetune="speech", mode="layer_norm"), 0.5)[
            "backbone.encoder.transformer.layer_norm.weight"
        ]
        == 1
    )  # at the top there
    sight = rate_factors(tower(Blip2Tower, finetune="image", qformer=True), 0.5)
    assert (
        sight["backbone.qformer.encoder.layer.1.output_query.dense.weight"] == 1
        and sight["backbone.query_tokens"] == 0.5
    )
    assert (
        sight["backbone.vision.post_layernorm.weight"]
        == sight["backbone.vision.encoder.layers.1.mlp.fc1.weight"]
        == 0.25
    )
    assert (
        sight["backbone.vision.encoder.layers.0.mlp.fc1.weight"] == 0.125
        and sight["backbone.vision.embeddings.patch_embedding.weight"] == 0.0625
    )
    without = rate_factors(tower(Blip2Tower, finetune="image"), 0.5)
    assert (
        without["backbone.vision.post_layernorm.weight"] == 1
        and without["backbone.vision.embeddings.class_embedding"] == 0.25
    )


@pytest.mark.parametrize("kind", [HubertTower, Blip2Tower])
def test_rates_name_exactly_what_learns(kind):
    for finetune in ("none", "both"):
        one = tower(kind, finetune=finetune)
        factors = rate_factors(one, 0.9)
        assert factors.keys() == learning(one).keys() and set(rate_factors(one, 1.0).values()) == {
            1.0
        }
        assert (set(factors.values()) == {1.0}) == (finetune == "none")
    assert rate_factors(nn.Linear(2, 2), 0.9) == {
        "weight": 1.0,
        "bias": 1.0,
    }  # other towers have no rungs


def test_eleven_or_more_layers_are_not_mixed_up():
    model = torchaudio.models.wav2vec2_model(**TINY_HUBERT | {"encoder_num_layers": 12})
    factors = rate_factors(HubertTower(change(finetune="speech"), backbone=model), 0.5)
    assert factors["backbone.encoder.transformer.layers.1.layer_norm.weight"] == 0.5**10
    assert factors["backbone.encoder.transformer.layers.11.layer_norm.weight"] == 1


# Weights of HuBERT


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "A hub folder of torch, and the HUBERT bundles shrunk to the tiny network."
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for name, mode in (("HUBERT_BASE", "group_norm"), ("HUBERT_LARGE", "layer_norm")):
        monkeypatch.setattr(getattr(torchaudio.pipelines, name), "_params", MODES[mode])
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "name, mode", [("hubert_base", "group_norm"), ("hubert_large", "layer_norm")]
)
def test_hubert_weights_arrive(hub, name, mode):
    state = network(mode).state_dict()
    torch.save(state, hub / getattr(torchaudio.pipelines, name.upper())._path)
    loaded = load_hubert(name)
    assert type(loaded).__name__ == "Wav2Vec2Model"  # not the wrapper that normalises over padding
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    ears = HubertTower(change(speech_model=name, finetune="speech"))
    assert torch.equal(
        ears.backbone.encoder.feature_projection.projection.weight,
        state["encoder.feature_projection.projection.weight"],
    )
    assert ears.front_end.normalise == (name == "hubert_large")


@pytest.mark.parametrize("finetune", ["speech", "image", "both"])
def test_a_fine_tuned_model_is_loaded_without_fetching_what_it_holds(
    hub, tmp_path, monkeypatch, finetune
):
    """The saved file brings the networks that learnt; a frozen one is in no file of ours, and asked
    for only when it is needed.
    """
    from speechimg.model import SpeechImageModel

    torch.save(network("group_norm").state_dict(), hub / torchaudio.pipelines.HUBERT_BASE._path)
    folder = tmp_path / "blip2"
    torch.manual_seed(0)
    model = SpeechImageModel(
        change(
            speech_model="hubert_base",
            image_model=save_blip2(folder),
            finetune=finetune,
            dim=8,
            fusion_depth=1,
        )
    ).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))  # as if it had learnt
    features, lengths = batch(model.speech_tower, [sound(5_000), sound(900)])
    shown = pixels(model.image_tower, [picture()])
    with torch.no_grad():
        expected = (
            model.encode_speech(features, lengths).embedding,
            model.encode_image(shown).embedding,
        )
    model.save_pretrained(tmp_path / "saved")

    asked = []

    def refuse(*arguments, **options):
        asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    for file in [*hub.iterdir(), *folder.glob("*.safetensors")]:
        file.unlink()
    again = SpeechImageModel.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        found = (
            again.encode_speech(features, lengths).embedding,
            again.encode_image(shown).embedding,
        )
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and not asked
    for kind, tower, thing in (
        ("speech", again.speech_tower, sound(900)),
        ("image", again.image_tower, picture()),
    ):
        if finetune in (kind, "both"):
            assert tower.front_end(thing) is not None
        else:
            with pytest.raises(InputError):
                tower.front_end(thing)  # frozen: its own weights, never random ones


def test_hubert_that_cannot_be_had_says_where_to_put_it(hub, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(InputError) as caught:
        load_hubert("hubert_base")
    assert str(hub / "hubert_fairseq_base_ls960.pth") in str(
        caught.value
    ) and "https://download.pytorch.org/torchaudio/models/hubert_fairseq_base_ls960.pth" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


class Hostile:
    def __reduce__(self):
        return print, ("this file ran",)


def test_a_hubert_file_cannot_run_code(hub, capsys):
    torch.save({"encoder": Hostile()}, hub / "hubert_fairseq_base_ls960.pth")
    with pytest.raises(InputError):
        load_hubert("hubert_base")
    assert "this file ran" not in capsys.readouterr().out
    (hub / "hubert_fairseq_base_ls960.pth").write_bytes(b"torn")
    with pytest.raises(InputError):
        load_hubert("hubert_base")


def test_random_weights_are_the_same_each_time_and_move_no_draw():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, sight = load_hubert("tiny"), load_blip2("tiny", True)
    assert torch.equal(torch.rand(3), expected)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), load_hubert("tiny").state_dict().values())
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(sight.state_dict().values(), load_blip2("tiny", True).state_dict().values())
    )


# Weights of BLIP-2


def save_blip2(folder, seed=0, kind="Blip2ForConditionalGeneration", **options):
    "A whole tiny BLIP-2 with its language model in a folder."
    import transformers

    torch.manual_seed(seed)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    text = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=16,
    )
    config = transformers.Blip2Config(
        vision_config=size | dict(image_size=48, patch_size=16, initializer_range=0.05),
        qformer_config=size,
        text_config=text.to_dict(),
        num_query_tokens=5,
    )
    model = getattr(transformers, kind)(config).eval()
    nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder, **options)
    save_blip2.model = model
    return str(folder)


@pytest.mark.parametrize("kind", ["Blip2ForConditionalGeneration", "Blip2Model"])
def test_blip2_weights_arrive(tmp_path, kind):
    folder = save_blip2(
        tmp_path, kind=kind, max_shard_size="60KB"
    )  # in several files, like the real ones
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, eyes = save_blip2.model, load_blip2(folder, qformer=True).eval()
    for mine, theirs in ((eyes.vision, model.vision_model), (eyes.qformer, model.qformer)):
        assert mine.state_dict().keys() == theirs.state_dict().keys()
        for key, tensor in theirs.state_dict().items():
            assert torch.equal(tensor, mine.state_dict()[key]), key
    assert torch.equal(eyes.query_tokens, model.query_tokens)
    shown = torch.rand(2, 3, 48, 48)
    normal = (shown - torch.tensor(CLIP[0]).view(3, 1, 1)) / torch.tensor(CLIP[1]).view(3, 1, 1)
    with torch.no_grad():
        assert_close(
            load_blip2(folder).eval()(shown),
            F.layer_norm(model.vision_model(normal).last_hidden_state, (32,)),
        )
        asked = model.qformer(
            query_embeds=model.query_tokens.expand(2, -1, -1),
            encoder_hidden_states=model.vision_model(normal).last_hidden_state,
        )
        assert_close(eyes(shown), F.layer_norm(asked.last_hidden_state, (32,)))
        if kind == "Blip2Model":
            assert_close(
                eyes(shown), F.layer_norm(model.get_qformer_features(pixel_values=normal), (32,))
            )


def test_a_tower_of_a_folder(tmp_path):
    sight = tower(Blip2Tower, image_model=save_blip2(tmp_path))
    assert sight.front_end(picture()).shape == (10, 32) and sight(
        pixels(sight, [picture()])
    ).tokens.shape == (1, 11, 16)
    tuned = tower(Blip2Tower, image_model=str(tmp_path), finetune="image")
    assert torch.equal(
        tuned.backbone.vision.embeddings.class_embedding,
        save_blip2.model.vision_model.embeddings.class_embedding,
    )
    empty = tower(
        Blip2Tower, image_model=str(tmp_path), finetune="image", weights=False
    )  # to be filled by a checkpoint of ours
    empty.load_state_dict(tuned.state_dict())
    assert torch.equal(
        empty.eval()(pixels(tuned, [picture()])).tokens, tuned(pixels(tuned, [picture()])).tokens
    )


def test_half_precision_files_become_float32(tmp_path):
    save_blip2(tmp_path)
    save_blip2.model.half().save_pretrained(tmp_path)
    assert {p.dtype for p in load_blip2(str(tmp_path), True).parameters()} == {torch.float32}


def test_a_missing_weight_is_refused(tmp_path):
    folder, file = save_blip2(tmp_path), tmp_path / "model.safetensors"
    state = safetensors.torch.load_file(file)
    gone = next(name for name in state if "vision_model.encoder.layers.1" in name)
    safetensors.torch.save_file(
        {name: tensor for name, tensor in state.items() if name != gone}, file, {"format": "pt"}
    )
    with pytest.raises(InputError, match="lacks 1 weights"):
        load_blip2(folder)
    shorter = {
        name: tensor[:1].clone() if name == gone else tensor for name, tensor in state.items()
    }
    safetensors.torch.save_file(shorter, file, {"format": "pt"})
    with pytest.raises(InputError):
        load_blip2(folder)


def test_what_is_no_blip2_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # as without a network, but at once
    for model in (str(tmp_path), "nobody/no-such-model"):
        with pytest.raises(InputError) as caught:
            tower(Blip2Tower, image_model=model)
        assert model in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "clip"})
    )  # transformers itself would take the defaults
    with pytest.raises(InputError, match="clip"):
        tower(Blip2Tower, image_model=str(tmp_path))
    folder = save_blip2(tmp_path / "pickled")
    torch.save(
        safetensors.torch.load_file(tmp_path / "pickled" / "model.safetensors"),
        tmp_path / "pickled" / "pytorch_model.bin",
    )
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="safetensors"):
        load_blip2(folder)


def test_without_transformers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'speechimg\[pretrained\]'"):
        Blip2Tower(TINY)


def test_colours_of_the_checkpoint(tmp_path):
    folder = save_blip2(tmp_path)
    assert large.blip2_facts(folder)[1:3] == CLIP
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]})
    )
    before = load_blip2(folder)
    assert (
        before.mean.flatten().tolist() == [0.5] * 3
        and before.spread.flatten().tolist() == [0.25] * 3
        and "mean" not in before.state_dict()
    )


def test_weights_of_another_revision_have_another_mark(monkeypatch, tmp_path):
    "The name of the folder in which the hub's own cache puts a commit; mutant: no revision at all."
    import huggingface_hub

    def fetched(name, file):
        if file != "config.json":
            raise OSError("not there")
        return str(tmp_path / "snapshots" / commit / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    marks = []
    for commit in ("a" * 40, "b" * 40):
        file, mark = large.blip2_colours("somebody/blip2")
        assert file is None
        marks.append(mark)
    assert marks == ["a" * 40, "b" * 40]

    def offline(name, file):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match="somebody/blip2: does not say its revision"):
        large.blip2_colours("somebody/blip2")


def test_the_whole_picture_is_seen():
    sight, wide = tower(Blip2Tower, cache_towers=False), picture(64, 32)
    seen = sight.front_end(wide)
    assert seen.shape == (3, 32, 32) and seen.dtype == np.uint8
    assert (
        (seen[:, :7] == 255).all()
        and (seen[:, -7:] == 255).all()
        and not (seen[:, 12:20] == 255).all()
    )


# In the model


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"cache_towers": False},
        {"finetune": "both"},
        {"finetune": "both", "qformer": True, "checkpointing": True},
    ],
)
def test_whole_steps_of_training(values):
    from speechimg.alignment import Alignment
    from speechimg.data import Batch
    from speechimg.model import SpeechImageModel

    torch.manual_seed(0)
    config = change(dim=8, queue_size=8, queue_warmup_steps=0, fusion_depth=1, **values)
    model = SpeechImageModel(config, *paper_towers(config))
    alignment = Alignment(model).train()
    waves = [sound(900 + 400 * i, i) for i in range(4)]
    speech, lengths = batch(model.speech_tower, waves)
    made = Batch(
        speech,
        lengths,
        pixels(model.image_tower, [picture(32 + i, 40) for i in range(4)]),
        torch.arange(4),
        list("abcd"),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for number in range(12):
        output = alignment(made, number, torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        alignment.update(output)
        losses.append(output.loss.item())
    assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(
        losses[2:5]
    )  # from when the queue is full
    if "finetune" not in values:
        assert alignment.teacher.speech_tower.frozen is model.speech_tower.frozen


def made_pairs(model, count=4):
    "A Batch of so many pairs."
    from speechimg.data import Batch

    speech, lengths = batch(model.speech_tower, [sound(900 + 400 * i, i) for i in range(count)])
    return Batch(
        speech,
        lengths,
        pixels(model.image_tower, [picture(32 + i, 40) for i in range(count)]),
        torch.arange(count),
        [str(i) for i in range(count)],
    )


def test_the_optimiser_gives_each_layer_its_rate():
    """layer_decay 0.5: every learning parameter in one group, with the factor of its layer; each
    step multiplies the rate of that moment by it.
    """
    from speechimg.alignment import Alignment
    from speechimg.model import SpeechImageModel
    from speechimg.train import learning_rate, make_optimizer, train_step

    config = change(
        dim=8,
        queue_size=8,
        fusion_depth=1,
        finetune="both",
        layer_decay=0.5,
        steps=9,
        warmup_steps=4,
        learning_rate=1e-2,
    )
    model = SpeechImageModel(config, *paper_towers(config))
    optimizer, alignment = make_optimizer(model, config), Alignment(model).train()
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert (
        len(group_of)
        == sum(len(group["params"]) for group in optimizer.param_groups)
        == len(parameters)
    )

    def factor(name):
        return group_of[id(parameters[name])]["factor"]

    speech, image = (
        "encoders.speech_tower.backbone.encoder.transformer.layers.{}.feed_forward.output_dense.weight",
        "encoders.image_tower.backbone.vision.encoder.layers.{}.mlp.fc1.weight",
    )
    assert [factor(speech.format(layer)) for layer in range(3)] == [0.25, 0.5, 1.0] and [
        factor(image.format(layer)) for layer in range(2)
    ] == [0.5, 1.0]
    assert (
        factor("encoders.speech_tower.backbone.encoder.feature_projection.projection.weight")
        == 0.125
    )
    assert all(factor(name) == 1 for name in parameters if "backbone" not in name)
    assert group_of[id(parameters[speech.format(0)])]["weight_decay"] == config.weight_decay
    assert group_of[id(parameters[speech.format(0).replace("weight", "bias")])] | {
        "params": 0
    } == group_of[id(parameters[speech.format(0)])] | {"params": 0, "weight_decay": 0.0}
    before, rates = {name: p.detach().clone() for name, p in parameters.items()}, []
    for number in range(2):
        train_step(
            alignment, optimizer, made_pairs(model), number, torch.Generator().manual_seed(number)
        )
        assert all(
            group["lr"] == learning_rate(config, number) * group["factor"]
            for group in optimizer.param_groups
        )
        rates.append(optimizer.param_groups[0]["lr"])
        if (
            number == 0
        ):  # AdamW's first step is as long as the rate, wherever the gradient is not tiny
            for name, rate in (
                (speech.format(0), 0.25),
                (speech.format(2), 1.0),
                (image.format(0), 0.5),
            ):
                assert_close(
                    (parameters[name].detach() - before[name]).abs().median().item(),
                    rate * learning_rate(config, 0),
                    rtol=0.05,
                    atol=0,
                )
    assert rates[1] == 2 * rates[0]


PROGRAM = """
import json, sys
import pandas, torchaudio, transformers  # once for both processes
import speechimg.train
from forked import ranks
from speechimg.core import Config
from speechimg.train import train
speechimg.train.draw_curves = lambda log, path: path.touch()
settings, corpus, out = sys.argv[1:]
config = Config.from_dict(json.loads(settings))
sys.exit(ranks(2, lambda: train(config, corpus, out, progress=False)))
"""


@pytest.mark.slow
def test_everything_at_once_by_two_processes(tmp_path):
    """Tiny HuBERT and BLIP-2 that learn, checkpointing, bfloat16, Q-Former, micro-batches, layer
    decay: trained by two processes, saved, loaded, evaluated; and nobody talks.
    """
    from speechimg.corpora import load_corpus
    from speechimg.retrieval import evaluate, load_features, load_model
    from speechimg.run.checkpoints import latest_checkpoint

    corpus = make_corpus(tmp_path / "mini", n_images=12)
    settings = TINY.to_dict() | {
        "dim": 8,
        "fusion_depth": 1,
        "finetune": "both",
        "checkpointing": True,
        "precision": "bfloat16",
        "qformer": True,
        "accumulate": 2,
        "layer_decay": 0.7,
        "batch_size": 8,
        "steps": 6,
        "queue_size": 16,
        "queue_warmup_steps": 2,
        "warmup_steps": 1,
        "evaluate_every": 6,
        "checkpoint_every": 3,
        "max_seconds": 1.0,
        "dropout": 0.1,
    }
    own = {"OMP_NUM_THREADS": "1", "SPEECHIMG_CACHE": str(tmp_path / "cache")}
    own["PYTHONPATH"] = os.pathsep.join(map(str, (HERE.parent, HERE)))
    command = [sys.executable, "-c", PROGRAM, json.dumps(settings), corpus, tmp_path / "out"]
    done = subprocess.run(
        command, env=os.environ | own, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpointing" not in done.stdout + done.stderr and done.stdout == "", (
        done.stdout + done.stderr
    )
    log = pd.read_csv(tmp_path / "out" / "log.csv")
    assert log["step"].tolist() == list(range(1, 7)) and np.isfinite(
        log[["loss", "sic", "sim", "gradient_norm"]]
    ).all(axis=None)
    state, tensors = latest_checkpoint(tmp_path / "out")
    assert (
        state["step"] == 6
        and int(tensors["queue.pointer"]) == 6 * 8 % 16
        and all(
            tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point()
        )
    )
    run = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert run["processes"] == 2
    model = load_model(tmp_path / "out")
    start = load_hubert("tiny").state_dict()
    moved = {
        name
        for name, tensor in model.speech_tower.backbone.state_dict().items()
        if not torch.equal(tensor.cpu(), start[name])
    }
    assert moved and not any("feature_extractor" in name for name in moved)
    found = evaluate(model, load_features(model, load_corpus(corpus, "val")))
    for stage in ("coarse", "fine"):
        assert found[stage] == run["validation"][stage]


@pytest.mark.slow
def test_compiled_towers_of_the_paper_learn_the_same(monkeypatch):
    """Only fusion and readers are compiled; losses as without, names of weights untouched.

    They are traced, and no machine code is made: test_train does that, for a fusion of the same
    blocks.
    """
    from speechimg.alignment import Alignment
    from speechimg.model import SpeechImageModel
    from speechimg.train import make_optimizer, train_step

    config = change(
        dim=8,
        fusion_depth=1,
        finetune="both",
        queue_size=8,
        queue_warmup_steps=0,
        warmup_steps=0,
        learning_rate=1e-3,
    )
    losses = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = SpeechImageModel(config, *paper_towers(config))
        names, alignment = list(model.state_dict()), Alignment(model).train()
        optimizer, pairs = make_optimizer(model, config), made_pairs(model)
        if compiled:

            def compile_part(part, **options):
                part._compiled_call_impl = torch.compile(
                    part._call_impl, backend="eager", **options
                )

            monkeypatch.setattr(nn.Module, "compile", compile_part)
            model.compile_parts()
        losses[compiled] = []
        for number in range(2):
            generator = torch.Generator().manual_seed(number)
            outputs, *_ = train_step(alignment, optimizer, pairs, number, generator)
            losses[compiled].append(outputs[0].loss.item())
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-3)
    assert names == list(model.state_dict())
    parts = {name for name, one in model.named_modules() if one._compiled_call_impl is not None}
    assert parts == {"fusion", "encoders.speech_tower.reader", "encoders.image_tower.reader"}
