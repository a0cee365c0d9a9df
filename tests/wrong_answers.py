"""The usual wrong answers to exercises, and what `minilora exercise check` says to each: `python tests/wrong_answers.py` writes them into
docs/exercises.md, with the list of exercises.
"""

from __future__ import annotations

import inspect
import re
import runpy
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from minilora.exercises.examine import examine
from minilora.exercises.template import Blank, Exercise, code, empty, exercises

PAGE = Path(__file__).parent.parent / "docs" / "exercises.md"


class Wrong(NamedTuple):
    """A mistake: a part of the solution, and what stands in its place."""

    mistake: str
    exercise: str
    right: str
    wrong: str
    says: str = "is wrong"


ANSWERS = [
    Wrong("the sign", "linear", "dW = x.T @ dy", "dW = -x.T @ dy", "dW is -1 times the true gradient: its sign is wrong."),
    Wrong("a transpose is missing", "linear", "dW = x.T @ dy", "dW = dy.T @ x", "transposed, it is right"),
    Wrong("1 / N is missing", "mse", "error * (2 / error.size)", "error * 2", "dy is 30 times the true gradient."),
    Wrong("the bias is not summed over the batch", "linear", "db = dy.sum(axis=0)", "db = dy", "the sum over axis 0 is left out"),
    Wrong("softmax without subtracting the sum", "softmax", "(dy - (dy * y).sum(axis=-1, keepdims=True))", "dy", "lacks y sum(dy y)"),
    Wrong("layer norm without the term of the variance", "layer_norm", " - xhat * along", "", "dx lacks xhat mean(dxhat xhat)"),
    Wrong(
        "layer norm without the term of the mean", "layer_norm", " - dxhat.mean(axis=1, keepdims=True)", "", "dx lacks the mean of dxhat"
    ),
    Wrong("the scale alpha / r is forgotten", "lora", "du = s * (dy @ B.T)", "du = dy @ B.T", "it lacks the factor s"),
    Wrong("dA and dB are swapped", "lora", "return dx, dA, dB", "return dx, dB, dA", "dA has shape (2, 4) instead of (5, 2)"),
    Wrong("the mask is forgotten", "lora_layer", "self.scaling, mask", "self.scaling, None", "gets other arguments than lora_linear had"),
    Wrong(
        "the gradient is overwritten, not added",
        "linear_layer",
        "self.weight.add_grad(dW)",
        "self.weight.grad = dW",
        "two backward passes do not add up: += is missing",
    ),
    Wrong(
        "a row that is read twice collects once",
        "embedding",
        "xp.add.at(dE, as_like(ids, E), dy)",
        "dE[ids] += dy",
        "dE: 10 of 30 coordinates are wrong, the first at [4, 0]: all of rows 4 to 5",
    ),
    Wrong("the sum of softmax over the wrong axis", "softmax", "axis=-1", "axis=0"),
    Wrong("the residual add is forgotten", "block", "dh = K.add(dy, dh)", "pass", "Block hands drop_1.backward a dy that lacks exactly dy"),
    Wrong("the product rule is forgotten", "gelu", "Phi + x * phi", "Phi", "dx lacks x phi(x)"),
    Wrong("the root of d is forgotten", "attention", "dS *= 1 / math.sqrt(Q.shape[-1])", "pass", "it has the factor sqrt d once too often"),
    Wrong("the rotation is not undone", "rotary", "-sin", "sin", "dx has the part with sin with the wrong sign"),
    Wrong("a head trained in two places gets one gradient", "tied_head", "E.add_grad(K.product(dy.T, s_head))", "pass"),
]


def text(exercise: Exercise, right: str = "", wrong: str = "") -> str:
    """The student's file with the solution, in which `wrong` stands in place of `right`."""
    file = "\n\n".join(code(exercise))
    for blank in exercise.write:
        assert empty(blank) in file
        file = file.replace(empty(blank), inspect.getsource(blank.solution).rstrip())
    assert right in file
    return file.replace(right, wrong)


def verdict(exercise: Exercise, file: str) -> str:
    """What check says to the text of a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "answer.py")
        path.write_text(file)
        return examine(exercise, runpy.run_path(str(path)))


@lru_cache
def said_to(wrong: Wrong) -> str:
    """What check says to a usual mistake."""
    e = exercises()[wrong.exercise]
    return verdict(e, text(e, wrong.right, wrong.wrong))


def link(blank: Blank) -> str:
    """The function, and the file that has it."""
    file = f"{blank.solution.__module__.removeprefix('minilora.').replace('.', '/')}.py"
    return f"`{blank.solution.__qualname__}` in [{file}](../minilora/{file})"


def page(old: str) -> str:
    """The page with its tables made anew; each stands between two comments with its name."""
    known = exercises()
    rows = [f"| {e.stem[:2]} | `{name}` | {e.title} | {'<br>'.join(map(link, e.write))} |" for name, e in known.items()]
    said = [f"| {w.mistake} | `{w.exercise}` | {said_to(w)} |" for w in ANSWERS]
    tables = {
        "exercises": ["| | name | about | what you write |", "|---|---|---|---|", *rows],
        "answers": ["| mistake | exercise | what `check` says |", "|---|---|---|", *said],
    }
    for name, lines in tables.items():
        new = "\n".join([f"<!-- {name} -->", *lines, f"<!-- end of {name} -->"])
        old = re.sub(f"<!-- {name} -->.*<!-- end of {name} -->", new.replace("\\", r"\\"), old, flags=re.DOTALL)
    return old


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
