"The command line from end to end: what it prints, what it leaves behind, and how it says no."

import base64
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import toys
from miniature import draw, image_bytes, make_corpus, make_files, speak, wav_bytes, write_files
from PIL import Image

from speechimg import cli
from speechimg.core import Config, InputError
from speechimg.look import page
from speechimg.model import SpeechImageModel
from speechimg.towers.words import load_words

TINY = toys.TINY | {"towers": "small"}
QUICK = [
    "--set",
    "batch_size=4",
    "--set",
    "steps=3",
    "--set",
    "evaluate_every=3",
    "--set",
    "queue_size=8",
    "--set",
    "warmup_steps=1",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a blank in its name: a corpus, its archive, a model, a recording, pictures."
    folder = tmp_path_factory.mktemp("command line")
    make_corpus(folder / "mini", n_images=6, captions=2)
    make_corpus(folder / "mini", n_images=6, captions=2, zip=True)
    torch.manual_seed(0)
    SpeechImageModel(Config(**TINY)).save_pretrained(folder / "model")
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "query.wav").write_bytes(wav_bytes(speak(("red circle",))))
    (folder / "pictures").mkdir()
    for number, noun in enumerate(("red circle", "blue square", "green triangle")):
        (folder / "pictures" / f"{number} {noun}.png").write_bytes(image_bytes(draw([noun])))
    return folder


@pytest.fixture
def command(place, monkeypatch, tmp_path, capfd):
    "Run a command in this process, inside an empty folder: (exit code, stdout, stderr)."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPEECHIMG_CACHE", str(place / "cache"))
    monkeypatch.setenv("SPEECHIMG_DATA", str(place))
    monkeypatch.delenv("SPEECHIMG_TRACEBACK", raising=False)
    monkeypatch.setattr(
        warnings, "formatwarning", warnings.formatwarning
    )  # main changes it for good

    def run(*arguments):
        capfd.readouterr()
        with warnings.catch_warnings():
            try:
                code = cli.main([str(one) for one in arguments])
            except SystemExit as stop:
                code = stop.code
        out, err = capfd.readouterr()
        return code, out, err

    return run


def refused(answer, *words, folder=None):
    "Exit code 2, one line on stderr with these words, nothing on stdout, nothing left behind."
    code, out, err = answer
    assert code == 2, answer
    assert err.count("\n") == 1 and err.startswith("speechimg: ") and "; " in err, (
        err
    )  # problem; remedy
    assert "Traceback" not in err and out == ""
    for word in words:
        assert str(word) in err, (word, err)
    if folder is not None:
        assert list(folder.iterdir()) == [], "something was left behind"


# what the four commands do


def test_train_evaluate_search_and_check(command, place, tmp_path):
    code, out, err = command(
        "train",
        "--corpus",
        place / "mini",
        "--out",
        "run",
        "--config",
        place / "config.json",
        *QUICK,
        "--seed",
        3,
        "--limit",
        10,
    )
    assert code == 0 and err == "" and "trained 3 steps" in out and "speech to image" in out
    made = Config.load("run/config.json")
    assert (made.width, made.batch_size, made.seed, made.steps) == (16, 4, 3, 3)
    assert not list(tmp_path.rglob("*.tmp"))

    code, out, err = command(
        "evaluate",
        "--model",
        "run",
        "--corpus",
        place / "mini.zip",
        "--rerank",
        4,
        "--json",
        "deep/er/result.json",
    )
    assert code == 0 and err == ""
    result = json.loads((tmp_path / "deep/er/result.json").read_text())
    assert list(result) == ["coarse", "fine", "swap", "pairs", "seconds"] and list(
        result["swap"]
    ) == ["coarse", "fine"]
    for stage in ("coarse", "fine"):
        assert list(result[stage]) == ["speech_to_image", "image_to_speech"]
        for part in result[stage].values():
            assert (
                list(part) == ["1", "5", "10"]
                and part["10"] == 100.0
                or part is result[stage]["image_to_speech"]
            )
    assert (
        "12 recordings, 6 pictures, 4 candidates" in out
        and "swap probe" in out
        and "pairs read together" in out
    )
    for value in result["fine"]["image_to_speech"].values():
        assert f"{value:.1f}" in out

    code, out, err = command(
        "search",
        place / "query.wav",
        "--model",
        "run",
        "--gallery",
        place / "pictures",
        "--top",
        2,
        "--save",
        "page.html",
    )
    assert code == 0 and err == "" and out.count(".png") == 2 and "page written to page.html" in out
    assert (tmp_path / "page.html").read_text().count("<figure>") == 2

    code, out, err = command("check", place / "mini")
    assert code == 0 and err == "" and "every file can be read" in out
    assert (
        command("check", place / "mini.zip")[0] == 0
        and command("check", place / "pictures")[0] == 0
    )


