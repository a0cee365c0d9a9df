"""Twin of functional/linear.py: on CuPy the products go to cuBLAS as cuda/blas.py has it; on NumPy the pair itself."""

from __future__ import annotations

from collections.abc import Collection

from minilora import functional as F
from minilora.backend import Array
from minilora.kernels import cuda
from minilora.kernels.elementwise import rows_of
from minilora.kernels.half import NARROW, WIDE, in_float32, is_half, wide


def linear(x: Array, W: Array, b: Array | None = None) -> Array:
    """As functional.linear. y is of x's dtype; x of 16 bits beside a W of float32, a head that is trained, is widened, and so is y."""
    return _linear(x if is_half(W) else wide(x), W, b)


def linear_backward(
    dy: Array, x: Array | None, W: Array, need: Collection[str] = ("dx", "dW", "db")
) -> tuple[Array | None, Array | None, Array | None]:
    """As functional.linear_backward. dx is of x's dtype where x was saved, else of dy's; dW and db are never of 16 bits."""
    if is_half(W) or not (is_half(dy) or is_half(x)):
        return _linear_backward(dy, x, W, need)
    dx, dW, db = _linear_backward(wide(dy), wide(x), W, need)
    return dx if x is None or dx is None else dx.astype(x.dtype, copy=False), dW, db


@in_float32(NARROW)
def product(x: Array, W: Array) -> Array:
    """x @ W. A packed matrix (quantization/packed.py) has its own way."""
    return cuda.gemm(x, W) if cuda.usable(x, W) and isinstance(W, type(x)) else x @ W


@in_float32(NARROW)
def _linear(x: Array, W: Array, b: Array | None) -> Array:
    if not cuda.usable(x, W, real=(b,)) or not _fit(x, W, b):
        return F.linear(x, W, b)
    if b is not None and is_half(x):  # added before the sum is rounded
        return cuda.gemm(x, W, rows_of(b, len(x), x), 1, 1)
    y = product(x, W)
    if b is not None:
        y += b
    return y


@in_float32(NARROW, WIDE, WIDE)
def _linear_backward(dy: Array, x: Array | None, W: Array, need: Collection[str]) -> tuple[Array | None, Array | None, Array | None]:
    if not cuda.usable(dy, x, W):
        return F.linear_backward(dy, x, W, need)
    db = wide(dy).sum(axis=0) if "db" in need else None
    dW = product(x.T, dy) if x is not None and "dW" in need else None
    return product(dy, W.T) if "dx" in need else None, dW, db


def _fit(x: Array, W: Array, b: Array | None) -> bool:
    """Do the shapes? Where they do not, the pair has the words."""
    return x.ndim == W.ndim == 2 and x.shape[1] == W.shape[0] and (b is None or b.shape == (W.shape[1],))
