"""A weight less a low-rank product, W - L R, as a matrix that is never formed.

PiSSA, OLoRA and LoRA-GA begin with an A B that is not zero, and take it off the weight so that the model begins as it was. Here the weight
is left alone: two thin products take the start off again, at 2 T r (m + n) more operations a pass. So the base model is still there to
the bit, no second m x n array is, and A B less its start is a plain LoRA of rank 2 r on the unchanged weight.
"""

from __future__ import annotations

from typing import Any

from minilora.backend import Array, as_like, get_xp
from minilora.kernels.linear import product


def column_squares(W: Array) -> Array:
    """sum_i W_ij^2 (n,), without an array of W's size."""
    return W.column_squares() if hasattr(W, "column_squares") else get_xp(W).einsum("ij,ij->j", W, W)


def dense(W: Array) -> Array:
    """W as an array, of float32 where its numbers are shorter: decompositions know no shorter ones."""
    W = W.dense() if hasattr(W, "dense") else W
    return W.astype("float32") if W.dtype.itemsize < 4 else W


class Residual:
    """W - L R.   Shapes: W (m, n), L (m, r), R (r, n). Has what a product asks of a matrix: x @ this, this @ y, .T, .shape, .dtype."""

    __array_ufunc__ = None  # so that x @ this asks this class
    ndim = 2

    def __init__(self, W: Array, L: Array, R: Array) -> None:
        self.W, self.L, self.R = W, L, R
        self.shape, self.dtype, self.like = W.shape, W.dtype, L

    @property
    def T(self) -> Residual:
        return Residual(self.W.T, self.R.T, self.L.T)

    def __rmatmul__(self, x: Array) -> Array:
        y = product(x, self.W)
        y -= product(product(x, self.L), self.R)
        return y

    def __matmul__(self, y: Array) -> Array:
        x = self.W @ y
        x -= self.L @ (self.R @ y)
        return x

    def column_squares(self) -> Array:
        """The squared lengths of the columns (n,)."""
        return column_squares(self.W) - (self.R * (2 * (self.L.T @ self.W) - (self.L.T @ self.L) @ self.R)).sum(axis=0)


class Offset:
    """The A and B that an adapter began with, times its scaling: what is taken off the weight."""

    def __init__(self, A: Array, B: Array, scaling: float) -> None:
        self.A, self.B, self.scaling = A, B, scaling

    def off(self, W: Array) -> Residual:
        """The matrix W - scaling A B."""
        self.A, self.B = (as_like(v, W).astype(W.dtype, copy=False) for v in (self.A, self.B))  # the layer may have moved
        return Residual(W, self.scaling * self.A, self.B)

    def product(self) -> Array:
        """scaling A B, formed."""
        return self.scaling * (self.A @ self.B)

    def joined(self, layer: Any) -> dict[str, Array]:
        """The adapter of rank 2 r that changes the weight as `layer` does: A B less the start is [A A0] [B; -B0], at the same scaling."""
        A, B = layer.lora_A.data, layer.lora_B.data
        xp = get_xp(A)
        A0, B0 = as_like(self.A, A).astype(A.dtype), as_like(self.B, B).astype(B.dtype)
        return {"lora_A": xp.concatenate([A, A0], axis=1), "lora_B": xp.concatenate([B, -B0])}