def test_train_goes_on_where_it_stopped(command, place):
    start = [
        "train",
        "--corpus",
        place / "mini",
        "--out",
        "run",
        "--config",
        place / "config.json",
        *QUICK,
    ]
    assert command(*start)[0] == 0
    refused(command(*start), "run", "already holds a run", "--resume")
    code, out, _ = command(*start, "--resume")
    assert code == 0 and "trained 3 steps" in out


def test_evaluate_takes_a_language_and_another_split(command, place, tmp_path):
    data = json.loads(make_files(6, 2)["test.json"])
    for entry in data["data"]:
        entry["captions"][1]["language"] = "fr"
    write_files(tmp_path / "two", make_files(6, 2) | {"test.json": json.dumps(data).encode()})
    code, out, _ = command(
        "evaluate", "--model", place / "model", "--corpus", "two", "--language", "fr"
    )
    assert code == 0 and "two/test in fr: 6 recordings, 6 pictures" in out and "swap" not in out
    assert (
        "12 recordings"
        in command("evaluate", "--model", place / "model", "--corpus", "two", "--split", "val")[1]
    )
    refused(
        command("evaluate", "--model", place / "model", "--corpus", "two", "--language", "xx"),
        "two",
        "no recordings",
    )
    refused(
        command("evaluate", "--model", place / "model", "--corpus", "two", "--split", "tset"),
        "no split 'tset'",
        "test",
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train"], "--out"),
        (["evaluate", "--rerank", "many"], "many"),
        (["search"], "recording"),
        (["trian"], "trian"),
        ([], "train"),
        (["train", "--out", "run", "--on-error", "panic"], "panic"),
    ],
)
def test_wrong_usage_is_told_with_code_2(command, tmp_path, arguments, words):
    code, out, err = command(*arguments)
    assert (
        code == 2
        and words in err + out
        and "Traceback" not in err
        and list(tmp_path.iterdir()) == []
    )


def test_help_names_every_option_of_the_readme(command):
    for name, options in {
        "train": "--corpus --out --config --resume --limit --seed --steps --set --on-error",
        "check": "STR",
        "words": "--model",
        "evaluate": "--model --corpus --split --rerank --json --language --on-error",
        "search": "PATH --gallery --top --save --rerank --model",
    }.items():
        code, out, _ = command(name, "--help")
        assert code == 0
        for option in options.split():
            assert option in out, (name, option)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_explains_every_option(command, monkeypatch, name):
    "A comment that the formatter moved away from its option leaves it without a word."
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = command(name, "--help")
    bare = r"│ (-\S+|[A-Z]+|\{[^}]+\}) ?\S* +\((default: .*|repeatable|required)\) *│"
    options = [line for line in out.splitlines() if line.startswith(("│ --", "│ PATH", "│ STR"))]
    assert code == 0 and options and not [line for line in options if re.match(bare, line)]


def test_words_are_listed_and_said(command, place, monkeypatch):
    monkeypatch.delenv("SPEECHIMG_DATA")  # the towers' words lie in the project
    code, out, _ = command("words", "--model", "untrained")
    assert code == 0 and out.splitlines() == sorted(load_words().names, key=str.casefold)
    known = ["--model", "untrained", "--gallery", place / "pictures"]
    code, out, _ = command("search", place / "query.wav", *known)
    assert code == 0 and out.startswith("heard: ")
    code, out, _ = command("search", place / "query.wav", "--model", place / "model", *known[2:])
    assert code == 0 and "heard" not in out
    refused(command("words", "--model", place / "model"), "knows no words")


# values that cannot be


@pytest.mark.parametrize(
    "options, words",
    [
        (["--set", "widht=24"], "did you mean width?"),
        (["--set", "width=text"], "width"),
        (["--set", "width"], "NAME=VALUE"),
        (["--set", "dropout=2"], "dropout"),
        (["--steps", "0"], "steps"),
        (["--limit", "0"], "--limit"),
        (["--config", "none.json"], "none.json"),
        (["--set", "batch_size=500"], "batch_size"),
    ],
)
def test_train_refuses_settings(command, place, options, words):
    refused(
        command(
            "train",
            "--corpus",
            place / "mini",
            "--out",
            "run",
            "--set",
            "towers=small",
            "--set",
            "width=16",
            "--set",
            "heads=2",
            *options,
        ),
        words,
    )


