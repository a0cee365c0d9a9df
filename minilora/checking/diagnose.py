"""How a wrong gradient differs from the true one: the usual mistakes leave fingerprints.

A remark states a fact about the numbers. It never guesses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.backend import Array, to_numpy


def diagnose(
    name: str, g: np.ndarray, numeric: np.ndarray, at: np.ndarray, precision: float, dy: np.ndarray, alone: Any, again: Callable[[], Any]
) -> str:
    """A fact about the coordinates `at` of the wrong gradient g called `name`, or "" if none explains nearly all of the error.

    numeric: the finite differences at these coordinates, with their relative precision. dy: the cotangent. alone: the gradient
    computed by a backward right after the first forward; again(): computed so once more.
    """
    analytic = g.ravel()[at]
    difference = float(np.linalg.norm(analytic - numeric))

    def explains(true: np.ndarray) -> bool:
        """Whether the gradient would be right if `analytic` were this."""
        rest = float(np.linalg.norm(true - numeric))
        return rest <= 0.01 * difference and rest <= 10 * precision * float(np.linalg.norm(numeric))

    def is_right(other: Any) -> bool:
        return getattr(other, "shape", None) == g.shape and explains(to_numpy(other).ravel()[at])

    if g.dtype != np.float64:
        return f"is {g.dtype}, and its array is float64: precision is lost"
    if not numeric.any():
        return "is not zero, and the true gradient is"
    if is_right(alone):
        when = "if no other forward comes in between" if is_right(again()) else "the first time"
        return f"is right only {when}: state is kept in the layer"
    if name == "dx" and dy.shape == g.shape and explains(analytic + dy.ravel()[at]):
        return "lacks exactly dy: the gradient of a residual add is left out"
    if not analytic.any():
        return "is zero, and the true gradient is not"
    factor = float(analytic @ numeric / (numeric @ numeric))
    if f"{factor:.6g}" != "1" and explains(analytic / factor if factor else analytic):
        return f"is {factor:.6g} times the true gradient"
    if g.ndim == 2 and is_right(g.T):
        return "is transposed"
    right = np.abs(analytic - numeric) <= precision * np.abs(numeric).max()
    if right.any() and not right.all():
        return f"{int((~right).sum())} of {right.size} coordinates are wrong, the first at {_place(g.shape, int(at[np.argmin(right)]))}"
    return ""


def misshapen(g: np.ndarray, shape: tuple[int, ...], numeric: np.ndarray, at: np.ndarray) -> str:
    """A fact about a gradient whose shape differs from that of its array; "" if it does not."""
    if g.shape == shape:
        return ""
    extra = g.ndim - len(shape)
    axes = (*range(extra), *(i for i, n in enumerate(shape, extra) if 0 <= i < g.ndim and n == 1 < g.shape[i]))
    summed = g.sum(axis=axes)
    candidates = {
        "transposed, it is right": g.T if g.T.shape == shape else None,
        "its values are right": g.reshape(shape) if g.size == math.prod(shape) else None,
        f"the sum over axis {', '.join(map(str, axes))} is left out": summed.reshape(shape) if summed.size == math.prod(shape) else None,
    }
    text = f"has shape {g.shape} instead of {shape}"
    for remark, values in candidates.items():
        if values is not None and np.linalg.norm(values.ravel()[at] - numeric) <= 1e-5 * np.linalg.norm(numeric):
            return f"{text}: {remark}"
    return text


def not_finite(values: Array) -> str:
    """How many values are NaN or infinite, and where the first one is; "" if none is."""
    bad = ~np.isfinite(to_numpy(values))
    if not bad.any():
        return ""
    return f"{int(bad.sum())} of {bad.size} values are NaN or infinite, the first at {_place(bad.shape, int(np.argmax(bad)))}"


def _place(shape: tuple[int, ...], i: int) -> str:
    return str([int(k) for k in np.unravel_index(i, shape)])
