"""What is wrong with an answer, in one sentence.

The student's functions take the place of minilora's own in every module that has them. Then the subjects of the catalogue that use them are
checked by finite differences.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import wraps
from inspect import isfunction, ismodule, signature
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
    """In a process of its own: examine(exercise, names of a file) into another file."""
    name, path, result = sys.argv[1:]
    spec: Any = importlib.util.spec_from_file_location("answer", path)
    module = sys.modules["answer"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        wrong = examine(exercises()[name], vars(module))
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


def _subjects(exercise: Exercise) -> list[Any]:
    return [subject for subject in catalogue() if subject[0] in exercise.checks]


def _find(blank: Blank, names: dict[str, Any]) -> Function:
    """The student's function for a blank. Raises Mistake if there is none."""
    house, owner = blank.house, blank.house.__qualname__.rpartition(".")[0]
    own = vars(names.get(owner, object)) if owner else names
    function = own.get(blank.name)
    if not isfunction(function) or function is house:
        others = [n for n, f in own.items() if isfunction(f) and f.__module__ != house.__module__]
        near = ", but ".join(["", *get_close_matches(blank.name, others, n=1)])
        raise Mistake(f"the file has no function {house.__qualname__}{near}; keep the name that it had")
    return function


@contextmanager
def _in_place(functions: dict[Blank, Function]) -> Iterator[None]:
    """Meanwhile each function stands wherever minilora has its own."""
    modules = [module for key, module in list(sys.modules.items()) if key.startswith("minilora.")]
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
        bound = signature(house).bind(*args, **kwargs).arguments
        before, (a, k) = copy.deepcopy(bound), copy.deepcopy((args, kwargs))
        expected, values, again = (_tuple(f(*x, **y)) for f, x, y in ((house, a, k), (function, args, kwargs), (function, a, k)))
        nothing = len(values) == 1 and values[0] is None is not expected[0]
        if nothing or len(values) != len(expected):
            what = "None" if nothing else f"{len(values)} value{'s' * (len(values) > 1)}"
            raise Mistake(f"{blank.name} returned {what}; it must return {blank.returns}")
        for name, value, right in zip(names, values, expected, strict=True):
            if right is None:
                continue
            if not hasattr(value, "shape"):
                raise Mistake(f"{name} is of type {type(value).__name__}; it must be an array of shape {right.shape}")
            if wrong := misshapen(value, right.shape, right.ravel(), np.arange(right.size)) or not_finite(value):
                raise Mistake(f"{name}{'' if wrong.startswith('has') else ':'} {wrong}")
            if value.dtype != right.dtype:
                raise Mistake(f"{name} is of {value.dtype} instead of {right.dtype}")
            if blank.name in CASES and not np.allclose(value, right, 1e-9, 1e-12):
                i = int(np.argmax(~np.isclose(value, right, 1e-9, 1e-12)))
                raise Mistake(f"{name} is wrong, first at [{i}]: {value[i]:.6g} instead of {right[i]:.6g}")
        if changed := [name for name in bound if not _equal(bound[name], before[name])]:
            raise Mistake(f"{blank.name} writes into its argument {changed[0]}; make a new array instead")
        if not _equal(values, again):
            raise Mistake(f"{blank.name} returned something else when it was called again with the same arguments; it must not be random")
        return values if len(values) > 1 else values[0]

    return watched


def _sentence(report: Report, blank: Blank) -> str:
    """The first failure that has a reason."""
    entry = next((e for e in report.failures if e.remark), report.failures[0])
    name, remark = entry.name, entry.remark or f"is wrong, with a relative error of {entry.error:.1g}"
    if ismodule(blank.owner) and name.isidentifier():  # a pair of functions: the parameters are its arguments
        name = f" {blank.returns}".partition(" d")[2].split()[0] if name == "dx" else name
        name = f"d{name}"
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


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _equal(a: Any, b: Any) -> bool:
    """Equal arrays, and whatever holds arrays."""
    if isinstance(a, (tuple, list)):
        return all(map(_equal, a, b))
    return not hasattr(a, "shape") or np.array_equal(a, b)


_VECTORS = np.random.default_rng(0).random((4, 7))
_STEPS = [AdamStep(0.1, 0.3, 0.9, 0.99, 1 - 0.9**3, 1 - 0.99**3, 1e-8, decoupled) for decoupled in (True, False)]
CASES = {"adamw": [(*_VECTORS, 1.0, 0.5, step) for step in _STEPS]}  # arguments of functions that are no gradients
