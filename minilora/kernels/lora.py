"""Twins of functional/lora.py: the low-rank product is added to the dense one block by block, and the bias along with it.

What fits a block runs as the plain pair. On CuPy the scale, and adding to what is there, are part of a product: gemm(alpha, beta, out).
Beside activations of 16 bits A and B are of float32: for the products they are narrowed, their gradients are summed in float32.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import cuda
from minilora.kernels.blocks import BLOCK, row_blocks
from minilora.kernels.elementwise import cast_two
from minilora.kernels.half import NARROW, WIDE, in_float32
from minilora.kernels.linear import linear, product


@in_float32(NARROW, NARROW)
def lora_linear(x: Array, W: Array, b: Array | None, A: Array, B: Array, s: float, mask: Array | None = None) -> tuple[Array, Array]:
    """As functional.lora_linear."""
    if x.ndim == 2 and len(x) and cuda.usable(x, real=(A, B)):
        F.check_lora(W, A, B)
        A, B = cast_two(A, B, x)
        y, u = linear(x, W, b), product(_masked(x, mask), A)
        return cuda.gemm(u, B, y, s, 1), u
    if get_xp(x, W, A, B) is not np or x.ndim != 2 or x.dtype != A.dtype or len(x) * sum(W.shape) < BLOCK:
        return F.lora_linear(x, W, b, A, B, s, mask)
    F.check_lora(W, A, B)
    y = F.linear(x, W, None)
    u = (x if mask is None else x * mask) @ A
    if b is None:
        _add_product(y, s * u, B)
    else:  # y += [s u, 1] @ [B; b]: one pass for both
        r = u.shape[1]
        wide = np.ones((len(u), r + 1), u.dtype)
        np.multiply(u, s, out=wide[:, :r])
        _add_product(y, wide, np.concatenate([B, b[None]]))
    return y, u


@in_float32(NARROW, WIDE, WIDE)
def lora_linear_backward(
    dy: Array,
    x: Array,
    u: Array,
    W: Array,
    A: Array,
    B: Array,
    s: float,
    mask: Array | None = None,
    need: Collection[str] = ("dx", "dA", "dB"),
) -> tuple[Array, Array, Array]:
    """As functional.lora_linear_backward."""
    if len(dy) and cuda.usable(dy, real=(A, B)):
        return _backward_on_device(dy, x, u, W, A, B, s, mask, need)
    if get_xp(dy) is not np or mask is not None or len(dy) * sum(W.shape) < BLOCK:
        return F.lora_linear_backward(dy, x, u, W, A, B, s, mask, need)
    dB = (s * u).T @ dy if "dB" in need else None
    if not {"dx", "dA"} & set(need):
        return None, None, dB
    du = s * (dy @ B.T)
    dA = x.T @ du if "dA" in need else None
    dx = dy @ W.T if "dx" in need else None
    if dx is not None:
        _add_product(dx, du, A.T)
    return dx, dA, dB


def _backward_on_device(
    dy: Array, x: Array, u: Array, W: Array, A: Array, B: Array, s: float, mask: Array | None, need: Collection[str]
) -> tuple[Array | None, Array | None, Array | None]:
    dB = cuda.gemm(u.T, dy, alpha=s, dtype=B.dtype) if "dB" in need else None
    if not {"dx", "dA"} & set(need):
        return None, None, dB
    A16, B16 = cast_two(A, B, dy) if "dx" in need else (A, _as(dy, B))
    du = cuda.gemm(dy, B16.T, alpha=s)
    dA = cuda.gemm(_masked(x, mask).T, du, dtype=A.dtype) if "dA" in need else None
    if "dx" not in need:
        return None, dA, dB
    dx = product(dy, W.T)
    if mask is None:
        return cuda.gemm(du, A16.T, dx, 1, 1), dA, dB
    dx += _masked(product(du, A16.T), mask)
    return dx, dA, dB


def _as(x: Array, A: Array) -> Array:
    """A in x's dtype, as products have factors of one."""
    return A if A.dtype == x.dtype else A.astype(x.dtype)


def _masked(x: Array, mask: Array | None) -> Array:
    return x if mask is None else (x * mask).astype(x.dtype, copy=False)


def _add_product(y: np.ndarray, u: np.ndarray, B: np.ndarray) -> None:
    """y += u @ B, without an array of the size of y."""
    product: np.ndarray | None = None
    for at in row_blocks(*y.shape):
        if product is None:
            product = np.empty((at.stop - at.start, y.shape[1]), y.dtype)
        part = np.matmul(u[at], B, out=product[: at.stop - at.start])
        y[at] += part
