"""How a wrong gradient differs from the true one: the usual mistakes leave fingerprints.

A remark states a fact about the numbers. It never guesses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minilora.backend import Array, to_backend


def diagnose(
    name: str, gradient: Array, numeric: np.ndarray, at: np.ndarray, precision: float, dy: Array, alone: Any, again: Callable[[], Any]
) -> str:
    """A fact about the coordinates `at` of the wrong gradient called `name`, or "" if none explains nearly all of the error.

    numeric: the finite differences at these coordinates, with their relative precision. dy: the cotangent. alone: the gradient
    computed by a backward right after the first forward; again(): computed so once more.
    """
    full = to_backend(gradient, "numpy")
    analytic = full.ravel()[at]
    difference = float(np.linalg.norm(analytic - numeric))

    def explains(true: np.ndarray) -> bool:
        """Whether the gradient would be right if `analytic` were this."""
        rest = float(np.linalg.norm(true - numeric))
        return rest <= 0.01 * difference and rest <= 10 * precision * float(np.linalg.norm(numeric))

    def same_place(g: Array) -> np.ndarray:
        return to_backend(g, "numpy").ravel()[at]

    if full.dtype != np.float64:
        return f"is {full.dtype}, and its array is float64: precision is lost"
    if not numeric.any():
        return "is not zero, and the true gradient is"
    if getattr(alone, "shape", None) == full.shape and explains(same_place(alone)):
        repeated = again()
        always = getattr(repeated, "shape", None) == full.shape and explains(same_place(repeated))
        return f"is right only {'if no other forward comes in between' if always else 'the first time'}: state is kept in the layer"
    if name == "dx" and dy.shape == full.shape and explains(analytic + same_place(dy)):
        return "lacks exactly dy: the gradient of a residual add is left out"
    if not analytic.any():
        return "is zero, and the true gradient is not"
    factor = float(analytic @ numeric / (numeric @ numeric))
    if f"{factor:.6g}" != "1" and explains(analytic / factor if factor else analytic):
        return f"is {factor:.6g} times the true gradient"
    if full.ndim == 2 and full.shape[0] == full.shape[1] and explains(same_place(full.T)):
        return "is transposed"
    right = np.abs(analytic - numeric) <= precision * np.abs(numeric).max()
    if right.any() and not right.all():
        return f"{int((~right).sum())} of {right.size} coordinates are wrong, the first at {_place(full.shape, int(at[np.argmin(right)]))}"
    return ""


def misshapen(g: np.ndarray, shape: tuple[int, ...], numeric: np.ndarray, at: np.ndarray) -> str:
    """A fact about a gradient whose shape differs from that of its array."""
    extra = tuple(range(g.ndim - len(shape)))
    stretched = tuple(len(extra) + i for i, n in enumerate(shape) if n == 1 and g.ndim >= len(shape) and g.shape[len(extra) + i] > 1)
    remarks = {
        "transposed, it is right": lambda: g.T,
        "its values are right": lambda: g.reshape(shape),
        f"the sum over axis {', '.join(map(str, extra + stretched))} is left out": lambda: g.sum(axis=extra + stretched).reshape(shape),
    }
    text = f"has shape {g.shape} instead of {shape}"
    for remark, make in remarks.items():
        try:
            candidate = make()
        except ValueError:  # this one cannot have the shape
            continue
        if candidate.shape == shape and np.linalg.norm(candidate.ravel()[at] - numeric) <= 1e-5 * np.linalg.norm(numeric):
            return f"{text}: {remark}"
    return text


def not_finite(values: Array) -> str:
    """How many values are NaN or infinite, and where the first one is; "" if none is."""
    bad = ~np.isfinite(to_backend(values, "numpy"))
    if not bad.any():
        return ""
    return f"{int(bad.sum())} of {bad.size} values are NaN or infinite, the first at {_place(bad.shape, int(np.argmax(bad)))}"


def _place(shape: tuple[int, ...], i: int) -> str:
    return str([int(k) for k in np.unravel_index(i, shape)])
