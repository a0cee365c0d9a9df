"""cupy.RawModule on a CPU: CUDA sources compiled by g++, with a few lines in place of what CUDA has and C++ has not.

A kernel runs block after block. With THREADS = 1, the default, each block has one thread, whatever was asked for: the sources take
their strides from blockDim. With more, the threads are real, and __syncthreads is a barrier: what is missing there goes wrong.
Arguments are checked as CuPy does not: number, kind, dtype and contiguity of each, and the room in shared memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from standin.arrays import ndarray
from standin.counting import note
from standin.recording import perform, refuse_product

COMPILER = shutil.which("g++")
THREADS = 1
_SHARED = 2**16  # bytes
_KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')
_SCALARS = {"int": (np.int32, ctypes.c_int32), "long long": (np.int64, ctypes.c_int64), "unsigned long long": (np.uint64, ctypes.c_uint64)}
_REALS = {"float": (np.float32, ctypes.c_float), "double": (np.float64, ctypes.c_double)}
_HALVES = {"float16": (np.float16, None), "bfloat16": (ml_dtypes.bfloat16, None)}  # of arrays alone

_BEFORE = """
#include <barrier>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>
using std::exp; using std::sqrt; using std::tanh; using std::erfc;
struct Dim { int x = 1, y = 1, z = 1; };
static Dim gridDim, blockDim;
static thread_local Dim threadIdx, blockIdx;
static std::unique_ptr<std::barrier<>> joined;
static void __syncthreads() { if (joined) joined->arrive_and_wait(); }
#define __global__
#define __device__ inline
#define __shared__
alignas(16) REAL shared[65536 / sizeof(REAL)];
template <class F> static void launch_(F kernel, int grid, int block) {
    gridDim.x = grid; blockDim.x = block;
    joined = block > 1 ? std::make_unique<std::barrier<>>(block) : nullptr;
    auto run = [&](int thread) {
        threadIdx.x = thread;
        for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) { kernel(); __syncthreads(); }
    };
    if (block == 1) return run(0);
    std::vector<std::thread> threads;
    for (int t = 0; t < block; t++) threads.emplace_back(run, t);
    for (auto& thread : threads) thread.join();
}
"""


class RawModule:
    """As far as it is used: RawModule(code=..., options=("-DREAL=float",)).get_function(name)(grid, block, args, shared_mem=0)."""

    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        self.kernels = {name: [_split(p) for p in params.split(",")] for name, params in _KERNEL.findall(code)}
        self.types = dict(option.removeprefix("-D").split("=") for option in options)
        self.types.setdefault("ACT", self.types["REAL"])
        self.uses_shared = "extern __shared__" in code
        wrappers = "".join(
            f'extern "C" void launch_{name}(int grid, int block, {", ".join(f"{kind} {p}" for kind, p in params)}) '
            f"{{ launch_([&] {{ {name}({', '.join(p for _, p in params)}); }}, grid, block); }}\n"
            for name, params in self.kernels.items()
        )
        self.library = ctypes.CDLL(str(_compiled(_BEFORE + code + wrappers, options)))

    def get_function(self, name: str) -> Any:
        params = self.kernels[name]
        run = getattr(self.library, f"launch_{name}")

        def launch(grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int = 0) -> None:
            if len(args) != len(params):
                raise TypeError(f"{name} takes {len(params)} arguments, got {len(args)}.")
            if block[0] & (block[0] - 1) or not 1 <= block[0] <= 1024 or not 1 <= grid[0] < 2**31:
                raise ValueError(f"{name}: a grid of {grid} blocks of {block} threads cannot be launched, or not be summed over.")
            if self.uses_shared and shared_mem < block[0] * np.dtype(_REALS[self.types["REAL"]][0]).itemsize:
                raise ValueError(f"{name}: {shared_mem} bytes of shared memory are too few for {block[0]} threads.")
            note(launches=1)
            given = [self._argument(name, kind, p, a) for (kind, p), a in zip(params, args, strict=True)]
            perform(lambda: run(grid[0], min(THREADS, block[0]), *given))

        return launch

    def _argument(self, kernel: str, kind: str, name: str, value: Any) -> Any:
        kind = re.sub("REAL|ACT", lambda found: self.types[found[0]], kind).removeprefix("const ")
        if not kind.endswith("*"):
            dtype, c = (_SCALARS | _REALS)[kind]
            if type(value) is not dtype:
                raise TypeError(f"{kernel}: {name} is a {kind}; give a {dtype.__name__}, not a {type(value).__name__}.")
            return c(value)
        if isinstance(value, np.intp) and value == 0:
            return ctypes.c_void_p(None)
        dtype = np.dtype((_SCALARS | _REALS | _HALVES)[kind.removesuffix("*").strip()][0])
        if not isinstance(value, ndarray) or value.dtype != dtype:
            raise TypeError(f"{kernel}: {name} is a {kind}; give an array of {dtype}, not {getattr(value, 'dtype', type(value).__name__)}.")
        if not value.flags.c_contiguous:
            raise ValueError(f"{kernel}: {name} is not contiguous.")
        return ctypes.c_void_p(value._host.ctypes.data)


def gemm(transa: str, transb: str, a: ndarray, b: ndarray, out: ndarray, alpha: float, beta: float) -> ndarray:
    """cupy.cublas.gemm: out = alpha a b + beta out. What is contiguous in neither order is copied first."""
    refuse_product()
    m, k, n = *a.shape, b.shape[1]
    if (transa, transb) != ("N", "N") or b.shape[0] != k or out.shape != (m, n) or not a.dtype == b.dtype == out.dtype:
        raise AssertionError(
            f"gemm: {a.shape} {a.dtype}, {b.shape} {b.dtype} and {out.shape} {out.dtype} do not fit, or are turned by a flag."
        )
    if a.dtype.char not in "fd":
        raise TypeError("invalid dtype")
    copies = sum(not (x.flags.c_contiguous or x.flags.f_contiguous) for x in (a, b)) + 2 * (not out.flags.c_contiguous)
    note(launches=1 + copies, products=[(m, n)])
    product = a.dtype.type(alpha) * (a._host @ b._host)
    out._host[...] = product + a.dtype.type(beta) * out._host if beta else product
    return out


def _split(parameter: str) -> tuple[str, str]:
    """("const REAL*", "x") of "const REAL* x"."""
    kind, _, name = parameter.strip().rpartition(" ")
    return kind, name


def _compiled(code: str, options: tuple[str, ...]) -> Path:
    """The shared library, kept from one run of the tests to the next."""
    mark = hashlib.sha256((code + " ".join(options)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "minilora-standin"
    folder.mkdir(exist_ok=True)
    library = folder / f"{mark}.so"
    if not library.is_file():
        assert COMPILER is not None
        with tempfile.TemporaryDirectory(dir=folder) as made:
            source, result = Path(made) / "kernel.cpp", Path(made) / "kernel.so"
            source.write_text(code)
            command = [
                COMPILER,
                "-std=c++20",
                "-O2",
                "-ffp-contract=off",
                "-shared",
                "-fPIC",
                "-pthread",
                *options,
                "-o",
                str(result),
                str(source),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"g++ refuses a CUDA source:\n{done.stderr[:3000]}")
            result.rename(library)
    return library
