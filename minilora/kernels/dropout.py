"""Twin of functional/dropout.py: on CuPy the mask is drawn and applied in one launch; on NumPy the pair itself.

There a key may also lie in the device's memory, as an array of no dimensions: a recorded step (training/recorded.py) draws other masks
each time that it is launched.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import cuda
from minilora.kernels.half import NARROW, in_float32

Key = Any  # an int, or a uint64 on the device


@in_float32(NARROW)
def dropout(x: Array, p: float, key: Key) -> Array:
    """As functional.dropout, with the same masks."""
    if not cuda.usable(x) or not 0 <= p < 1:  # of a p beyond these the pair complains
        return F.dropout(x, p, key)
    x = get_xp(x).ascontiguousarray(x)
    return _drawn(x, get_xp(x).empty_like(x), p, key)


def dropout_backward(dy: Array, p: float, key: Key) -> Array:
    """As functional.dropout_backward: the same function of dy."""
    return dropout(dy, p, key)


def dropout_mask(shape: tuple[int, ...], p: float, key: Key, like: Array) -> Array:
    """As functional.dropout_mask, where `like` lives and in its dtype."""
    if not cuda.usable(like) or not 0 <= p < 1:
        return F.dropout_mask(shape, p, key, get_xp(like), like.dtype)
    return _drawn(None, get_xp(like).empty(shape, dtype=like.dtype), p, key)


def _drawn(x: Array | None, y: Array, p: float, key: Key) -> Array:
    """y = x mask, or the mask."""
    number, placed = (np.uint64(key % 2**64), cuda.NULL) if isinstance(key, int) else (np.uint64(0), key)
    least, scale = np.uint64(round(p * 2**24)), cuda.real_of(y)(1 / (1 - p))
    cuda.elementwise("dropout", "dropout", y.size, cuda.NULL if x is None else x, number, placed, least, scale, y, like=y)
    return y
