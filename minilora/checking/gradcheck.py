"""`gradcheck(layer, x)`: every gradient of a layer or model against finite differences, and which call is to blame for a wrong one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minilora.backend import Array
from minilora.checking.blame import blame
from minilora.checking.check import Check, unchanged
from minilora.checking.report import Entry, Report


def gradcheck(
    layer: Any,
    x: Array,
    *,
    tol: float = 1e-7,
    seed: int = 0,
    max_coordinates: int = 200,
    by_call: bool = False,
    timeout: float | None = None,
    **forward: Any,
) -> Report:
    """Check every gradient of `layer` at x against finite differences, in float64. Afterwards the layer is as before.

    A copy of the layer is called. It has the layer's own parameters, to which functions made in __init__ may hold on; their arrays
    are exchanged for the check.

    x: what forward takes; floating (then dx is checked too) or integer ids. `forward` is passed on (offsets=...).
    Checked for dx and each trainable parameter: every coordinate if there are at most `max_coordinates`, else that many, half at
    random and half where the gradient is largest; then one random direction through x and all parameters together. The relative
    error is ||analytic - numeric|| over the larger of the two norms, both over the checked coordinates.

    An entry is ok when its error is below `tol`, or below the precision of the finite differences where that is worse: rounding
    of y alone is 4 eps sum|c y| over the step and the norm of the gradient. Beyond 1e-4 a mistake would not be seen, and the entry
    is "inconclusive", not ok.

    Parameters that are all zero are moved away from zero first: with B = 0, LoRA's dA is zero whatever backward does.
    Also part of the contract, and reported by name when broken: gradients accumulate; x, dy and the parameters are not
    written to; frozen parameters get no gradient; the call's state is not kept in the layer; need_dx=False, for a method that
    takes it, changes nothing. Exceptions in forward or backward are reported, too.

    Where something is wrong, `.faults` says which call inside the layer is to blame (blame.py). by_call: check every call of the layer on
    its own, along directions, and all together along one; for large models. timeout: seconds after which what runs is stopped and reported
    as an error; in the main thread, and not on Windows.
    """
    if not callable(getattr(layer, "forward", None)) or not callable(getattr(layer, "backward", None)):
        raise ValueError(f"gradcheck: {type(layer).__name__} has no forward or no backward; see the contract in layers/base.py.")
    entries: list[Entry] = []
    report = Report(getattr(layer, "name", type(layer).__name__), tol, entries)
    with unchanged(layer), np.errstate(all="ignore"):  # values that are not finite are reported by name
        try:
            with limited(timeout):
                check = Check(layer, x, tol, seed, max_coordinates, forward)
                entries += check.entries([list(check.checked)] if by_call and check.checked else None)
                if by_call or (report.verdict == "WRONG" and not any("TimeoutError" in e.remark for e in entries)):
                    report.faults = blame(check, entries.copy(), entries if by_call else None)
        except TimeoutError as error:
            entries.append(Entry("(time)", str(error)))
    return report


def assert_gradients(layer: Any, x: Array, **options: Any) -> None:
    """For tests: raise AssertionError, with the report, unless `gradcheck(layer, x, **options)` is ok."""
    report = gradcheck(layer, x, **options)
    if not report.ok:
        raise AssertionError(str(report))


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """TimeoutError in what runs inside the `with` for longer."""
    if not seconds or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it did not end within {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
