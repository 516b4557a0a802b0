"The front page: its tables say what the files say, and README is readable without the notebook."

import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
import notebooks

INDEX = ROOT / "nbs" / "index.ipynb"


@pytest.fixture(scope="module")
def page():
    "The functions of the front page, without running what it shows."
    names = {"json": json, "re": re, "tomllib": tomllib, "Path": Path}
    for cell in notebooks.read(INDEX)["cells"]:
        code = notebooks.body(cell) if cell["cell_type"] == "code" else ""
        if "def results(" in code or "def shelves(" in code:
            exec(re.sub(r"(?m)^(?:if .*\n    )?display\(.*", "", code), names)
    return names


METRICS = {
    "command": "speechimg train --corpus 'my scenes'",
    "seed": 3,
    "steps": 1200,
    "seconds": 600.0,
    "date": "2026-01-31",
    "config": {"towers": "light"},
    "evaluations": {
        "test": {
            "coarse": {
                "speech_to_image": {"1": 51.25, "5": 80.0, "10": 91.0},
                "image_to_speech": {"1": 52.0, "5": 81.0, "10": 92.0},
            },
            "fine": {
                "speech_to_image": {"1": 66.6, "5": 88.0, "10": 91.5},
                "image_to_speech": {"1": 67.0, "5": 89.0, "10": 92.5},
            },
            "swap": {"coarse": 61.0, "fine": 88.8},
        },
        "stamps_en": {
            "pictures": 65,
            "all": {
                "queries": 30,
                "coarse": {"1": 20.0, "5": 41.0, "10": 55.0},
                "fine": {"1": 25.0, "5": 44.0, "10": 56.0},
            },
            "nouns": None,
        },
        "untrained": {"stamps_en": {"all": {"coarse": {"1": 19.0, "5": 40.0, "10": 54.0}}}},
    },
}


def write(folder, name, metrics):
    (folder / name).mkdir(parents=True)
    (folder / name / "metrics.json").write_text(json.dumps(metrics))


def cells(text, *starts):
    "The cells of the table row that starts like this."
    rows = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return next(row[len(starts) :] for row in rows if row[: len(starts)] == list(starts))


def test_results_are_those_of_the_files(page, tmp_path):
    write(tmp_path, "reference", METRICS)
    text = page["results"](tmp_path)
    assert cells(text, "scenes, test", "coarse") == [
        "51.2",
        "80.0",
        "91.0",
        "52.0",
        "81.0",
        "92.0",
        "61.0",
    ]
    assert cells(text, "", "fine") == ["66.6", "88.0", "91.5", "67.0", "89.0", "92.5", "88.8"]
    people = "stamps, people speaking English: the very picture, of 65"
    assert cells(text, people, "no training")[:4] == ["19.0", "40.0", "54.0", "–"]
    assert cells(text, "", "coarse")[:4] == ["20.0", "41.0", "55.0", "–"]
    for said in (
        "`speechimg train --corpus 'my scenes'`",
        "seed 3",
        "1200 steps in 10 minutes",
        "2026-01-31",
        "frozen pretrained",
    ):
        assert said in text


def test_what_is_missing_is_called_so(page, tmp_path):
    assert "make reference" in page["results"](tmp_path)
    write(tmp_path, "reference", METRICS)
    write(tmp_path, "small", {"evaluations": {}})
    text = page["results"](tmp_path)
    assert cells(text, "scenes, a drawing style never seen", "coarse")[0] == "not measured"
    assert cells(text, "the same among all 747 stamps", "coarse")[0] == "not measured"
    assert (
        text.index("`reference`") < text.index("`small`") and "None" not in text.split("`small`")[0]
    )


@pytest.mark.parametrize(
    "broken", [None, [], 7, {"test": 3}, {"test": {"coarse": {"speech_to_image": {"1": "x"}}}}]
)
def test_odd_metrics_do_not_break_the_page(page, tmp_path, broken):
    write(tmp_path, "odd", {"evaluations": broken})
    assert "Model `odd`" in page["results"](tmp_path)


def test_every_row_of_a_table_is_as_wide_as_its_head(page, tmp_path):
    write(tmp_path, "reference", METRICS)
    rows = [line for line in page["results"](tmp_path).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1 and len(rows) == 17


def test_shelves_are_the_notebooks(page):
    text = page["shelves"](ROOT / "nbs")
    every = [notebooks.name_of(path) for path in notebooks.paths(ROOT)]
    linked = [name.removesuffix(".ipynb") for name in re.findall(r"\]\((\S+)\)", text)]
    assert sorted(linked) == sorted(set(every) - {"index"})
    assert linked[:2] == ["00_page", "01_data"] and "| `run.hub` |" in text
    assert not re.search(r"\|  \| (?:`|\|)", text)  # each has its sentence


def test_no_measured_number_is_typed():
    "Percentages stand in tables made from files; prose may quote the abstract and what chance is."
    for cell in notebooks.read(INDEX)["cells"]:
        if cell["cell_type"] == "markdown":
            for number in re.findall(r"(\d+(?:\.\d+)?) ?%", notebooks.source(cell)):
                assert number in ("4", "50", "95"), number


def test_readme_stands_alone():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text and "make test" in text
    assert not re.search(r"^#\|", text, re.M) and "import matplotlib" not in text
    for target in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", text):
        assert (ROOT / target).exists(), target


def test_published_commands_for_eight_gpus_do_not_cut_a_step(root):
    "A config for one GPU is cut into micro-batches; eight processes hold the same 32 pairs uncut."
    from speechimg.core import Config

    found, command = 0, r"torchrun --nproc-per-node (\d+) [^\n]*--config (\S+)([^\n]*)"
    texts = {"README.md": (root / "README.md").read_text(encoding="utf-8")}
    for path in notebooks.paths(root):
        cells = notebooks.read(path)["cells"]
        texts[path.name] = "\n".join(notebooks.source(cell) for cell in cells)
    for place, text in texts.items():
        for start, name, rest in re.findall(command, re.sub(r"\\\n\s*", "", text)):
            config = Config.load(name)
            cut = re.search(r"--set accumulate=(\d+)", rest)
            assert (
                config.batch_size // int(cut[1] if cut else config.accumulate) // int(start)
                == config.batch_size // config.accumulate
                == 32
            ), (place, name)
            found += 1
    assert found == 6


def test_the_front_page_asks_what_the_demo_asks():
    "The notebook draws its recordings itself, so that it runs without tools/; the lot is the same."
    import demo

    from speechimg.corpora import load_corpus

    names, stamps = {}, load_corpus("stamps", "all")
    code = next(
        code
        for cell in notebooks.read(INDEX)["cells"]
        if "def human_queries(" in (code := notebooks.body(cell))
    )
    exec(code[: code.index("def show_answers(")], names)
    assert names["human_queries"](stamps) == demo.human_queries(stamps)
