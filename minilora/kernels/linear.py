"""Twin of functional/linear.py: on CuPy the products go to cuBLAS as cuda/blas.py has it; on NumPy the pair itself."""

from __future__ import annotations

from collections.abc import Collection

from minilora import functional as F
from minilora.backend import Array
from minilora.kernels import cuda


def linear(x: Array, W: Array, b: Array | None = None) -> Array:
    """As functional.linear."""
    if not cuda.usable(x, W, b) or not _fit(x, W, b):
        return F.linear(x, W, b)
    y = product(x, W)
    if b is not None:
        y += b
    return y


def linear_backward(dy: Array, x: Array, W: Array, need: Collection[str] = ("dx", "dW", "db")) -> tuple[Array, Array, Array]:
    """As functional.linear_backward."""
    if not cuda.usable(dy, W):
        return F.linear_backward(dy, x, W, need)
    db = dy.sum(axis=0) if "db" in need else None
    dW = product(x.T, dy) if "dW" in need else None
    return product(dy, W.T) if "dx" in need else None, dW, db


def _fit(x: Array, W: Array, b: Array | None) -> bool:
    """Do the shapes? Where they do not, the pair has the words."""
    return x.ndim == W.ndim == 2 and x.shape[1] == W.shape[0] and (b is None or b.shape == (W.shape[1],))


def product(a: Array, b: Array) -> Array:
    """a @ b. A packed matrix (family/packed.py) has its own way."""
    return cuda.gemm(a, b) if cuda.usable(a, b) and isinstance(b, type(a)) else a @ b
