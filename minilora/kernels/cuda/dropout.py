"""Dropout whose mask is drawn and applied in one launch (dropout.cu); the same masks as the reference draws.

A key may also lie in the device's memory, as an array of no dimensions: a captured step (replay.py) then draws new masks at each replay.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import cuda

Key = Any  # an int, or a uint64 on the device


def dropout(x: Array, p: float, key: Key) -> tuple[Array, None]:
    """As functional.dropout."""
    return dropout_backward(x, p, key), None


def dropout_backward(dy: Array, p: float, key: Key) -> Array:
    """As functional.dropout_backward: the same function, of dy."""
    dy = get_xp(dy).ascontiguousarray(dy)
    return _draw(dy, get_xp(dy).empty_like(dy), p, key)


def dropout_mask(like: Array, shape: tuple[int, ...], p: float, key: Key) -> Array:
    """As functional.dropout_mask, where `like` lives and in its dtype."""
    return _draw(None, get_xp(like).empty(shape, dtype=like.dtype), p, key)


def _draw(x: Array | None, y: Array, p: float, key: Key) -> Array:
    """y = x mask, or the mask."""
    F.check_p(p)
    number, placed = (np.uint64(key % 2**64), cuda.NULL) if isinstance(key, int) else (np.uint64(0), key)
    least, scale = np.uint64(round(p * 2**24)), cuda.real_of(y)(1 / (1 - p))
    cuda.elementwise("dropout", "dropout", y.size, cuda.NULL if x is None else x, number, placed, least, scale, y, like=y)
    return y
