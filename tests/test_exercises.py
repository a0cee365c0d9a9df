"""minilora exercise: solutions pass, empty files and wrong answers get one sentence, and a student's work is never lost."""

from __future__ import annotations

import configparser
import inspect
import json
import runpy
from pathlib import Path

import pytest
from wrong_answers import ANSWERS, PAGE, page, said_to, text, verdict

from minilora.checking.catalogue import catalogue
from minilora.cli import main
from minilora.exercises import check_here
from minilora.exercises.template import code, empty, exercises

SUBJECTS = {name for name, *_ in catalogue()}
RIGHT = "    return dy @ W.T, x.T @ dy, dy.sum(axis=0)"


def run(capsys, *argv):
    """(exit status, stdout, stderr) of `minilora exercise`; stderr is at most one line."""
    status = main(["exercise", *map(str, argv)])
    out = capsys.readouterr()
    assert "Traceback" not in out.err + out.out
    return status, out.out.strip(), out.err.strip()


@pytest.fixture
def linear(cwd, capsys):
    """The started file of the first exercise, and a function that fills it in."""
    assert run(capsys, "start")[0] == 0
    path = Path("exercises/01_linear.py")
    started = path.read_text()
    body = started[started.rindex("    raise NotImplementedError") :].rstrip("\n")

    def fill(answer, also=lambda text: text):
        path.write_text(also(started.replace(body, answer)))
        return path

    return fill


# -- the exercises ----------------------------------------------------------------------------------------------------


def test_there_are_enough_and_each_is_complete():
    assert len(exercises()) >= 24
    numbers = [int(e.stem[:2]) for e in exercises().values()]
    assert numbers == list(range(1, len(numbers) + 1))
    for e in exercises().values():
        assert [bool(hint.strip()) for hint in e.hints] == [True] * 3, e.name
        assert e.checks or e.name == "adamw", e.name
        assert set(e.checks) <= SUBJECTS, e.name


@pytest.mark.parametrize("name", exercises())
def test_the_solution_passes_and_the_empty_file_does_not(name):
    e = exercises()[name]
    assert verdict(e, text(e)) == ""
    empty = "\n\n".join(code(e))
    first = e.write[0]
    assert verdict(e, empty) == f"{first.solution.__qualname__} is empty: it must return {first.returns}."


def test_the_file_does_not_give_the_answer():
    for e in exercises().values():
        for blank in e.write:
            *_, last = inspect.getsource(blank.solution).rstrip().splitlines()
            assert last not in empty(blank), blank.function


