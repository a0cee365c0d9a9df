"""Twin of functional/dropout.py: on CuPy the mask is drawn and applied in one launch; on NumPy the pair itself."""

from __future__ import annotations

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import cuda
from minilora.kernels.half import NARROW, in_float32


@in_float32(NARROW)
def dropout(x: Array, p: float, key: int) -> Array:
    """As functional.dropout, with the same masks."""
    if not cuda.usable(x) or not 0 <= p < 1:  # of a p beyond these the pair complains
        return F.dropout(x, p, key)
    x = get_xp(x).ascontiguousarray(x)
    y = get_xp(x).empty_like(x)
    least, scale = np.uint64(round(p * 2**24)), cuda.real_of(x)(1 / (1 - p))
    cuda.elementwise("dropout", "dropout", x.size, x, np.uint64(key % 2**64), least, scale, y)
    return y


def dropout_backward(dy: Array, p: float, key: int) -> Array:
    """As functional.dropout_backward: the same function of dy."""
    return dropout(dy, p, key)
