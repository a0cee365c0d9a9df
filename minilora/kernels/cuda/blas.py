"""Products by cuBLAS itself, through NVIDIA's bindings (nvmath-python), where they are installed; else by CuPy's own calls.

CuPy copies a factor whose rows or columns do not follow each other, gives a product the dtype of its factors, has no product of 16-bit
numbers with a float32 result, and refuses all of them while a step is recorded (replay.py). Here none of that holds.

cuBLAS counts column by column. What lies row by row as C = A B is to it C^T = B^T A^T: the factors change places, and nothing is turned.
"""

from __future__ import annotations

import os
import warnings
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp

_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType_t
_FLOAT32, _TF32, _FLOAT64 = 68, 77, 70  # cublasComputeType_t: what sums are taken in
_DEFAULT_ALGORITHM = -1
_WORKSPACE = 2**25  # bytes: what NVIDIA advises for Hopper; our own, as a recorded step must not allocate any


def gemm(a: Array, b: Array, out: Array | None = None, alpha: float = 1.0, beta: float = 0.0, dtype: Any = None) -> Array:
    """out = alpha a b + beta out, in one launch: scaling a product, and adding it to what is there, cost nothing.

    a (m, k), b (k, n) -> (m, n), or stacks of matrices (..., m, k), (..., k, n) -> (..., m, n), of one dtype. Without `out` the result
    is new, of `dtype` (default: the factors'); 16-bit factors may give float32. Sums are taken in float32, or in float64 of float64.
    """
    xp = get_xp(a, b, out)
    if out is None:
        shape = (*a.shape[:-1], b.shape[-1])
        out = xp.empty(shape, dtype=dtype or a.dtype)
        beta = 0.0
    if a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2] or out.shape != (*a.shape[:-1], b.shape[-1]) or a.dtype != b.dtype:
        raise ValueError(f"gemm: {a.shape} {a.dtype} and {b.shape} {b.dtype} do not make {out.shape}.")
    if not out.size:
        return out
    if not a.shape[-1]:  # an empty sum
        out[...] = beta * out if beta else 0
        return out
    by = _by_cupy if bindings() is None else _by_cublas
    by(xp, a, b, out, alpha, beta)
    return out


@cache
def bindings() -> Any:
    """nvmath.bindings.cublas; None where it is not installed, or cannot be used (a warning says so), and with MINILORA_BLAS=cupy."""
    if os.environ.get("MINILORA_BLAS") == "cupy":
        return None
    try:
        from nvmath.bindings import cublas

        cublas.destroy(cublas.create())
    except ImportError:
        return None
    except Exception as error:  # a library that is not found, or of another CUDA; its errors have no common class
        warnings.warn(f"products go by CuPy's own calls, as NVIDIA's bindings cannot be used: {' '.join(str(error).split())}", stacklevel=2)
        return None
    return cublas


def _by_cublas(xp: Any, a: Array, b: Array, out: Array, alpha: float, beta: float) -> None:
    target = out if _plain(out) else out.copy()
    (a, turn_a), (b, turn_b) = _factor(xp, a), _factor(xp, b)
    blas, float64, (m, n) = bindings(), a.dtype == np.float64, target.shape[-2:]
    compute = _FLOAT64 if float64 else _TF32 if tf32() and a.dtype == np.float32 else _FLOAT32
    scale, add = (_number(float(value), float64)[1] for value in (alpha, beta))
    shapes = (_handle(xp), turn_b, turn_a, n, m, a.shape[-1], scale)
    if out.ndim == 2:
        blas.gemm_ex(*shapes, *_place(b, turn_b), *_place(a, turn_a), add, *_place(target), compute, _DEFAULT_ALGORITHM)
    else:
        places = [(*_place(x, turn), _step(x)) for x, turn in ((b, turn_b), (a, turn_a), (target, 0))]
        count = target.size // (m * n)
        blas.gemm_strided_batched_ex(*shapes, *places[0], *places[1], add, *places[2], count, compute, _DEFAULT_ALGORITHM)
    if target is not out:
        out[...] = target


def _factor(xp: Any, x: Array) -> tuple[Array, int]:
    """(x, is it turned): a matrix whose rows, or whose columns, do not follow each other is copied."""
    if _plain(x):
        return x, 0
    return (x, 1) if _plain(x.swapaxes(-1, -2)) else (xp.ascontiguousarray(x), 0)


def _place(x: Array, turned: int = 0) -> tuple[int, int, int]:
    """(where it lies, its type, the distance between its rows, or between its columns)."""
    axis = -1 if turned else -2
    apart = x.strides[axis] // x.itemsize if x.shape[axis] > 1 else 0
    return x.data.ptr, _type_of(x.dtype), max(apart, x.shape[-2 if turned else -1])


@cache
def _type_of(dtype: Any) -> int:
    return _TYPES[dtype.name]


def _plain(x: Array) -> bool:
    """Do the numbers of a row follow each other, and the matrices of a stack at one distance?"""
    *steps, across, along = (s // x.itemsize for s in x.strides)
    *counts, rows, columns = x.shape
    if (along != 1 and columns > 1) or (across < columns and rows > 1):
        return False
    apart = [(count, step) for count, step in zip(counts, steps, strict=True) if count > 1]
    return all(step == next_step * next_count for (_, step), (next_count, next_step) in pairwise(apart))


def _step(x: Array) -> int:
    """The distance between the matrices of a stack."""
    return next((s // x.itemsize for s, count in zip(x.strides[-3::-1], x.shape[-3::-1], strict=True) if count > 1), 0)


def tf32() -> bool:
    """Are float32 products to be taken in TF32, as CuPy itself asks the environment?"""
    return os.environ.get("CUPY_TF32") == "1"


@lru_cache(maxsize=64)
def _number(value: float, float64: bool) -> tuple[np.ndarray, int]:
    """A number on the host, and where it lies: cuBLAS reads it before the call returns."""
    array = np.array([value], "float64" if float64 else "float32")
    return array, array.ctypes.data


class _Handle:
    """A cuBLAS handle of one device, with its workspace; it follows the current stream."""

    def __init__(self, xp: Any) -> None:
        self.handle, self.stream = bindings().create(), -1
        self.workspace = xp.empty(_WORKSPACE, dtype=xp.uint8)

    def here(self, stream: int) -> int:
        if stream != self.stream:
            bindings().set_stream(self.handle, stream)  # forgets the workspace
            bindings().set_workspace(self.handle, self.workspace.data.ptr, _WORKSPACE)
            self.stream = stream
        return int(self.handle)


@cache
def _handle_of(xp: Any, device: int) -> _Handle:
    return _Handle(xp)


def _handle(xp: Any) -> int:
    return _handle_of(xp, xp.cuda.runtime.getDevice()).here(xp.cuda.get_current_stream().ptr)


def _by_cupy(xp: Any, a: Array, b: Array, out: Array, alpha: float, beta: float) -> None:
    if a.ndim == 2 and a.dtype == out.dtype and a.dtype.char in "fd":
        from cupy import cublas

        cublas.gemm("N", "N", a, b, out=out, alpha=alpha, beta=beta)
        return
    if a.ndim > 2 and a.itemsize == 2:  # CuPy's are slow in float16, and fail in bfloat16 (cupy/cupy#10317)
        a, b = a.astype(xp.float32), b.astype(xp.float32)
    product = a @ b
    if alpha != 1:
        product *= alpha
    out[...] = product + beta * out if beta else product
