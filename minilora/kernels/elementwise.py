"""Sums and products of two activations of one shape, rows that begin as a bias, A and B in the activations' dtype: cuda/elementwise.cu.

CuPy's own kernels move one number a thread, 2 bytes in half precision; these move 16. Where a kernel does not apply, on NumPy and for
arrays that are not contiguous, the operator itself runs: the values are the same to the bit.
"""

from __future__ import annotations

import numpy as np

from minilora.backend import Array, get_xp
from minilora.kernels import cuda


def add(x: Array, y: Array) -> Array:
    """x + y."""
    return _of_two("add", x, y) if _fit(x, y) else x + y


def multiply(x: Array, y: Array) -> Array:
    """x * y."""
    return _of_two("multiply", x, y) if _fit(x, y) else x * y


def rows_of(b: Array, rows: int, like: Array) -> Array:
    """(rows, n) in the dtype of `like`, every row the bias b (n,), which has the dtype that is computed in."""
    xp, n = get_xp(b, like), len(b)
    y = xp.empty((rows, n), dtype=like.dtype)
    pack = 16 // like.itemsize
    blocks, width = -(-rows // 4), -(-n // pack)
    cuda.rowwise("elementwise", "fill_rows", blocks, width, xp.ascontiguousarray(b), y, np.int64(rows), np.int32(n), like=like)
    return y


def cast_two(A: Array, B: Array, like: Array) -> tuple[Array, Array]:
    """A and B in the dtype of `like`, in one launch. They have the dtype that arrays of that one are computed in."""
    if A.dtype == like.dtype:
        return A, B
    if not (A.flags.c_contiguous and B.flags.c_contiguous):
        return A.astype(like.dtype), B.astype(like.dtype)
    xp = get_xp(A, B, like)
    a, b = xp.empty(A.shape, dtype=like.dtype), xp.empty(B.shape, dtype=like.dtype)
    cuda.elementwise("elementwise", "cast_two", A.size + B.size, A, B, a, b, np.int64(A.size), like=like)
    return a, b


def _fit(x: Array, y: Array) -> bool:
    return cuda.usable(x, y) and x.shape == y.shape and x.flags.c_contiguous and y.flags.c_contiguous


def _of_two(name: str, x: Array, y: Array) -> Array:
    z = get_xp(x).empty(x.shape, dtype=x.dtype)
    cuda.elementwise("elementwise", name, x.size, x, y, z, each=16 // x.itemsize)
    return z