def test_a_config_file_with_errors_is_named(command, place, tmp_path):
    for content, word in (
        ("{", "not valid JSON"),
        ('{"width": "wide"}', "width"),
        ("[]", "not a table"),
        ('{"unheard": 1}', "unheard"),
    ):
        (tmp_path / "bad.json").write_text(content)
        refused(
            command("train", "--corpus", place / "mini", "--out", "run", "--config", "bad.json"),
            word,
        )
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--top", "0"], "--top"),
        (["--model", "nowhere"], "nowhere"),
        (["--gallery", "nowhere"], "nowhere"),
    ],
)
def test_search_refuses_settings(command, place, tmp_path, options, words):
    known = ["--model", place / "model", "--gallery", place / "pictures"]
    refused(
        command("search", place / "query.wav", *known, "--save", "page.html", *options),
        words,
        folder=tmp_path,
    )


def test_evaluate_refuses_settings(command, place, tmp_path):
    refused(
        command(
            "evaluate", "--model", place / "model", "--corpus", place / "mini", "--rerank", "-1"
        ),
        "--rerank",
        folder=tmp_path,
    )
    refused(
        command("evaluate", "--corpus", place / "mini"),
        "reference",
        "holds no model",
        folder=tmp_path,
    )
    refused(
        command("evaluate", "--model", place / "model", "--corpus", "nowhere"),
        "nowhere",
        "does not exist",
        folder=tmp_path,
    )
    refused(command("check", "nowhere"), "nowhere", "does not exist", folder=tmp_path)


def test_a_damaged_model_is_named(command, place, tmp_path):
    for name, content in (
        ("config.json", b"{"),
        ("model.safetensors", b"rubbish"),
        ("model.safetensors", (place / "model" / "model.safetensors").read_bytes()[:-8]),
    ):
        folder = write_files(
            tmp_path / "bad model",
            {
                one: (place / "model" / one).read_bytes()
                for one in ("config.json", "model.safetensors")
            }
            | {name: content},
        )
        refused(
            command(
                "evaluate", "--model", folder, "--corpus", place / "mini", "--json", "out.json"
            ),
            name,
        )
        assert not (tmp_path / "out.json").exists()


