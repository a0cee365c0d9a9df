"""What the difference between a wrong gradient and the true one looks like: the usual mistakes leave fingerprints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from minilora.backend import to_backend

if TYPE_CHECKING:
    from minilora.checking.gradcheck import _Check


def diagnose(name: str, check: _Check, analytic: np.ndarray, numeric: np.ndarray, at: np.ndarray) -> str:
    """A guess, in a few words, or "". `analytic` and `numeric` are the coordinates `at` of the gradient called `name`."""

    def close(a: np.ndarray, b: np.ndarray) -> bool:
        size = max(float(np.linalg.norm(a)), float(np.linalg.norm(b)), 1e-300)
        return float(np.linalg.norm(a - b)) <= 1e-5 * size

    if not np.isfinite(analytic).all():
        return "is not finite"
    if not analytic.any():
        return "is zero"
    if check.alone is not None and check.alone.get(name) is not None and close(to_backend(check.alone[name], "numpy").ravel()[at], numeric):
        return "belongs to the last forward call, not to its own: state is kept in the layer"
    factor = float(analytic @ numeric / max(numeric @ numeric, 1e-300))
    if close(analytic, factor * numeric):
        return f"is {factor:.6g} times the true gradient: a factor is lost or doubled"
    full = to_backend(check.analytic[name], "numpy")
    if full.ndim == 2 and full.shape[0] == full.shape[1] and close(full.T.ravel()[at], numeric):
        return "is transposed"
    dy = to_backend(check.c, "numpy")
    if name == "dx" and dy.shape == full.shape and close(analytic + dy.ravel()[at], numeric):
        return "lacks exactly dy: the gradient of a residual add is left out"
    right = np.abs(analytic - numeric) <= 1e-6 * np.abs(numeric).max()
    if right.any():
        return f"{int((~right).sum())} of {right.size} coordinates are wrong, the first at {_place(full.shape, int(at[np.argmin(right)]))}"
    return ""


def _place(shape: tuple[int, ...], i: int) -> str:
    return str([int(k) for k in np.unravel_index(i, shape)])
