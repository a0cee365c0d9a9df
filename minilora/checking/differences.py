"""Derivatives from values of a function: central differences, with an estimate of their error."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minilora.backend import Array

# Relative to the size of the argument. With the first, truncation, h^4, and rounding, eps / h, are both about 1e-12 for a function
# that varies on the scale of its argument. The others are for a function that varies faster, or has a kink nearby.
STEPS = (1e-4, 1e-5, 1e-6)


class Derivative(NamedTuple):
    """`value`; `error`, a bound on its absolute error; `kink`: no step was small enough for a smooth function."""

    value: float
    error: float
    kink: bool


def derivative(f: Callable[[float], Array], c: Array, rounding: float) -> Derivative:
    """d sum(c f(t)) / dt at t = 0. `rounding` is the absolute error of sum(c f(t)).

    Two central differences, with steps h and 2h, are combined so that their error is of order h^4. Where f is smooth they agree
    to order h^2. Where they do not, h is too large, and the next step is tried. Near a kink they never agree; at a kink the
    differences to the right and to the left differ. The value is NaN where f is not finite within the smallest step.
    """
    for h in STEPS:
        y = {s: f(s * h) for s in (-2, -1, 1, 2)}
        far, near, right, left = (  # the difference is taken before the sum: less is lost to rounding
            float((c * (y[a] - y[b])).sum()) / ((a - b) * h) for a, b in ((2, -2), (1, -1), (2, 1), (-1, -2))
        )
        value, noise, size, apart = (4 * near - far) / 3, rounding / h, max(abs(right), abs(left)), abs(near - far)
        bent = abs(right - left) > 0.1 * size + noise
        if apart <= 1e-7 * size + noise and not bent:
            return Derivative(value, noise, False)
    kink = (apart > 1e-4 * size + noise or bent) and math.isfinite(value)
    return Derivative(value, max(noise, apart), kink)


def relative_error(a: np.ndarray, n: np.ndarray, floor: float) -> float:
    """||a - n|| over the larger norm, or over `floor` where both are smaller. Infinite where it is not finite."""
    scale = max(float(np.linalg.norm(n)), float(np.linalg.norm(a)), floor)
    error = float(np.linalg.norm(a - n))
    if not np.isfinite(error):
        return float("inf")
    return error / scale if scale > 0 else 0.0
