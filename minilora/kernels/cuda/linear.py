"""Dense layers whose products go to cuBLAS as blas.py has it: factors are not copied, and a bias is part of the product."""

from __future__ import annotations

from collections.abc import Collection

from minilora import functional as F
from minilora.backend import Array, Matrix
from minilora.kernels import cuda
from minilora.kernels.cuda.pointwise import rows_of
from minilora.kernels.half import is_half, upcast


def product(x: Array, W: Array) -> Array:
    """x @ W."""
    return x @ W if isinstance(W, Matrix) else cuda.gemm(x, W)


def linear(x: Array, W: Array, b: Array | None = None) -> tuple[Array, None]:
    """As functional.linear."""
    F.check_linear(x, W, b)
    if b is not None and is_half(x):  # added before the sum is rounded
        return cuda.gemm(x, W, rows_of(b, len(x), x), 1, 1), None
    y = product(x, W)
    if b is not None:
        y += b
    return y, None


def linear_backward(
    dy: Array, x: Array | None, W: Array, need: Collection[str] = ("dx", "dW", "db")
) -> tuple[Array | None, Array | None, Array | None]:
    """As functional.linear_backward; dW and db are of float32 also in half precision."""
    db = upcast(dy).sum(axis=0) if "db" in need else None
    dW = cuda.gemm(x.T, dy, dtype=cuda.real_of(x)) if x is not None and "dW" in need else None
    return product(dy, W.T) if "dx" in need else None, dW, db
