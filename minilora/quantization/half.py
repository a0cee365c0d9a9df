"""Frozen weights in 16 bits: half the memory, and on a GPU products by tensor cores.

    y = x W      is taken as      s (x / s)_16 W_16,      s = max |x| / c,      c = 65504 / (m max |W|), but at most 256

where _16 rounds to 16 bits, and W is (m, n). float16's numbers end at 65504 and thin out below 6e-5; scaled so, no sum can overflow, and a
gradient of any size, however small, passes through: what is 1e-6 of the largest has an error of a few per cent, all else float16's own.
That takes the place of scaling the loss: there is no factor to be found and kept. bfloat16 has float32's range, and needs none.

What is trained, the norms, the softmax, the loss and the optimizer stay in float32, as do activations between products. On NumPy, which
multiplies 16-bit matrices without BLAS, a block of W's rows at a time is widened instead: there these are weights of half the size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.backend import Array, get_xp, to_backend
from minilora.kernels import cuda
from minilora.kernels.half import chunked_product
from minilora.quantization.packed import Packed

KINDS = ("float16", "bfloat16")
_LARGEST, END = 256.0, 65504.0  # of x after scaling, and of float16


class Half(Packed):
    """values (m, n) of a 16-bit dtype, `peak` the largest magnitude among them; `dtype` is that of what a product gives."""

    def __init__(self, values: Array, peak: float, dtype: Any = "float32") -> None:
        self.values, self.peak, self.dtype, self.shape, self.like = values, peak, np.dtype(dtype), tuple(values.shape), values

    @classmethod
    def of(cls, W: Array, kind: str, dtype: Any = "float32") -> Half:
        """W rounded to the nearest. Raises ValueError for an unknown kind, or where float16 would make infinities of it."""
        peak = float(abs(W).max())
        if kind == "float16" and peak > END:
            raise ValueError(f"a weight of shape {tuple(W.shape)} has numbers beyond float16's 65504; choose bfloat16.")
        return cls(W.astype(dtype_of(kind)), peak, dtype)

    @property
    def nbytes(self) -> int:
        return int(self.values.nbytes)

    @property
    def T(self) -> Half:
        return Half(self.values.T, self.peak, self.dtype)

    def __rmatmul__(self, x: Array) -> Array:
        xp = get_xp(x)
        if xp is np:
            return chunked_product(x, self.values)
        if self.values.dtype == np.float16 and len(x):
            largest = min(_LARGEST, END / (self.shape[0] * max(self.peak, 1e-30)))
            scale = xp.maximum(xp.abs(x).max(), 1e-30) / largest  # stays on the device
            return cuda.gemm((x / scale).astype(np.float16), self.values, dtype=x.dtype) * scale
        return cuda.gemm(x.astype(self.values.dtype), self.values, dtype=x.dtype)

    def dense(self) -> Array:
        return self.values.astype(self.dtype)

    def column_squares(self) -> Array:
        """The squared lengths of the columns (n,)."""
        return (self.dense() ** 2).sum(axis=0)

    def to_backend(self, backend: str, dtype: Any = None) -> Half:
        """The same, moved; `dtype` is of what products give."""
        return Half(to_backend(self.values, backend), self.peak, dtype or self.dtype)


def dtype_of(kind: str) -> Any:
    """The dtype. Raises ValueError for an unknown kind, ImportError where bfloat16 needs what is not installed."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of 16-bit weights; choose {' or '.join(KINDS)}.")
    if kind == "float16":
        return np.dtype(np.float16)
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError("bfloat16 needs ml_dtypes: pip install 'minilora[bf16]'") from None
    return np.dtype(ml_dtypes.bfloat16)
