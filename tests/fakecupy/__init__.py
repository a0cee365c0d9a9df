"""A fake CuPy, and fake NVIDIA bindings to cuBLAS, for machines without a GPU: `sys.modules |= fakecupy.modules`.

It computes with NumPy and follows the rules of CuPy 14.2 (docs.cupy.dev, "Differences between CuPy and NumPy"): nothing is
converted to NumPy implicitly, operands on the host and on the device do not mix, reductions and single elements are 0-d
arrays, index arrays wrap around, floating-point warnings and failed decompositions are silent. `count` counts the launches,
synchronisations and transfers that a GPU would have made.

Only the names listed below exist. Where CuPy is installed, a test compares the lists with it. The fake CuPy is deliberately
stricter than CuPy in three places: NumPy's functions are refused (CuPy would accept `np.exp(x)`, which hides a forgotten
`xp`), index arrays and lists on the host are refused (CuPy would copy them to the device), and there are no random numbers
(minilora draws on the host).
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from fakecupy import blas, cuda, graph, nccl
from fakecupy.arrays import argument, ndarray, offered, operand
from fakecupy.counting import Counts, count, note
from fakecupy.graph import perform, waits

__all__ = ["CONSTANTS", "FUNCTIONS", "LACKS", "LINALG", "Counts", "blas", "count", "module", "modules", "ndarray"]

CONSTANTS = (
    "bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128 "
    "floating integer generic dtype finfo iinfo issubdtype promote_types inf nan newaxis pi e"
)
FUNCTIONS = {  # by kind, see fakecupy.arrays.offered; "own": defined below
    "create": "arange eye full ones zeros",
    "empty": "empty empty_like",
    "launch": (
        "abs absolute add all allclose any argmax argmin argsort array_equal bitwise_and ceil clip concatenate copysign cos cumsum "
        "diag divide equal exp expm1 floor full_like greater greater_equal isclose isfinite isinf isnan left_shift less less_equal "
        "log log1p logaddexp logical_and logical_not logical_or max maximum mean min minimum multiply negative not_equal ones_like "
        "power prod reciprocal right_shift round sign sin sort sqrt square stack std subtract sum take_along_axis tan tanh "
        "tril triu true_divide var zeros_like"
    ),
    "view": "ascontiguousarray broadcast_to expand_dims moveaxis ravel reshape squeeze swapaxes transpose",
    "sync": "argwhere flatnonzero nonzero unique",
    "product": "dot einsum inner matmul outer tensordot vdot",
    "own": "array asarray asnumpy cuda get_array_module get_default_memory_pool is_available linalg ndarray result_type where",
}
LINALG = "cholesky eigh inv norm qr solve svd"
LACKS = (  # names of NumPy that CuPy 14.2 lacks and that code might use
    "block bytes_ einsum_path errstate frompyfunc geomspace geterr insert longdouble matvec nanpercentile nanquantile ndenumerate "
    "nditer object_ seterr spacing str_ strings unstack vecdot vecmat"
)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)  # CuPy 14 supports it if ml_dtypes is installed
POOL_BYTES = 4096  # the size that the fake memory pool reports
PROPERTIES = {"name": b"NVIDIA Fake", "totalGlobalMem": 2**33, "l2CacheSize": 50 * 2**20}  # of the device; L2 as of an H100
_DTYPES = "?bBhHiIlLqQefdFD" + BFLOAT16.char  # NumPy's characters of the dtypes that CuPy supports
_ATOMIC = "iILQefd"  # dtypes of add.at; int64 is missing in CuPy


class CuPy(types.ModuleType):
    """The module. The message for a missing name says whether CuPy lacks it or these lists do."""

    def __getattr__(self, name: str) -> Any:
        if name in LACKS.split():
            raise AttributeError(f"CuPy has no {name!r}; only NumPy has it.")
        raise AttributeError(f"cupy.{name} is not in the list of the fake CuPy; if CuPy has it, add it in tests/fakecupy/__init__.py.")


def array(x: Any, dtype: Any = None) -> ndarray:
    """A new array on the device. A host array is copied asynchronously."""
    if isinstance(x, ndarray):
        return x.astype(x.dtype if dtype is None else dtype)
    host = np.array(x, dtype=dtype)
    if host.dtype.char not in _DTYPES:
        raise ValueError(f"Unsupported dtype {host.dtype}")
    waits()  # a captured graph would read the host memory again at every replay
    note(to_device=1, bytes=host.nbytes)
    return ndarray(host)


def asarray(x: Any, dtype: Any = None) -> ndarray:
    """x as a device array of the dtype; x itself if it already is one."""
    return x if isinstance(x, ndarray) and dtype in (None, x.dtype) else array(x, dtype)


def asnumpy(x: Any) -> np.ndarray:
    """x on the host."""
    return x.get() if isinstance(x, ndarray) else np.asarray(x)


def get_array_module(*arrays: Any) -> Any:
    """This module if any of the arrays is on the device, else NumPy."""
    return module if any(isinstance(x, ndarray) for x in arrays) else np


def where(condition: ndarray, *choices: Any) -> Any:
    """With one argument this is nonzero, which synchronises."""
    return offered(np.where)(condition, *choices) if choices else condition.nonzero()


def result_type(*arrays_and_dtypes: Any) -> np.dtype:
    """NumPy's promotion of dtypes. Values do not matter, so nothing is launched."""
    return np.result_type(*map(argument, arrays_and_dtypes))


