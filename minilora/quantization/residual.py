"""A weight less a low-rank product, W - L R, as a matrix that is never formed.

PiSSA, OLoRA and LoRA-GA initialise A B to a product that is not zero, and subtract it from the weight so that the model starts unchanged.
Here the weight is left alone: two thin products subtract the initial A B, at 2 T r (m + n) more operations a pass. So the base model is
unchanged to the bit, no second m x n array exists, and A B less its initial value is a plain LoRA of rank 2 r on that weight.
"""

from __future__ import annotations

from typing import Any

from minilora.backend import Array, Matrix, as_like, get_xp
from minilora.kernels import product


def column_squares(W: Array) -> Array:
    """sum_i W_ij^2 (n,), without an array of W's size."""
    return W.column_squares() if isinstance(W, Matrix) else get_xp(W).einsum("ij,ij->j", W, W)


def dense(W: Array) -> Array:
    """W as an array, upcast to float32 from half precision, as decompositions need it."""
    W = W.dense() if isinstance(W, Matrix) else W
    return W.astype("float32") if W.dtype.itemsize < 4 else W


class Residual(Matrix):
    """W - L R.   Shapes: W (m, n), L (m, r), R (r, n)."""

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

    def dense(self) -> Array:
        return dense(self.W) - self.L @ self.R

    def column_squares(self) -> Array:
        """The squared lengths of the columns (n,)."""
        return column_squares(self.W) - (self.R * (2 * (self.L.T @ self.W) - (self.L.T @ self.L) @ self.R)).sum(axis=0)


class Offset:
    """The initial A and B of an adapter, times its scaling: what is subtracted from the weight."""

    def __init__(self, A: Array, B: Array, scaling: float) -> None:
        self.A, self.B, self.scaling = A, B, scaling

    def __deepcopy__(self, memo: dict[int, Any]) -> Offset:
        return self  # replicas share it, as they share weights

    def off(self, W: Array) -> Residual:
        """The matrix W - scaling A B."""
        self.A, self.B = (as_like(v, W).astype(W.dtype, copy=False) for v in (self.A, self.B))  # the layer may have moved
        return Residual(W, self.scaling * self.A, self.B)

    def product(self) -> Array:
        """scaling A B, formed."""
        return self.scaling * (self.A @ self.B)

    def joined(self, layer: Any) -> dict[str, Array]:
        """The adapter of rank 2 r that changes the weight as `layer` does: A B - A0 B0 = [A A0] [B; -B0], at the same scaling."""
        A, B = layer.lora_A.data, layer.lora_B.data
        xp = get_xp(A)
        A0, B0 = as_like(self.A, A).astype(A.dtype), as_like(self.B, B).astype(B.dtype)
        return {"lora_A": xp.concatenate([A, A0], axis=1), "lora_B": xp.concatenate([B, -B0])}
