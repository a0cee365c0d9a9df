"""`gradcheck(layer, x)`: every gradient of a layer or model against finite differences, and which call is to blame for a wrong one."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.backend import Array
from minilora.checking.blame import blame
from minilora.checking.check import Check, unchanged
from minilora.checking.report import Entry, Report


def gradcheck(layer: Any, x: Array, *, tol: float = 1e-7, seed: int = 0, max_coordinates: int = 200, **forward: Any) -> Report:
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
    """
    entries: list[Entry] = []
    report = Report(getattr(layer, "name", type(layer).__name__), tol, entries)
    with unchanged(layer), np.errstate(all="ignore"):  # values that are not finite are reported by name
        check = Check(layer, x, tol, seed, max_coordinates, forward)
        entries += check.entries()
        if report.verdict == "WRONG":
            report.faults = blame(check, entries)
    return report
