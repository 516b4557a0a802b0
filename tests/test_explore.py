"""Explorers, pairs, studio: figures for ordinary and odd input, and no widget needed.

The numbers in them are those of the library.
"""

import base64
import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from miniature import make_corpus, wav_bytes
from torch.testing import assert_close
from toys import tiny_model

from speechimg.core import Config, InputError
from speechimg.corpora import load_corpus
from speechimg.distillation import soft_targets
from speechimg.look.attention_view import (
    fine_table,
    hardest,
    hear_negatives,
    heat,
    page_file,
    play_matching,
    players,
    read_together,
    show_matching,
    show_negatives,
    show_recall,
    show_strip,
    uri,
)
from speechimg.look.explore import (
    explore,
    log_mel,
    mean_of_eight,
    pick_batch,
    png,
    sheet,
    show_queue,
    show_similarities,
    show_spectrogram,
    show_targets,
    walk,
)
from speechimg.look.studio import Studio, captions_of, received, show_answers
from speechimg.mining import negative_probabilities
from speechimg.model import SpeechImageModel
from speechimg.queue import EmbeddingQueue
from speechimg.retrieval import Embeddings, embed, load_features, recall_at_k, search, two_stages
from speechimg.sic import id_targets, sic_loss, similarity_logits
from speechimg.speech import LogMel, mel_power

RATE = 16_000


def labelled(figure):
    "A Figure that can be drawn, in which every axis with ticks says what it measures; returns it."
    assert isinstance(figure, Figure) and png(figure).startswith(b"\x89PNG")
    shown = [axis for axis in figure.axes if axis.axison and axis.get_label() != "<colorbar>"]
    assert any(axis.get_xlabel() for axis in shown) and all(
        axis.get_xlabel() or axis.get_ylabel() for axis in shown
    )
    return figure


def titles(figure):
    return " | ".join(axis.get_title() for axis in figure.axes)


def embeddings(images=6, each=2, dim=8, noise=0.4):
    "A toy: recordings near their pictures."
    image = F.normalize(torch.randn(images, dim), dim=1)
    image_of = torch.arange(images).repeat_interleave(each)
    speech = F.normalize(image[image_of] + noise * torch.randn(len(image_of), dim), dim=1)
    return Embeddings(
        speech, image, [torch.zeros(3, 4)] * len(speech), torch.zeros(images, 5, 4), image_of
    )


@pytest.fixture(scope="module")
def corpus_path(tmp_path_factory):
    return make_corpus(
        tmp_path_factory.mktemp("corpus") / "mini", n_images=12, captions=2, splits=("test",)
    )


@pytest.fixture(scope="module")
def corpus(corpus_path):
    return load_corpus(corpus_path, "test")


@pytest.fixture(scope="module")
def model():
    return tiny_model(towers="small", fusion_depth=2, max_seconds=5.0)


@pytest.fixture(scope="module")
def seen(model, corpus):
    return embed(model, load_features(model, corpus))


@pytest.fixture(scope="module")
def opened(model, corpus_path):
    "A studio nobody has spoken to: its gallery is read once."
    return Studio(model, corpus_path)


@pytest.fixture
def studio(opened):
    return copy.copy(opened)


# explore: plain functions


@pytest.mark.parametrize("seconds", [0, 1 / RATE, 0.01, 1.3, 60])
def test_spectrogram_of_any_length(seconds):
    figure = labelled(show_spectrogram(torch.randn(round(seconds * RATE)) / 10))
    assert ("first 20 s of 60 s" in titles(figure)) == (seconds == 60)


