"""NumPy and CuPy: choose one, move arrays, draw numbers, synchronise.

`xp` comes from the arrays in hand, `xp = get_xp(x, W)`, never from a global "current backend". Random numbers are drawn on the host, or
computed from a counter with integer arithmetic (functional/dropout.py): equal seeds give equal values on both backends.
"""

import math
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

Array = Any  # a numpy.ndarray or a cupy.ndarray
Rng = np.random.Generator | int | None  # what draws initial values: a generator, a seed, or the module's own generator
BACKENDS = ("numpy", "cupy")
_caches: list[Any] = []
_modules: dict[type, Any] = {np.ndarray: np}  # of the types of arrays seen so far, as this is looked up thousands of times a step


class Matrix:
    """What stands in for a weight (m, n) in products without being an array, such as a quantized weight (quantization/).

    A subclass has __rmatmul__, for products x @ this, and what is only named here; one that is never moved has no to_backend.
    """

    __array_ufunc__ = None  # so that x @ this calls __rmatmul__
    ndim = 2
    shape: tuple[int, ...]
    dtype: Any  # of products
    like: Array  # an array that lives where it does
    T: Any
    dense: Callable[[], Array]  # itself as an array
    column_squares: Callable[[], Array]  # (n,) the squares of its columns' lengths
    to_backend: Callable[..., Any]  # (backend, dtype) -> itself, moved

    def __matmul__(self, y: Array) -> Array:
        return (y.T @ self.T).T

    def __add__(self, other: Array) -> Array:
        return self.dense() + other

    def __getitem__(self, key: Any) -> Array:
        return self.dense()[key]

    def copy(self) -> Array:
        return self.dense()

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def get_xp(*arrays: Array | None) -> Any:
    """The module (numpy or cupy) that the arrays live in; None is skipped.

    Raises TypeError when some live on the host and some on the device: nothing is ever copied between them implicitly.
    """
    found = None
    for x in arrays:
        if x is None:
            continue
        xp = _modules.get(type(x)) or _module_of(x)
        if found is not None and xp is not found:
            raise TypeError("arrays of NumPy and CuPy are mixed; move the layer with layer.to(...) or the data with to_backend(...).")
        found = xp
    return np if found is None else found


def _module_of(x: Array) -> Any:
    if isinstance(x, (np.ndarray, np.generic)):
        return np
    cupy = sys.modules.get("cupy")  # who holds a CuPy array has imported CuPy
    if cupy is not None and isinstance(x, cupy.ndarray):
        return _modules.setdefault(type(x), cupy)
    if isinstance(x, Matrix):
        return get_xp(x.like)
    raise TypeError(f"expected a NumPy or CuPy array, got {type(x).__name__}.")


def backend_name(x: Array) -> str:
    """'numpy' or 'cupy', for messages and for `to_backend`."""
    return "numpy" if get_xp(x) is np else "cupy"


