"""The CUDA sources of this folder, compiled by CuPy when first used (NVRTC: no compiler has to be installed), and their launch.

Without them every kernel falls back to its pair in `functional/`, which runs on CuPy as it is: so do dtypes that the sources are not
written for, and all of them with MINILORA_KERNELS=plain in the environment. tests/standin runs the same sources on a CPU, through g++.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.kernels.cuda.blas import gemm as gemm

ENABLED = os.environ.get("MINILORA_KERNELS") != "plain"
NULL = np.intp(0)  # for a pointer that may be null; CuPy turns None into another address (cupy/cupy#9046)
THREADS = 256
REAL = {"float32": "float", "float64": "double", "float16": "float", "bfloat16": "float"}  # what arrays of a dtype are computed in
_HERE = Path(__file__).parent


def usable(first: Array, *alike: Array | None, real: Sequence[Array | None] = ()) -> bool:
    """Are these on the device, in a dtype that the sources are written for: `alike` in the first's, `real` in what it is computed in?"""
    if not ENABLED or isinstance(first, np.ndarray) or get_xp(first, *alike, *real) is np:
        return False
    dtype = first.dtype
    computed = _computed_in(dtype)
    for x in alike:
        if x is not None and x.dtype != dtype:
            return False
    for x in real:
        if x is not None and x.dtype != computed:
            return False
    return computed is not None


@cache  # a dtype's name takes NumPy longer than a launch should
def _computed_in(dtype: Any) -> np.dtype | None:
    return np.dtype(np.float64 if dtype == np.float64 else np.float32) if dtype.name in REAL else None


def real_of(x: Array) -> Any:
    """The type of the numbers that arrays like x are computed in: float32 for those of 16 bits."""
    return np.float64 if x.dtype == np.float64 else np.float32


def source_of(file: str) -> str:
    """The text of FILE.cu, with what all of them share before it, and with what it includes: NVRTC knows no folder to look in."""
    text = (_HERE / "common.cuh").read_text() + (_HERE / f"{file}.cu").read_text()
    return re.sub(r'#include "(\w+\.cuh)"\n', lambda found: (_HERE / found[1]).read_text(), text)


def options_of(dtype: str) -> tuple[str, ...]:
    """What a source is compiled with for activations of a dtype: REAL is what is computed in, ACT the activations' own type if another."""
    return (f"-DREAL={REAL[dtype]}", *([f"-DACT={dtype}"] if dtype in ("float16", "bfloat16") else []))


def function(like: Array, file: str, name: str, *options: str) -> Any:
    """The kernel, for activations like these."""
    return _function(get_xp(like), file, name, like.dtype, options)


@cache
def _function(xp: Any, file: str, name: str, dtype: Any, options: tuple[str, ...]) -> Any:
    return _module(xp, file, dtype, options).get_function(name)


@cache
def _module(xp: Any, file: str, dtype: Any, options: tuple[str, ...]) -> Any:
    return xp.RawModule(code=source_of(file), options=(*options_of(dtype.name), *options))


def elementwise(file: str, name: str, n: int, *args: Any, like: Array | None = None, each: int = 1) -> None:
    """Launch a kernel over n elements, its last argument. like: an array of activations, if the first argument is none. A thread takes
    `each` elements at once."""
    blocks = min(-(-n // (THREADS * each)), 8192)
    if n:
        function(args[0] if like is None else like, file, name)((blocks,), (THREADS,), (*args, np.int64(n)))


def rowwise(file: str, name: str, rows: int, width: int, *args: Any, like: Array | None = None) -> None:
    """Launch a kernel with a block for each of the rows, of `width` elements each. like: an array of activations, if the first is none."""
    threads = 32
    while threads < min(width, THREADS):
        threads *= 2
    if rows:
        like = args[0] if like is None else like
        shared = threads * np.dtype(real_of(like)).itemsize
        function(like, file, name)((rows,), (threads,), args, shared_mem=shared)
