"""Assignments: what is handed out gives nothing away, and marks are right whatever comes back."""

import ast
import csv
import json
import os
import re
import runpy
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("nbgrader")

from speechimg import cli, course  # noqa: E402
from speechimg.core import InputError  # noqa: E402
from speechimg.course.assignments import MARK, all_assignments, functions, read_assignments, stub  # noqa: E402
from speechimg.course.grader.classroom import build, grade  # noqa: E402
from speechimg.course.grader.grading import Limits, mark, restore, table  # noqa: E402
from speechimg.course.grader.sandbox import Ended, Sandbox  # noqa: E402
from speechimg.course.handout import library_before, released, source_notebook  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ASSIGNMENTS = {one.name: one for one in all_assignments()}
ANSWERS = {
    name: runpy.run_path(str(ROOT / "tests" / "course_answers" / f"{name}.py"))
    for name in ASSIGNMENTS
}
each = pytest.mark.parametrize("name", ASSIGNMENTS)


@pytest.fixture(scope="module")
def boxes():
    "A sandbox per assignment, started when first asked for."
    found = {}

    def box(name):
        return (
            found.setdefault(name, None)
            or found.__setitem__(name, Sandbox(library_before(ASSIGNMENTS[name])))
            or found[name]
        )

    yield box
    for one in found.values():
        one.close()


def teacher(name, seed=5):
    return source_notebook(ASSIGNMENTS[name], seed)


def release(name):
    return {**teacher(name), "cells": [released(cell) for cell in teacher(name)["cells"]]}


def handed_in(name, code="", solved=True):
    "The release with the library's own solutions in it, and then some code that replaces a part of them."
    right = {
        cell["id"]: cell["source"] for cell in teacher(name)["cells"] if "-solution-" in cell["id"]
    }
    last = list(right)[-1]
    cells = [
        {
            **cell,
            "source": (right[cell["id"]] if solved else cell["source"])
            + (f"\n{code}" if cell["id"] == last else ""),
        }
        if cell["id"] in right
        else cell
        for cell in release(name)["cells"]
    ]
    return {**release(name), "cells": cells}


def most(name):
    return sum(part.points for part in ASSIGNMENTS[name].parts if part.kind == "check")


def numbered(name):
    "The ids of the checks in order."
    return [cell["id"] for cell in teacher(name)["cells"] if "-check-" in cell["id"]]


# What is handed out


def test_there_are_the_assignments_that_a_course_needs():
    assert {
        "speech",
        "image",
        "queue",
        "sic",
        "mining",
        "sim",
        "distillation",
        "retrieval",
        "project",
    } <= set(ASSIGNMENTS)


@each
def test_an_assignment_has_everything(name):
    one = ASSIGNMENTS[name]
    kinds = [part.kind for part in one.parts]
    checks = [part for part in one.parts if part.kind == "check"]
    text = "\n".join(part.source for part in one.parts if part.kind == "text")
    assert (
        (60 <= one.minutes <= 90 or name == "project")
        and "**Purpose.**" in text
        and "**Given.**" in text
        and text.count("<details>") >= 3
    )
    assert any(part.hidden for part in checks) and sum(not part.hidden for part in checks) >= 3
    assert kinds.count("question") >= 1 and all(
        part.rubric and part.points for part in one.parts if part.kind == "question"
    )
    assert len({part.title for part in checks}) == len(checks) and 10 <= most(name) <= 24


@each
def test_a_release_holds_no_line_of_a_solution_no_hidden_check_and_no_rubric(name):
    one, text = ASSIGNMENTS[name], "\n".join(cell["source"] for cell in release(name)["cells"])
    given = {
        line.strip()
        for part in one.parts
        if part.kind in ("given", "text", "question") or part.kind == "check" and not part.hidden
        for line in part.source.splitlines()
    }
    lines = {line.strip() for line in text.splitlines()} - given
    for part in one.parts:
        if part.kind == "solution":
            away = {line.strip() for line in part.source.splitlines()} - {
                line.strip() for line in stub(part.source, part.targets).splitlines()
            }
            assert away and not {line for line in away if len(line) > 5} & lines
        if part.hidden:
            assert (
                not {line.strip() for line in part.source.splitlines() if len(line.strip()) > 12}
                & lines
            )
        if part.kind == "question":
            assert (
                not {line.strip() for line in part.rubric.splitlines() if len(line.strip()) > 12}
                & lines
            )
    assert "SEED" not in text and "BEGIN HIDDEN" not in text