def to_backend(x: Array, backend: str, dtype: Any = None) -> Array:
    """x on the named backend, in `dtype` if given. Copies only what has to change."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    if isinstance(x, Matrix):
        return x.to_backend(backend, dtype)
    if backend == "cupy":
        return import_cupy().asarray(x, dtype=dtype)
    return np.asarray(x if isinstance(x, (np.ndarray, np.generic)) else x.get(), dtype=dtype)


def to_numpy(x: Array) -> np.ndarray:
    """x as a NumPy array. From a GPU this copies and synchronises: for printing, saving and tests only."""
    return to_backend(x.dense() if isinstance(x, Matrix) else x, "numpy")


def as_like(x: Array, like: Array) -> Array:
    """x moved to where `like` lives; its own dtype is kept (token ids stay integers)."""
    return to_backend(x, backend_name(like)) if get_xp(x) is not get_xp(like) else x


def constant(x: np.ndarray, like: Array) -> Array:
    """`as_like` for what repeats in every step, such as positions: the copy on a device is kept, and found by its content. Read-only."""
    return x if get_xp(like) is np else _copied(x, get_xp(like))


def kept_on_device(make: Callable[..., Any]) -> Callable[..., Any]:
    """functools.lru_cache, for a function that makes arrays on a device which every layer of a step reads.

    NumPy arrays among its arguments are compared by content; the function gets them read-only.
    """

    @lru_cache(maxsize=256)
    def cached(*args: Any) -> Any:
        return make(*(np.frombuffer(*x[:2]).reshape(x[2]) if isinstance(x, tuple) else x for x in args))

    _caches.append(cached)
    return lambda *args: cached(*((x.tobytes(), x.dtype, x.shape) if isinstance(x, np.ndarray) else x for x in args))


def forget_constants() -> None:
    """Free all that is kept so: a captured step needs what it reads in memory of its own (kernels/cuda/replay.py)."""
    for cache in _caches:
        cache.cache_clear()


@kept_on_device
def _copied(x: np.ndarray, xp: Any) -> Array:
    return xp.asarray(x)


def import_cupy() -> Any:
    """The cupy module, after a check that it can be used.

    Raises ImportError that names the extra to install, or RuntimeError that names what is missing or too old: driver, device, capability.
    """
    try:
        import cupy
    except ImportError as error:
        why = "" if error.name == "cupy" else f" What is installed cannot be imported ({error}): is it for another CUDA?"
        needs = "the cupy backend needs CuPy: pip install 'minilora[cuda13]' (driver 580 or newer) or 'minilora[cuda12]'."
        raise ImportError(needs + why) from error
    runtime = cupy.cuda.runtime
    try:
        devices = runtime.getDeviceCount()
    except Exception as error:  # CuPy raises CUDARuntimeError, which cannot be named without CuPy
        theirs = runtime.driverGetVersion() // 1000  # 0: there is no driver
        cuda = runtime.runtimeGetVersion() // 1000
        why = f"it is of CUDA {theirs}, CuPy of CUDA {cuda}: update it" if 0 < theirs <= cuda else f"{error}; install one"
        raise RuntimeError(f"CuPy is installed but found no usable NVIDIA driver; {why}, or use --backend numpy.") from error
    if devices == 0:
        raise RuntimeError("CuPy is installed but sees no GPU; is CUDA_VISIBLE_DEVICES empty? Otherwise use --backend numpy.")
    has = int(cupy.cuda.Device().compute_capability)
    least = {12: 50, 13: 75}.get(runtime.runtimeGetVersion() // 1000, 0)  # NVIDIA's release notes of CUDA 12.0 and 13.0
    if has < least:
        why = f"its compute capability is {has / 10}, and this CUDA needs {least / 10}"
        raise RuntimeError(f"CuPy does not support this GPU; {why}. pip install 'minilora[cuda12]', for 5.0 on, or use --backend numpy.")
    return cupy


def choose_backend(name: str = "auto", quiet: bool = False) -> str:
    """Resolve 'auto' | 'numpy' | 'cupy' to a backend that works here.

    'auto' takes CuPy where it can be used, else NumPy, and says so on standard error; 'cupy' raises as `import_cupy` does.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {name!r}; choose auto, numpy or cupy.")
    try:
        if name != "numpy":
            import_cupy()
            return "cupy"
    except (ImportError, RuntimeError) as error:
        if name == "cupy":
            raise
        if not quiet:
            reason = "CuPy cannot be imported" if isinstance(error, ImportError) else str(error).partition(";")[0]
            print(f"backend: numpy ({reason})", file=sys.stderr)
    return "numpy"


_generator = np.random.default_rng(0)


def seed(value: int) -> None:
    """Restart the generator that draws initial weights. Unset, it starts at 0: scripts repeat by default."""
    global _generator
    _generator = np.random.default_rng(value)


def generator(rng: Rng = None) -> np.random.Generator:
    """A host generator: rng itself, one seeded by an integer, or the module's own."""
    rng = _generator if rng is None else rng
    return rng if isinstance(rng, np.random.Generator) else np.random.default_rng(rng)


def synchronize(backend: str) -> None:
    """Wait until the device has finished, if it is one."""
    if backend == "cupy":
        import_cupy().cuda.get_current_stream().synchronize()
