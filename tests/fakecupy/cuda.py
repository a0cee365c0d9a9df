"""cupy.RawModule on a CPU: CUDA sources compiled by g++, with emulations of what C++ lacks.

Blocks run one after the other. With THREADS = 1, the default, each block has one thread whatever the launch requests: the sources take
their strides from blockDim, except those that fix a number of threads (__launch_bounds__). With more, the threads take turns
(emulator.hpp) and __syncthreads waits for all of them: a missing one gives a wrong result.
Arguments are checked more strictly than CuPy does: number, kind, dtype and contiguity of each, and the size of shared memory.
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

from fakecupy.arrays import ndarray
from fakecupy.counting import note
from fakecupy.graph import perform, refuse_product

COMPILER = shutil.which("g++")
THREADS = 1
_SHARED = 48 * 1024  # bytes
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\((\d+)[^)]*\) )?(\w+)\(([^)]*)\)')
_SCALARS = {"int": (np.int32, ctypes.c_int32), "long long": (np.int64, ctypes.c_int64), "unsigned long long": (np.uint64, ctypes.c_uint64)}
_REALS = {"float": (np.float32, ctypes.c_float), "double": (np.float64, ctypes.c_double)}
_HALVES = {"float16": (np.float16, None), "bfloat16": (ml_dtypes.bfloat16, None)}  # arrays only

_BEFORE = (Path(__file__).parent / "emulator.hpp").read_text()
_SHARED_ARRAY = re.compile(r"extern __shared__ (?:__align__\(16\) )?(\w+) (\w+)\[\];")


class RawModule:
    """The parts that minilora uses: RawModule(code=..., options=("-DREAL=float",)).get_function(name)(grid, block, args, shared_mem=0)."""

    def __init__(self, *, code: str, options: tuple[str, ...] = ()) -> None:
        found = _KERNEL.findall(code)
        self.kernels = {name: [_split(p) for p in params.split(",")] for _, name, params in found}
        self.threads = {name: int(threads) for threads, name, _ in found if threads}  # kernels with a fixed number of threads
        self.types = dict(option.removeprefix("-D").split("=") for option in options)
        self.types.setdefault("ACT", self.types["REAL"])
        self.uses_shared = "extern __shared__" in code
        wrappers = "".join(
            f'extern "C" int launch_{name}(int grid, int block, {", ".join(f"{kind} {p}" for kind, p in params)}) '
            f"{{ return launch_([&] {{ {name}({', '.join(p for _, p in params)}); }}, grid, block); }}\n"
            for name, params in self.kernels.items()
        )
        code = _SHARED_ARRAY.sub(r"\1* const \2 = (\1*)shared_memory;", code)
        self.library = ctypes.CDLL(str(_compiled(_BEFORE + code + wrappers, options)))

    def get_function(self, name: str) -> Any:
        declared = self.kernels[name]
        steps = {p.removesuffix("_step") for _, p in declared if p.endswith("_step")}  # arrays with a row stride need not be contiguous
        params = [
            (re.sub("REAL|ACT", lambda found: self.types[found[0]], kind).removeprefix("const "), p) for kind, p in self.kernels[name]
        ]
        run = getattr(self.library, f"launch_{name}")

        def launch(grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int = 0) -> None:
            if len(args) != len(params):
                raise TypeError(f"{name} takes {len(params)} arguments, got {len(args)}.")
            if block[0] & (block[0] - 1) or not 1 <= block[0] <= 1024 or not 1 <= grid[0] < 2**31:
                raise ValueError(f"{name}: a grid of {grid} blocks of {block} threads cannot be launched, or their sums would be wrong.")
            if self.uses_shared and shared_mem < block[0] * np.dtype(_REALS[self.types["REAL"]][0]).itemsize:
                raise ValueError(f"{name}: {shared_mem} bytes of shared memory are too few for {block[0]} threads.")
            if shared_mem > _SHARED:
                raise ValueError(f"{name}: {shared_mem} bytes of shared memory exceed the default limit of a launch.")
            if self.threads.get(name, block[0]) != block[0]:
                raise ValueError(f"{name} needs blocks of {self.threads[name]} threads, not {block[0]}.")
            note(launches=1)
            arguments = [self._argument(name, kind, p, a, p in steps) for (kind, p), a in zip(params, args, strict=True)]
            threads = block[0] if name in self.threads else min(THREADS, block[0])

            def go() -> None:
                if run(grid[0], threads, *arguments):
                    raise RuntimeError(f"{name}: some threads wait at a barrier that others never reach.")

            perform(go)

        return launch

    def _argument(self, kernel: str, kind: str, name: str, value: Any, strided: bool = False) -> Any:
        if not kind.endswith("*"):
            dtype, c = (_SCALARS | _REALS)[kind]
            if type(value) is not dtype:
                raise TypeError(f"{kernel}: {name} is a {kind}; pass a {dtype.__name__}, not a {type(value).__name__}.")
            return c(value)
        if isinstance(value, np.intp) and value == 0:
            return ctypes.c_void_p(None)
        dtype = np.dtype((_SCALARS | _REALS | _HALVES)[kind.removesuffix("*").strip()][0])
        if not isinstance(value, ndarray) or value.dtype != dtype:
            raise TypeError(f"{kernel}: {name} is a {kind}; pass an array of {dtype}, not {getattr(value, 'dtype', type(value).__name__)}.")
        if not (value.flags.c_contiguous or (strided and value.strides[-1] == value.itemsize)):
            raise ValueError(f"{kernel}: {name} is not contiguous.")
        return ctypes.c_void_p(value._host.ctypes.data)


def gemm(transa: str, transb: str, a: ndarray, b: ndarray, out: ndarray, alpha: float, beta: float) -> ndarray:
    """cupy.cublas.gemm: out = alpha a b + beta out. Matrices that are contiguous in neither order are copied first."""
    refuse_product()
    m, k, n = *a.shape, b.shape[1]
    if (transa, transb) != ("N", "N") or b.shape[0] != k or out.shape != (m, n) or not a.dtype == b.dtype == out.dtype:
        raise AssertionError(
            f"gemm: {a.shape} {a.dtype}, {b.shape} {b.dtype} and {out.shape} {out.dtype} do not fit, or are transposed by a flag."
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
    """The compiled shared library, cached between test runs."""
    digest = hashlib.sha256((code + " ".join(options)).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "minilora-fakecupy"
    folder.mkdir(exist_ok=True)
    library = folder / f"{digest}.so"
    if not library.is_file():
        assert COMPILER is not None
        with tempfile.TemporaryDirectory(dir=folder) as build:
            source, result = Path(build) / "kernel.cpp", Path(build) / "kernel.so"
            source.write_text(code)
            command = [
                COMPILER,
                "-std=c++20",
                "-O2",
                "-ffp-contract=off",
                "-shared",
                "-fPIC",
                "-Wno-unknown-pragmas",
                *options,
                "-o",
                str(result),
                str(source),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"g++ cannot compile a CUDA source:\n{done.stderr[:3000]}")
            result.rename(library)
    return library
