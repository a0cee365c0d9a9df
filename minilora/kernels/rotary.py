"""Twin of functional/rotary.py: one launch on CuPy; on NumPy the pair itself."""

from __future__ import annotations

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import cuda
from minilora.kernels.half import NARROW, in_float32


@in_float32(NARROW)
def rotary(x: Array, cos: Array, sin: Array, interleaved: bool = False) -> Array:
    """As functional.rotary."""
    return _turned(x, cos, sin, 1, interleaved) if _fit(x, cos, sin) else F.rotary(x, cos, sin, interleaved)


@in_float32(NARROW)
def rotary_backward(dy: Array, cos: Array, sin: Array, interleaved: bool = False) -> Array:
    """As functional.rotary_backward."""
    return _turned(dy, cos, sin, -1, interleaved) if _fit(dy, cos, sin) else F.rotary_backward(dy, cos, sin, interleaved)


def _fit(x: Array, cos: Array, sin: Array) -> bool:
    """On the device, and of shapes that fit; for what does not, the pair has the words."""
    shapes_fit = x.ndim == 2 and cos.shape == sin.shape == (x.shape[0], cos.shape[-1]) and x.shape[1] % (2 * cos.shape[1]) == 0
    return cuda.usable(x, real=(cos, sin)) and shapes_fit


def _turned(x: Array, cos: Array, sin: Array, sign: int, interleaved: bool) -> Array:
    xp = get_xp(x)
    x, cos, sin = map(xp.ascontiguousarray, (x, cos, sin))
    half = cos.shape[1]
    y = xp.empty_like(x)
    given = (x, cos, sin, cuda.real_of(x)(sign), np.int32(x.shape[1] // (2 * half)), np.int32(half), np.int32(interleaved), y)
    cuda.elementwise("rotary", "rotary", x.size // 2, *given)
    return y