OTHERWISE = {  # correct answers that are not minilora's own
    "relu": "    return np.where(x > 0, dy, 0.0)",
    "softmax": """    dx = np.empty_like(dy)
    for row, (g, p) in enumerate(zip(dy, y)):
        dx[row] = (np.diag(p) - np.outer(p, p)) @ g
    return dx""",
    "linear": """    dx, dW, db = np.zeros_like(x), np.zeros_like(W), np.zeros(W.shape[1])
    for t in range(len(x)):
        for i in range(W.shape[0]):
            for j in range(W.shape[1]):
                dx[t, i] += dy[t, j] * W[i, j]
                dW[i, j] += dy[t, j] * x[t, i]
    for j in range(W.shape[1]):
        db[j] = sum(dy[:, j])
    return [dx, dW, db]""",
    "block": """        dm = self.drop_2.backward(dy, s_drop_2)
        dh = dy + norm_2.backward(mlp.backward(dm, s_mlp), s_norm_2)
        da = attn.backward(self.drop_1.backward(dh, s_drop_1), s_attn)
        dx = norm_1.backward(da, s_norm_1, need_dx)
        return dh + dx if need_dx else None""",
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_right_answer_may_be_written_otherwise(name):
    e = exercises()[name]
    given = "\n\n".join(code(e)).replace("annotations\n", "annotations\nimport numpy as np\n", 1)
    assert verdict(e, given[: given.rindex("    raise NotImplementedError")].rstrip(" ") + OTHERWISE[name]) == ""


# -- wrong answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ANSWERS, ids=[w.mistake for w in ANSWERS])
def test_a_usual_mistake_is_named_by_one_sentence(wrong):
    said = said_to(wrong)
    assert said.endswith(".")
    assert "\n" not in said
    assert wrong.says in said


def test_the_tables_of_the_page_are_those_of_today():
    assert page(PAGE.read_text()) == PAGE.read_text(), "run python tests/wrong_answers.py"


def test_adamw_is_compared_with_the_original():
    e = exercises()["adamw"]
    assert verdict(e, text(e, "math.sqrt(step.c2)", "1")).startswith("w is wrong, first at [0]: ")


@pytest.mark.parametrize(
    ("name", "right", "wrong", "said"),
    [
        ("mse", "return (error * error).mean(), error * (2 / error.size)", "return (error * error).sum(), error * 2", "loss is wrong: "),
        ("mse", "(error * error).mean()", "(error * error).mean() * float('nan')", "y: 1 of 1 values are NaN or infinite"),
        ("mse", "(error * error).mean()", "None", "forward: returned y of NoneType; a check needs an array of float64"),
        ("cross_entropy", "(loss * times, dlogits * times)", "(loss, dlogits)", "loss is wrong: "),
        ("online_softmax", "x.T @ p / N", "x.T @ p / N + 1e-9", "dW is wrong, first at [0, 0]: "),
    ],
)
def test_a_gradient_of_another_function_is_found(name, right, wrong, said):
    e = exercises()[name]
    assert verdict(e, text(e, right, wrong)).startswith(said)


def test_a_wrong_method_among_several_is_found():
    e = exercises()["decoder"]
    assert "wpe" in verdict(e, text(e, "self.wpe.backward(dsum, s_wpe)", "pass"))


# -- a student's way --------------------------------------------------------------------------------------------------


def test_two_commands_to_the_first_exercise_solved(linear, capsys):
    linear(RIGHT)
    status, out, _ = run(capsys, "check")
    assert status == 0
    assert out == "exercises/01_linear.py: right. Next: minilora exercise start relu"
    status, out, _ = run(capsys, "start")
    assert "02_relu.py: write relu_backward" in out
    status, out, _ = run(capsys, "list")
    assert out.startswith("x 01 linear")
    assert "1 of 30 are solved" in out


def test_after_the_last_exercise_nothing_is_next(linear, capsys):
    linear(RIGHT)
    others = {name: True for name in exercises() if name != "linear"}
    Path("exercises/progress.json").write_text(json.dumps({"solved": others, "hints": {}}))
    assert run(capsys, "check")[1] == "exercises/01_linear.py: right. All exercises are solved."


def test_a_wrong_answer_has_exit_status_1_and_json(linear, capsys):
    path = linear(RIGHT.replace("x.T", "-x.T"))
    status, out, err = run(capsys, "check", path, "--json")
    assert status == 1
    assert json.loads(out) == {"exercise": "linear", "ok": False, "wrong": "dW is -1 times the true gradient: its sign is wrong."}
    assert err == f"{path}: dW is -1 times the true gradient: its sign is wrong."


def test_solved_is_taken_back_when_the_answer_no_longer_passes(linear, capsys):
    linear(RIGHT)
    run(capsys, "check")
    linear("    return None")
    run(capsys, "check", "linear")
    assert json.loads(Path("exercises/progress.json").read_text()) == {"solved": {"linear": False}, "hints": {}}


def test_one_more_hint_at_every_call(linear, capsys):
    counts = [run(capsys, "hint", "1")[1].count(" of 3. ") for _ in range(4)]
    assert counts == [1, 2, 3, 3]
    assert json.loads(run(capsys, "list", "--json")[1])["hints"] == {"linear": 3}


def test_the_solution_is_the_package_s_source(cwd, capsys):
    _, out, _ = run(capsys, "solution", "linear")
    assert out.startswith("# minilora.functional.linear.linear_backward\n")
    source = Path(main.__code__.co_filename).parent.parent / "functional" / "linear.py"
    assert out.split("\n", 1)[1] in source.read_text()


def test_the_data_files_are_installed():
    config = configparser.ConfigParser()
    config.read(Path(__file__).parent.parent / "setup.cfg")
    assert "exercises/*.toml" in config["options.package_data"]["minilora"]


# -- a notebook -------------------------------------------------------------------------------------------------------


def test_a_notebook_is_the_same_exercise(cwd, capsys):
    assert run(capsys, "start", "--notebook")[0] == 0
    path = Path("exercises/01_linear.ipynb")
    book = json.loads(path.read_text())
    kinds = [cell["cell_type"] for cell in book["cells"]]
    assert (book["nbformat"], kinds[0], set(kinds[1:])) == (4, "markdown", {"code"})
    status, out, _ = run(capsys, "check", path)
    assert status == 1
    assert "linear_backward is empty" in out
    book["cells"][-2]["source"] = book["cells"][-2]["source"].rpartition("    raise")[0] + RIGHT
    path.write_text(json.dumps(book))
    assert run(capsys, "check")[0] == 0


def test_the_cell_that_checks(cwd, capsys):
    e = exercises()["linear"]
    for answer, said in ((text(e), "linear is right."), ("\n\n".join(code(e)), "linear_backward is empty")):
        Path("cells.py").write_text(answer)
        check_here("linear", runpy.run_path("cells.py"))
        assert capsys.readouterr().out.startswith(said)
    assert json.loads(Path("progress.json").read_text())["solved"] == {"linear": False}


def test_a_notebook_is_valid(cwd, capsys):
    nbformat = pytest.importorskip("nbformat", reason="validation needs nbformat")
    run(capsys, "start", "decoder", "--notebook")
    nbformat.validate(nbformat.read("exercises/30_decoder.ipynb", as_version=4))


# -- bad input --------------------------------------------------------------------------------------------------------

AGAIN = "linear_backward returns something else when it is called again: it is random, or writes into its arguments."
BAD = {
    "no longer parses": ("    return dy @", "line 31, column 16: invalid syntax."),
    "raises": ("    return dy @ W, None, None", "line 31 raised ValueError: matmul: "),
    "returns NaN": (RIGHT.replace("dy @ W.T", "dy @ W.T / 0 * 0"), "dx: 30 of 30 values are NaN or infinite, the first at [0, 0]."),
    "None": ("    pass", "linear_backward returns None; it must return dx (T, m), dW (m, n), db (n,)."),
    "one gradient": ("    return dy @ W.T", "linear_backward returns 1 of 3 values; it must return dx (T, m), dW (m, n), db (n,)."),
    "None for one": ("    return dy @ W.T, None, None", "dW: no gradient was written."),
    "wrong shape": (RIGHT.replace(".sum(axis=0)", ""), "db has shape (6, 4) instead of (4,): the sum over axis 0 is left out."),
    "wrong type": (RIGHT.replace("dy.sum(axis=0)", "[0.0] * 4"), "db is a list instead of an array."),
    "random": ("    import numpy as np\n" + RIGHT.replace("dy @ W.T", "dy @ W.T + np.random.default_rng().random()"), AGAIN),
    "changes its input": ("    dy *= 1.5\n" + RIGHT, AGAIN),
    "a module that is missing": ("    import torch_of_another_kind\n" + RIGHT, "line 31 raised ModuleNotFoundError: No module named "),
    "exits": ("    raise SystemExit(3)", "line 31 raised SystemExit: 3."),
    "dies": ("    import os\n    os._exit(7)", "the file ended Python with status 7 during the check."),
    "deep recursion": ("    return linear_backward(dy, x, W)", "line 31 raised RecursionError: maximum recursion depth exceeded"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_answer_gets_one_sentence(what, linear, capsys):
    answer, said = BAD[what]
    path = linear(answer)
    line = path.read_text().splitlines().index(answer.splitlines()[0]) + 1
    status, out, _ = run(capsys, "check")
    assert status == 1
    sentence = next(line for line in out.splitlines() if line.startswith(str(path)))
    assert sentence.startswith(f"{path}: {said.replace('line 31', f'line {line}')}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.replace("def linear_backward", "def other"), "the file has no function linear_backward; keep the name that it had."),
        (lambda s: s + "linear_backward = 3\n", "the file has no function linear_backward; keep the name that it had."),
        (lambda s: "import no_such_module\n" + s.replace("from __future__ import annotations", ""), "line 1 raised ModuleNotFoundError: "),
        (lambda s: s + "raise SystemExit\n", "raised SystemExit."),
        (lambda s: s + "\0", "source code string cannot contain null bytes"),
        (lambda s: "", "the file has no function linear_backward; keep the name that it had."),
    ],
)
def test_a_bad_file_gets_one_sentence(change, said, linear, capsys):
    path = linear(RIGHT, change)
    status, out, _ = run(capsys, "check")
    assert status == 1
    assert out.startswith(f"{path}: ")
    assert said in out


def test_a_file_that_is_not_utf8(linear, capsys):
    path = linear(RIGHT)
    path.write_bytes(path.read_bytes() + b"name = '\xff\xfe'\n")
    status, out, _ = run(capsys, "check")
    assert status == 1
    assert "line" in out
    assert len(out.splitlines()) == 1


def test_a_method_that_was_renamed(cwd, capsys):
    run(capsys, "start", "sequential")
    path = Path("exercises/17_sequential.py")
    path.write_text(path.read_text().replace("def backward", "def backwards"))
    assert "the file has no function Sequential.backward; keep the name that it had." in run(capsys, "check", "sequential")[1]


@pytest.mark.parametrize("where", ["    while True:\n        pass", RIGHT + "\n\n\nwhile True:\n    print('more')"])
def test_an_answer_without_an_end_is_stopped(where, linear, capsys):
    linear(where)
    status, out, _ = run(capsys, "check", "--limit", "3")
    assert status == 1
    assert "did not end within 3 seconds" in out
    assert len(out) < 2500


def test_what_the_answer_prints_is_shown(linear, capsys):
    linear("    print('shape', dy.shape)\n" + RIGHT)
    assert "shape (6, 4)" in run(capsys, "check")[1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["start", "liner"], "there is no exercise 'liner'; did you mean linear or "),
        (["check", "zzz"], "there is no exercise 'zzz'; `minilora exercise list` names them."),
        (["check", "exercises/99_other.py"], "there is no exercise '99_other'"),
        (["check", "softmax"], "exercises/07_softmax.py does not exist; `minilora exercise start softmax` writes it."),
        (["check", "elsewhere/07_softmax.py"], "there is no file elsewhere/07_softmax.py;"),
        (["start", "linear"], "exercises/01_linear.py exists, and may hold your answer; --force overwrites it."),
    ],
)
def test_what_cannot_be_done_is_said(argv, said, linear, capsys):
    before = linear("    return 1").read_text()
    status, _, err = run(capsys, *argv)
    assert status == 1
    assert err.startswith(f"minilora: error: {said}")
    assert len(err.splitlines()) == 1
    assert Path("exercises/01_linear.py").read_text() == before


