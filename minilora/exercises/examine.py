"""What is wrong with an answer, in one sentence.

The student's functions take the place of minilora's own in every module that has them. Then the subjects of the catalogue that use them are
checked by finite differences.
"""

import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from inspect import isfunction, ismodule
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minilora.checking.catalogue import catalogue
from minilora.checking.gradcheck import gradcheck
from minilora.checking.report import Fault
from minilora.checking.trace import exchanged
from minilora.exercises.template import Blank, Exercise, exercises
from minilora.functional import AdamStep

Function = Callable[..., Any]


class Mistake(BaseException):
    """What is wrong: its one argument. No `except Exception` of the checker stops it."""


def main() -> None:
    """In a process of its own: examine a file, and write the sentence into another."""
    name, path, result = sys.argv[1:]
    try:
        wrong = examine(exercises()[name], runpy.run_path(path))
    except SyntaxError as error:
        wrong = f"line {error.lineno}, column {error.offset}: {error.msg}."
    except BaseException as error:  # SystemExit, too
        wrong = f"{_raised(error, path)}."
    Path(result).write_text(wrong, encoding="utf-8")


def examine(exercise: Exercise, names: dict[str, Any]) -> str:
    """A sentence that says what is wrong with the functions among these names, or "" if they are right."""
    try:
        written = {blank: _watched(blank, _find(blank, names)) for blank in exercise.write}
        with _in_place(written):
            named = (subject for subject in catalogue() if subject[0] in exercise.checks)
            for name, layer, x, options in islice(named, len(exercise.checks)):  # builds nothing beyond the last
                if not (report := gradcheck(layer, x, max_coordinates=40, **options)).ok:
                    faults = report.faults or [Fault([""], name, e.name, e.remark, "") for e in report.failures]
                    return f"{_sentence(faults[0], list(written.values()))}."
        for blank, function in written.items():
            for case in CASES.get(blank.name, ()):
                _compare(blank, function(*case), blank.solution(*case))
    except Mistake as mistake:
        return f"{mistake}."
    return ""


def _find(blank: Blank, names: dict[str, Any]) -> Function:
    """The student's function for a blank. Raises Mistake if there is none."""
    owner = blank.solution.__qualname__.rpartition(".")[0]
    function = (vars(names.get(owner, object)) if owner else names).get(blank.name)
    if not isfunction(function) or function is blank.solution:
        raise Mistake(f"the file has no function {blank.solution.__qualname__}; keep the name that it had")
    return function


@contextmanager
def _in_place(functions: dict[Blank, Function]) -> Iterator[None]:
    """Meanwhile each function stands wherever minilora has its own."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("minilora.")]
    with ExitStack() as stack:
        for blank, function in functions.items():
            solution = blank.solution
            for owner in {blank.owner, *modules}:
                if vars(owner).get(blank.name) is solution:
                    stack.enter_context(exchanged(owner, blank.name, function))
        yield


def _watched(blank: Blank, function: Function) -> Function:
    """The function, which raises Mistake where it raises anything, returns another number of values, or differs from call to call."""
    count = len(blank.returns.split("), ")) if ismodule(blank.owner) else 1

    @wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
            again = function(*args, **kwargs) if ismodule(blank.owner) else result
        except Exception as error:
            raise Mistake(_raised(error, function.__code__.co_filename)) from None
        got = len(result) if isinstance(result, (tuple, list)) else int(result is not None)
        if ismodule(blank.owner) and got != count:
            raise Mistake(f"{blank.name} returns {f'{got} of {count} values' if got else 'None'}; it must return {blank.returns}")
        if repr(result) != repr(again):
            raise Mistake(f"{blank.name} returns something else when it is called again: it is random, or writes into its arguments")
        return tuple(result) if isinstance(result, list) else result

    return watched


def _compare(blank: Blank, result: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    """Raise Mistake where a function that is more than a gradient differs from minilora's own."""
    for part, value, right in zip(blank.returns.split("), "), result, expected, strict=True):
        name = part.split()[0]
        if getattr(value, "shape", None) != right.shape:
            raise Mistake(f"{name} is not an array of shape {right.shape}")
        if len(off := np.argwhere(~np.isclose(value, right, 1e-9, 1e-12))):
            at = tuple(off[0])
            raise Mistake(f"{name} is wrong{f', first at {[*map(int, at)]}' if at else ''}: {value[at]:.6g} instead of {right[at]:.6g}")


def _sentence(fault: Fault, written: list[Function]) -> str:
    """The fault in words. Where a function of minilora is to blame, the student's gave it other arguments than forward did."""
    cause = fault.cause or "is wrong, and none of the usual mistakes explains it"
    verb = cause.partition(" ")[0]
    subject = fault.name if verb in _WIRING or not fault.gradient else fault.gradient
    text = f"{subject} {cause}" if verb in ("is", "lacks", "has", *_WIRING) else f"{subject}: {cause}"
    layer, _, operation = fault.place.rpartition("/")
    if operation and fault.source and all(f.__code__.co_filename not in fault.source for f in written):
        text = f"{operation}_backward gets other arguments than {operation} had, so that {fault.gradient} is wrong"
    return f"{layer}: {text}" if layer else text


def _raised(error: BaseException, file: str) -> str:
    """An exception in words, with the line of the student's file."""
    if isinstance(error, NotImplementedError):
        return str(error)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    what = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": .")
    return f"{f'line {lines[-1]}' if lines else 'the check'} raised {what}"


_WIRING = ("hands", "calls", "never", "changes")  # of causes that say what a layer does
_DRAW, _LABELS = np.random.default_rng(0).random((4, 7)), np.array([2, 0, -100, 6])
_STEPS = [AdamStep(0.1, 0.3, 0.9, 0.99, 1 - 0.9**3, 1 - 0.99**3, 1e-8, decoupled) for decoupled in (True, False)]
CASES: dict[str, list[Any]] = {  # arguments of functions that are more than gradients
    "adamw": [(*_DRAW, 1.0, 0.5, step) for step in _STEPS],
    "mse": [(_DRAW, _DRAW[::-1])],
    "cross_entropy": [(_DRAW, _LABELS), (_DRAW, _LABELS % 6, 2, 0.3)],
    "linear_cross_entropy": [(_DRAW[[0, 1, 3]].T[:3] @ _DRAW[:3, :2], _DRAW[:2], _LABELS[[0, 1, 3]], 5)],
}
