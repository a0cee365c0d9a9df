"""The CUDA sources of this folder, compiled by CuPy when first used (NVRTC: no compiler has to be installed), and their launch.

Without them every kernel falls back to its pair in `functional/`, which runs on CuPy as it is: so do dtypes that the sources are not
written for, and all of them with MINILORA_KERNELS=plain in the environment. tests/standin runs the same sources on a CPU, through g++.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.kernels.cuda.blas import gemm as gemm

ENABLED = os.environ.get("MINILORA_KERNELS") != "plain"
NULL = np.intp(0)  # for a pointer that may be null; CuPy turns None into another address (cupy/cupy#9046)
THREADS = 256
REAL = {"float32": "float", "float64": "double"}
_HERE = Path(__file__).parent


def usable(first: Array, *others: Array | None) -> bool:
    """Are these on the device, all of one dtype that the sources are written for?"""
    if not ENABLED or isinstance(first, np.ndarray):
        return False
    given = [first, *(x for x in others if x is not None)]
    return get_xp(*given) is not np and first.dtype.name in REAL and all(x.dtype == first.dtype for x in given)


def source_of(file: str) -> str:
    """The text of FILE.cu, with what all of them share before it."""
    return (_HERE / "common.cuh").read_text() + (_HERE / f"{file}.cu").read_text()


@cache
def _function(xp: Any, file: str, name: str, dtype: str) -> Any:
    return _module(xp, file, dtype).get_function(name)


@cache
def _module(xp: Any, file: str, dtype: str) -> Any:
    return xp.RawModule(code=source_of(file), options=(f"-DREAL={REAL[dtype]}",))


def elementwise(file: str, name: str, n: int, *args: Any) -> None:
    """Launch a kernel over n elements; the first argument tells dtype and backend, the last of the kernel is n."""
    blocks = min(-(-n // THREADS), 8192)
    if n:
        _function(get_xp(args[0]), file, name, args[0].dtype.name)((blocks,), (THREADS,), (*args, np.int64(n)))


def rowwise(file: str, name: str, rows: int, width: int, *args: Any) -> None:
    """Launch a kernel with a block for each of the rows, of `width` elements each."""
    threads = 32
    while threads < min(width, THREADS):
        threads *= 2
    if rows:
        like = args[0]
        shared = threads * like.dtype.itemsize
        _function(get_xp(like), file, name, like.dtype.name)((rows,), (threads,), args, shared_mem=shared)
