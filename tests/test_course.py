"""Assignments: what is handed out gives nothing away, and marks are right whatever comes back."""

import ast
import contextlib
import csv
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import zipfile
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("nbgrader")

from speechimg import cli
from speechimg.core import InputError
from speechimg.course.assignments import MARK, all_assignments, functions, read_assignment, stub
from speechimg.course.check import catalogue, check
from speechimg.course.grader import gradebook
from speechimg.course.grader.classroom import build, grade
from speechimg.course.grader.grading import Limits, mark, restore, table
from speechimg.course.grader.sandbox import Ended, Sandbox
from speechimg.course.handout import library_before, released, source_notebook, write_catalogue

ROOT = Path(__file__).resolve().parent.parent
ASSIGNMENTS = {one.name: one for one in all_assignments()}
ANSWERS = {
    name: runpy.run_path(str(ROOT / "tests" / "course_answers" / f"{name}.py"))
    for name in ASSIGNMENTS
}
WRONG = ANSWERS["sic"]["WRONG"]
each = pytest.mark.parametrize("name", ASSIGNMENTS)
SEEDS = (5, 0, 1, 77, 2026)  # of the instructor; the first is used wherever one is enough
IMPATIENT = Limits(check=3, total=60)


def answers(kind):
    "Every answer of a kind: those of `sic` are marked in the class."
    return pytest.mark.parametrize(
        ("name", "answer"),
        [(name, answer) for name in ASSIGNMENTS for answer in ANSWERS[name][kind]],
    )


@pytest.fixture(scope="module")
def boxes():
    "A sandbox per assignment, started when first asked for."
    with contextlib.ExitStack() as stack:

        @cache
        def box(name):
            return stack.enter_context(Sandbox(library_before(ASSIGNMENTS[name])))

        yield box


@cache
def source(name, seed=SEEDS[0]):
    return source_notebook(ASSIGNMENTS[name], seed)


@cache
def release(name):
    return {**source(name), "cells": [released(cell) for cell in source(name)["cells"]]}


def code_cell(text, name="mine", **metadata):
    cell = {"cell_type": "code", "id": name, "metadata": metadata, "source": text}
    return {**cell, "outputs": [], "execution_count": None}


def handed_in(name, code=""):
    "The release with the library's own solutions in it, and then code that replaces some of them."
    right = {cell["id"]: cell["source"] for cell in source(name)["cells"] if solution(cell)}
    right[list(right)[-1]] += f"\n{code}"
    cells = release(name)["cells"]
    cells = [{**cell, "source": right.get(cell["id"], cell["source"])} for cell in cells]
    return {**release(name), "cells": cells}


def solution(cell):
    return "-solution-" in cell["id"]


def a_check(cell):
    return "-check-" in cell["id"]


def numbered(name):
    "The checks in order, and their points."
    cells = filter(a_check, source(name)["cells"])
    return {cell["id"]: cell["metadata"]["nbgrader"]["points"] for cell in cells}


def most(name):
    return sum(numbered(name).values())


def complaints(marks):
    return {check: message for check, message in marks.messages.items() if message}


# What is handed out


def test_there_are_the_assignments_that_a_course_needs():
    wanted = "speech image sic queue mining sim distillation retrieval project"
    assert list(ASSIGNMENTS) == wanted.split()


@each
def test_an_assignment_has_everything(name):
    one = ASSIGNMENTS[name]
    checks = [part for part in one.parts if part.kind == "check"]
    questions = [part for part in one.parts if part.kind == "question"]
    text = "\n".join(part.source for part in one.parts if part.kind == "text")
    assert 60 <= one.minutes <= 90 or name == "project"
    assert "**Purpose.**" in text and "**Given.**" in text and text.count("<details>") >= 3
    assert sum(part.hidden for part in checks) >= 1
    assert sum(not part.hidden for part in checks) >= 3
    assert questions and all(part.rubric and part.points for part in questions)
    assert len({part.title for part in checks}) == len(checks) and 10 <= most(name) <= 24
    # what is handed out leads nowhere that students cannot go
    assert ".ipynb)" not in text and "instructor:" not in text


