"""What the worked examples in the pages import: small random arrays, finite differences, and tables of both.

The loss of every worked example is L = sum(dy * y) for a fixed array dy of random numbers. Then dL/dy is dy exactly, whatever dy is, and a
gradient that is right for it is right for every loss that is computed from y.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

np.set_printoptions(precision=4, suppress=True, linewidth=100)


def numbers(seed: int) -> Callable[..., np.ndarray]:
    """draw(*shape): normal numbers with two decimals, so that a reader can repeat the arithmetic."""
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.normal(size=shape).round(2)


def numeric(loss: Callable[[], float], array: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """dL/d(array) by central differences: (L(a + h) - L(a - h)) / 2h, one number of `array` at a time."""
    gradient = np.empty(array.shape)
    for i in np.ndindex(array.shape):
        before = array[i]
        array[i] = before + h
        up = loss()
        array[i] = before - h
        gradient[i] = (up - loss()) / (2 * h)
        array[i] = before
    return gradient


def check(forward: Callable[[], Any], dy: Any, **gradients: tuple[np.ndarray, np.ndarray]) -> str:
    """Each gradient beside its finite differences; `gradients` are name=(array, its gradient by hand). Raises ValueError if they differ."""
    lines = [f"{'largest':<12}{'by hand':>12}{'differences':>14}    largest error, relative"]
    for name, (array, by_hand) in gradients.items():
        finite = numeric(lambda: float(np.sum(dy * forward())), array)
        error = float(abs(by_hand - finite).max() / max(abs(finite).max(), 1e-30))
        at = np.unravel_index(abs(finite).argmax(), finite.shape)
        label = f"d{name}[{', '.join(map(str, at))}]"
        lines.append(f"{label:<12}{by_hand[at]:>12.6f}{finite[at]:>14.6f}    {error:.0e}, of {by_hand.size} numbers")
        if error > 1e-6:
            raise ValueError(f"{name}: the gradient by hand and finite differences differ by {error:.1e}.")
    return "\n".join(lines)


def terms(name: str, *factors: Any) -> str:
    """One coordinate as the sum of products that it is: terms("dW[1, 0]", x[:, 1], dy[:, 0])."""
    columns = np.broadcast_arrays(*map(np.atleast_1d, factors))
    products = " + ".join(" * ".join(map(short, row)) for row in zip(*columns, strict=True))
    return f"{name} = {products} = {np.prod(columns, axis=0).sum():.6f}"


def short(x: float) -> str:
    """Four digits, with a negative number in parentheses: for sums that are written out."""
    return f"({x:.4g})" if x < 0 else f"{x:.4g}"
