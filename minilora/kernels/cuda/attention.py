"""Attention by groups of sequences (kernels/grouped.py) on the GPU: its steps (softmax.cu)."""

import sys
from functools import partial
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.kernels import cuda, grouped
from minilora.kernels.half import is_half

product = cuda.gemm


def scores(a: Array, b: Array) -> Array:
    """a b, in float32 of factors of half precision."""
    return cuda.gemm(a, b, dtype=np.float32 if is_half(a) else a.dtype)


def weights(S: Array, begin: int, first: Array | None, last: Array, dtype: Any) -> tuple[Array, Array | None]:
    """E = exp(S - max) in place of S, and 1 / sum; of queries in half precision P, in their dtype, and None. See numpy/attention.py."""
    xp, (n, G, rows, e), t = get_xp(S), S.shape, last.shape[1]
    seen = cuda.NULL if first is None else xp.ascontiguousarray(first), xp.ascontiguousarray(last)
    args = S, *seen, np.int32(begin), np.int32(G * rows), np.int32(t), np.int32(e)
    if dtype != S.dtype:
        P = xp.empty(S.shape, dtype=dtype)
        cuda.rowwise("softmax", "masked_exp", n * G * rows, e, *args, cuda.NULL, P, like=P)
        return P, None
    inverse = xp.empty((n, G, rows, 1), dtype=S.dtype)
    cuda.rowwise("softmax", "masked_exp", n * G * rows, e, *args, inverse, cuda.NULL)
    return S, inverse


def through_softmax(dS: Array, E: Array, inverse: Array | None) -> Array:
    """dS = E (dS - D'), D' = (row sum of E * dS) / sum, in place, or new where E is of half precision."""
    xp, n = get_xp(dS), dS.shape[-1]
    new = xp.empty(dS.shape, dtype=E.dtype) if inverse is None else None
    args = dS, E, cuda.NULL if inverse is None else inverse, np.int32(n), cuda.NULL if new is None else new
    cuda.rowwise("softmax", "softmax_backward", dS.size // n, n, *args, like=E)
    return dS if new is None else new


attention, attention_backward = (partial(f, sys.modules[__name__]) for f in (grouped.attention, grouped.attention_backward))
