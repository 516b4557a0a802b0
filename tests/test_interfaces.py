"A model that travels: its card, its files, hostile files, and vectors straight from files."

import inspect
import json
import re
import shlex
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from miniature import image_bytes, make_corpus, wav_bytes
from toys import TINY

import speechimg.model as model_room
import speechimg.run.hub as hub_room
from speechimg.core import Config, InputError, data_dir, read_json
from speechimg.corpora import load_corpus
from speechimg.model import SpeechImageModel
from speechimg.retrieval import embed, load_features
from speechimg.train import train

RUN = json.loads((data_dir() / "models" / "reference" / "metrics.json").read_text())
RUN |= {"corpus": "scenes"}  # as train writes it


def make(towers="light", run=None, **settings):
    torch.manual_seed(0)
    if towers == "paper":
        settings = {"speech_model": "tiny", "image_model": "tiny"} | settings
    model = SpeechImageModel(Config(towers=towers, **TINY | settings)).eval()
    model.run = run
    return model


# ---- the card


def test_round_trip_gives_the_same_bits_and_the_same_story(tmp_path):
    "Twice saved and loaded: equal outputs, equal facts, equal card."
    first = make(run=RUN)
    first.save_pretrained(tmp_path / "one")
    second = SpeechImageModel.from_pretrained(tmp_path / "one")
    second.save_pretrained(tmp_path / "two")
    third = SpeechImageModel.from_pretrained(tmp_path / "two")
    frames, lengths, grids = (
        torch.randn(3, 9, 384),
        torch.tensor([9, 4, 1]),
        torch.randn(3, 25, 320),
    )
    with torch.inference_mode():
        outputs = [
            (model.encode_speech(frames, lengths), model.encode_image(grids))
            for model in (first, third)
        ]
        for one, other in zip(*outputs):
            assert all(torch.equal(a, b) for a, b in zip(one, other))
        logits = [
            model.match(speech.tokens, speech.mask, image.tokens)
            for model, (speech, image) in zip((first, third), outputs)
        ]
    assert torch.equal(*logits)
    assert second.run == third.run == RUN and not third.training
    for name in ("README.md", "config.json", "model.safetensors", "metrics.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), (
            name
        )


def test_the_card_says_data_licence_metrics_and_command(tmp_path):
    make(run=RUN).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (
        card.data.license == "apache-2.0"
        and card.data.library_name == "speechimg"
        and card.data.datasets == ["scenes"]
    )
    assert (
        "speech-image-retrieval" in card.data.tags
        and card.data.pipeline_tag == "feature-extraction"
    )
    assert (
        RUN["command"] in card.text
        and f"{RUN['recordings']['train']} recordings in train" in card.text
        and "Apache-2.0" in card.text
    )
    figures = {
        (result.dataset_split, result.metric_name): result.metric_value
        for result in card.data.eval_results
    }
    for k, value in RUN["evaluations"]["test"]["fine"]["image_to_speech"].items():
        assert figures["test", f"R@{k}, image to speech, fine"] == value
    assert (
        figures["stamps_en (all)", "R@10, speech to image, coarse"]
        == RUN["evaluations"]["stamps_en"]["all"]["coarse"]["10"]
    )
    sets = {(result.dataset_type, result.dataset_split) for result in card.data.eval_results}
    ways = {  # of scenes both directions
        **{("scenes", split): 2 for split in ("validation", "test", "test_style", "voice")},
        **{("stamps", f"stamps_en{part}"): 1 for part in (" (all)", " (nouns)", "_noun")},
        **{
            ("things", f"things_{split}_{kind}"): 1
            for split in ("test", "test_sentences")
            for kind in ("picture", "style")
        },
    }
    assert sets == set(ways)
    assert len(figures) == 3 * 2 * sum(ways.values())  # three k, two stages
    assert card.text.count("| fine |") == sum(ways.values())
    make(run=RUN | {"evaluations": {"voice": RUN["evaluations"]["test"]}}).save_pretrained(tmp_path)
    assert {
        result.dataset_type for result in ModelCard.load(tmp_path / "README.md").data.eval_results
    } == {"scenes"}


def test_training_writes_the_card(tmp_path, miniature):
    "What train knows is in the folder, and the loaded model knows it too."
    config = Config(
        towers="small",
        **TINY,
        batch_size=4,
        queue_size=8,
        steps=2,
        warmup_steps=1,
        evaluate_every=2,
        checkpoint_every=2,
    )
    out = train(config, miniature, tmp_path / "run", progress=False)
    card, run = ModelCard.load(out / "README.md"), read_json(out / "metrics.json")
    assert (
        SpeechImageModel.from_pretrained(out).run == run
        and card.data.datasets == [miniature.name]
        and run["command"] in card.text
    )
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values["R@5, speech to image, fine"] == run["validation"]["fine"]["speech_to_image"]["5"]