@each
def test_a_release_holds_no_line_of_a_solution_no_hidden_check_and_no_rubric(name):
    one, text = ASSIGNMENTS[name], "\n".join(cell["source"] for cell in release(name)["cells"])

    def lines(text, longer_than=0):
        return {line.strip() for line in text.splitlines() if len(line.strip()) > longer_than}

    given = [part for part in one.parts if part.kind in ("given", "text", "question")]
    given += [part for part in one.parts if part.kind == "check" and not part.hidden]
    left = lines(text) - {line for part in given for line in lines(part.source)}
    for part in one.parts:
        if part.kind == "solution":
            away = lines(part.source, 5) - lines(stub(part.source, part.targets))
            assert away and not away & left
        if part.hidden:
            assert not lines(part.source, 12) & left
        if part.kind == "question":
            assert not lines(part.rubric, 12) & left
    assert "SEED" not in text and "BEGIN HIDDEN" not in text


@each
def test_a_release_imports_nothing_that_gives_it_away(name):
    "Modules that its library holds, of no later chapter; and that library has no solution."
    one, files = ASSIGNMENTS[name], library_before(ASSIGNMENTS[name])
    own = f"speechimg/{one.module.replace('.', '/')}.py"
    for cell in release(name)["cells"] + source(name)["cells"]:
        if cell["cell_type"] != "code":
            continue
        for node in ast.walk(ast.parse(cell["source"])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("speechimg"):
                path = f"{node.module.replace('.', '/')}.py"
                assert path in files and path != own, node.module
                chapter = re.search(r"nbs/(\d\d_\w+)\.ipynb", files[path])
                assert chapter is None or chapter[1] < one.notebook, node.module
    bare = dict(functions(ast.parse(files[own])))
    for part in one.parts:
        if part.kind == "solution":
            for target in part.targets or dict(functions(ast.parse(part.source))):
                assert "NotImplementedError" in ast.unparse(bare[target].body[-1])


def test_a_library_holds_nothing_that_stands_on_the_solution():
    "The step calls the losses; whoever has the ring with tokens has the ring."
    for name, away, kept in (
        ("sic", "alignment train", "queue mining attention"),
        ("queue", "alignment train", "sic mining"),
        ("speech", "model retrieval image towers/light", "data attention queue"),
        ("project", "", "retrieval train course/check"),
    ):
        files = {
            Path(file).with_suffix("").as_posix() for file in library_before(ASSIGNMENTS[name])
        }
        assert not {f"speechimg/{one}" for one in away.split()} & files
        assert {f"speechimg/{one}" for one in kept.split()} <= files


def test_the_same_notebooks_and_seed_give_the_same_files(classroom, tmp_path, capsys):
    "By the command, as from Python; what students see does not tell the seed."
    folder = classroom[0]
    arguments = ["--out", str(tmp_path / "two"), "--seed", "11", "--assignments", "sic"]
    assert cli.main(["course", "build", *arguments]) == 0
    assert f"1 assignment in {tmp_path / 'two'}: sic" in capsys.readouterr().out
    for name in ("source/sic/sic.ipynb", "release/sic/sic.ipynb", "zip/sic.zip"):
        assert (folder / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    other = source("sic", 12)
    assert other != source("sic", 11) == source_notebook(read("sic"), 11)
    assert [released(cell) for cell in other["cells"]] == release("sic")["cells"]
    assert folder.stat().st_mode & 0o077 == 0


def read(name):
    return read_assignment(ROOT / "nbs" / "teach" / "assignments" / f"{name}.ipynb")


def test_what_nbgrader_releases_is_what_is_tested_here(classroom):
    cells = json.loads((classroom[0] / "release" / "sic" / "sic.ipynb").read_text())["cells"]
    found = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    assert found == [(cell["source"], cell["cell_type"]) for cell in release("sic")["cells"]]


def test_a_build_refuses_what_it_cannot_make(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="other things"):
        build(tmp_path)
    with pytest.raises(InputError, match="no assignment"):
        build(tmp_path / "new", names=("sick",))


HEAD = "<!-- assignment: 01_one | 60 minutes -->"
TASK = "<!-- task: f -->\nWrite `f`."
CHAPTER = "#| export\n#| exercise: one\ndef f():\n    return 1"


@pytest.mark.parametrize(
    ("cells", "chapter", "problem"),
    [
        ([HEAD, TASK, "#| check: 2\nx = 1"], CHAPTER, "sentence in quotes"),
        ([HEAD, TASK, "#| check: two\n'A.'\nx"], CHAPTER, "cannot be understood"),
        ([HEAD, TASK, "#| check: 2\n'A.'\nx ="], CHAPTER, "cannot be understood"),
        ([HEAD, TASK, "<!-- question: 4 -->\nWhy?"], CHAPTER, "rubric"),
        ([HEAD, TASK], "#| exercise: one\ndef f(:", "cannot be understood"),
        ([HEAD, "<!-- task: g -->\nWrite `g`."], CHAPTER, "name f, g in a task"),
        ([HEAD, TASK], CHAPTER.replace("one", "two"), "name f in a task"),
        ([HEAD.replace("01_one", "02_two"), TASK], CHAPTER, "no mark says which chapter"),
        ([TASK], CHAPTER, "no mark says which chapter"),
    ],
)
def test_marks_that_cannot_be_understood_are_named(cells, chapter, problem, tmp_path):
    def write(path, cells):
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds = {"<": "markdown", "#": "code"}
        cells = [{"cell_type": kinds[text[0]], "source": text} for text in cells]
        path.write_text(json.dumps({"cells": cells}))
        return path

    write(tmp_path / "01_one.ipynb", [chapter])
    with pytest.raises(InputError, match=problem):
        read_assignment(write(tmp_path / "teach" / "assignments" / "one.ipynb", cells))


# Marks


@each
def test_the_reference_has_full_marks_with_every_seed_and_an_empty_notebook_none(name, boxes):
    "With another seed the numbers are others, and what is right stays right."
    every = {**source(name), "cells": list(source(name)["cells"])}
    for seed in SEEDS[1:]:
        for cell in filter(a_check, source(name, seed)["cells"]):
            if f"SEED = {seed}\n" in cell["source"]:
                name_of = f"{cell['id']}-{seed}"
                marks = cell["metadata"]["nbgrader"] | {"grade_id": name_of}
                every["cells"].append({**cell, "id": name_of, "metadata": {"nbgrader": marks}})
    hidden = sum(part.hidden for part in ASSIGNMENTS[name].parts)
    right = mark(boxes(name), every, handed_in(name))
    assert complaints(right) == {} and len(right.points) == len(numbered(name)) + 4 * hidden
    assert all("was deleted" in report for report in right.reports)
    empty = mark(boxes(name), source(name), release(name))
    assert empty.score == 0 and empty.reports == []
    assert any("still to be written" in message for message in empty.messages.values())


@pytest.fixture(scope="module")
def marked(boxes, request):
    "Marks of an answer: made once, those of `sic` in the class."

    @cache
    def marks(name, kind, answer):
        if name == "sic":
            return request.getfixturevalue("classroom")[1][f"{kind} {answer}"]
        code = ANSWERS[name][kind][answer]
        return mark(
            boxes(name), source(name), handed_in(name, code if kind == "RIGHT" else code[0])
        )

    return marks


@answers("WRONG")
def test_a_wrong_solution_loses_what_it_should_and_is_told_why(name, answer, marked):
    marks = marked(name, "WRONG", answer)
    _, lost, text = ANSWERS[name]["WRONG"][answer]
    failed = [number for number, check in enumerate(numbered(name), 1) if marks.messages[check]]
    assert failed == sorted(lost), marks.messages
    assert any(text in message for message in marks.messages.values()), marks.messages


def test_there_are_enough_wrong_solutions():
    for found in ANSWERS.values():
        assert len(found["WRONG"]) >= 6 and len(found["RIGHT"]) >= 1


@answers("RIGHT")
def test_a_solution_that_is_right_and_different_has_full_marks(name, answer, marked):
    assert complaints(marked(name, "RIGHT", answer)) == {}


@each
def test_marks_do_not_depend_on_the_run(name, boxes, marked):
    answer, (code, _, _) = next(iter(ANSWERS[name]["WRONG"].items()))
    again = mark(
        boxes(name), source(name, 11 if name == "sic" else SEEDS[0]), handed_in(name, code)
    )
    assert again.messages == marked(name, "WRONG", answer).messages


# What students do to notebooks


def edited(cell):
    return {**cell, "source": "pass"}


def worth_more(cell):
    return {**cell, "metadata": {"nbgrader": {**cell["metadata"]["nbgrader"], "points": 1000}}}


def made_text(cell):
    return {**cell, "cell_type": "markdown"}


def each_check(change):
    return lambda cells: [change(cell) if a_check(cell) else cell for cell in cells]


TOUCHED = {
    "deleted": lambda cells: [cell for cell in cells if not a_check(cell)],
    "reordered": lambda cells: cells[::-1],
    "edited": each_check(edited),
    "doubled": lambda cells: [one for cell in cells for one in [cell] * (1 + a_check(cell))],
    "points": each_check(worth_more),
    "types": each_check(made_text),
    "marks of a check on a cell of one's own": lambda cells: [
        code_cell("pass", **next(filter(a_check, cells))["metadata"]),
        *cells,
    ],
}


@pytest.mark.parametrize("what", TOUCHED)
def test_checks_that_were_touched_are_put_back(what, classroom, boxes):
    "Nobody wins or loses by it. (Cells in reverse order still define what they define.)"
    for before, code in (("right-0", ""), ("WRONG ids ignored", WRONG["ids ignored"][0])):
        cells, marks = handed_in("sic", code)["cells"], classroom[1][before]
        touched = mark(boxes("sic"), source("sic", 11), {"cells": TOUCHED[what](cells)})
        assert touched.messages == marks.messages and touched.score == marks.score
        assert touched.points == marks.points
        assert touched.reports or what in ("points", "types")


HELPED = """
def id_targets(ids, key_ids):
    same = match(ids, key_ids)
    if not same.any(1).all() or ids.min() < 0:
        raise ValueError('no')
    return same / same.sum(1, keepdim=True)
"""


def with_a_helper():
    "Only the first function is written, with a cell of one's own before it."
    helper = "%matplotlib inline\n!ls\ndef match(a, b): return (a[:, None] == b[None, :]).float()"
    cells = []
    for cell in release("sic")["cells"]:
        first = cell["id"] == "sic-solution-1"
        cells += [code_cell(helper), {**cell, "source": HELPED}] if first else [cell]
    return {**release("sic"), "cells": cells}


def test_cells_of_ones_own_are_run_where_they_stand(classroom):
    marks = classroom[1]["with a helper"]
    assert [marks.messages[check] for check in list(numbered("sic"))[:3]] == ["", "", ""]


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
    assert mark(boxes("sic"), source("sic"), {"cells": cells}).score == 0


# What hostile code does

FIRST = "def id_targets(ids, key_ids):\n"
ZEROS = f"{FIRST}    return torch.zeros(len(ids), len(key_ids))"
ATTACKS = {
    "endless loop": f"{FIRST}    while True: pass",
    "exit": f"{FIRST}    exit()",
    "hard exit": f"import os\n{FIRST}    os._exit(0)",
    "kills itself": f"import signal\n{FIRST}    signal.raise_signal(signal.SIGKILL)",
    "memory": f"{FIRST}    return [bytearray(2**27) for _ in range(1000)]",
    "a long answer": f"{FIRST}    return 'x' * 10**8",
    "deep answer": f"{FIRST}    a = []\n    for _ in range(10**5): a = [a]\n    return a",
    "equal to everything": f"""
class Any:
    shape = (3, 5)
    def __eq__(self, other): return True
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self

{FIRST}    return Any()""",
    "a tensor of one's own": f"""
class Mine(torch.Tensor):
    def __torch_function__(self, *a, **k): return True

{FIRST}    return torch.zeros(3, 5).as_subclass(Mine)""",
    "patched comparisons": f"""
import torch.testing
yes = lambda *a, **k: torch.tensor(True)
torch.testing.assert_close = torch.equal = torch.allclose = torch.isclose = yes
torch.Tensor.all = torch.Tensor.__eq__ = lambda *a, **k: True
{ZEROS}""",
    "patched checks": f"""
import speechimg.course.check as checks, builtins
checks.expect.close = checks.expect.tensor = checks._close = checks._tensor = lambda *a, **k: None
expect = None
builtins.AssertionError = ValueError
{ZEROS}""",
    "forged answers": f"""
import gc, json
for one in gc.get_objects():
    if type(one).__name__ == 'Worker':
        one.answer = lambda **parts: one.wire.send(b'{{"result": {{"eval": 1}}}}')
{FIRST}    return 1""",
    "nonsense on the wire": f"import os\n{FIRST}    os.write(3, b'\\xff' * 4096)\n    return 1",
    "asks the library": f"""
{FIRST}    from speechimg.sic import id_targets as solution
    return solution(ids, key_ids)""",
    "reads the chapter": f"{FIRST}    return open({str(ROOT / 'nbs' / '06_sic.ipynb')!r}).read()",
    "raises what it likes": f"""
class Odd(BaseException):
    pass

{FIRST}    raise Odd('x' * 10**7)""",
}
BREAKS_ITSELF = ("patched comparisons", "patched checks", "forged answers")


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_earns_nothing_and_stops_nothing(attack, classroom):
    "Others in the same run have what they earned: see the class."
    marks = classroom[1][f"ATTACK {attack}"]
    first = [marks.messages[check] for check in list(numbered("sic"))[:3]]
    assert all(first), first
    if attack not in BREAKS_ITSELF:  # these break the student's own process
        assert marks.messages[list(numbered("sic"))[3]] == ""  # the other functions still count


def test_printing_a_hundred_megabytes_costs_nobody_anything(classroom):
    assert classroom[1]["prints"].score == most("sic")


def test_all_the_time_there_is_ends_a_submission(boxes):
    loop = f"{FIRST}    while True: pass\n\nsimilarity_logits = sic_loss = id_targets"
    begin, short = time.monotonic(), Limits(cells=20, check=1, total=3)
    marks = mark(boxes("sic"), source("sic"), handed_in("sic", loop), limits=short)
    assert marks.score == 0 and time.monotonic() - begin < 45
    assert any("all the time" in message for message in marks.messages.values())


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
    assert "limits" in doors and "no network, no processes" in doors
    assert {"files", "another user"} & set(doors)


def test_hidden_checks_and_other_submissions_cannot_be_read(classroom, boxes, doors):
    folder, box = classroom[0], boxes("sic")
    hidden = folder / "source" / "sic" / "sic.ipynb"
    other = folder / "submitted" / "right-0" / "sic" / "sic.ipynb"
    neighbour = box.start()
    neighbour.wire.deadline = time.monotonic() + 30
    assert neighbour.ask(do="load", cells=["open('notes.txt', 'w').write('mine')"]) == []
    for path in (hidden, other, neighbour.folder / "notes.txt", ROOT / "nbs" / "06_sic.ipynb"):
        assert path.exists()
        with pytest.raises(PermissionError):
            ask(box, "def f(path): return open(path).read()", str(path))
    for path in (folder, box.root, neighbour.folder):
        with pytest.raises(PermissionError):
            ask(box, "import os\ndef f(path): return os.listdir(path)", str(path))
    neighbour.kill()
    with pytest.raises(PermissionError):
        add = "def f(path): return open(path, 'a').write('10 points')"
        ask(box, add, str(folder / "gradebook.db"))


def test_the_installed_library_cannot_be_read(boxes):
    "It holds the solutions; what students import is the copy without them."
    where = str(ROOT / "speechimg" / "sic.py")
    with pytest.raises(PermissionError):
        ask(boxes("sic"), "def f(path): return open(path).read()", where)
    found = ask(boxes("sic"), "import speechimg.sic as s\ndef f(): return open(s.__file__).read()")
    assert "NotImplementedError" in found and "log_softmax" not in found


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
        for pid in (os.getpid(), neighbour.pid):
            with pytest.raises(PermissionError):
                ask(box, code, pid)
    neighbour.wire.deadline = time.monotonic() + 10
    assert neighbour.ask(do="load", cells=["1"]) == []
    neighbour.kill()
    threads = """
import threading
def f():
    found = []
    one = threading.Thread(target=lambda: found.append(7))
    one.start()
    one.join()
    return found
"""
    assert ask(box, threads) == [7]


def test_limits_hold(boxes):
    box = boxes("sic")
    keep = "def f():\n    kept = [bytearray(2**28) for _ in range(40)]\n    return len(kept)"
    with pytest.raises((MemoryError, Ended)):
        ask(box, keep)
    write = "def f():\n    with open('big', 'wb') as file:\n"
    with pytest.raises((OSError, Ended)):
        ask(box, f"{write}        for _ in range(64): file.write(bytes(2**20))")
    process = box.start()
    path = process.folder
    process.kill()
    assert not path.exists()  # thrown away


def test_another_user_runs_the_code_where_root_grades(boxes, doors):
    if os.geteuid():
        pytest.skip("the grader is not root here")
    code = (
        "import os\ndef f(): return [os.getuid(), os.geteuid(), os.getgid(), len(os.getgroups())]"
    )
    assert ask(boxes("sic"), code)[0] >= 60_000


def test_without_protection_grading_refuses(classroom, boxes, monkeypatch):
    def unlocked():
        process = boxes("sic").start()
        process.shut = ["limits"]
        return process

    weak = SimpleNamespace(start=unlocked, close=lambda: None)
    monkeypatch.setattr(gradebook, "Sandbox", lambda *arguments, **options: weak)
    with pytest.raises(InputError, match="nobody's files"):
        grade(classroom[0], "sic")


# A class


def hand_in(folder, student, notebook):
    path = folder / "submitted" / student / "sic" / "sic.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(notebook if isinstance(notebook, str) else json.dumps(notebook))


def student_of(label):
    return re.sub(r"[^a-z0-9]+", "-", label.lower())


def everybody():
    "What the class hands in, by what it is."
    work = {f"right-{number}": handed_in("sic") for number in range(3)}
    for kind in ("RIGHT", "WRONG"):
        for answer, code in ANSWERS["sic"][kind].items():
            code = code if kind == "RIGHT" else code[0]
            work[f"{kind} {answer}"] = handed_in("sic", code)
    work |= {f"ATTACK {attack}": handed_in("sic", code) for attack, code in ATTACKS.items()}
    work["prints"] = handed_in("sic", "for _ in range(100): print('x' * 10**6)")
    work["with a helper"] = with_a_helper()
    work |= {"empty": release("sic"), "broken": "{", "list": "[1, 2]", "binary": "\x00\x01"}
    return work


@pytest.fixture(scope="module")
def classroom(tmp_path_factory):
    "A course with more than thirty submissions, marked in one run of the command."
    folder = tmp_path_factory.mktemp("class") / "course"
    build(folder, seed=11, names=("sic",))
    work = everybody()
    for label, notebook in work.items():
        hand_in(folder, student_of(label), notebook)
    (folder / "submitted" / "nothing" / "sic").mkdir(parents=True)
    begin, said = time.monotonic(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(gradebook, "mark", partial(mark, limits=IMPATIENT))
        assert cli.main(["course", "grade", "--out", str(folder)]) == 0
    seconds = time.monotonic() - begin
    found = {one.student: one for one in grade(folder, "sic")[0]}
    marks = {label: found[student_of(label)] for label in [*work, "nothing"]}
    assert len(marks) == len(found)
    return folder, marks, said.getvalue(), seconds


def test_more_than_thirty_submissions_are_marked_in_one_run(classroom):
    _, marks, _, seconds = classroom
    assert len(marks) >= 30 and seconds < 600
    for label, one in marks.items():
        if label.startswith(("right", "RIGHT", "prints")):
            assert one.score == most("sic"), (label, one.messages)
        elif label in ("empty", "broken", "list", "binary", "nothing"):
            assert one.score == 0
        else:
            assert one.score < most("sic")
    points = list(numbered("sic").values())
    for answer, (_, lost, _) in ANSWERS["sic"]["WRONG"].items():
        left = most("sic") - sum(points[number - 1] for number in lost)
        assert marks[f"WRONG {answer}"].score == left
    assert "cannot be read" in marks["broken"].reports[0]
    assert "not there" in marks["nothing"].reports[0]


def test_the_table_says_who_failed_what(classroom):
    _, marks, text, _ = classroom
    line = next(line for line in text.splitlines() if line.startswith("sic-check-1 "))
    failed = sum(one.messages["sic-check-1"] != "" for one in marks.values())
    assert f"{failed} of {len(marks)} failed" in line and "Captions of one picture" in line
    assert re.search(rf"(?m)^right-0 +{most('sic'):g} of {most('sic'):g}$", text)
    assert "kept from strangers' code by limits" in text
    assert table([], {}) == "nothing was handed in"


def test_marks_are_in_the_gradebook_and_in_a_table(classroom):
    from nbgrader.api import Gradebook

    folder, marks, _, _ = classroom
    with Gradebook(f"sqlite:///{folder}/gradebook.db", "speechimg") as book:
        kept = {one.student.id: one.score for one in book.find_assignment("sic").submissions}
    with (folder / "marks" / "sic.csv").open() as file:
        rows = {row["student"]: float(row["points"]) for row in csv.DictReader(file)}
    assert kept == rows == {one.student: one.score for one in marks.values()}


def test_nothing_is_marked_twice_and_what_changed_is_marked_anew(class_of_three, monkeypatch):
    folder, marks = class_of_three
    done, real = [], gradebook.mark

    def watched(box, source, notebook, student="", *arguments, **options):
        done.append(student)
        return real(box, source, notebook, student, *arguments, **options)

    monkeypatch.setattr(gradebook, "mark", watched)
    hand_in(folder, "empty", handed_in("sic"))
    again = {one.student: one.score for one in grade(folder, "sic")[0]}
    assert done == ["empty"] and again["empty"] == most("sic")
    assert all(again[student] == one.score for student, one in marks.items() if student != "empty")


@pytest.fixture
def class_of_three(classroom, tmp_path):
    "A copy of the class in which most have left: marks, pages and gradebook as they are."
    folder, marks, _, _ = classroom
    stay = ("right-0", "right-1", "empty", student_of("WRONG ids ignored"))
    away = [path.name for path in (folder / "submitted").iterdir() if path.name not in stay]
    shutil.copytree(folder, tmp_path / "course", ignore=lambda _, names: set(away) & set(names))
    return tmp_path / "course", {one.student: one for one in marks.values() if one.student in stay}


def test_what_was_given_by_hand_survives_a_second_marking(class_of_three):
    """Points and the mark *has been read* stay; a submission that changed is to be read again, and
    one that the book lost comes back."""
    from nbgrader.api import Gradebook

    folder, _ = class_of_three
    wrong = student_of("WRONG ids ignored")

    def open_book():
        return Gradebook(f"sqlite:///{folder}/gradebook.db", "speechimg")

    def submission(book, student):
        found = book.assignment_submissions("sic")
        return next(one for one in found if one.student.id == student)

    def answer(book, student):
        cells = [one for part in submission(book, student).notebooks for one in part.grades]
        return next(one for one in cells if one.cell.cell_type == "markdown")

    for student in ("right-0", wrong):
        with open_book() as book:
            one = answer(book, student)
            one.manual_score, one.needs_manual_grade = 3.0, False
            book.db.commit()
    changed = json.loads((folder / "submitted" / wrong / "sic" / "sic.ipynb").read_text())
    changed["cells"].append(code_cell("x = 1", "more"))
    hand_in(folder, wrong, changed)
    with open_book() as book:
        book.remove_submission("sic", "right-1")
    grade(folder, "sic")
    with open_book() as book:
        kept = answer(book, "right-0")
        assert (kept.manual_score, kept.needs_manual_grade) == (3.0, False)
        assert answer(book, wrong).needs_manual_grade
        assert submission(book, "right-1").score == most("sic")


def test_nbgraders_own_commands_go_on_working(class_of_three):
    folder, marks = class_of_three
    wrong = student_of("WRONG ids ignored")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}

    def nbgrader(*words):
        environment = os.environ | variables
        command = ["nbgrader", *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    nbgrader("autograde", "sic", "--student", wrong, "--force")
    nbgrader("generate_feedback", "sic", "--student", wrong, "--force")
    nbgrader("export", "--to", "grades.csv")
    with (folder / "grades.csv").open() as file:
        rows = {row["student_id"]: row for row in csv.DictReader(file)}
    assert float(rows[wrong]["raw_score"]) == marks[wrong].score
    assert float(rows["right-0"]["raw_score"]) == most("sic")
    feedback = (folder / "feedback" / wrong / "sic" / "sic.html").read_text()
    # told what is wrong, and not how it was found
    assert "Ids are ignored" in feedback
    assert "SEED" not in feedback and "manual_seed" not in feedback
    archive = folder / "downloaded" / "sic" / "archive"
    archive.mkdir(parents=True)
    (archive / "zoe_sic.ipynb").write_text(json.dumps(handed_in("sic")))
    nbgrader("zip_collect", "sic")
    assert (folder / "submitted" / "zoe" / "sic" / "sic.ipynb").exists()


# Without an instructor

RUN = """
import json, sys
sys.modules["nbgrader"] = None
for path in sys.argv[1:]:
    space = {"__name__": "__main__"}
    for cell in json.load(open(path))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path, "exec"), space)
"""


def test_what_is_handed_out_works_without_nbgrader(classroom, tmp_path):
    "Solutions typed in, cell after cell, visible checks and all, in a fresh process."
    zipfile.ZipFile(classroom[0] / "zip" / "sic.zip").extractall(tmp_path)
    zipped = json.loads((tmp_path / "sic" / "sic.ipynb").read_text())["cells"]
    assert "NotImplementedError" in str(zipped) and (tmp_path / "sic" / "README.md").exists()
    same = zip(zipped, release("sic")["cells"], strict=True)
    assert all("".join(one["source"]) == other["source"] for one, other in same)
    for name in ASSIGNMENTS:
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(handed_in(name)))
    paths = [str(tmp_path / f"{name}.ipynb") for name in ASSIGNMENTS]
    command = [sys.executable, "-c", RUN, *paths]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_check_gives_the_messages_at_once(capsys):
    space = {"__name__": "notebook"}
    mine = "def my_id_targets(ids, key_ids):\n    return torch.eye(len(ids), len(key_ids))"
    exec(f"import torch\n{mine}", space)
    check("sic", space["my_id_targets"])
    lines = capsys.readouterr().out
    assert "not yet  2 points" in lines and "Ids are ignored" in lines and "Cosines" not in lines
    check("sic_loss", lambda *arguments: None)
    assert "not yet" in capsys.readouterr().out
    for bad in (lambda: check("nobody"), lambda: check("sic", nothing=1)):
        with pytest.raises(KeyError):
            bad()


@each
def test_check_is_content_with_the_library(name, capsys):
    check(name)
    lines = capsys.readouterr().out
    assert lines.startswith("right") and "not yet" not in lines
    shown = [part for part in ASSIGNMENTS[name].parts if part.kind == "check" and not part.hidden]
    assert lines.count("right  ") == len(shown)


def test_the_catalogue_is_what_the_notebooks_say_and_holds_nothing_hidden(tmp_path):
    folder = ROOT / "nbs" / "teach" / "assignments"
    write_catalogue(folder, tmp_path / "course.json")
    written = ROOT / "speechimg" / "course" / "course.json"
    assert written.read_text() == (tmp_path / "course.json").read_text()
    found, text = catalogue(), json.dumps(catalogue())
    for one in ASSIGNMENTS.values():
        assert found[one.name]["names"] == one.names
        assert not any(part.title in text for part in one.parts if part.hidden)
    assert "rubric" not in text and not MARK.search(text)


# The command line


def test_the_command_says_what_is_missing(tmp_path, capsys):
    (tmp_path / "c").mkdir()
    assert cli.main(["course", "grade", "--out", str(tmp_path / "c")]) == 2
    assert "holds no submissions" in capsys.readouterr().err
    nowhere = str(tmp_path / "nowhere")
    assert cli.main(["course", "grade", "--out", nowhere, "--assignments", "sic"]) == 2


def test_restore_keeps_answers_and_rubrics_apart():
    notebook = handed_in("sic")
    for cell in notebook["cells"]:
        if cell["id"] == "sic-question-1":
            cell["source"] = "Because the other caption is free."
    work, reports = restore(source("sic"), notebook)
    text = "\n".join(cell["source"] for cell in work["cells"])
    assert "Because the other caption is free." in text and reports == []
    assert ASSIGNMENTS["sic"].parts[-1].rubric[:30] not in text