def test_spectrogram_numbers_are_the_librarys():
    wave = torch.randn(8000) / 10
    power = mel_power()(wave)
    assert_close(log_mel(wave), 10 * (power / power.max()).clamp(min=1e-8).log10())
    kept = []
    show_spectrogram(wave, reader=lambda frames: kept.append(frames) or mean_of_eight(frames))
    assert_close(kept[0], torch.from_numpy(LogMel()(wave)).float(), atol=5e-3, rtol=0)
    assert mean_of_eight(kept[0]).shape == (-(-len(kept[0]) // 8), 64)


def test_silence_is_dark_and_windows_may_be_any_size():
    assert (log_mel(torch.zeros(RATE)) == -80).all()
    for window, hop in ((1, 1), (5, 100), (250, 2)):
        labelled(show_spectrogram(torch.randn(4000), window, hop))
    labelled(show_spectrogram(np.zeros(RATE, np.float32)))


@pytest.mark.parametrize(
    "pairs, each, queue, by_id",
    [
        (1, 1, 0, True),
        (6, 1, 0, True),
        (6, 2, 4, True),
        (6, 2, 4, False),
        (99, 2, 999, True),
        (3, 1, 1, True),
    ],
)
def test_similarities_show_the_loss_of_the_library(pairs, each, queue, by_id):
    toy = embeddings()
    figure = labelled(show_similarities(toy, pairs, each, 0.1, queue, by_id))
    rows, others = pick_batch(toy.image_of, pairs, each)
    keys = torch.cat([rows, others[:queue]])
    ids, key_ids = toy.image_of[rows], toy.image_of[keys]
    targets = id_targets(ids, key_ids) if by_id else torch.eye(len(rows), len(keys))
    out = sic_loss(
        toy.speech[rows], toy.image[ids], toy.speech[keys], toy.image[key_ids], targets, 0.1
    )
    assert f"{out.loss:.3f}" in titles(figure)
    drawn = torch.as_tensor(np.array(figure.axes[0].collections[0].get_array())).view(len(rows), -1)
    assert_close(drawn[:, : len(rows)].float(), out.speech_to_image.softmax(1)[:, : len(rows)])
    assert_close(drawn.sum(1).float(), torch.ones(len(rows)))
    bars = [bar.get_width() for bar in figure.axes[1].patches]
    assert_close(
        torch.tensor(bars).mean().float(),
        -(targets * out.speech_to_image.log_softmax(1)).sum(1).mean(),
        atol=1e-4,
        rtol=1e-4,
    )


def test_batches_keep_their_pictures_out_of_the_queue():
    rows, others = pick_batch(torch.tensor([2, 0, 1, 0, 2, 2]), 3, 2)
    assert rows.tolist() == [1, 3, 2] and others.tolist() == [0, 4, 5]


@pytest.mark.parametrize(
    "step, size, batch", [(0, 16, 4), (5, 16, 4), (200, 64, 1), (3, 3, 8), (7, 0, 4), (1, 1, 1)]
)
def test_queue_is_the_real_one(step, size, batch):
    figure = labelled(show_queue(step, size, batch, 0.9))
    queue = EmbeddingQueue(size, 1)
    for one in range(step):
        queue.enqueue(torch.zeros(batch, 1), torch.zeros(batch, 1), torch.full((batch,), one))
    assert f"{int((queue.ids >= 0).sum())} of {size}" in figure.axes[0].texts[-1].get_text()
    oldest = step - 1 - int(queue.ids[queue.ids >= 0].min()) if (queue.ids >= 0).any() else 0
    assert f"oldest key: {oldest} steps" in titles(figure)


def test_teacher_follows_the_formula():
    student, teacher = walk(0.9)
    value = 0.0
    for one, slow in zip(student[1:], teacher[1:]):
        value = 0.9 * value + 0.1 * one
        assert abs(value - slow) < 1e-5
    assert walk(0.0)[1] == walk(0.0)[0] and set(walk(1.0)[1]) == {0.0}


@pytest.mark.parametrize("noise", [0.0, 0.25, 1.0])
def test_targets_are_the_librarys(noise):
    toy = embeddings(8, 1)
    logits = similarity_logits(toy.speech, toy.image, 0.1)
    figure = labelled(show_targets(logits, toy.image_of, 0.4, noise))
    labels, mixed = (
        torch.as_tensor(np.array(figure.axes[place].collections[0].get_array())).view(8, 8).float()
        for place in (0, 2)
    )
    assert_close(labels.sum(1), torch.ones(8)) and figure.axes[
        0
    ].get_title() == f"labels: {1 - noise:.0%} right"
    assert labels.diagonal().sum() == 8 * (1 - noise)
    assert_close(mixed, soft_targets(logits, labels, 0.4))


def test_targets_of_one_pair_and_of_one_image():
    labelled(show_targets(torch.zeros(1, 1), torch.tensor([3]), noise=1.0))
    assert "labels: 100% right" in titles(
        show_targets(torch.zeros(3, 3), torch.tensor([4, 4, 4]), noise=1.0)
    )


# sliders


def line(slope=0.5, colour="teal"):
    if slope > 3:
        raise ValueError("too <steep>")
    figure, axes = sheet(3, 2)
    axes[0, 0].plot([0, 1], [0, slope], color=colour)
    axes[0, 0].set(xlabel="x", ylim=(0, 4))
    return figure


def test_sliders_start_at_the_defaults_and_redraw():
    look = explore(
        line,
        hear=lambda slope, colour: f"<i>{slope}</i>",
        live=False,
        slope=(0.0, 4.0, 0.5),
        colour=["crimson", "teal"],
    )
    assert (
        look.controls["slope"].value == 0.5
        and look.controls["colour"].value == "teal"
        and not look.controls["slope"].continuous_update
    )
    before = look.picture.value
    look.controls["slope"].value = 2.0
    assert (
        look.picture.value != before
        and look.sound.value == "<i>2.0</i>"
        and look.message.value == ""
    )
    look.controls["slope"].value = 4.0
    assert (
        look.message.value == "too &lt;steep&gt;" and look.sound.value == "<i>2.0</i>"
    )  # the last drawing stays
    look.controls["slope"].value = 1.0
    assert look.message.value == ""


def test_sliders_bring_a_plain_picture_along():
    bundle = explore(line, slope=(0.0, 1.0))._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and base64.b64decode(
        bundle["image/png"]
    ).startswith(b"\x89PNG")


def test_saved_notebooks_keep_the_picture_and_not_the_dead_slider(tmp_path, root, monkeypatch):
    monkeypatch.syspath_prepend(root / "tools")
    import notebooks

    view, picture = (
        {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}},
        {"image/png": "abc"},
    )
    outputs = [
        {"output_type": "display_data", "data": data}
        for data in (view | picture, dict(view), dict(picture))
    ]
    (tmp_path / "nbs").mkdir()
    path = tmp_path / "nbs" / "00_x.ipynb"
    path.write_text(
        json.dumps(
            {
                "cells": [
                    {"cell_type": "code", "source": "", "outputs": outputs},
                    {"cell_type": "markdown", "source": ""},
                ]
            }
        )
    )
    notebooks.keep_pictures(tmp_path)
    assert [one["data"] for one in notebooks.read(path)["cells"][0]["outputs"]] == [
        picture,
        view,
        picture,
    ]


# attention_view


def test_negatives_have_the_probabilities_of_the_library(corpus, seen):
    rows = torch.arange(len(corpus.captions))
    ids = seen.image_of[rows]
    chances = negative_probabilities(
        similarity_logits(seen.speech[rows], seen.image[ids], 0.07), ids
    )[3]
    found = hardest(seen, rows, 3, 0.07, 4)
    assert [chance for _, chance in found] == chances.topk(4).values.tolist() and all(
        ids[place] != ids[3] for place, _ in found
    )
    figure = labelled(show_negatives(corpus, seen, rows, 3, 0.07, 4))
    assert all(f"{chance:.1%}" in titles(figure) for _, chance in found) and corpus.captions[
        3
    ].text in titles(figure)
    assert hear_negatives(corpus, seen, rows, 3).count("<audio") == 4


def test_a_pair_without_negatives(corpus, seen):
    for rows in (torch.tensor([0]), torch.tensor([0, 1])):  # two captions of one picture
        assert hardest(seen, rows) == []
        assert "no negative" in titles(labelled(show_negatives(corpus, seen, rows)))
        assert hear_negatives(corpus, seen, rows).count("<audio") == 1


@pytest.mark.parametrize(
    "wave",
    [torch.randn(20_000) / 10, torch.zeros(8000), torch.zeros(0), torch.randn(60 * RATE) / 10],
    ids=["noise", "silence", "nothing", "a minute"],
)
@pytest.mark.parametrize("count", [1, 2])
def test_matching_of_any_recording(model, corpus, wave, count):
    together = read_together(model, wave, [corpus.load_picture(place) for place in range(count)])
    assert (
        len(together.wave) == min(len(wave), 5 * RATE)
        and together.maps.shape[:2] == (count, 2)
        and len(together.seconds) == together.maps.shape[2]
    )
    assert heat(together).max() == 1 and heat(together, 2).min() >= 0
    labelled(show_matching(together, second=99.0, head=1))
    assert png(show_strip(together, moments=3))
    assert play_matching(together).count("<canvas") == count


def test_matching_shows_the_scores_of_the_library(model, corpus, seen):
    together = read_together(
        model, corpus.load_wave(0), [corpus.load_picture(place) for place in (0, 5)]
    )
    tokens = seen.speech_tokens[0][None].expand(2, -1, -1)
    with torch.no_grad():
        logits = model.match(
            tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), seen.image_tokens[[0, 5]]
        )[:, 1]
        maps = model.fusion.attention_maps(
            tokens, torch.ones(tokens.shape[:2], dtype=torch.bool), seen.image_tokens[[0, 5]]
        )
    assert_close(together.scores, logits, atol=1e-4, rtol=1e-4)
    assert_close(together.cosines, seen.image[[0, 5]] @ seen.speech[0], atol=1e-4, rtol=1e-4)
    assert_close(
        together.maps.flatten(3), maps[:, 0, :, 1:, 1:], atol=1e-4, rtol=1e-3
    )  # the block before the last; no [CLS] on either side
    assert f"fine {logits[0]:+.2f}" in titles(show_matching(together))


