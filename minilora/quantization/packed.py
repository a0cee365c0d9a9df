"""Frozen matrices that are kept in fewer bits than their products are taken in: NF4 (nf4.py), and 16 bits (half.py)."""

from __future__ import annotations

import math
from typing import Any

from minilora.backend import Array


class Packed:
    """A matrix (m, n) with what a product asks of one: x @ W, W @ y, .T, .shape, .dtype (of the products). Sums with it are dense."""

    __array_ufunc__ = None  # so that x @ this asks this class
    ndim = 2
    shape: tuple[int, int]

    def dense(self) -> Array:
        """The whole matrix, unpacked."""
        raise NotImplementedError(f"{type(self).__name__} has no dense.")

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def T(self) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no T.")

    def __matmul__(self, y: Array) -> Array:
        return (y.T @ self.T).T

    def __add__(self, other: Any) -> Array:
        return self.dense() + other

    def __sub__(self, other: Any) -> Array:
        return self.dense() - other

    def __getitem__(self, key: Any) -> Array:
        return self.dense()[key]

    def copy(self) -> Array:
        return self.dense()


def is_packed(value: Any) -> bool:
    return isinstance(value, Packed)
