"""`minilora gradcheck`: everything in the package, one model, or a layer in a reader's own file."""

import runpy
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minilora.checking import catalogue
from minilora.checking.check import parameters_of
from minilora.checking.gradcheck import gradcheck
from minilora.checking.report import Report
from minilora.formats.checkpoint import load_model

TEXT = b"def f(x): return x + 1"


def gradcheck_run(
    what: str | None, backend: str, say: Callable[[str], None], x: str | None = None, timeout: float = 60.0, table: bool = False
) -> dict[str, Any]:
    """The figures of a check, as --json prints them.

    what: None is the whole catalogue; "path/file.py:Name" a layer, its class, or a function that makes it; else a model, by directions.
    x: the shape of the input of a layer, such as "5x4"; the default is the file's own `x`, else 5 rows that fit its first matrix.
    Raises ArithmeticError when a gradient is wrong or could not be compared, ValueError for what cannot be checked.
    """
    if what is None:
        return _whole_catalogue(backend, say)
    if ".py:" in what:
        layer, values = layer_in(what, x)
        report = gradcheck(layer, values, timeout=timeout)
    else:
        model = load_model(what, backend).unfreeze()
        ids = np.frombuffer(TEXT, np.uint8).astype(np.int64) % model.config.vocab_size
        report = gradcheck(model, ids[: model.config.longest_sequence], by_call=True, tol=1e-6)
    if table or not report.ok:
        say(str(report) if table or not report.faults else "\n".join(map(str, report.faults)))
    result = {"verdict": report.verdict, "checked": len(report.entries), "worst": report.worst}
    result["faults"] = [asdict(fault) for fault in report.faults]
    if not report.ok:
        raise failed(f"{what}: {report.verdict}; --table prints every gradient.", result)
    say(f"{what}: all {len(report.entries)} checks agree with finite differences, relative error at most {report.worst:.1e}")
    return result


def failed(text: str, result: dict[str, Any]) -> ArithmeticError:
    """An error with what --json prints nevertheless, as `result`."""
    error: Any = ArithmeticError(text)
    error.result = result
    return error


def _whole_catalogue(backend: str, say: Callable[[str], None]) -> dict[str, Any]:
    reports = dict[str, Report]()
    say(f"{'what':<48} {'gradients':>9} {'worst error':>12}")
    total = len(list(catalogue.catalogue()))
    for name, report in tqdm(catalogue.check_all(backend), total=total, disable=None, leave=False, file=sys.stderr):
        say(f"{name:<48} {len(report.entries):>9} {report.worst:>12.1e}  {report.verdict}")
        reports[name] = report
        if not report.ok:
            say(str(report))
    errors = {name: report.worst for name, report in reports.items()}
    if wrong := [name for name, report in reports.items() if not report.ok]:
        faults = [asdict(fault) for report in reports.values() for fault in report.faults]
        what = "backward passes disagree with finite differences, or could not be compared"
        text = f"{len(wrong)} of {len(errors)} {what}: {', '.join(wrong)}."
        raise failed(text, {"checked": len(errors), "errors": errors, "faults": faults})
    say(f"all {len(errors)} agree with central differences in float64, relative error at most {max(errors.values()):.1e}")
    return {"checked": len(errors), "worst": max(errors.values()), "errors": errors}


def layer_in(what: str, shape: str | None = None) -> tuple[Any, np.ndarray]:
    """The layer that "path/file.py:Name" names, and an input for it. The file is run."""
    path, _, name = what.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such Python file.")
    try:
        names = runpy.run_path(path)
        layer = names.get(name)
        layer = layer() if callable(layer) and not hasattr(layer, "weight") else layer
    except Exception as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ValueError(f"{path}{line}: {type(error).__name__}: {getattr(error, 'msg', error)}.") from error
    if layer is None:
        raise ValueError(f"{path} has no {name}; it has {', '.join(n for n in names if not n.startswith('_')) or 'nothing'}.")
    if shape is None and "x" in names:
        return layer, np.asarray(names["x"])
    widths = [p.data.shape[0] for _, p in parameters_of(layer) if getattr(p.data, "ndim", 0) == 2]
    try:
        sizes = [int(n) for n in shape.split("x")] if shape else [5, widths[0]]
    except (ValueError, IndexError):
        raise ValueError(f"{what}: the shape of x is not known; give --x ROWSxCOLUMNS, or an array x in the file.") from None
    return layer, np.random.default_rng(0).standard_normal(sizes)
