"""Rotary positions (RoFormer, arXiv 2104.09864, section 3.2.2): queries and keys are rotated by an angle that grows with the position.

Then q_s . k_t depends on the positions s and t through s - t alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.backend import Array, constant, get_xp


def rotary_tables(positions: np.ndarray, d: int, theta: Any, like: Array, factor: float = 1.0) -> tuple[Array, Array]:
    """cos and sin (T, d / 2) of the angles position_t theta^(-2 i / d), for heads of d features; both times `factor`.

    theta: a number, or in place of theta^(-2 i / d) an array of d / 2 frequencies (models/rope.py).
    Computed in float64 on the host, then moved to where `like` lives, in its dtype: every layer of a model shares them.
    """
    if d < 2 or d % 2:
        raise ValueError(f"rotary: a head has {d} features; they are rotated in pairs, so their number must be even.")
    angles = positions[:, None] * (theta if np.ndim(theta) else theta ** (-np.arange(0, d, 2) / d))
    return constant((factor * np.cos(angles)).astype(like.dtype), like), constant((factor * np.sin(angles)).astype(like.dtype), like)


def rotary(x: Array, cos: Array, sin: Array) -> Array:
    """Each pair (a, b) of features of each head becomes (a cos - b sin, b cos + a sin).

    Shapes: x (T, H d) holds H heads in its columns, cos and sin (T, d / 2) -> y (T, H d).
    Pair i of a head is its features i and i + d / 2, as in transformers' Llama. In the original Llama and in GGUF files it is 2 i and
    2 i + 1: the same model with the columns of its projections of q and k in another order, which `formats/gguf.py` undoes.

    Nothing but the tables is needed backward.
    """
    y = check_rotary(x, cos, sin).empty_like(x)
    a, b = _pairs(x, cos.shape[1])
    y_a, y_b = _pairs(y, cos.shape[1])  # views into y
    cos, sin = cos[:, None, :], sin[:, None, :]  # one angle for all heads
    y_a[...] = a * cos - b * sin
    y_b[...] = b * cos + a * sin
    return y


def rotary_backward(dy: Array, cos: Array, sin: Array) -> Array:
    """dx: dy rotated back by the same angle. A rotation is orthogonal: its transpose is its inverse."""
    return rotary(dy, cos, -sin)


def check_rotary(x: Array, cos: Array, sin: Array) -> Any:
    """The module of the arrays. Raises ValueError unless x (T, H d) and cos and sin (T, d / 2) fit."""
    if x.ndim != 2 or cos.shape != sin.shape or cos.shape[0] != x.shape[0] or x.shape[1] % (2 * cos.shape[1]):
        raise ValueError(f"rotary: x has shape {x.shape}, cos {cos.shape} and sin {sin.shape}; they must be (T, H d) and (T, d / 2) each.")
    return get_xp(x, cos, sin)


def _pairs(x: Array, half: int) -> tuple[Array, Array]:
    """The first and the second of each pair, (T, H, d / 2) each, as views of x (T, H d)."""
    heads = x.reshape(x.shape[0], x.shape[1] // (2 * half), 2 * half)
    return heads[:, :, :half], heads[:, :, half:]
