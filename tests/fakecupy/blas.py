"""minilora/kernels/cuda/cublas.py on a CPU: cuBLAS calls as its manual defines them, computed by NumPy on the memory behind the pointers.

Matrices are column-major with a leading dimension and a transpose flag, as in cuBLAS. Arguments that cuBLAS would refuse raise, and so
does a call without a stream and a workspace, which a CUDA graph could not capture.
"""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np

from fakecupy.counting import note
from fakecupy.graph import current, perform

_TYPES = {0: np.dtype("float32"), 1: np.dtype("float64"), 2: np.dtype("float16"), 14: np.dtype(ml_dtypes.bfloat16)}
_SUMS = {68: "float32", 77: "float32", 70: "float64"}
_states: dict[int, dict[str, int | None]] = {}  # {handle: its stream and workspace}


def create() -> int:
    handle = 1234 + len(_states)
    _states[handle] = {"stream": None, "workspace": None}
    return handle


def destroy(handle: int) -> None:
    _states[handle] = {}


def set_stream(handle: int, stream: int) -> None:
    _states[handle] = {"stream": stream, "workspace": None}


def set_workspace(handle: int, workspace: int, size: int) -> None:
    if not workspace or workspace % 16 or size <= 0:
        raise ValueError(f"cublasSetWorkspace: {size} bytes at {workspace} are no valid workspace.")
    _states[handle]["workspace"] = workspace


def gemm_ex(handle, trans_a, trans_b, m, n, k, alpha, a, a_type, a_lead, b, b_type, b_lead, beta, c, c_type, c_lead, compute, algorithm):  # type: ignore[no-untyped-def]
    first = (handle, trans_a, trans_b, m, n, k, alpha)
    gemm_strided_batched_ex(
        *first, a, a_type, a_lead, 0, b, b_type, b_lead, 0, beta, c, c_type, c_lead, 0, 1, compute, algorithm, flat=True
    )


def gemm_strided_batched_ex(  # type: ignore[no-untyped-def]
    handle, trans_a, trans_b, m, n, k, alpha, a, a_type, a_lead, a_step, b, b_type, b_lead, b_step,
    beta, c, c_type, c_lead, c_step, count, compute, algorithm, flat=False,
):  # fmt: skip
    """C_i = alpha op(A_i) op(B_i) + beta C_i in column-major order; op transposes if the flag is 1."""
    types = _TYPES[a_type], _TYPES[b_type], _TYPES[c_type]
    fits = types[0] == types[1] and (types[2] == types[0] or (types[0].itemsize == 2 and types[2] == np.float32))
    state = _states.get(handle, {})
    if state.get("workspace") is None or state["stream"] != current().ptr or algorithm != -1:
        raise RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED: no handle, no workspace, or not the current stream.")
    if not fits or (_SUMS[compute] == "float64") != (types[0] == np.float64) or min(m, n, k, count) <= 0:
        raise RuntimeError(f"CUBLAS_STATUS_NOT_SUPPORTED: {types}, sums in {_SUMS[compute]}, {m} x {n} x {k}, {count} times.")
    if a_lead < (k if trans_a else m) or b_lead < (n if trans_b else k) or c_lead < m or (count > 1 and not c_step):
        raise RuntimeError(f"CUBLAS_STATUS_INVALID_VALUE: leading dimensions {a_lead}, {b_lead}, {c_lead} of {m} x {n} x {k}.")
    number = ctypes.c_double if types[0] == np.float64 else ctypes.c_float
    alpha, beta = (number.from_address(place).value for place in (alpha, beta))

    def run() -> None:
        sums = _SUMS[compute]
        A = _columns(a, types[0], count, a_step, a_lead, *((k, m) if trans_a else (m, k))).astype(sums, copy=False)
        B = _columns(b, types[1], count, b_step, b_lead, *((n, k) if trans_b else (k, n))).astype(sums, copy=False)
        C = _columns(c, types[2], count, c_step, c_lead, m, n)
        with np.errstate(all="ignore"):
            result = alpha * ((A.swapaxes(1, 2) if trans_a else A) @ (B.swapaxes(1, 2) if trans_b else B))
            C[...] = result + beta * C.astype(sums, copy=False) if beta else result

    note(launches=1, products=[(n, m) if flat else (count, n, m)])
    perform(run)


def _columns(place: int, dtype: np.dtype, count: int, step: int, lead: int, rows: int, columns: int) -> np.ndarray:
    """A view of column-major matrices at an address, (count, rows, columns)."""
    size, item = (count - 1) * step + (columns - 1) * lead + rows, dtype.itemsize
    memory = (ctypes.c_char * (size * item)).from_address(place)
    return np.ndarray((count, rows, columns), dtype, memory, strides=(step * item, item, lead * item))