def test_matching_needs_a_fusion(corpus):
    bare = tiny_model(towers="small", fusion_depth=0)
    with pytest.raises(InputError, match="no fusion blocks"):
        read_together(bare, torch.zeros(8000), [corpus.load_picture(0)])


def test_recall_is_the_librarys(model, seen):
    coarse, fine = fine_table(model, seen, most=6)
    assert (fine.isfinite().sum(1) == 6).all()
    for k, at in ((1, 1), (4, 1), (4, 5)):
        figure = labelled(show_recall(coarse, fine, seen.image_of, k, at, "sim"))
        expected = recall_at_k(two_stages(model, seen, k)[1], seen.image_of, (at,))[
            "speech_to_image"
        ][at]
        ceiling = recall_at_k(coarse, seen.image_of, (max(k, at),))["speech_to_image"][max(k, at)]
        assert (
            titles(figure) == f"k = {k}: {expected:.1f} % of at most {ceiling:.1f} %"
            and expected <= ceiling + 1e-6
        )


def test_recall_with_more_candidates_than_pictures():
    scores = torch.randn(5, 3)
    assert titles(
        labelled(show_recall(scores, scores, torch.tensor([0, 1, 2, 0, 1]), k=99))
    ).startswith("k = 3:")
    labelled(show_recall(torch.zeros(1, 1), torch.zeros(1, 1), torch.tensor([0]), k=0))


