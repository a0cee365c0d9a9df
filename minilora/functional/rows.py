"""Some rows of a matrix: those that a head reads, or that have a label."""

from __future__ import annotations

import numpy as np

from minilora.backend import Array, constant, get_xp


def take_rows(x: Array, rows: np.ndarray | None) -> Array:
    """y_i = x[rows_i].   x (T, n), rows (R,) distinct and on the host -> y (R, n); None is all rows, x itself. Saved: rows."""
    return x if rows is None else x[constant(rows, x)]


def take_rows_backward(dy: Array, rows: np.ndarray | None, T: int) -> Array:
    """dx (T, n): dy in the rows that were taken, zero in the others, which nothing read."""
    if rows is None:
        return dy
    dx = get_xp(dy).zeros((T, dy.shape[1]), dtype=dy.dtype)
    dx[constant(rows, dy)] = dy  # y = x[rows]
    return dx