def add_at(a: ndarray, index: Any, value: Any) -> None:
    """a[index] += value; repeated indices accumulate."""
    if a.dtype.char not in _ATOMIC:
        raise TypeError(f"add.at only supports int32, uint32, uint64, float16, float32 and float64, got {a.dtype}.")
    _, _, mask = a._resolve(index)
    note(launches=1, syncs=mask)
    value = operand(value)
    perform(lambda: np.add.at(a._host, a._resolve(index)[0], value))


def _solver(name: str) -> Callable:
    """A function of linear algebra. Where NumPy raises LinAlgError, CuPy returns garbage: reading the status would synchronise."""
    run = offered(getattr(np.linalg, name))

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except np.linalg.LinAlgError:
            easy = [(module.eye if a.ndim == 2 else module.ones)(*a.shape, dtype=a.dtype) for a in args]
            results = run(*easy, **kwargs)  # for the shapes of the results; a wrong shape raises again, as in CuPy
            return tuple(y * np.nan for y in results) if isinstance(results, tuple) else results * np.nan

    return call


class MemoryPool:
    """A private memory pool; `malloc` is never called."""

    malloc = None
    freed = False

    def total_bytes(self) -> int:
        return 0 if self.freed else POOL_BYTES

    def free_all_blocks(self) -> None:
        self.freed = True


def _make_module() -> CuPy:
    cupy, space = CuPy("cupy"), types.SimpleNamespace
    for name in CONSTANTS.split():
        setattr(cupy, name, getattr(np, name))
    for kind, names in FUNCTIONS.items():
        for name in names.split() if kind != "own" else ():
            setattr(cupy, name, offered(getattr(np, name), kind))
    for function in (array, asarray, asnumpy, get_array_module, result_type, where):
        setattr(cupy, function.__name__, function)
    cupy.ndarray, cupy.__version__, cupy.add.at = ndarray, "14.2.0", add_at
    cupy.linalg = space(**{name: _solver(name) for name in LINALG.split()})
    if cuda.COMPILER:
        cupy.RawModule = cuda.RawModule
    cupy.cublas = space(gemm=cuda.gemm)
    cupy.is_available = lambda: True
    pool = space(total_bytes=lambda: POOL_BYTES, used_bytes=lambda: POOL_BYTES // 2, free_all_blocks=lambda: None)
    cupy.get_default_memory_pool = lambda: pool
    runtime = space(getDeviceCount=lambda: 1, getDevice=lambda: 0, getDeviceProperties=lambda number: dict(PROPERTIES))
    runtime.driverGetVersion, runtime.runtimeGetVersion = lambda: 13000, lambda: 13000
    cupy.cuda = space(runtime=runtime, get_current_stream=graph.current, Stream=graph.Stream, is_available=lambda: True)
    cupy.cuda.Device = lambda number=0: space(compute_capability="90", use=lambda: None)
    cupy.cuda.nccl = nccl
    cupy.cuda.MemoryPool, cupy.cuda.using_allocator = MemoryPool, lambda allocator: contextlib.nullcontext()
    return cupy


module = _make_module()
modules = {"cupy": module, "minilora.kernels.cuda.cublas": blas}  # sys.modules |= fakecupy.modules