def test_force_overwrites(linear, capsys):
    linear("    return 1")
    assert run(capsys, "start", "linear", "--force")[0] == 0
    assert "raise NotImplementedError" in Path("exercises/01_linear.py").read_text()


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"solved": {}}', '{"solved": [], "hints": {}}', '{"solved": {}, "hints": {"linear": "3"}}', ""]
)
def test_damaged_progress_is_kept_and_said(damage, linear, capsys):
    Path("exercises/progress.json").write_text(damage)
    linear(RIGHT)
    status, out, _ = run(capsys, "check")
    assert status == 0
    assert "It is kept as exercises/progress.damaged-1.json" in out
    assert Path("exercises/progress.damaged-1.json").read_text() == damage
    assert json.loads(Path("exercises/progress.json").read_text())["solved"] == {"linear": True}


@pytest.mark.parametrize("damage", ["{", "[]", '{"cells": 3}', '{"cells": [1]}', '{"cells": [{"cell_type": "code", "source": 3}]}'])
def test_a_damaged_notebook_is_named(damage, cwd, capsys):
    Path("01_linear.ipynb").write_text(damage)
    status, _, err = run(capsys, "check", "01_linear.ipynb")
    assert status == 1
    assert err.startswith("minilora: error: ")
    assert "01_linear.ipynb" in err
