"""Rows of a table, one for each token; and some rows of a matrix: those that a head reads, or that have a label."""

from __future__ import annotations

import numpy as np

from minilora.backend import Array, as_like, constant, get_xp


def embedding(ids: Array, E: Array) -> Array:
    """y_t = E[ids_t].   Shapes: ids (T,) integers, E (V, d) -> y (T, d). Saved: ids.

    ids may stay on the host: they are checked there, then moved (T integers, no synchronisation). Ids on a device are not checked, as
    reading them back would synchronise; CuPy wraps a bad one silently, so check them while they are on the host.
    """
    check_ids(ids, E.shape[0], "embedding")
    return E[as_like(ids, E)]


def embedding_backward(dy: Array, ids: Array, E: Array, padding_idx: int | None = None) -> Array:
    """dE[v] = sum of dy_t over the tokens t with ids_t = v; rows that no token read stay zero, and so does `padding_idx`. dE (V, d).

    On a GPU the sum is made of atomic additions, in no fixed order: there it repeats to rounding, not to the bit.
    """
    xp = get_xp(dy, E)
    dE = xp.zeros(E.shape, dtype=dy.dtype)
    xp.add.at(dE, as_like(ids, E), dy)  # y = E[ids]: a row read twice collects twice
    if padding_idx is not None:
        dE[padding_idx] = 0
    return dE


def check_ids(ids: Array, count: int, what: str) -> None:
    """Raise unless ids (T,) are integers in [0, count). Ids on a device are not read, see `embedding`."""
    if getattr(ids, "ndim", None) != 1 or ids.dtype.kind not in "iu":
        raise TypeError(f"{what}: ids must be a one-dimensional integer array, got {getattr(ids, 'dtype', type(ids).__name__)}.")
    if isinstance(ids, np.ndarray) and ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < count):
        at = int(np.flatnonzero((ids < 0) | (ids >= count))[0])
        raise ValueError(f"{what}: id {int(ids[at])} at position {at} is outside 0 to {count - 1}.")


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