@pytest.mark.parametrize(
    "corpus, name",
    [("my flickr8k/", "my flickr8k"), ("/data/a`b.zip", "a'b"), ("scenes", "scenes"), (7, "7")],
)
def test_the_card_takes_the_corpus_from_the_run(tmp_path, corpus, name):
    "Blanks and all; the printed command, here another's, is not read."
    words = ["speechimg", "train", "--corpus", str(corpus)]
    command = shlex.join(words) + " --corpus other"
    make(run=RUN | {"corpus": corpus, "command": command, "name": None}).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == [name] and f"Trained on `{name}` (" in card.text
    pasted = next(line for line in card.text.splitlines() if line.startswith("    speechimg"))
    assert shlex.split(pasted)[: len(words)] == words
    assert {result.dataset_type for result in card.data.eval_results} == {name, "stamps", "things"}
    assert card.data.model_name == "speechimg-" + re.sub(r"[^\w.-]", "-", name)


def test_a_mixture_is_named_where_it_was_meant(tmp_path):
    "Its validation is of all of it, a test of the first; mutant: the name behind the last slash."
    make(run=RUN | {"corpus": "scenes+things/5"}).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["scenes+things/5"]
    named = {result.dataset_split: result.dataset_type for result in card.data.eval_results}
    assert named["validation"] == "scenes+things/5" and named["test_style"] == "scenes"


def test_a_run_from_before_says_that_its_corpus_is_not_recorded(tmp_path):
    old = {key: value for key, value in RUN.items() if key not in ("corpus", "name")}
    make(run=old).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    count = RUN["recordings"]["train"]
    assert f"a corpus that is not recorded ({count} recordings in train" in card.text
    assert card.data.datasets is None and card.data.model_name == "speechimg-model"
    assert old["command"] in card.text


def test_a_model_without_a_past_says_so(tmp_path):
    make().save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (
        "Nothing is recorded" in card.text
        and card.data.eval_results is None
        and not (tmp_path / "metrics.json").exists()
    )
    assert SpeechImageModel.from_pretrained(tmp_path).run is None


def test_our_card_is_renewed_and_a_written_one_is_left_alone(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    model.run = RUN
    model.save_pretrained(tmp_path)
    assert RUN["command"] in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("my own words")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my own words"


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"validation": [1]},
        {
            "evaluations": {"x": {"coarse": {"a": {"1": 2}}, "all": 3}},
            "command": 7,
            "recordings": {},
        },
    ],
)
def test_odd_facts_make_a_card_all_the_same(tmp_path, run):
    make(run=run).save_pretrained(tmp_path)
    ModelCard.load(tmp_path / "README.md")


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff", b"null"])
def test_damaged_facts_do_not_keep_a_model_from_loading(tmp_path, content):
    make(run=RUN).save_pretrained(tmp_path)
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.warns(UserWarning, match="metrics.json"):
        assert SpeechImageModel.from_pretrained(tmp_path).run is None


# ---- the hub, without one


def test_push_uploads_the_right_files(monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, **options):
            seen.update(
                {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}, repo=repo_id
            )
            return "url"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model = make(run=RUN)
    assert model.push_to_hub("me/model") == "url" and seen.pop("repo") == "me/model"
    assert sorted(seen) == ["README.md", "config.json", "metrics.json", "model.safetensors"]
    assert (
        json.loads(seen["metrics.json"]) == RUN
        and Config.from_dict(json.loads(seen["config.json"])) == model.config
    )
    assert (
        set(safetensors.torch.load(seen["model.safetensors"])) == set(model.state_dict())
        and RUN["command"].encode() in seen["README.md"]
    )


def test_a_model_of_the_hub_is_checked_like_a_folder(tmp_path, monkeypatch):
    make(run=RUN).save_pretrained(tmp_path)

    def download(repo_id, filename, **options):
        if not (tmp_path / filename).exists():
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", download)
    monkeypatch.setattr(hub_room, "hf_hub_download", download)
    assert SpeechImageModel.from_pretrained("me/model").run == RUN
    (tmp_path / "metrics.json").unlink()
    assert SpeechImageModel.from_pretrained("me/model").run is None
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled"):
        SpeechImageModel.from_pretrained("me/model")


# ---- hostile files


@pytest.fixture
def built(monkeypatch):
    "The devices on which a model was begun."
    devices, original = [], model_room.DualEncoder.__init__

    def spy(self, *arguments):
        devices.append(torch.empty(0).device.type)
        original(self, *arguments)

    monkeypatch.setattr(model_room.DualEncoder, "__init__", spy)
    return devices


