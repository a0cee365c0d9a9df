"""Softmax over the last axis."""

from __future__ import annotations

from minilora.backend import Array, get_xp


def softmax(x: Array) -> Array:
    """y_i = exp(x_i) / sum_j exp(x_j), over the last axis; any shape.

    The row's maximum is subtracted first: the result is the same and exp never overflows. y is saved.
    """
    e = get_xp(x).exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_backward(dy: Array, y: Array) -> Array:
    """dx_i = y_i (dy_i - sum_j dy_j y_j): raising one input lowers all the other outputs."""
    return y * (dy - (dy * y).sum(axis=-1, keepdims=True))
