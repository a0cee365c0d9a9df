"""What the folder of a run holds, read file by file, so that a page about an unfinished or damaged run says what is missing."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minilora.formats.atomic import json_object, read_json
from minilora.runs import run_file

T = TypeVar("T")
COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens")  # of metrics.jsonl


@dataclass
class Run:
    """A run folder. What a file does not give is empty, and `missing` has a sentence about it. NaN stands for null."""

    path: Path
    name: str
    settings: dict[str, Any]
    labels: list[str]
    results: dict[str, Any]
    steps: dict[str, np.ndarray] = field(default_factory=dict)  # {one of COLUMNS: (steps,)}
    measured: list[float] = field(default_factory=list)  # the S steps whose norms are known
    grads: dict[str, np.ndarray] = field(default_factory=dict)  # {parameter: (S,)} norms of its gradient, and
    values: dict[str, np.ndarray] = field(default_factory=dict)  # of its values
    confusion: dict[str, Any] = field(default_factory=dict)  # {"before", "after"}: (classes, classes) counts
    samples: dict[str, str] = field(default_factory=dict)  # {"prompt", "before", "after"}
    missing: list[str] = field(default_factory=list)

    def figure(self, *names: str) -> float:
        """A number in the results, by the names that lead to it; NaN where there is none."""
        value: Any = self.results
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return _number(value)

    def attempt(self, what: str, read: Callable[[], T]) -> T | None:
        """The result of `read`; None, and a sentence in `missing`, if it raises."""
        try:
            return read()
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, OSError) as error:
            why = "it is not there" if isinstance(error, FileNotFoundError) and error.filename else " ".join(str(error).split()).rstrip(".")
            self.missing.append(f"{what} cannot be read: {why}.")
            return None


def read_run(path: str | Path) -> Run:
    """The run in a folder. Raises ValueError when it is not the folder of a run, or its run.json is damaged."""
    path = Path(path)
    if not (path / "run.json").is_file():
        raise ValueError(f"{path} is not the folder of a run: it has no run.json. minilora finetune writes one.")
    found = run_file.run_of(path) or run_file.Run()
    run = Run(path, path.resolve().name, found.configuration, found.labels or [], found.results)
    run.attempt("metrics.jsonl", lambda: _steps(run))
    run.attempt("norms.jsonl, with the norms by layer,", lambda: _norms(run))
    if "after" not in run.results:
        run.missing.append("The run did not finish, so there are no figures, samples or predictions of held-out data.")
    elif run.labels:
        run.confusion = run.attempt("confusion.json", lambda: _confusion(path / "confusion.json", len(run.labels))) or {}
    elif run.settings.get("sample_bytes"):
        run.samples = run.attempt("samples.txt", lambda: _samples(path / "samples.txt")) or {}
    return run


def _number(value: Any) -> float:
    return float(value) if type(value) in (int, float) and abs(value) < 1e308 else math.nan


def _lines(file: Path) -> list[dict[str, Any]]:
    """The objects in a .jsonl. Raises ValueError when there is none, or a line is damaged."""
    found = [json_object(line, f"line {n}") for n, line in enumerate(file.read_bytes().splitlines(), start=1)]
    if not found:
        raise ValueError("it is empty")
    return found


def _steps(run: Run) -> None:
    lines = _lines(run.path / "metrics.jsonl")
    run.steps = {name: np.array([_number(line.get(name)) for line in lines]) for name in COLUMNS}
    if (bad := run.steps["step"][np.isnan(run.steps["loss"])]).size:
        run.missing.append(f"The loss of {bad.size} of {len(lines)} steps is not finite, first at step {bad[0]:.0f}.")


def _norms(run: Run) -> None:
    first, *lines = _lines(run.path / "norms.jsonl")
    grads, values = (np.array([[_number(x) for x in line[kind]] for line in lines]) for kind in ("grad_norms", "norms"))
    if not all(isinstance(name, str) for name in first["parameters"]):
        raise ValueError("a name of a parameter is no text")
    if not grads.shape == values.shape == (len(lines), len(first["parameters"])):
        raise ValueError("it has not two numbers for each parameter in every line")
    run.measured = [_number(line["step"]) for line in lines]
    run.grads, run.values = (dict(zip(first["parameters"], of.T, strict=True)) for of in (grads, values))


def _confusion(file: Path, classes: int) -> dict[str, Any]:
    """Both matrices. The file leaves out the classes after the last that occurs."""
    found = {when: np.array(C, dtype=np.int64) for when, C in read_json(file).items()}
    if found.keys() != {"before", "after"} or any(C.shape != (len(C), len(C)) or len(C) > classes for C in found.values()):
        raise ValueError(f"it has not two square matrices for {classes} classes")
    return {when: np.pad(C, (0, classes - len(C))).tolist() for when, C in found.items()}


def _samples(file: Path) -> dict[str, str]:
    parts = re.fullmatch(r"# prompt\n(.*?)\n\n# before\n\1(.*)\n\n# after\n\1(.*)\n", file.read_text(encoding="utf-8"), re.DOTALL)
    if parts is None:
        raise ValueError("it has no prompt, before and after")
    return dict(zip(("prompt", "before", "after"), parts.groups(), strict=True))