@each
def test_a_release_imports_nothing_that_gives_it_away(name):
    "Only lower chapters, and what checks need; and the library it is marked with has the bodies taken out."
    files = library_before(ASSIGNMENTS[name])
    for cell in release(name)["cells"]:
        if cell["cell_type"] != "code":
            continue
        for node in ast.walk(ast.parse(cell["source"])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("speechimg"):
                path = f"speechimg/{node.module.partition('.')[2] or '__init__'}.py"
                assert path in files and path != f"speechimg/{ASSIGNMENTS[name].module}.py", (
                    node.module
                )
    own = dict(functions(ast.parse(files[f"speechimg/{ASSIGNMENTS[name].module}.py"])))
    for part in ASSIGNMENTS[name].parts:
        for target in part.targets or (
            [one for one, _ in functions(ast.parse(part.source))] if part.kind == "solution" else []
        ):
            assert "NotImplementedError" in ast.unparse(own[target].body[-1])


def test_the_same_chapters_and_seed_give_the_same_files(tmp_path):
    for place in ("one", "two"):
        build(tmp_path / place, seed=3, names=("sic", "mining"))
    build(tmp_path / "other", seed=4, names=("sic",))
    same = lambda name, other="two": (
        (tmp_path / "one" / name).read_bytes() == (tmp_path / other / name).read_bytes()
    )  # noqa: E731
    for name in ("sic", "mining"):
        assert (
            same(f"source/{name}/{name}.ipynb")
            and same(f"release/{name}/{name}.ipynb")
            and same(f"zip/{name}.zip")
        )
    assert not same("source/sic/sic.ipynb", "other") and same(
        "release/sic/sic.ipynb", "other"
    )  # what students see does not tell the seed
    assert (tmp_path / "one").stat().st_mode & 0o077 == 0


def test_what_nbgrader_releases_is_what_is_tested_here(tmp_path):
    build(tmp_path / "course", names=("sic",))
    cells = json.loads((tmp_path / "course" / "release" / "sic" / "sic.ipynb").read_text())["cells"]
    assert [("".join(cell["source"]), cell["cell_type"]) for cell in cells] == [
        (cell["source"], cell["cell_type"]) for cell in release("sic")["cells"]
    ]


def test_a_build_refuses_what_it_cannot_make(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="other things"):
        build(tmp_path)
    with pytest.raises(InputError, match="no assignment"):
        build(tmp_path / "new", names=("sick",))


def test_marks_in_a_chapter_that_cannot_be_understood_are_named(tmp_path):
    cell = lambda kind, source: {"cell_type": kind, "source": source}  # noqa: E731
    head = cell("markdown", "<!-- assignment: one | One | 60 minutes -->")
    for bad, problem in (
        ("#| check: one 2\nx = 1", "sentence in quotes"),
        ("#| check: one two\n'A.'\nx", "cannot be understood"),
        ("#| exercise: one\ndef f(:", "cannot be understood"),
        ("#| check: two 1\n'A.'\nx", "not in this chapter"),
    ):
        path = tmp_path / "01_one.ipynb"
        path.write_text(json.dumps({"cells": [head, cell("code", bad)]}))
        with pytest.raises(InputError, match=problem):
            read_assignments(path)


# Marks


@each
def test_the_reference_has_full_marks_and_an_empty_notebook_none(name, boxes):
    marks = mark(boxes(name), teacher(name), handed_in(name))
    assert {
        check: message for check, message in marks.messages.items() if message
    } == {} and marks.reports == []
    assert marks.score == most(name)
    empty = mark(boxes(name), teacher(name), release(name))
    assert (
        empty.score == 0
        and empty.reports == []
        and any("still to be written" in message for message in empty.messages.values())
    )


@pytest.mark.parametrize(
    ("name", "answer"),
    [(name, answer) for name in ASSIGNMENTS for answer in ANSWERS[name]["WRONG"]],
)
def test_a_wrong_solution_loses_what_it_should_and_is_told_why(name, answer, boxes):
    code, lost, text = ANSWERS[name]["WRONG"][answer]
    marks = mark(boxes(name), teacher(name), handed_in(name, code))
    failed = [number for number, check in enumerate(numbered(name), 1) if marks.messages[check]]
    assert failed == sorted(lost), marks.messages
    assert any(text in message for message in marks.messages.values()), marks.messages


def test_there_are_enough_wrong_solutions():
    assert all(
        len(answers["WRONG"]) >= 6 and len(answers["RIGHT"]) >= 1 for answers in ANSWERS.values()
    )


@pytest.mark.parametrize(
    ("name", "answer"),
    [(name, answer) for name in ASSIGNMENTS for answer in ANSWERS[name]["RIGHT"]],
)
def test_a_solution_that_is_right_and_different_has_full_marks(name, answer, boxes):
    marks = mark(boxes(name), teacher(name), handed_in(name, ANSWERS[name]["RIGHT"][answer]))
    assert {check: message for check, message in marks.messages.items() if message} == {}


@each
def test_marks_do_not_depend_on_the_teachers_seed_nor_on_the_run(name, boxes):
    "With another seed the numbers are others, and what is right stays right."
    for seed in (0, 1, 77, 2026):
        marks = mark(boxes(name), source_notebook(ASSIGNMENTS[name], seed), handed_in(name))
        assert marks.score == most(name), (seed, marks.messages)
    code = next(iter(ANSWERS[name]["WRONG"].values()))[0]
    assert (
        mark(boxes(name), teacher(name), handed_in(name, code)).messages
        == mark(boxes(name), teacher(name), handed_in(name, code)).messages
    )


# What students do to notebooks


def broken_in(what, cells):
    checks = [cell for cell in cells if "-check-" in cell["id"]]
    if what == "deleted":
        return [cell for cell in cells if cell not in checks]
    if what == "reordered":
        return cells[::-1]
    if what == "edited":
        return [{**cell, "source": "pass"} if cell in checks else cell for cell in cells]
    if what == "doubled":
        return [one for cell in cells for one in ([cell, cell] if cell in checks else [cell])]
    if what == "points":
        return [
            {**cell, "metadata": {"nbgrader": {**cell["metadata"]["nbgrader"], "points": 1000}}}
            if cell in checks
            else cell
            for cell in cells
        ]
    if what == "types":
        return [
            {
                "cell_type": "markdown",
                "id": cell["id"],
                "metadata": cell["metadata"],
                "source": cell["source"],
            }
            if cell in checks
            else cell
            for cell in cells
        ]
    if what == "marks of a check on a cell of one's own":
        return [
            {
                "cell_type": "code",
                "id": "mine",
                "metadata": checks[0]["metadata"],
                "source": "pass",
                "outputs": [],
                "execution_count": None,
            },
            *cells,
        ]
    raise ValueError(what)


@pytest.mark.parametrize(
    "what",
    [
        "deleted",
        "reordered",
        "edited",
        "doubled",
        "points",
        "types",
        "marks of a check on a cell of one's own",
    ],
)
def test_checks_that_were_touched_are_put_back(what, boxes):
    "Nobody wins or loses by it. (Cells in reverse order still define what they define.)"
    code = ANSWERS["sic"]["WRONG"]["ids ignored"][0]
    right, wrong = (
        mark(boxes("sic"), teacher("sic"), handed_in("sic")),
        mark(boxes("sic"), teacher("sic"), handed_in("sic", code)),
    )
    for notebook, marks in ((handed_in("sic"), right), (handed_in("sic", code), wrong)):
        touched = mark(
            boxes("sic"), teacher("sic"), {**notebook, "cells": broken_in(what, notebook["cells"])}
        )
        assert (
            touched.messages == marks.messages
            and touched.points == marks.points
            and touched.score == marks.score
        )
        if what not in ("points", "types"):
            assert touched.reports


def test_cells_of_ones_own_are_run_where_they_stand(boxes):
    notebook = release("sic")
    helper = {
        "cell_type": "code",
        "id": "own",
        "metadata": {},
        "source": "%matplotlib inline\n!ls\ndef match(a, b): return (a[:, None] == b[None, :]).float()",
        "outputs": [],
        "execution_count": None,
    }
    index = next(
        index for index, cell in enumerate(notebook["cells"]) if cell["id"] == "sic-solution-1"
    )
    notebook["cells"] = [
        *notebook["cells"][:index],
        helper,
        {
            **notebook["cells"][index],
            "source": "def id_targets(ids, key_ids):\n    same = match(ids, key_ids)\n    if not same.any(1).all() or ids.min() < 0: raise ValueError('no')\n    return same / same.sum(1, keepdim=True)",
        },
        *notebook["cells"][index + 1 :],
    ]
    marks = mark(boxes("sic"), teacher("sic"), notebook)
    assert [marks.messages[check] for check in numbered("sic")[:3]] == ["", "", ""]


@pytest.mark.parametrize(
    "cells",
    [
        [],
        [1, None, "x"],
        [{}],
        [{"cell_type": "code"}],
        [{"cell_type": "code", "source": ["a", 5], "metadata": {"nbgrader": 3}}],
        [{"cell_type": "raw", "source": "x", "metadata": {}}],
    ],
)
def test_a_notebook_of_nonsense_is_marked_with_nothing(cells, boxes):
    assert mark(boxes("sic"), teacher("sic"), {"cells": cells}).score == 0


# What hostile code does

ATTACKS = {
    "endless loop": "def id_targets(ids, key_ids):\n    while True: pass",
    "exit": "def id_targets(ids, key_ids):\n    exit()",
    "hard exit": "import os\ndef id_targets(ids, key_ids):\n    os._exit(0)",
    "kills itself": "import os, signal\ndef id_targets(ids, key_ids):\n    signal.raise_signal(signal.SIGKILL)",
    "memory": "def id_targets(ids, key_ids):\n    return [bytearray(2**27) for _ in range(1000)]",
    "a long answer": "def id_targets(ids, key_ids):\n    return 'x' * 10**8",
    "deep answer": "def id_targets(ids, key_ids):\n    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "equal to everything": "class Any:\n    def __eq__(self, other): return True\n    def __getattr__(self, name): return self\n    def __call__(self, *a, **k): return self\n    shape = (3, 5)\n\ndef id_targets(ids, key_ids):\n    return Any()",
    "a tensor of one's own": "class Mine(torch.Tensor):\n    def __torch_function__(self, *a, **k): return True\n\ndef id_targets(ids, key_ids):\n    return torch.zeros(3, 5).as_subclass(Mine)",
    "patched comparisons": "import torch.testing\ntorch.testing.assert_close = torch.equal = torch.allclose = torch.isclose = lambda *a, **k: torch.tensor(True)\ntorch.Tensor.all = torch.Tensor.__eq__ = lambda *a, **k: True\ndef id_targets(ids, key_ids):\n    return torch.zeros(len(ids), len(key_ids))",
    "patched checks": "import speechimg.course.check, builtins\nspeechimg.course.expect.close = speechimg.course.check.expect.tensor = lambda *a, **k: None\nexpect = None\nbuiltins.AssertionError = ValueError\ndef id_targets(ids, key_ids):\n    return torch.zeros(len(ids), len(key_ids))",
    "forged answers": "import gc, json\nfor one in gc.get_objects():\n    if type(one).__name__ == 'Worker':\n        one.answer = lambda **parts: one.wire.send(b'{\"result\": {\"eval\": 1}}')\ndef id_targets(ids, key_ids):\n    return 1",
    "nonsense on the wire": "import os\ndef id_targets(ids, key_ids):\n    os.write(3, b'\\xff' * 4096)\n    return 1",
    "asks the library": "def id_targets(ids, key_ids):\n    from speechimg.sic import id_targets as solution\n    return solution(ids, key_ids)",
    "reads the chapter": f"def id_targets(ids, key_ids):\n    return open({str(ROOT / 'nbs' / '06_sic.ipynb')!r}).read()",
    "raises what it likes": "class Odd(BaseException):\n    pass\n\ndef id_targets(ids, key_ids):\n    raise Odd('x' * 10**7)",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_earns_nothing_and_stops_nothing(attack, boxes):
    begin = time.monotonic()
    marks = mark(
        boxes("sic"),
        teacher("sic"),
        handed_in("sic", ATTACKS[attack]),
        limits=Limits(check=4, total=60),
    )
    first = [marks.messages[check] for check in numbered("sic")[:3]]
    assert all(first), first
    assert time.monotonic() - begin < 90
    if attack not in (
        "patched comparisons",
        "forged answers",
        "patched checks",
    ):  # these break the student's own process
        assert marks.messages[numbered("sic")[3]] == ""  # the other functions still count
    assert mark(boxes("sic"), teacher("sic"), handed_in("sic")).score == most(
        "sic"
    )  # and the next student's


def test_printing_a_hundred_megabytes_costs_nobody_anything(boxes):
    begin = time.monotonic()
    marks = mark(
        boxes("sic"), teacher("sic"), handed_in("sic", "for _ in range(100): print('x' * 10**6)")
    )
    assert marks.score == most("sic") and time.monotonic() - begin < 60


def test_all_the_time_there_is_ends_a_submission(boxes):
    loop = "def id_targets(ids, key_ids):\n    while True: pass\n\nsimilarity_logits = sic_loss = id_targets"
    begin = time.monotonic()
    marks = mark(
        boxes("sic"),
        teacher("sic"),
        handed_in("sic", loop),
        limits=Limits(cells=20, check=2, total=6),
    )
    assert (
        marks.score == 0
        and time.monotonic() - begin < 45
        and any("all the time" in message for message in marks.messages.values())
    )


# Safe


def ask(box, code, *arguments):
    process = box.start()
    process.wire.deadline = time.monotonic() + 30
    try:
        problems = process.ask(do="load", cells=[code])
        return problems or process.named("f")(*arguments)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def doors(boxes):
    process = boxes("sic").start()
    process.kill()
    return process.shut


def test_this_machine_shuts_the_doors(doors):
    "Linux with Landlock or root; elsewhere grading refuses, which has a test of its own."
    if sys.platform != "linux":
        pytest.skip("the sandbox is Linux's")
    assert (
        "limits" in doors
        and {"files", "another user"} & set(doors)
        and "no network, no processes" in doors
    )


def test_hidden_checks_and_other_submissions_cannot_be_read(tmp_path, boxes, doors):
    build(tmp_path / "course", names=("sic",))
    hidden = tmp_path / "course" / "source" / "sic" / "sic.ipynb"
    other = tmp_path / "course" / "submitted" / "ada"
    other.mkdir()
    (other / "sic.ipynb").write_text("{}")
    box = boxes("sic")
    neighbour = box.start()
    neighbour.wire.deadline = time.monotonic() + 30
    assert neighbour.ask(do="load", cells=["open('notes.txt', 'w').write('mine')"]) == []
    for path in (hidden, other / "sic.ipynb", neighbour.folder / "notes.txt"):
        with pytest.raises(PermissionError):
            ask(box, "def f(path): return open(path).read()", str(path))
    for path in (tmp_path / "course", box.root, neighbour.folder):
        with pytest.raises(PermissionError):
            ask(box, "import os\ndef f(path): return os.listdir(path)", str(path))
    neighbour.kill()
    with pytest.raises(PermissionError):
        ask(
            box,
            "def f(path): return open(path, 'a').write('10 points')",
            str(tmp_path / "course" / "gradebook.db"),
        )


def test_the_grader_and_other_students_cannot_be_touched(boxes, doors):
    if "no network, no processes" not in doors:
        pytest.skip("no seccomp filter here")
    box = boxes("sic")
    neighbour = box.start()
    for code in (
        "import socket\ndef f(pid): return socket.socket()",
        "import os\ndef f(pid): return os.fork()",
        "import os\ndef f(pid): return os.execv('/bin/true', ['true'])",
        "import os\ndef f(pid): return os.kill(pid, 9)",
        "import subprocess\ndef f(pid): return subprocess.run(['true'])",
    ):
        with pytest.raises(PermissionError):
            ask(box, code, os.getpid())
        with pytest.raises(PermissionError):
            ask(box, code, neighbour.pid)
    neighbour.wire.deadline = time.monotonic() + 10
    assert neighbour.ask(do="load", cells=["1"]) == []
    neighbour.kill()
    assert ask(
        box,
        "import threading\ndef f():\n    found = []\n    one = threading.Thread(target=lambda: found.append(7)); one.start(); one.join()\n    return found",
    ) == [7]  # threads are allowed


def test_limits_hold(boxes):
    box = boxes("sic")
    with pytest.raises((MemoryError, Ended)):
        ask(
            box,
            "def f(): return sum(len(bytearray(2**28)) for _ in [0] if (kept := [bytearray(2**28) for _ in range(40)]))",
        )
    with pytest.raises((OSError, Ended)):
        ask(
            box,
            "def f():\n    with open('big', 'wb') as file:\n        for _ in range(64): file.write(bytes(2**20))",
        )
    folder = box.start()
    path = folder.folder
    folder.kill()
    assert not path.exists()  # thrown away


def test_another_user_runs_the_code_where_root_grades(boxes, doors):
    if os.geteuid():
        pytest.skip("the grader is not root here")
    assert (
        ask(
            boxes("sic"),
            "import os\ndef f(): return [os.getuid(), os.geteuid(), os.getgid(), len(os.getgroups())]",
        )[0]
        >= 60_000
    )


def test_without_protection_grading_refuses(tmp_path, monkeypatch):
    from speechimg.course.grader import gradebook

    build(tmp_path / "course", names=("sic",))

    class Open(Sandbox):
        def start(self, *arguments, **options):
            process = super().start(*arguments, **options)
            process.shut = ["limits"]
            return process

    monkeypatch.setattr(gradebook, "Sandbox", Open)
    with pytest.raises(InputError, match="nobody's files"):
        grade(tmp_path / "course", "sic")


# A class


def write(course_folder, student, notebook, name="sic"):
    path = course_folder / "submitted" / student / name / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(notebook if isinstance(notebook, str) else json.dumps(notebook))


@pytest.fixture(scope="module")
def classroom(tmp_path_factory):
    "A course with thirty submissions, marked in one run."
    folder = tmp_path_factory.mktemp("class") / "course"
    build(folder, seed=11, names=("sic",))
    wrong, right = ANSWERS["sic"]["WRONG"], ANSWERS["sic"]["RIGHT"]
    work = {f"right-{number}": handed_in("sic") for number in range(3)} | {
        f"other-{number}": handed_in("sic", code) for number, code in enumerate(right.values())
    }
    work |= {
        f"wrong-{number}": handed_in("sic", code)
        for number, (code, _, _) in enumerate(wrong.values())
    }
    attacks = [
        "exit",
        "hard exit",
        "memory",
        "equal to everything",
        "patched comparisons",
        "patched checks",
        "forged answers",
        "asks the library",
        "nonsense on the wire",
        "raises what it likes",
    ]
    work |= {
        f"attack-{number}": handed_in("sic", ATTACKS[attack])
        for number, attack in enumerate(attacks)
    }
    work |= {"empty": release("sic"), "broken": "{", "list": "[1, 2]", "binary": "\x00\x01"}
    work |= {
        f"filler-{number}": handed_in("sic", code)
        for number, (code, _, _) in zip(range(30 - len(work) - 1), wrong.values())
    }
    for student, notebook in work.items():
        write(folder, student, notebook)
    (folder / "submitted" / "nothing" / "sic").mkdir(parents=True)
    begin = time.monotonic()
    marks, text = grade(folder, "sic")
    return folder, {one.student: one for one in marks}, text, time.monotonic() - begin


def test_thirty_submissions_are_marked_in_one_run(classroom):
    folder, marks, text, seconds = classroom
    assert len(marks) >= 30 and seconds < 600
    for student, one in marks.items():
        if student.startswith(("right", "other")):
            assert one.score == most("sic"), (student, one.messages)
        elif student in ("empty", "broken", "list", "binary", "nothing"):
            assert one.score == 0
        else:
            assert one.score < most("sic")
    points = dict(
        zip(
            numbered("sic"),
            [
                cell["metadata"]["nbgrader"]["points"]
                for cell in teacher("sic")["cells"]
                if "-check-" in cell["id"]
            ],
        )
    )
    for number, (_, lost, _) in enumerate(ANSWERS["sic"]["WRONG"].values()):
        assert marks[f"wrong-{number}"].score == most("sic") - sum(
            points[numbered("sic")[index - 1]] for index in lost
        )
    assert (
        "cannot be read" in marks["broken"].reports[0]
        and "not there" in marks["nothing"].reports[0]
    )


def test_the_table_says_who_failed_what(classroom):
    _, marks, text, _ = classroom
    line = next(line for line in text.splitlines() if line.startswith("sic-check-1 "))
    failed = sum(one.messages["sic-check-1"] != "" for one in marks.values())
    assert f"{failed} of {len(marks)} failed" in line and "Captions of one picture" in line
    assert re.search(rf"(?m)^right-0 +{most('sic'):g} of {most('sic'):g}$", text)
    assert table([], {}) == "nothing was handed in"


def test_marks_are_in_the_gradebook_and_in_a_table(classroom):
    from nbgrader.api import Gradebook

    folder, marks, _, _ = classroom
    with Gradebook(f"sqlite:///{folder}/gradebook.db", "speechimg") as book:
        kept = {one.student.id: one.score for one in book.find_assignment("sic").submissions}
    with (folder / "marks" / "sic.csv").open() as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert (
        kept
        == {student: one.score for student, one in marks.items()}
        == {student: float(row["points"]) for student, row in rows.items()}
    )


def test_nothing_is_marked_twice_and_what_changed_is_marked_anew(classroom, monkeypatch):
    from speechimg.course.grader import gradebook

    folder, marks, _, _ = classroom
    done = []
    real = gradebook.mark
    monkeypatch.setattr(
        gradebook,
        "mark",
        lambda *arguments, **options: done.append(arguments[3]) or real(*arguments, **options),
    )
    write(folder, "empty", handed_in("sic"))
    again = {one.student: one.score for one in grade(folder, "sic")[0]}
    assert done == ["empty"] and again["empty"] == most("sic")
    assert all(again[student] == one.score for student, one in marks.items() if student != "empty")


def test_what_a_teacher_gave_by_hand_survives_a_second_marking(classroom):
    "Points and the mark *has been read* stay; a submission that changed is to be read again, and one that the book lost comes back."
    from nbgrader.api import Gradebook

    folder, _, _, _ = classroom
    open_book = lambda: Gradebook(f"sqlite:///{folder}/gradebook.db", "speechimg")  # noqa: E731

    def answer(book, student):
        submission = next(
            one for one in book.assignment_submissions("sic") if one.student.id == student
        )
        return next(
            one
            for notebook in submission.notebooks
            for one in notebook.grades
            if one.cell.cell_type == "markdown"
        )

    for student in ("right-2", "wrong-1"):
        with open_book() as book:
            one = answer(book, student)
            one.manual_score, one.needs_manual_grade = 3.0, False
            book.db.commit()
    changed = json.loads((folder / "submitted" / "wrong-1" / "sic" / "sic.ipynb").read_text())
    changed["cells"].append(
        {
            "cell_type": "code",
            "id": "more",
            "metadata": {},
            "source": "x = 1",
            "outputs": [],
            "execution_count": None,
        }
    )
    write(folder, "wrong-1", changed)
    with open_book() as book:
        book.remove_submission("sic", "right-1")
    grade(folder, "sic")
    with open_book() as book:
        kept, read_again = answer(book, "right-2"), answer(book, "wrong-1")
        assert (kept.manual_score, kept.needs_manual_grade) == (
            3.0,
            False,
        ) and read_again.needs_manual_grade
        assert next(
            one for one in book.assignment_submissions("sic") if one.student.id == "right-1"
        ).score == most("sic")


def test_nbgraders_own_commands_go_on_working(classroom):
    folder, marks, _, _ = classroom
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    nbgrader = lambda *words: subprocess.run(
        ["nbgrader", *words], cwd=folder, env=environment, capture_output=True, text=True
    )  # noqa: E731
    for words in (
        ("autograde", "sic", "--student", "wrong-0", "--force"),
        ("generate_feedback", "sic", "--student", "wrong-0", "--force"),
        ("export", "--to", "grades.csv"),
    ):
        done = nbgrader(*words)
        assert done.returncode == 0, done.stderr[-2000:]
    with (folder / "grades.csv").open() as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    assert float(rows["wrong-0"]["raw_score"]) == marks["wrong-0"].score and float(
        rows["right-0"]["raw_score"]
    ) == most("sic")
    feedback = (folder / "feedback" / "wrong-0" / "sic" / "sic.html").read_text()
    assert (
        "Ids are ignored" in feedback and "SEED" not in feedback and "manual_seed" not in feedback
    )  # told what is wrong, and not how it was found
    (folder / "downloaded" / "sic" / "archive").mkdir(parents=True)
    (folder / "downloaded" / "sic" / "archive" / "zoe_sic.ipynb").write_text(
        json.dumps(handed_in("sic"))
    )
    assert (
        nbgrader("zip_collect", "sic").returncode == 0
        and (folder / "submitted" / "zoe" / "sic" / "sic.ipynb").exists()
    )


# Without a teacher


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sic", "retrieval"])
def test_a_zip_works_without_nbgrader(name, tmp_path):
    "In a fresh kernel, visible checks and all; the notebook of the zip with the solutions typed in."
    import nbformat
    from nbclient import NotebookClient

    build(tmp_path / "course", names=(name,))
    zipfile.ZipFile(tmp_path / "course" / "zip" / f"{name}.zip").extractall(tmp_path)
    notebook = nbformat.read(tmp_path / name / f"{name}.ipynb", 4)
    assert any("NotImplementedError" in cell.source for cell in notebook.cells)
    solutions = {
        cell["id"]: cell["source"] for cell in teacher(name)["cells"] if "-solution-" in cell["id"]
    }
    for cell in notebook.cells:
        cell.source = solutions.get(cell.metadata.get("nbgrader", {}).get("grade_id"), cell.source)
    NotebookClient(
        notebook,
        timeout=120,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()


def test_check_gives_the_messages_at_once(capsys):
    space = {"__name__": "notebook"}
    exec(
        "import torch\ndef my_id_targets(ids, key_ids):\n    return torch.eye(len(ids), len(key_ids))",
        space,
    )
    course.check("sic", space["my_id_targets"])
    lines = capsys.readouterr().out
    assert "not yet  2 points" in lines and "Ids are ignored" in lines and "Cosines" not in lines
    course.check("sic_loss", lambda *arguments: None)
    assert "not yet" in capsys.readouterr().out
    for bad in (lambda: course.check("nobody"), lambda: course.check("sic", nothing=1)):
        with pytest.raises(KeyError):
            bad()


@each
def test_check_is_content_with_the_library(name, capsys):
    course.check(name)
    lines = capsys.readouterr().out
    assert lines.startswith("right") and "not yet" not in lines
    assert lines.count("right  ") == sum(
        part.kind == "check" and not part.hidden for part in ASSIGNMENTS[name].parts
    )


def test_the_catalogue_is_what_the_chapters_say_and_holds_nothing_hidden():
    found = course.catalogue()
    assert set(found) == set(ASSIGNMENTS)
    text = json.dumps(found)
    for one in ASSIGNMENTS.values():
        assert found[one.name]["names"] == one.names
        assert not any(part.title in text for part in one.parts if part.hidden)
    assert "rubric" not in text and not MARK.search(text)


# The command line


def test_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["course", "build", "--out", "c", "--seed", "3", "--assignments", "sic"]) == 0
    assert "1 assignment in c: sic" in capsys.readouterr().out
    assert cli.main(["course", "grade", "--out", "c"]) == 2
    assert "holds no submissions" in capsys.readouterr().err
    write(tmp_path / "c", "ada", handed_in("sic"))
    assert cli.main(["course", "grade", "--out", "c", "--jobs", "1"]) == 0
    out = capsys.readouterr().out
    assert (
        f"{most('sic'):g} of {most('sic'):g}" in out
        and "kept from strangers' code by limits" in out
    )
    assert cli.main(["course", "grade", "--out", "nowhere", "--assignments", "sic"]) == 2


def test_restore_keeps_answers_and_rubrics_apart():
    notebook = handed_in("sic")
    for cell in notebook["cells"]:
        if cell["id"] == "sic-question-1":
            cell["source"] = "Because the other caption is free."
    work, reports = restore(teacher("sic"), notebook)
    text = "\n".join(cell["source"] for cell in work["cells"])
    assert (
        "Because the other caption is free." in text
        and ASSIGNMENTS["sic"].parts[-1].rubric[:30] not in text
        and reports == []
    )
