"""Products by cuBLAS itself (cublas.py); by CuPy's own calls where its library cannot be called.

CuPy copies a factor whose rows or columns are not contiguous, gives a product the dtype of its factors, has no half-precision product with
a float32 result, and refuses all products while a step is captured (replay.py). Here none of that holds.

cuBLAS counts column by column. C = A B in row order is to it C^T = B^T A^T: the factors change places, and nothing is transposed.
"""

import os
import sys
import warnings
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, get_xp

_TYPES = {"f": 0, "d": 1, "e": 2, "E": 14}  # cudaDataType_t by NumPy's character, which is read faster than a name; E is bfloat16
_FLOAT32, _TF32, _FLOAT64 = 68, 77, 70  # cublasComputeType_t: what sums are taken in
_DEFAULT_ALGORITHM = -1
_WORKSPACE = 2**25  # bytes: what NVIDIA advises for Hopper; our own, as a captured step must not allocate any


def gemm(a: Array, b: Array, out: Array | None = None, alpha: float = 1.0, beta: float = 0.0, dtype: Any = None) -> Array:
    """out = alpha a b + beta out, in one launch: scaling a product, and adding it to what is there, cost nothing.

    a (m, k), b (k, n) -> (m, n), or stacks of matrices (..., m, k), (..., k, n) -> (..., m, n), of one dtype. Without `out` the result is
    new, of `dtype` (default: the factors'); half-precision factors may give float32. Sums are taken in float32, or in float64 of float64.
    Raises ValueError when the shapes do not fit.
    """
    xp, of_a, of_b = get_xp(a, b, out), a.shape, b.shape
    shape = (*of_a[:-1], of_b[-1])
    if out is None:
        out = xp.empty(shape, dtype=dtype or a.dtype)
        beta = 0.0
    if of_a[-1] != of_b[-2] or of_a[:-2] != of_b[:-2] or out.shape != shape or a.dtype != b.dtype:
        raise ValueError(f"gemm: {of_a} {a.dtype} and {of_b} {b.dtype} do not make {out.shape}.")
    if not out.size:
        return out
    if not of_a[-1]:  # an empty sum
        out[...] = beta * out if beta else 0
        return out
    by = _by_cupy if bindings() is None else _by_cublas
    by(xp, a, b, out, alpha, beta)
    return out


@cache
def bindings() -> Any:
    """The module cublas.py; None with MINILORA_BLAS=cupy, and where its library cannot be called, of which a warning tells.

    Raises ImportError where there is no cuBLAS: then CuPy's own calls fail too.
    """
    if os.environ.get("MINILORA_BLAS") == "cupy":
        return None
    try:
        from minilora.kernels.cuda import cublas

        cublas.destroy(cublas.create())
        return cublas
    except ImportError as error:
        why = str(error).partition("\n")[0]  # CuPy lists the folders in which it has looked
        brings = "pip install 'minilora[cuda13]', for a CuPy of CUDA 12 'minilora[cuda12]', or use --backend numpy."
        raise ImportError(f"CuPy cannot load cuBLAS, which products need ({why}); {brings}") from error
    except (OSError, AttributeError, RuntimeError) as error:
        why = " ".join(str(error).split())
    warnings.warn(
        f"products go by CuPy's own calls, which are slower and cannot be captured, as cuBLAS cannot be called: {why}", stacklevel=2
    )
    return None