@pytest.mark.parametrize("towers", ["light", "small", "paper"])
@pytest.mark.parametrize(
    "lie",
    [
        {"width": 40_000_000},
        {"dim": 10**12},
        {"fusion_depth": 10**9},
        {"speech_depth": 10**6},
        {"image_depth": 10**5},
        {"fusion_depth": 1000},
        {"width": 2**62},
        {"width": 32},
        {"dim": 9},
        {"width": 17_000, "dim": 1},
    ],
)
def test_sizes_that_the_file_does_not_have_are_refused_before_memory_is_asked_for(
    tmp_path, towers, lie, built
):
    make(towers).save_pretrained(tmp_path)
    built.clear()
    config = json.loads((tmp_path / "config.json").read_text()) | lie
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        SpeechImageModel.from_pretrained(tmp_path)
    named = ["model.safetensors", *(f"config.json: {key}: " for key in lie)]
    assert any(name in str(error.value) for name in named) and "\n" not in str(error.value)
    assert set(built) <= {"meta"}


@pytest.mark.parametrize("finetune", ["none", "both"])
def test_the_towers_of_the_paper_are_compared_too(tmp_path, finetune, built):
    make("paper", finetune=finetune).save_pretrained(tmp_path)
    assert set(SpeechImageModel.from_pretrained(tmp_path).state_dict()) == set(
        safetensors.torch.load_file(tmp_path / "model.safetensors")
    )
    built.clear()
    config = json.loads((tmp_path / "config.json").read_text()) | {"width": 24, "heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="config.json asks for"):
        SpeechImageModel.from_pretrained(tmp_path)
    assert set(built) == {"meta"}


def test_without_the_check_memory_would_be_asked_for(tmp_path, built, monkeypatch):
    "Mutant: the config is believed."
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"dim": 9})
    )
    built.clear()
    monkeypatch.setattr(hub_room, "check_weights", lambda *arguments: None)
    with pytest.raises(InputError):
        SpeechImageModel.from_pretrained(tmp_path)
    assert built == ["cpu"]


def header(tensors):  # {name: (shape, first byte, last byte)}
    text = json.dumps(
        {
            name: {"dtype": "F32", "shape": shape, "data_offsets": [first, last]}
            for name, (shape, first, last) in tensors.items()
        }
    ).encode()
    return struct.pack("<Q", len(text)) + text


def test_headers_that_lie(tmp_path, built):
    make().save_pretrained(tmp_path)
    file, built[:] = tmp_path / "model.safetensors", []
    names = list(safetensors.torch.load_file(file))
    for data in (
        header({"temperature": ([10**12], 0, 4 * 10**12)}),
        header({"temperature": ([2**62, 4], 0, 4)}),
        struct.pack("<Q", 2**60) + b"{}",
        header({name: ([0], 0, 0) for name in names}),
        b"\x80\x04K\x01.",
        b"{}",
    ):
        file.write_bytes(data)
        with pytest.raises(InputError) as error:
            SpeechImageModel.from_pretrained(tmp_path)
        assert (
            any(name in str(error.value) for name in ("model.safetensors", "config.json: "))
            and "too" in str(error.value)
            or "model.safetensors" in str(error.value)
        )
    assert set(built) <= {"meta"}


def test_a_file_larger_than_the_memory_is_refused(tmp_path, built):
    "Sparse: four terabytes that take no room on the disk, with a header that agrees."
    size = 10**12
    make().save_pretrained(tmp_path)
    file, built[:] = tmp_path / "model.safetensors", []
    file.write_bytes(start := header({"encoders.speech_projection.weight": ([size], 0, 4 * size)}))
    try:
        with open(file, "r+b") as sparse:
            sparse.truncate(len(start) + 4 * size)
    except OSError:
        pytest.skip("this file system has no such files")
    with pytest.raises(InputError, match="more than the memory|does not hold"):
        SpeechImageModel.from_pretrained(tmp_path)
    assert not built


@pytest.mark.parametrize(
    "text", ["[]", "7", "{", '{"wdith": 3}', '{"width": "3"}', '{"width": 1e400}']
)
def test_a_config_that_is_none_is_an_input_error(tmp_path, text):
    make().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as error:
        SpeechImageModel.from_pretrained(tmp_path)
    assert "config.json" in str(error.value)


# ---- vectors from files


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return make_corpus(
        tmp_path_factory.mktemp("corpus") / "mini", n_images=10, captions=2, splits=("train", "val")
    )