def test_sounds_and_pictures_in_pages(corpus):
    assert uri(torch.zeros(1600)).startswith("data:audio/mpeg;base64,") and uri(
        corpus.load_picture(0)
    ).startswith("data:image/webp;base64,")
    assert uri(torch.zeros(0)).startswith("data:audio") and "<script" not in players(
        [("<script>", torch.zeros(160))]
    )


# the studio


def pcm(wave):
    return (np.asarray(wave) * 32767).round().astype("<i2").tobytes()


def test_numbers_from_the_page():
    wave = torch.linspace(-1, 1, 1000)
    for data in (pcm(wave), bytearray(pcm(wave)), memoryview(pcm(wave))):
        assert_close(received({"kind": "recording"}, [data]), wave, atol=1e-4, rtol=0)
    assert (
        len(received({"kind": "recording"}, [pcm(torch.zeros(10 * RATE))], max_seconds=3))
        == 4 * RATE
    )


@pytest.mark.parametrize(
    "content, buffers",
    [
        ({"kind": "recording"}, [b"odd"]),
        ({"kind": "file", "name": "a.docx"}, [b"PK"]),
        ({"kind": "file", "name": "a.wav"}, []),
        ({"kind": "file"}, [wav_bytes(np.zeros(800), RATE)[:30]]),
        ({}, [b""]),
        ({"kind": "shell"}, [b"ls"]),
    ],
)
def test_what_is_no_sound_is_refused(content, buffers):
    with pytest.raises(InputError):
        received(content, buffers)


def test_search_is_the_librarys(studio, model, corpus):
    wave = corpus.load_wave(0)
    hits = studio.search_wave(wave)
    assert (
        hits == search(model, wave, studio.gallery, 16, 16)
        and "seconds were heard" in studio.message
    )
    labelled(studio.show())
    assert studio.search_wave(wave.numpy()) == hits


def test_silence_long_and_broken_recordings(studio, corpus):
    assert studio.search_wave(torch.zeros(RATE)) == [] and "silent" in studio.message
    labelled(studio.show())
    long = corpus.load_wave(0).repeat(20)
    hits = studio.search_wave(long)
    assert (
        hits
        and studio.message == "Only the first 5 seconds were used."
        and hits == studio.search_wave(long[: 5 * RATE])
    )
    for broken in (torch.zeros(0), torch.full((800,), torch.nan), torch.zeros(2, 800)):
        with pytest.raises(InputError):
            studio.search_wave(broken)


