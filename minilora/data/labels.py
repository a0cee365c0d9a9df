"""The label of a record: one of a list of classes, or a value for a model with one output.

A published head keeps its own classes in their own order. Otherwise the classes are those of the training data: integers by value, then
everything else as text. The result depends neither on the order of the records nor on the machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from minilora.data.records import Record, field_of, listed
from minilora.functional import IGNORE

_WHOLE = re.compile(r"-?\d+", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)  # in decimal notation
_DIGITS = 4000  # Python does not convert longer integers; they are sorted as text


class NoClass(ValueError):
    """A label that is not a class of the head."""


@contextmanager
def at_line(file: Path, line: int) -> Iterator[None]:
    """Name the file and the line in a ValueError."""
    try:
        yield
    except ValueError as error:
        kind = NoClass if isinstance(error, NoClass) else ValueError
        raise kind(f"{file}, line {line}: {error}") from None


def class_names(file: Path, records: Sequence[tuple[int, Record]]) -> list[str]:
    """The distinct labels of records: integers first, by value, equal ones ("1", "01") as text; then names as text."""
    names = set()
    for line, record in records:
        with at_line(file, line):
            names.add(label_of(record))
    if len(names) < 2:
        raise ValueError(f"{file}: all {len(records)} records have the label {next(iter(names))!r}; classification needs two classes.")
    integers = {name: int(name) for name in names if _WHOLE.fullmatch(name) and len(name) <= _DIGITS}
    return sorted(names, key=lambda name: (name not in integers, integers.get(name, 0), name))


def label_of(record: Record) -> str:
    """The class of a record, as text without white space around it. Raises ValueError unless it is an integer or a name."""
    value = field_of(record, "label", "classify")
    name = str(value).strip()
    if type(value) not in (int, str) or name.lower() in ("", "nan"):
        advice = '; write "true" or "false" as text' if isinstance(value, bool) else ""
        raise ValueError(f"the label must be an integer or a name, got {value!r:.60}{advice}.")
    if _NUMBER.fullmatch(name) and not _WHOLE.fullmatch(name):
        raise ValueError(f"the label {name!r:.60} is a score; classes are integers or names, scores need a model with one output.")
    return name


def reader(names: Sequence[str]) -> Callable[[Record], float]:
    """A function record -> the index of the class in `names`; for one name (a model with one output), the value.

    A label is looked up by its name. If no name is a number, an integer is the index itself, as in transformers.
    The function raises ValueError for any other label.
    """
    if len(names) == 1:
        return _value
    index = {name.strip(): i for i, name in enumerate(names)}
    if len(index) < len(names):
        raise ValueError(f"the model names a class twice: {', '.join(names)}; a label does not say which one it means.")
    if not any(_NUMBER.fullmatch(name) for name in names):
        index |= {str(i): i for i in range(len(names))}

    def read(record: Record) -> float:
        label = record.get("label")
        name = label.strip() if isinstance(label, str) and label.strip() in index else label_of(record)
        if name not in index:
            raise NoClass(f"the label {name!r:.60} is none of the classes: {listed(names, 40)}.")
        return index[name]

    return read


def _value(record: Record) -> float:
    """The label of a record as a value. Raises ValueError unless it is a finite number other than -100, which means "no label"."""
    label = field_of(record, "label", "classify")
    value = float(label) if isinstance(label, str) and _NUMBER.fullmatch(label.strip()) else label
    if type(value) not in (int, float) or not math.isfinite(value) or value == IGNORE:
        raise ValueError(f"this model has one output, so the label must be a number (not -100), got {label!r:.60}.")
    return float(value)
