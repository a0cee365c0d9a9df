"""What is wrong with an answer, in one sentence.

The student's functions take the place of minilora's own in every module that has them. Then the subjects of the catalogue that use them are
checked by finite differences.
"""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import isfunction, ismodule
from pathlib import Path
from typing import Any

import numpy as np

from minilora.checking.catalogue import catalogue
from minilora.checking.diagnose import misshapen, not_finite
from minilora.checking.gradcheck import gradcheck
from minilora.checking.report import Report
from minilora.exercises.template import Blank, Exercise, exercises
from minilora.functional import AdamStep

Function = Callable[..., Any]


class Mistake(Exception):
    """What is wrong: its one argument."""


def main() -> None:
    """In a process of its own: examine a file, and write the sentence into another."""
    name, path, result = sys.argv[1:]
    try:
        wrong = examine(exercises()[name], runpy.run_path(path))
    except SyntaxError as error:
        wrong = f"line {error.lineno}, column {error.offset}: {error.msg}."
    except BaseException as error:  # SystemExit, too
        wrong = _raised(error, path)
    Path(result).write_text(wrong, encoding="utf-8")


def examine(exercise: Exercise, names: dict[str, Any]) -> str:
    """A sentence that says what is wrong with the functions among these names, or "" if they are right."""
    file = ""
    try:
        written = {blank: _find(blank, names) for blank in exercise.write}
        file = next(iter(written.values())).__code__.co_filename
        watched = {blank: _watched(blank, f) if ismodule(blank.owner) else f for blank, f in written.items()}
        for blank, function in watched.items():
            for case in CASES.get(blank.name, ()):
                function(*case)
        with _in_place(watched):
            for _, layer, x, options in _subjects(exercise):
                y, saved = layer.forward(x, **options)
                layer.backward(np.random.default_rng(0).standard_normal(y.shape), saved)
        with _in_place(written):
            for _, layer, x, options in _subjects(exercise):
                report = gradcheck(layer, x, max_coordinates=40, **options)
                if not report.ok:
                    return f"{_sentence(report, exercise.write[0])}."
    except Mistake as mistake:
        return f"{mistake}."
    except Exception as error:
        return _raised(error, file)
    return ""


def _find(blank: Blank, names: dict[str, Any]) -> Function:
    """The student's function for a blank. Raises Mistake if there is none."""
    owner = blank.house.__qualname__.rpartition(".")[0]
    function = (vars(names.get(owner, object)) if owner else names).get(blank.name)
    if not isfunction(function) or function is blank.house:
        raise Mistake(f"the file has no function {blank.house.__qualname__}; keep the name that it had")
    return function


def _subjects(exercise: Exercise) -> list[Any]:
    return [subject for subject in catalogue() if subject[0] in exercise.checks]


@contextmanager
def _in_place(functions: dict[Blank, Function]) -> Iterator[None]:
    """Meanwhile each function stands wherever minilora has its own."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("minilora.")]
    places = [(o, b, b.house) for b in functions for o in {b.owner, *modules} if vars(o).get(b.name) is b.house]
    try:
        for owner, blank, _ in places:
            setattr(owner, blank.name, functions[blank])
        yield
    finally:
        for owner, blank, house in places:
            setattr(owner, blank.name, house)


def _watched(blank: Blank, function: Function) -> Function:
    """The function, which raises Mistake for a result that is not even of the right form."""
    house, names = blank.house, [part.split()[-1] for part in blank.returns.split(" (")[:-1]]

    @wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        expected, values, again = (_tuple(f(*args, **kwargs)) for f in (house, function, function))
        if len(values) != len(expected) or (len(values) == 1 and values[0] is None):
            what = "None" if values[0] is None else f"{len(values)} value{'s' * (len(values) > 1)}"
            raise Mistake(f"{blank.name} returned {what}; it must return {blank.returns}")
        for name, value, right in zip(names, values, expected, strict=True):
            if right is None:
                continue
            if not hasattr(value, "shape"):
                raise Mistake(f"{name} is of type {type(value).__name__}; it must be an array of shape {right.shape}")
            if wrong := misshapen(value, right.shape, right.ravel(), np.arange(right.size)):
                raise Mistake(f"{name} {wrong}")
            if wrong := not_finite(value):
                raise Mistake(f"{name}: {wrong}")
            if value.dtype != right.dtype:
                raise Mistake(f"{name} is of {value.dtype} instead of {right.dtype}")
            if blank.name in CASES and (off := np.flatnonzero(~np.isclose(value, right, 1e-9, 1e-12))).size:
                raise Mistake(f"{name} is wrong, first at [{off[0]}]: {value[off[0]]:.6g} instead of {right[off[0]]:.6g}")
        if not all(map(np.array_equal, values, again)):
            raise Mistake(f"{blank.name} returns something else when it is called again: it is random, or writes into its arguments")
        return values if len(values) > 1 else values[0]

    return watched


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _sentence(report: Report, blank: Blank) -> str:
    """The first failure that has a reason."""
    entry = next((e for e in report.failures if e.remark), report.failures[0])
    name, remark = entry.name, entry.remark or f"is wrong, with a relative error of {entry.error:.1g}"
    if ismodule(blank.owner) and name.isidentifier():  # a pair of functions: the parameters are its arguments
        name = "d" + (f" {blank.returns}".partition(" d")[2].split()[0] if name == "dx" else name)
    elif name not in ("dx", "forward", "backward", "x", "y", "dy"):
        name = f"the gradient of {name}"
    return f"{name} {remark}" if remark.startswith(("is ", "lacks ", "has ")) else f"{name}: {remark}"


def _raised(error: BaseException, file: str) -> str:
    """An exception in words, with the line of the student's file."""
    if isinstance(error, NotImplementedError):
        return f"{error}."
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    what = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": .")
    return f"{f'line {lines[-1]}' if lines else 'the check'} raised {what}."


_VECTORS = np.random.default_rng(0).random((4, 7))
_STEPS = [AdamStep(0.1, 0.3, 0.9, 0.99, 1 - 0.9**3, 1 - 0.99**3, 1e-8, decoupled) for decoupled in (True, False)]
CASES = {"adamw": [(*_VECTORS, 1.0, 0.5, step) for step in _STEPS]}  # arguments of functions that are no gradients