def _by_cublas(xp: Any, a: Array, b: Array, out: Array, alpha: float, beta: float) -> None:
    (a, in_a), (b, in_b), (target, in_c) = _factor(a), _factor(b), _factor(out, (False,))
    blas, (*_, m, n), k = bindings(), out.shape, a.shape[-1]
    kind, c_kind = _TYPES[a.dtype.char], _TYPES[out.dtype.char]
    compute = _FLOAT64 if a.dtype.char == "d" else _TF32 if a.dtype.char == "f" and tf32() else _FLOAT32
    scale, add = _number(alpha, compute == _FLOAT64)[1], _number(beta, compute == _FLOAT64)[1]
    handle = _handle_of(xp, xp.cuda.runtime.getDevice()).here(xp.cuda.get_current_stream().ptr)
    shapes = (handle, in_b.transposed, in_a.transposed, n, m, k, scale)
    of_b, of_a, of_c = (b.data.ptr, kind, in_b.lead), (a.data.ptr, kind, in_a.lead), (target.data.ptr, c_kind, in_c.lead)
    if out.ndim == 2:
        blas.gemm_ex(*shapes, *of_b, *of_a, add, *of_c, compute, _DEFAULT_ALGORITHM)
    else:
        count = out.size // (m * n)
        blas.gemm_strided_batched_ex(*shapes, *of_b, in_b.step, *of_a, in_a.step, add, *of_c, in_c.step, count, compute, _DEFAULT_ALGORITHM)
    if target is not out:
        out[...] = target


class _Layout(NamedTuple):
    """How a matrix, or a stack of them, lies in memory."""

    transposed: int  # 0: the numbers of a row follow each other; 1: those of a column
    lead: int  # the distance between its rows, or its columns
    step: int  # the distance between the matrices of a stack


def _factor(x: Array, ways: tuple[bool, ...] = (False, True)) -> tuple[Array, _Layout]:
    """x and its layout. What lies in none of these ways is copied."""
    layout = _layout(x.shape, x.strides, x.itemsize, ways)
    return (x, layout) if layout is not None else _factor(x.copy(), ways)


@lru_cache(maxsize=4096)  # a step asks for the same ones, hundreds of times
def _layout(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, ways: tuple[bool, ...]) -> _Layout | None:
    *counts, rows, columns = shape
    *steps, across, along = (s // itemsize for s in strides)
    apart = [(count, step) for count, step in zip(counts, steps, strict=True) if count > 1]
    if not all(step == next_step * next_count for (_, step), (next_count, next_step) in pairwise(apart)):
        return None  # the matrices of a stack do not lie at one distance
    for transposed in ways:
        m, n, lead, next_to = (columns, rows, along, across) if transposed else (rows, columns, across, along)
        if (next_to == 1 or n == 1) and (lead >= n or m == 1):
            return _Layout(int(transposed), max(lead if m > 1 else 0, n), apart[-1][1] if apart else 0)
    return None


def tf32() -> bool:
    """Whether float32 products are to be taken in TF32, by the environment variable that CuPy reads."""
    return os.environ.get("CUPY_TF32") == "1"


def allow_tf32() -> None:
    """Take them so: several times as fast, with errors of 1e-3. CuPy reads this when it is imported.

    Raises RuntimeError when CuPy has been imported without it.
    """
    if "cupy" in sys.modules and not tf32():
        raise RuntimeError("TF32 must be chosen before CuPy is imported: set CUPY_TF32=1 before Python starts.")
    os.environ["CUPY_TF32"] = "1"


@lru_cache(maxsize=64)
def _number(value: float, float64: bool) -> tuple[np.ndarray, int]:
    """A number on the host, and its address: cuBLAS reads it before the call returns."""
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


def _by_cupy(xp: Any, a: Array, b: Array, out: Array, alpha: float, beta: float) -> None:
    if a.ndim == 2 and a.dtype == out.dtype and (a.dtype.char == "d" or (a.dtype.char == "f" and not tf32())):  # gemm knows no TF32
        from cupy import cublas

        cublas.gemm("N", "N", a, b, out=out, alpha=alpha, beta=beta)
        return
    if a.ndim > 2 and a.itemsize == 2:  # CuPy's are slow in float16, and fail in bfloat16 (cupy/cupy#10317)
        a, b = a.astype(xp.float32), b.astype(xp.float32)
    product = a @ b
    if alpha != 1:
        product *= alpha
    out[...] = product + beta * out if beta else product
