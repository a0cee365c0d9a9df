"""Operations on each element, in one launch: sums (elementwise.cu), activations, dropout, rotary positions, AdamW (files of these names).

CuPy's own kernels move one number a thread, 2 bytes in half precision; those of elementwise.cu and activations.cu move 16 bytes.
"""

import math
from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import cuda


def of_one_shape(x: Array, y: Array) -> bool:
    """Whether `swiglu` has a kernel for these arrays."""
    return cuda.alike(x, y) and x.shape == y.shape


def of_two(x: Array, y: Array) -> bool:
    """Whether `add` and `multiply` have a kernel for these arrays."""
    return of_one_shape(x, y) and x.flags.c_contiguous and y.flags.c_contiguous


def add(x: Array, y: Array) -> Array:
    """x + y."""
    return _of_two("add", x, y)


def multiply(x: Array, y: Array) -> Array:
    """x * y."""
    return _of_two("multiply", x, y) if of_two(x, y) else x * y


def _of_two(name: str, x: Array, y: Array) -> Array:
    z = get_xp(x).empty(x.shape, dtype=x.dtype)
    cuda.elementwise("elementwise", name, x.size, x, y, z, each=16 // x.itemsize)
    return z


def rows_of(b: Array, rows: int, like: Array) -> Array:
    """(rows, n) in the dtype of `like`, every row the bias b (n,), which has the dtype of its sums."""
    xp, n, pack = get_xp(b, like), len(b), 16 // like.itemsize
    y = xp.empty((rows, n), dtype=like.dtype)
    args = xp.ascontiguousarray(b), y, np.int64(rows), np.int32(n)
    cuda.rowwise("elementwise", "fill_rows", -(-rows // 4), -(-n // pack), *args, like=like)
    return y


def cast_two(A: Array, B: Array, like: Array) -> tuple[Array, Array]:
    """A and B in the dtype of `like`, in one launch."""
    if A.dtype == like.dtype:
        return A, B
    if not (A.flags.c_contiguous and B.flags.c_contiguous):
        return A.astype(like.dtype), B.astype(like.dtype)
    xp = get_xp(A, B, like)
    a, b = xp.empty(A.shape, dtype=like.dtype), xp.empty(B.shape, dtype=like.dtype)
    cuda.elementwise("elementwise", "cast_two", A.size + B.size, A, B, a, b, np.int64(A.size), like=like)
    return a, b


def lora_factors(A: Array, B: Array, b: Array, s: float, x: Array) -> tuple[Array, Array, Array]:
    """A (m, r), [s B; b; 0] (r + k, n) and [? 1 0] (T, r + k) in x's dtype, r + k a multiple of 8; ? (T, r) is to be written."""
    xp, (r, n), more = get_xp(A, B, b, x), B.shape, 8 - B.shape[0] % 8
    A16, B16, u = (xp.empty(shape, dtype=x.dtype) for shape in (A.shape, (r + more, n), (len(x), r + more)))
    A, B, b = map(xp.ascontiguousarray, (A, B, b))
    args = A, B, b, np.float32(s), A16, B16, u, np.int64(A.size), np.int32(r), np.int32(more), np.int32(n)
    cuda.elementwise("elementwise", "lora_factors", A.size + B16.size + len(x) * more, *args, like=x)
    return A16, B16, u


def _with_derivative(name: str, x: Array, keep: bool = True) -> tuple[Array, Array | None]:
    """y = f(x), saved f'(x), which takes no more memory than x."""
    xp = get_xp(x)
    x = xp.ascontiguousarray(x)
    y, derivative = xp.empty_like(x), xp.empty_like(x) if keep else None
    cuda.elementwise("activations", name, x.size, x, y, cuda.NULL if derivative is None else derivative, each=16 // x.itemsize)
    return y, derivative


gelu, gelu_tanh, silu = (partial(_with_derivative, name) for name in ("gelu", "gelu_tanh", "silu"))


def activation_backward(dy: Array, derivative: Array) -> Array:
    """dx = dy f'(x)."""
    return multiply(dy, derivative)


gelu_backward = gelu_tanh_backward = silu_backward = activation_backward


def swiglu(g: Array, u: Array, keep: bool = True) -> tuple[Array, tuple[Array, Array] | None]:
    """y = silu(g) * u, saved u silu'(g), which is dy / dg, and silu(g), which is dy / du."""
    xp = get_xp(g, u)
    g, u = xp.ascontiguousarray(g), xp.ascontiguousarray(u)
    y, *kept = (xp.empty_like(g) for _ in range(3 if keep else 1))
    cuda.elementwise("activations", "swiglu", g.size, g, u, y, *(kept or (cuda.NULL, cuda.NULL)), each=16 // g.itemsize)
    return y, (kept[1], kept[0]) if keep else None


def swiglu_backward(dy: Array, saved: tuple[Array, Array], need: Collection[str] = ("dg", "du")) -> tuple[Array | None, Array | None]:
    """dg = dy u silu'(g),   du = dy silu(g)."""
    by_g, by_u = saved
    return multiply(dy, by_g) if "dg" in need else None, multiply(dy, by_u) if "du" in need else None


def dropout(x: Array, p: float, key: Any) -> tuple[Array, None]:
    """As functional.dropout, with the same masks. A key may also lie in the device's memory, as a uint64 array of no dimensions: a captured
    step (replay.py) then draws new masks at each replay."""
    return dropout_backward(x, p, key), None


def dropout_backward(dy: Array, p: float, key: Any) -> Array:
    """As functional.dropout_backward: the same function, of dy."""
    dy = get_xp(dy).ascontiguousarray(dy)
    return _draw(dy, get_xp(dy).empty_like(dy), p, key)


def dropout_mask(like: Array, shape: tuple[int, ...], p: float, key: Any) -> Array:
    """As functional.dropout_mask."""
    return _draw(None, get_xp(like).empty(shape, dtype=like.dtype), p, key)


def _draw(x: Array | None, y: Array, p: float, key: Any) -> Array:
    """y = x mask, or the mask."""
    F.check_p(p)
    number, placed = (np.uint64(key % 2**64), cuda.NULL) if isinstance(key, int) else (np.uint64(0), key)
    least, scale = np.uint64(round(p * 2**24)), cuda.real_of(y)(1 / (1 - p))
    cuda.elementwise("dropout", "dropout", y.size, cuda.NULL if x is None else x, number, placed, least, scale, y, like=y)
    return y


def rotary(x: Array, cos: Array, sin: Array, sign: int = 1) -> tuple[Array, None]:
    """As functional.rotary; backward is the same with sign -1."""
    xp = F.check_rotary(x, cos, sin)
    x, cos, sin = map(xp.ascontiguousarray, (x, cos, sin))
    half, y = cos.shape[1], xp.empty_like(x)
    args = (x, cos, sin, cuda.real_of(x)(sign), np.int32(x.shape[1] // (2 * half)), np.int32(half), y)
    cuda.elementwise("rotary", "rotary", x.size // 2, *args)
    return y, None


def rotary_backward(dy: Array, cos: Array, sin: Array) -> Array:
    """As functional.rotary_backward."""
    return rotary(dy, cos, sin, -1)[0]


def adamw(w: Array, g: Array, m: Array, v: Array, rates: Any, decays: Any, step: F.AdamStep) -> None:
    """As functional.adamw, in place."""
    f = w.dtype.type
    scales = ((rates, step.lr), (decays, step.weight_decay))
    (rates, lr), (decays, decay) = ((x, f(y)) if getattr(x, "ndim", 0) else (cuda.NULL, f(x * y)) for x, y in scales)
    numbers = (step.b1, step.b2, 1 - step.b1, 1 - step.b2, step.c1, math.sqrt(step.c2), step.eps)
    args = (w, g, m, v, rates, decays, lr, decay, *map(f, numbers), np.int32(step.decoupled))
    cuda.elementwise("adamw", "adamw", w.size, *args)
