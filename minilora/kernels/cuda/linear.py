"""Dense layers and LoRA in products alone: a bias, the scale, and adding to what is there are part of each, gemm(a, b, out, alpha, beta).

Products go to cuBLAS as blas.py has it: factors are not copied.
Beside half-precision activations A and B are of float32: they are downcast for the products, and their gradients are summed in float32.
"""

from collections.abc import Collection
from typing import Any

from minilora import functional as F
from minilora.backend import Array, Matrix
from minilora.kernels import cuda
from minilora.kernels.cuda.pointwise import cast_two, lora_factors, rows_of
from minilora.kernels.half import is_half, upcast


def fits(x: Array, W: Array, *parameters: Any) -> bool:
    """Whether W has x's dtype, and parameters that in which sums over x are taken."""
    return cuda.alike(x, W) and cuda.real(x, *parameters)


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


def lora_linear(x: Array, W: Array, b: Array | None, A: Array, B: Array, s: float, mask: Array | None = None) -> tuple[Array, Array]:
    """As functional.lora_linear."""
    F.check_lora(W, A, B)
    if b is not None and is_half(x):  # y = x W + [u 1] [s B; b]: the bias costs no pass over y
        F.check_linear(x, W, b)
        A, B, wide = lora_factors(A, B, b, s, x)
        u = cuda.gemm(_masked(x, mask), A, wide[:, : A.shape[1]])
        return cuda.gemm(x, W, cuda.gemm(wide, B), 1, 1), u
    A, B = cast_two(A, B, x)
    y, u = linear(x, W, b)[0], product(_masked(x, mask), A)
    return cuda.gemm(u, B, y, s, 1), u


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
) -> tuple[Array | None, Array | None, Array | None]:
    """As functional.lora_linear_backward."""
    dB = cuda.gemm(u.T, dy, alpha=s, dtype=B.dtype) if "dB" in need else None
    if not {"dx", "dA"} & set(need):
        return None, None, dB
    A_, B_ = cast_two(A, B, dy) if "dx" in need else (A, B.astype(dy.dtype, copy=False))  # in dy's dtype
    du = cuda.gemm(dy, B_.T, alpha=s)
    dA = cuda.gemm(_masked(x, mask).T, du, dtype=A.dtype) if "dA" in need else None
    if "dx" not in need:
        return None, dA, dB
    dx = product(dy, W.T)
    if mask is None:
        return cuda.gemm(du, A_.T, dx, 1, 1), dA, dB
    dx += _masked(product(du, A_.T), mask)
    return dx, dA, dB


def _masked(x: Array, mask: Array | None) -> Array:
    return x if mask is None else (x * mask).astype(x.dtype, copy=False)
