"""Rotary positions in one launch (rotary.cu)."""

from __future__ import annotations

import numpy as np

from minilora import functional as F
from minilora.backend import Array
from minilora.kernels import cuda


def rotary(x: Array, cos: Array, sin: Array, interleaved: bool = False) -> tuple[Array, None]:
    """As functional.rotary."""
    return _rotate(x, cos, sin, 1, interleaved), None


def rotary_backward(dy: Array, cos: Array, sin: Array, interleaved: bool = False) -> Array:
    """As functional.rotary_backward."""
    return _rotate(dy, cos, sin, -1, interleaved)


def _rotate(x: Array, cos: Array, sin: Array, sign: int, interleaved: bool) -> Array:
    xp = F.check_rotary(x, cos, sin)
    x, cos, sin = map(xp.ascontiguousarray, (x, cos, sin))
    half = cos.shape[1]
    y = xp.empty_like(x)
    args = (x, cos, sin, cuda.real_of(x)(sign), np.int32(x.shape[1] // (2 * half)), np.int32(half), np.int32(interleaved), y)
    cuda.elementwise("rotary", "rotary", x.size // 2, *args)
    return y
