"""Optimised kernels on the GPU: the CUDA sources of this folder, their launch, and one family of operations a file.

CuPy compiles the sources when they are first used (NVRTC: no compiler has to be installed). tests/fakecupy runs them on a CPU, through g++.
"""

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.kernels.cuda.blas import gemm as gemm

ENABLED = os.environ.get("MINILORA_KERNELS") != "plain"  # whether the sources can be run
NULL = np.intp(0)  # for a pointer that may be null; CuPy turns None into another address (cupy/cupy#9046)
THREADS = 256
REAL = {"float32": "float", "float64": "double", "float16": "float", "bfloat16": "float"}  # what arrays of a dtype are computed in
_HERE = Path(__file__).parent


def alike(x: Array, *args: Any) -> bool:
    """Whether the arrays among the arguments have x's dtype, as a kernel reads them. Raises TypeError where one lives elsewhere."""
    return _of(x.dtype, x, args)


def agree(count: int) -> Callable[..., bool]:
    """A condition: that the first `count` arguments have one dtype."""
    return lambda *args: alike(*args[:count])


def real(x: Array, *args: Any) -> bool:
    """Whether they have the dtype in which sums over arrays like x are taken. Raises TypeError where one lives elsewhere."""
    return _of(real_of(x), x, args)


def _of(dtype: Any, x: Array, args: tuple[Any, ...]) -> bool:
    arrays = [a for a in args if getattr(a, "ndim", 0)]
    get_xp(x, *arrays)
    return all(a.dtype == dtype for a in arrays)


def real_of(x: Array) -> Any:
    """The type of the numbers that arrays like x are computed in: float32 for half precision."""
    return np.float64 if x.dtype == np.float64 else np.float32


def source_of(file: str) -> str:
    """The text of FILE.cu after what all sources share, with what it includes: NVRTC knows no folder to look in."""
    text = (_HERE / "common.cuh").read_text() + (_HERE / f"{file}.cu").read_text()
    return re.sub(r'#include "(\w+\.cuh)"\n', lambda found: (_HERE / found[1]).read_text(), text)


def options_of(dtype: str) -> tuple[str, ...]:
    """Compiler options for activations of a dtype: REAL is what is computed in, ACT the activations' own type if another."""
    return (f"-DREAL={REAL[dtype]}", *([f"-DACT={dtype}"] if dtype in ("float16", "bfloat16") else []))


@cache
def function(xp: Any, dtype: Any, file: str, name: str, *options: str) -> Any:
    """The kernel, for activations of a dtype."""
    return _module(xp, dtype, file, options).get_function(name)


@cache
def _module(xp: Any, dtype: Any, file: str, options: tuple[str, ...]) -> Any:
    return xp.RawModule(code=source_of(file), options=(*options_of(dtype.name), *options))


def elementwise(file: str, name: str, n: int, *args: Any, like: Array | None = None, each: int = 1) -> None:
    """Launch a kernel over n elements, its last argument. like: an array of activations, if the first argument is none.
    A thread takes `each` elements at once."""
    like = args[0] if like is None else like
    blocks = min(-(-n // (THREADS * each)), 8192)
    if n:
        function(get_xp(like), like.dtype, file, name)((blocks,), (THREADS,), (*args, np.int64(n)))


def rowwise(file: str, name: str, rows: int, width: int, *args: Any, like: Array | None = None) -> None:
    """Launch a kernel with a block for each of the rows, of `width` elements each. like: an array of activations, if the first is none."""
    like = args[0] if like is None else like
    threads = 32
    while threads < min(width, THREADS):
        threads *= 2
    if rows:
        function(get_xp(like), like.dtype, file, name)((rows,), (threads,), args, shared_mem=threads * np.dtype(real_of(like)).itemsize)