@pytest.mark.parametrize("towers", ["light", "small"])
@pytest.mark.parametrize("batch_size", [64, 1])
@pytest.mark.slow
def test_vectors_from_files_equal_those_of_retrieval(miniature, towers, batch_size):
    "Paths, arrays, tensors and pictures; in batches of any size; in the order given."
    model, corpus = make(towers).train(), load_corpus(miniature, "val")
    reference = embed(model, load_features(model, corpus))
    wavs, pictures = (
        [miniature / caption.wav for caption in corpus.captions],
        [miniature / picture.path for picture in corpus.pictures],
    )
    waves, images = (
        [corpus.load_wave(place) for place in range(len(wavs))],
        [corpus.load_picture(place) for place in range(len(pictures))],
    )
    for given in (
        wavs,
        [str(path) for path in wavs],
        waves,
        [wave.numpy() for wave in waves],
        (wave for wave in waves),
    ):
        found = model.embed_speech(given, batch_size, progress=False)
        assert found.dtype == np.float32 and np.abs(found - reference.speech.numpy()).max() < 1e-5
    for given in (pictures, [str(path) for path in pictures], images):
        assert (
            np.abs(
                model.embed_images(given, batch_size, progress=False) - reference.image.numpy()
            ).max()
            < 1e-5
        )
    assert model.training and all(part.training for part in model.modules())


def test_more_than_the_memory_of_one_round_keeps_its_order(miniature):
    "20 recordings in batches of one are two rounds. Mutant: in the order of their lengths."
    model, corpus = make(), load_corpus(miniature, "val")
    waves = [corpus.load_wave(place) for place in range(len(corpus.captions))]
    one_by_one = np.concatenate([model.embed_speech([wave], progress=False) for wave in waves])
    assert np.abs(model.embed_speech(waves, 1, progress=False) - one_by_one).max() < 1e-5
    source = inspect.getsource(model_room.embed_recordings)
    mutant = source.replace("vectors[rows]", "vectors[[order.index(row) for row in rows]]")
    assert mutant != source
    space = dict(vars(model_room))
    exec(mutant, space)
    frames = [model.speech_tower.front_end(wave) for wave in waves]
    right, wrong = (
        function(model, frames, 4, keep_tokens=False)[0].numpy()
        for function in (model_room.embed_recordings, space["embed_recordings"])
    )
    assert np.allclose(right, one_by_one, atol=1e-5)
    assert not np.allclose(right, wrong, atol=1e-3)


def test_every_format_is_read(tmp_path, miniature):
    model, corpus = make(), load_corpus(miniature, "val")
    wave = corpus.load_wave(0).numpy()
    for kind, subtype in (
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_24"),
        ("OGG", "VORBIS"),
        ("MP3", "MPEG_LAYER_III"),
    ):
        (tmp_path / f"a.{kind.lower()}").write_bytes(wav_bytes(wave, subtype=subtype, format=kind))
    found = model.embed_speech(sorted(tmp_path.iterdir()), progress=False)
    assert found.shape == (4, 8) and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    (tmp_path / "p.jpg").write_bytes(image_bytes(corpus.load_picture(0), "JPEG"))
    (tmp_path / "p.png").write_bytes(image_bytes(corpus.load_picture(0).convert("LA")))
    assert model.embed_images([tmp_path / "p.jpg", tmp_path / "p.png"], progress=False).shape == (
        2,
        8,
    )
    assert (
        model.embed_speech([], progress=False).shape
        == model.embed_images([], progress=False).shape
        == (0, 8)
    )


def test_what_cannot_be_embedded_is_named(tmp_path, miniature):
    model, wave = make(), np.zeros(16_000, np.float32)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for given, where in (
        ([wave, tmp_path / "broken.wav"], "broken.wav"),
        ([tmp_path / "gone.wav"], "gone.wav"),
        ([tmp_path], tmp_path.name),
        ([wave, wave[:0]], "recording 1"),
        ([wave * np.nan], "recording 0"),
        ([wave, wave.astype(np.int16)], "recording 1"),
        ([wave.reshape(2, -1)], "recording 0"),
        ([None], "recording 0"),
        ([object()], "recording 0"),
        ("one.wav", "one.wav"),
    ):
        with pytest.raises(InputError) as error:
            model.embed_speech(given, progress=False)
        assert where in error.value.where and "\n" not in str(error.value)
    for given, where in (
        ([tmp_path / "broken.png"], "broken.png"),
        ([wave], "picture 0"),
        (tmp_path / "one.png", "one.png"),
    ):
        with pytest.raises(InputError) as error:
            model.embed_images(given, progress=False)
        assert where in error.value.where
    assert not model.training


def test_a_long_recording_is_cut_like_everywhere():
    model, wave = make(max_seconds=1.0), torch.randn(48_000).clamp(-1, 1) / 4
    with warnings.catch_warnings(action="error"):
        long, short = model.embed_speech([wave, wave[:16_000]], progress=False)
    assert np.allclose(long, short, atol=1e-6)