def test_places_that_cannot_be_written_are_told_before_the_work(command, place, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    begin = ["evaluate", "--model", "not even looked for", "--corpus", place / "mini", "--json"]
    refused(command(*begin, "folder"), "folder", "cannot be written")
    refused(command(*begin, "file/result.json"), "result.json", "cannot be written")
    refused(
        command("search", place / "query.wav", "--save", "folder"), "folder", "cannot be written"
    )
    refused(command("train", "--corpus", place / "mini", "--out", "file/run"), "run")
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_older_result_survives_a_failure(command, place, tmp_path, monkeypatch):
    (tmp_path / "result.json").write_text("old")
    (tmp_path / "page.html").write_text("old")
    files = make_files(6, 2)
    files["wavs/test-003-0.wav"] = b"no sound"
    corpus = write_files(tmp_path / "bad", files)
    refused(
        command(
            "evaluate", "--model", place / "model", "--corpus", corpus, "--json", "result.json"
        ),
        "test-003-0.wav",
    )
    monkeypatch.setattr(page, "card", lambda *_: 1 / 0)  # dies while the page is made
    code, _, err = command(
        "search",
        place / "query.wav",
        "--model",
        place / "model",
        "--gallery",
        place / "pictures",
        "--save",
        "page.html",
    )
    assert (
        code == 3
        and err.count("\n") == 1
        and "unexpected ZeroDivisionError" in err
        and "SPEECHIMG_TRACEBACK" in err
    )
    assert (tmp_path / "result.json").read_text() == (tmp_path / "page.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "page.html", "result.json"]


# recordings


GOOD = speak(("blue square",), seed=1)


def sounds():
    "Recordings of every kind: {name: (bytes, words of the refusal or None)}."
    nan, stereo, long = (
        GOOD.copy(),
        np.stack([GOOD, 0.5 * GOOD], 1),
        np.tile(GOOD, 1 + 300 * 16_000 // len(GOOD)),
    )
    nan[100] = np.nan
    return {
        "empty.wav": (b"", "is empty"),
        "text.wav": (b"this is a letter", "cannot be decoded"),
        "header.wav": (wav_bytes(GOOD)[:30], "cannot be decoded"),
        "bare.wav": (wav_bytes(GOOD[:0]), "holds no samples"),
        "nan.wav": (wav_bytes(nan, subtype="FLOAT"), "NaN"),
        "silent.wav": (wav_bytes(0 * GOOD), "silence"),
        "short.ogg": (wav_bytes(GOOD, format="OGG", subtype="VORBIS")[:200], "cannot be decoded"),
        "cut.wav": (wav_bytes(GOOD)[: len(GOOD)], None),
        "stereo.wav": (wav_bytes(stereo), None),
        "long.wav": (wav_bytes(long), None),
        "8k.wav": (wav_bytes(GOOD[::2], 8_000), None),
        "44k.flac": (wav_bytes(GOOD, 44_100, format="FLAC"), None),
        "48k.wav": (wav_bytes(GOOD, 48_000, "PCM_24"), None),
        "opus.ogg": (wav_bytes(GOOD, format="OGG", subtype="OPUS"), None),
    }


@pytest.mark.parametrize("name", sounds())
def test_search_with_every_kind_of_recording(command, place, tmp_path, name):
    content, words = sounds()[name]
    (tmp_path / name).write_bytes(content)
    answer = command(
        "search",
        name,
        "--model",
        place / "model",
        "--gallery",
        place / "pictures",
        "--save",
        "page.html",
    )
    if words:
        refused(answer, name, words)
    else:
        assert (
            answer[0] == 0
            and answer[1].count(".png") == 3
            and answer[2]
            == (f"{name}: only the first 20 seconds are used\n" if name == "long.wav" else "")
        )
    assert (tmp_path / "page.html").exists() == (words is None)


def test_search_without_a_recording(command, place, tmp_path):
    refused(
        command("search", "none.wav", "--model", place / "model", "--save", "page.html"),
        "none.wav",
        "No such file",
        folder=tmp_path,
    )
    refused(
        command("search", place, "--model", place / "model", "--save", "page.html"),
        place.name,
        "directory",
        folder=tmp_path,
    )


@pytest.mark.parametrize(
    "name", [name for name, (_, words) in sounds().items() if words and words != "silence"]
)
def test_a_corpus_with_a_bad_recording(command, place, tmp_path, name):
    "Refused by name; with --on-error skip left out and reported; found by check."
    files = make_files(6, 2)
    for split in ("train", "test"):
        files[f"wavs/{split}-002-1.wav"] = sounds()[name][0]
    corpus = write_files(tmp_path / "bad", files)
    refused(
        command("evaluate", "--model", place / "model", "--corpus", corpus, "--json", "out.json"),
        "test-002-1.wav",
        sounds()[name][1],
    )
    assert not (tmp_path / "out.json").exists()
    code, out, err = command(
        "evaluate",
        "--model",
        place / "model",
        "--corpus",
        corpus,
        "--json",
        "out.json",
        "--on-error",
        "skip",
    )
    assert (
        code == 0
        and "11 recordings" in out
        and err.count("\n") == 1
        and err.startswith("skipped ")
        and "test-002-1.wav" in err
    )
    code, out, err = command("check", corpus)
    assert (
        code == 1
        and err == ""
        and [re.search(r"\w+-002-1.wav", line)[0] for line in out.splitlines()]
        == ["test-002-1.wav", "train-002-1.wav"]
    )


def test_training_with_bad_files(command, place, tmp_path):
    files = make_files(6, 2)
    files["wavs/train-002-1.wav"], files["images/train-004.png"] = b"", b"no picture"
    write_files(tmp_path / "bad", files)
    start = ["train", "--corpus", "bad", "--out", "run", "--config", place / "config.json", *QUICK]
    refused(command(*start), "train-004.png", "is not a picture")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "bad" not in path.parts]
    code, out, err = command(*start, "--on-error", "skip")
    assert code == 0 and "left out 2" in out + err
    assert (tmp_path / "run" / "skipped.txt").read_text().count("\n") == 2


# pictures


def pictures():
    "Pictures of every kind: {name: (bytes, can it be read)}."
    image = draw(["red circle"])
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.linspace(0, 65535, 96 * 96).reshape(96, 96).astype(np.uint16))
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    return {
        "cut.png": (image_bytes(image)[:200], False),
        "text.jpg": (b"this is a letter", False),
        "empty.webp": (b"", False),
        "huge.png": (huge.getvalue(), False),
        "dot.png": (image_bytes(image.resize((1, 1))), True),
        "palette.gif": (image_bytes(image.convert("P"), "GIF"), True),
        "grey.png": (image_bytes(image.convert("L")), True),
        "cmyk.jpg": (image_bytes(image.convert("CMYK"), "JPEG"), True),
        "deep.png": (image_bytes(deep), True),
        "turned.jpg": (image_bytes(image, "JPEG", exif=exif), True),
        "clear.png": (image_bytes(image.convert("RGBA")), True),
        "wide.jpg": (image_bytes(image.resize((3000, 40)), "JPEG"), True),
    }


@pytest.mark.slow
def test_search_among_every_kind_of_picture(command, place, tmp_path):
    folder = write_files(
        tmp_path / "zoo", {name: content for name, (content, _) in pictures().items()}
    )
    code, out, err = command(
        "search",
        place / "query.wav",
        "--model",
        place / "model",
        "--gallery",
        folder,
        "--top",
        99,
        "--save",
        "page.html",
    )
    good, bad = (
        {name for name, (_, can) in pictures().items() if can is wanted} for wanted in (True, False)
    )
    assert code == 0 and set(re.findall(r"\S+\.(?:png|jpg|gif|webp)", out)) == good
    assert {
        re.search(r"[\w.]+: ", line)[0][:-2].rsplit("/")[-1] for line in err.splitlines()
    } == bad and all(line.startswith("skipped ") for line in err.splitlines())
    assert (tmp_path / "page.html").read_text().count("<figure>") == len(good)
    code, out, err = command("check", folder)
    assert (
        code == 1
        and err == ""
        and {line.split(": ")[0].rsplit("/")[-1] for line in out.splitlines()} == bad
    )


def test_folders_without_pictures(command, place, tmp_path):
    (tmp_path / "none").mkdir()
    for name, content in ((None, None), ("notes.txt", b"words"), ("only.png", b"words")):
        if name:
            (tmp_path / "none" / name).write_bytes(content)
        refused(
            command(
                "search",
                place / "query.wav",
                "--model",
                place / "model",
                "--gallery",
                "none",
                "--save",
                "page.html",
            ),
            "none",
        )
        assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("name", [name for name, (_, can) in pictures().items() if not can])
def test_a_corpus_with_a_bad_picture(command, place, tmp_path, name):
    files = make_files(6, 2) | {"images/test-001.png": pictures()[name][0]}
    corpus = write_files(tmp_path / "bad", files)
    refused(
        command("evaluate", "--model", place / "model", "--corpus", corpus, "--json", "out.json"),
        "test-001.png",
    )
    assert not (tmp_path / "out.json").exists()
    code, out, _ = command(
        "evaluate", "--model", place / "model", "--corpus", corpus, "--on-error", "skip"
    )
    assert code == 0 and "10 recordings, 5 pictures" in out


# manifests


def edits():
    "Ways to spoil the first two entries of a manifest: {name: (change, words of the refusal)}."

    def put(*path, value):
        def change(data):
            spot = data
            for key in path[:-1]:
                spot = spot[key]
            spot[path[-1]] = value

        return change

    image, wav = (0, "image"), (0, "captions", 0, "wav")
    return {
        "missing picture": (put(*image, value="images/none.png"), "none.png"),
        "missing recording": (put(*wav, value="wavs/none.wav"), "none.wav"),
        "number for a picture": (put(*image, value=7), "'image' is 7"),
        "text for captions": (put(0, "captions", value="hello"), "'captions'"),
        "number for an entry": (put(0, value=5), "entry 0"),
        "null for a recording": (put(*wav, value=None), "'wav'"),
        "same picture twice": (lambda data: data[1].update(image=data[0]["image"]), "occurs twice"),
        "same name twice": (
            lambda data: data[1]["captions"][0].update(uttid=data[0]["captions"][0]["uttid"]),
            "occurs twice",
        ),
        "path upwards": (put(*image, value="../outside.png"), "../outside.png"),
        "path upwards inside": (put(*wav, value="wavs/../../outside.wav"), "outside.wav"),
        "absolute path": (put(*wav, value="/etc/hostname"), "/etc/hostname"),
        "link outside": (put(*image, value="images/link.png"), "link"),
        "no name": (lambda data: data[0]["captions"][0].pop("uttid"), "'uttid' is missing"),
        "backslashes": (put(*wav, value="wavs\\test.wav"), "wavs"),
    }


@pytest.mark.parametrize("name", edits())
def test_manifests_with_errors(command, place, tmp_path, name):
    "evaluate and train refuse in one line, check lists, and with --on-error skip the rest is used."
    change, words = edits()[name]
    corpus = write_files(tmp_path / "bad", make_files(6, 2))
    (tmp_path / "outside.png").write_bytes(image_bytes(draw(["red circle"])))
    (tmp_path / "outside.wav").write_bytes(wav_bytes(GOOD))
    (corpus / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    for split in ("train", "test"):
        content = json.loads((corpus / f"{split}.json").read_text())
        change(content["data"])
        (corpus / f"{split}.json").write_text(json.dumps(content))
    refused(
        command("evaluate", "--model", place / "model", "--corpus", corpus, "--json", "out.json"),
        words,
    )
    refused(
        command(
            "train", "--corpus", corpus, "--out", "run", "--config", place / "config.json", *QUICK
        ),
        words,
    )
    assert not (tmp_path / "out.json").exists() and not [
        path for path in tmp_path.glob("run/**/*") if path.is_file()
    ]
    code, out, err = command("check", corpus)
    assert code == 1 and err == "" and words in out and "Traceback" not in out
    code, out, err = command(
        "evaluate", "--model", place / "model", "--corpus", corpus, "--on-error", "skip"
    )
    assert code == 0 and "skipped " in err and words in err


@pytest.mark.parametrize(
    "content, words",
    [
        (b"{", "not valid JSON"),
        (b"[]", "test.json"),
        (b'{"data": 3}', "'data'"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_manifests_that_are_none(command, place, tmp_path, content, words):
    corpus = write_files(tmp_path / "bad", make_files(6, 2) | {"test.json": content})
    refused(
        command("evaluate", "--model", place / "model", "--corpus", corpus, "--json", "out.json"),
        "test.json",
        words,
    )
    assert not (tmp_path / "out.json").exists() and command("check", corpus)[0] == 1


def test_archives_with_errors(command, place, tmp_path):
    (tmp_path / "bad.zip").write_bytes((place / "mini.zip").read_bytes()[:5000])
    (tmp_path / "text.zip").write_text("not an archive")
    for name in ("bad.zip", "text.zip"):
        for arguments in (
            ["evaluate", "--model", place / "model", "--corpus", name, "--json", "out.json"],
            ["check", name],
            ["search", place / "query.wav", "--model", place / "model", "--gallery", name],
        ):
            refused(command(*arguments), name, "zip")
    broken = bytearray((place / "mini.zip").read_bytes())
    start = broken.index(b"RIFF") + 100
    broken[start : start + 50] = bytes(50)  # one recording no longer fits its checksum
    (tmp_path / "flip.zip").write_bytes(broken)
    code, out, _ = command("check", "flip.zip")
    assert code == 1 and out.count("\n") == 1 and ".wav" in out


# the page


class Outline(HTMLParser):
    "Tags, attributes and text of a page; complains about tags that are not closed."

    void = {"meta", "img", "br", "!doctype"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.values, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.values += [(tag, *pair) for pair in attributes]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def answers(command, place):
    "Two answers, from pictures whose names try to be markup."
    from speechimg.retrieval import load_model, open_gallery, search

    folder = place / "markup"
    names = ("<script>alert(1)<", '"><img src=x onerror=alert(2)>', "a & b", "'quoted'", "z")
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name.replace('/', '')}.png").write_bytes(image_bytes(draw(["red circle"])))
    model = load_model(place / "model")
    gallery = open_gallery(model, folder)
    waves = [torch.from_numpy(speak(("red circle",))), torch.from_numpy(GOOD)]
    return [
        page.Answer(title, wave, gallery[0], search(model, wave, gallery, top=5, rerank=3))
        for title, wave in zip(("<b>one</b>", '"zwölf"'), waves)
    ]


def test_the_page_stands_alone_and_cannot_be_injected(answers, tmp_path):
    page.write_page(tmp_path / "page.html", answers, "Found & heard")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    outline = Outline(text)
    assert (
        outline.open == []
        and "script" not in outline.tags
        and outline.tags.count("section") == 2
        and outline.tags.count("figure") == 10
        and outline.tags.count("audio") == 2
    )
    assert not [value for value in outline.values if value[1].startswith("on")]
    sources = [value for _, name, value in outline.values if name in ("src", "href")]
    assert len(sources) == 2 + 2 + 10 and all(
        value.startswith(("data:image/webp;base64,", "data:audio/wav;base64,")) for value in sources
    )
    assert (
        "http" not in re.sub(r"base64,[\w+/=]+", "", text)
        and "url(" not in text
        and "viewport" in text
    )
    assert (
        {"<b>one</b>", '"zwölf"'} <= set(outline.words)
        and "Found & heard" in outline.words
        and {"a & b.png", "<script>alert(1)<.png"} <= set(outline.words)
    )
    assert sum(word == "not re-ranked" for word in outline.words) == 4
    assert len(text) < 300_000


def test_the_page_holds_the_sound_and_the_pictures(answers, tmp_path):
    import soundfile

    page.write_page(tmp_path / "page.html", answers)
    found = re.findall(
        r"data:([\w/]+);base64,([\w+/=]+)", (tmp_path / "page.html").read_text(encoding="utf-8")
    )
    content = [(kind, base64.b64decode(data)) for kind, data in found]
    waves = [
        soundfile.read(io.BytesIO(data), dtype="float32")
        for kind, data in content
        if kind == "audio/wav"
    ]
    for (wave, rate), answer in zip(waves, answers):
        assert rate == 16_000 and np.abs(wave - answer.wave.numpy()).max() < 1e-4
    images = [Image.open(io.BytesIO(data)) for kind, data in content if kind == "image/webp"]
    assert [image.size for image in images] == [(720, 144), *[(96, 96)] * 5] * 2
    for image in images:
        image.load()


def test_the_page_is_written_whole_or_not_at_all(answers, tmp_path):
    path = tmp_path / "page.html"
    page.write_page(path, answers[:1])
    before = path.read_bytes()
    broken = answers[0]._replace(hits=[answers[0].hits[0]._replace(picture=99)])
    with pytest.raises(IndexError):
        page.write_page(path, [answers[1], broken])
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["page.html"]


def test_bars_and_spectrograms_with_nothing_to_show(answers, tmp_path):
    assert "width:8%" in page.bar("fine", 0.5, [0.5, 0.5]) and "width:100%" in page.bar(
        "fine", 2.0, [1.0, None, 2.0]
    )
    assert "not re-ranked" in page.bar("fine", None, [None])
    assert page.spectrogram(torch.zeros(160)).size == (720, 144)
    page.write_page(tmp_path / "page.html", [answers[0]._replace(hits=[], wave=torch.zeros(1))])
    assert Outline((tmp_path / "page.html").read_text(encoding="utf-8")).tags.count("figure") == 0


def test_loud_parts_are_dark(answers):
    wave = torch.cat([torch.zeros(8000), torch.from_numpy(speak(("red circle",)))])
    pixels = np.asarray(page.spectrogram(wave)).mean(-1)
    assert pixels[:, :50].min() > 240 and pixels.min() < 60


def test_plan_says_what_a_training_needs(command, place, tmp_path):
    code, out, err = command(
        "plan",
        "--config",
        place / "config.json",
        "--pairs",
        640,
        "--memory",
        2,
        "--json",
        "plan.json",
        "--set",
        "max_seconds=2",
    )
    assert (
        code == 0
        and err == ""
        and "memory per pair" in out
        and "in 2 GiB" in out
        and "10 of 640 pairs" in out
    )
    assert json.loads((tmp_path / "plan.json").read_text())["steps_per_epoch"] == 10
    refused(command("plan", "--memory", 0), "--memory", "above 0")
    refused(command("plan", "--config", "nowhere"), "nowhere", "cannot be read")


@pytest.mark.slow
def test_a_config_has_a_name_or_a_path(command, place, tmp_path):
    (place / "configs").mkdir(exist_ok=True)
    (place / "configs" / "mine.json").write_text(
        json.dumps(TINY | {"max_seconds": 2, "steps": 70, "assumed": ["steps"]})
    )
    code, out, _ = command("plan", "--config", "mine", "--pairs", 64)
    assert code == 0 and "70 steps" in out and re.search(r"assumed in the config +steps", out)
    code, out, _ = command(
        "train", "--corpus", place / "mini", "--out", "run", "--config", "mine", *QUICK
    )
    assert code == 0 and Config.load("run/config.json").width == 16


@pytest.mark.parametrize("rank", (0, 1))
def test_of_several_processes_one_speaks(rank, command, place, monkeypatch):
    naps = []
    monkeypatch.setattr(cli.time, "sleep", naps.append)
    monkeypatch.setenv("WORLD_SIZE", "2"), monkeypatch.setenv("RANK", str(rank))
    code, out, err = command("check", place / "mini")
    assert (code, err, naps) == (0, "", []) and ("every file can be read" in out) == (rank == 0)
    code, out, err = command("check", "nowhere")
    assert (
        code == 2
        and out == ""
        and err.startswith(f"speechimg: rank {rank}: ")
        and naps == [3] * rank
    )
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert (
        "every file can be read" in command("check", place / "mini")[1]
    )  # RANK alone, as some clusters set it, means nothing


# as torchrun starts them, but forked from a process that has imported torch
FORKED_CHECKS = """
import os, sys
import speechimg.corpora
from forked import ranks
from speechimg.cli import main

for who in ("all", "1"):
    def check():
        wrong = who in ("all", os.environ["RANK"])
        sys.exit(main(["check", "nowhere" if wrong else sys.argv[1]]))

    print("failed with", ranks(2, check), file=sys.stderr, flush=True)
"""


@pytest.mark.slow
def test_of_several_processes_a_common_mistake_is_told_once_and_a_lonely_one_too(place):
    folders = os.path.dirname(__file__), os.path.dirname(os.path.dirname(cli.__file__))
    run = subprocess.run(
        [sys.executable, "-c", FORKED_CHECKS, str(place / "mini")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    told = [line for line in run.stderr.splitlines() if line.startswith(("speechimg: ", "failed"))]
    assert run.returncode == 0 and len(told) == 4, run.stderr
    assert "rank 0" in told[0] and "rank 1" in told[2], run.stderr
    assert told[1::2] == ["failed with 2"] * 2


def test_setting_values():
    assert [
        cli.setting(text) for text in ("a=1", "a=1e-3", "a=true", "a=light", "a=b=c", "a=")
    ] == [("a", 1), ("a", 1e-3), ("a", True), ("a", "light"), ("a", "b=c"), ("a", "")]
    with pytest.raises(InputError, match="NAME=VALUE"):
        cli.setting("a")


# a process of its own: speed, signals, pipes


def listening():
    "A shell's background job starts with Ctrl-C switched off, and so does what it starts."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def process(place, *arguments, **options):
    "The command in a process of its own."
    environment = os.environ | {
        "SPEECHIMG_CACHE": str(place / "cache"),
        "SPEECHIMG_DATA": str(place),
        "PYTHONPATH": os.path.dirname(os.path.dirname(cli.__file__)),
    }
    environment.pop("SPEECHIMG_TRACEBACK", None)
    return subprocess.Popen(
        [sys.executable, "-m", "speechimg.cli", *map(str, arguments)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listening,
        **options,
    )


def test_help_needs_no_torch_and_little_time(place):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = process(place, "--help", stdout=subprocess.PIPE)
    out, err = run.communicate(timeout=600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (
        run.returncode == 0
        and err == ""
        and all(word in out for word in ("train", "evaluate", "search", "check"))
    )
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    )  # of this process alone, whatever else runs
    probe = (
        "import sys, speechimg.cli; sys.exit(bool({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", probe],
            env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(cli.__file__))},
        ).returncode
        == 0
    )


@pytest.mark.slow  # a process that imports torch
def test_bad_input_from_outside(place, tmp_path):
    run = process(
        place, "search", "none.wav", "--save", "page.html", cwd=tmp_path, stdout=subprocess.PIPE
    )
    out, err = run.communicate(timeout=600)
    assert (
        run.returncode == 2
        and out == ""
        and err
        == "speechimg: none.wav: No such file or directory; check path, rights and free space\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # a process that imports torch
def test_a_reader_that_goes_away_is_no_error(place, tmp_path):
    files = make_files(6, 2)
    corpus = write_files(
        tmp_path / "bad",
        {name: b"" if name.startswith("wavs/") else content for name, content in files.items()},
    )
    run = process(place, "check", corpus, stdout=subprocess.PIPE)
    run.stdout.close()  # as `| head -0` does
    assert run.wait(timeout=600) == 141 and run.stderr.read() == ""
    run.stderr.close()


@pytest.mark.slow  # a process that imports torch
def test_ctrl_c_ends_in_one_line(place, tmp_path):
    run = process(
        place,
        "train",
        "--corpus",
        place / "mini",
        "--out",
        "run",
        "--config",
        place / "config.json",
        "--set",
        "batch_size=4",
        "--set",
        "steps=100000",
        "--set",
        "evaluate_every=100000",
        "--set",
        "checkpoint_every=5",
        cwd=tmp_path,
        stdout=subprocess.PIPE,
    )
    until = time.monotonic() + 600
    while (
        not list(tmp_path.glob("run/checkpoint-*"))
        and run.poll() is None
        and time.monotonic() < until
    ):
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=600)
    assert (
        run.returncode == 130
        and out == ""
        and [line for line in err.splitlines() if "queue_size" not in line]
        == ["speechimg: stopped"]
    )
    assert not (tmp_path / "run" / "model.safetensors").exists()