def test_messages_of_the_page(studio, corpus):
    page = studio.front
    studio.answer(page, {"kind": "recording"}, [pcm(corpus.load_wave(0))])
    assert (
        page.number == 1
        and page.heard.startswith("data:audio/mpeg")
        and {"picture", "name", "src", "coarse", "fine"} == set(page.hits[0])
    )
    for stage in ("coarse", "fine"):
        assert sorted(hit[stage] for hit in page.hits if hit[stage] <= 5) == [1, 2, 3, 4, 5]
    studio.answer(
        page,
        {"kind": "file", "name": "voice.wav"},
        [wav_bytes(np.random.default_rng(0).standard_normal(44_100) / 10, 44_100)],
    )
    assert page.number == 2 and page.hits and "1.0 seconds" in page.message
    for content, buffers, words in (
        ({"kind": "file", "name": "a.docx"}, [b"PK"], "a.docx: cannot be decoded"),
        ({"kind": "recording"}, [b""], "shape"),
        ({"kind": "recording"}, [pcm(torch.zeros(RATE))], "silent"),
        ({"kind": "nonsense"}, [], "did not arrive whole"),
    ):
        number = page.number
        studio.answer(page, content, buffers)
        assert (
            words in page.message
            and page.hits == []
            and page.heard.startswith("data:audio") == (words == "silent")
            and page.number == number + 1
        )


def test_a_click_plays_the_captions_of_that_picture(studio, corpus):
    page = studio.front
    studio.answer(page, {"kind": "recording"}, [pcm(corpus.load_wave(0))])
    picture = page.hits[2]["picture"]
    studio.answer(page, {"kind": "hear", "picture": picture}, [])
    path = studio.corpus.pictures[picture].path
    texts = [one.text for one in corpus.captions if corpus.pictures[one.image].path == path]
    assert [one["text"] for one in page.clips["sounds"]] == texts and all(
        one["src"].startswith("data:audio") for one in page.clips["sounds"]
    )
    for wrong in (
        {"kind": "hear"},
        {"kind": "hear", "picture": 10**6},
        {"kind": "hear", "picture": "x"},
    ):
        studio.answer(page, wrong, [])  # told, not raised


def test_a_folder_without_captions(model, corpus, tmp_path):
    for place in range(3):
        corpus.load_picture(place).save(tmp_path / f"<b>{place}.png")
    studio = Studio(model, tmp_path)
    studio.answer(studio.front, {"kind": "recording"}, [pcm(corpus.load_wave(0))])
    assert len(studio.front.hits) == 3 and captions_of(studio, 0) == []
    studio.play(0)
    assert studio.front.clips == {"title": "Nobody has described this picture.", "sounds": []}
    labelled(show_answers(studio.wave, studio.corpus, studio.hits, right={0}))


def test_the_studio_brings_a_plain_picture_along(studio, corpus):
    for wave in (None, torch.zeros(RATE), corpus.load_wave(0)):
        if wave is not None:
            studio.search_wave(wave)
        bundle = studio._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in bundle and base64.b64decode(
            bundle["image/png"]
        ).startswith(b"\x89PNG")


def test_names_that_a_browser_test_relies_on():
    script, looks = page_file("studio.js"), page_file("studio.css")
    for name in ("record", "file", "level", "elapsed", "message", "heard", "ranks", "hit", "clips"):
        assert f'"{name}"' in script
    assert ".speechimg-hit" in looks and "innerHTML" not in script


@pytest.mark.slow  # loads the reference model and both bundled galleries
def test_bundled_pictures_answer_bundled_recordings():
    from speechimg.retrieval import load_model

    scenes, reference = load_corpus("scenes", "test"), load_model("reference")
    studio = Studio(reference, "scenes")
    ranks = []
    for row in range(0, len(scenes.captions), 100):
        hits = studio.search_wave(scenes.load_wave(row))
        ranks.append(
            next(
                (
                    hit.rank
                    for hit in hits
                    if hit.path == scenes.pictures[scenes.captions[row].image].path
                ),
                99,
            )
        )
    assert sum(rank <= 5 for rank in ranks) > 0.8 * len(ranks)
    assert len(captions_of(studio, hits[0].picture)) == 5
    together = read_together(
        reference, scenes.load_wave(0), [scenes.load_picture(0), scenes.load_picture(1)]
    )
    assert len(play_matching(together, head=2)) < 60_000
    assert len(Studio(reference, "stamps").clips_of) == 747
