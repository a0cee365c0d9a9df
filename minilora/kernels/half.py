"""Activations and frozen weights in 16 bits: what a kernel is given in float16 or bfloat16 it gives back so, and computes in float32.

On the device the CUDA sources and cuBLAS do that themselves. Elsewhere `in_float32` makes of a kernel one that widens what it is given,
and narrows what it gives: memory is saved, not time, and the result is the one that a device comes to, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.kernels import cuda

NARROW, WIDE = True, False  # of a result: in the dtype of the first argument, or in float32
CHUNK = 2**19  # numbers of a weight that are widened at a time


def is_half(x: Any) -> bool:
    """Is this an array of float16 or bfloat16? (ml_dtypes' bfloat16 is of kind "V".)"""
    dtype = getattr(x, "dtype", None)
    return dtype is not None and dtype.itemsize == 2 and dtype.kind in "fV"


def wide(x: Any) -> Any:
    """x in float32 where it has 16 bits, else x itself, whatever it is."""
    return x.astype(np.float32) if is_half(x) else x


def in_float32(*results: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a kernel take 16 bits. `results` says of each result NARROW or WIDE, in tuples and lists as they come (a list: of every item).

    On the device the kernel is called as it is, provided that its first argument has 16 bits. A weight called W is never widened whole.
    """
    pattern = results if len(results) > 1 else results[0]

    def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
        names = list(signature(f).parameters)
        W = names.index("W") if "W" in names else 0

        @wraps(f)
        def run(*args: Any, **kwargs: Any) -> Any:
            first = args[0]
            if first.dtype.itemsize > 2 and not is_half(args[W]):  # the rest is as the first
                return f(*args, **kwargs)
            if not any(map(is_half, args)) or (cuda.ENABLED and is_half(first) and get_xp(first) is not np):
                return f(*args, **kwargs)
            given = [Widened(x) if name == "W" and is_half(x) else _widened(x) for name, x in zip(names, args, strict=False)]
            with np.errstate(over="ignore"):  # beyond float16 there is infinity, which is told where a step is looked at
                return _narrowed(f(*given, **kwargs), pattern, first.dtype)

        return run

    return decorate


class Widened:
    """A 16-bit matrix (m, n) that takes part in products as one of float32; a chunk of that exists at a time."""

    __array_ufunc__ = None  # so that x @ this asks this class
    ndim, dtype = 2, np.dtype(np.float32)

    def __init__(self, values: Array) -> None:
        self.values = self.like = values
        self.shape = values.shape

    @property
    def T(self) -> Widened:
        return Widened(self.values.T)

    def __rmatmul__(self, x: Array) -> Array:
        return chunked_product(x, self.values)

    def __getitem__(self, key: Any) -> Array:
        return wide(self.values[key])


def chunked_product(x: Array, W: Array) -> Array:
    """x W in x's dtype, where as many of W's rows as lie in a chunk are made wide at a time; of a W that lies column by column, columns."""
    xp, (m, n) = get_xp(x, W), W.shape
    if W.flags.c_contiguous:
        step, y = max(1, CHUNK // n), xp.zeros((len(x), n), x.dtype)
        for a in range(0, m, step):
            y += x[:, a : a + step] @ W[a : a + step].astype(x.dtype)
        return y
    step, y = max(1, CHUNK // m), xp.empty((len(x), n), x.dtype)
    for a in range(0, n, step):
        y[:, a : a + step] = x @ W[:, a : a + step].astype(x.dtype)
    return y


def _widened(value: Any) -> Any:
    return type(value)(map(_widened, value)) if isinstance(value, (tuple, list)) else wide(value)


def _narrowed(value: Any, pattern: Any, dtype: Any) -> Any:
    if value is None or pattern is WIDE:
        return value
    if isinstance(pattern, list):
        return [_narrowed(v, pattern[0], dtype) for v in value]
    if isinstance(pattern, tuple):
        return tuple(_narrowed(v, p, dtype) for v, p in zip(value, pattern, strict=True))
    return value.astype(dtype, copy=False)
