"""The one door to NumPy and CuPy: choose, move arrays, draw numbers, synchronise, measure memory.

Two rules keep the rest of the code free of the question "CPU or GPU?":

1. `xp` comes from the arrays in hand, `xp = get_xp(x, W)`, never from a global "current backend".
2. Random numbers are drawn on the host by NumPy, or computed from a counter with integer arithmetic
   (`functional/dropout.py`): equal seeds give equal values on both backends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np

Array = Any  # a numpy.ndarray or a cupy.ndarray; the code below never asks which
Rng = np.random.Generator | int | None  # what draws initial values: a generator, a seed, or the module's own generator
Made = TypeVar("Made", bound=Callable[..., Any])
BACKENDS = ("numpy", "cupy")
_caches: list[Any] = []
_modules: dict[type, Any] = {np.ndarray: np}  # of the types of arrays seen so far: a step of a model asks thousands of times
_most_held = 0  # by CuPy's memory pools
POOL_OWNERS: WeakSet[Any] = WeakSet()  # whoever has a memory pool besides CuPy's own, as .pool (kernels/cuda/replay.py)


def get_xp(*arrays: Array | None) -> Any:
    """The module (numpy or cupy) that the arrays live in; None is skipped.

    Raises TypeError when some live on the host and some on the device: nothing is ever copied between
    them behind the caller's back.
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
    if hasattr(x, "like"):  # a matrix made of arrays (quantization/residual.py, quantization/nf4.py)
        return get_xp(x.like)
    raise TypeError(f"expected a NumPy or CuPy array, got {type(x).__name__}.")


def backend_name(x: Array) -> str:
    """'numpy' or 'cupy', for messages and for `to_backend`."""
    return "numpy" if get_xp(x) is np else "cupy"


def to_backend(x: Array, backend: str, dtype: Any = None) -> Array:
    """x on the named backend, in `dtype` if given. Copies only what has to change."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    if hasattr(x, "to_backend"):  # NF4
        return x.to_backend(backend, dtype)
    if backend == "cupy":
        return import_cupy().asarray(x, dtype=dtype)
    host = x if isinstance(x, (np.ndarray, np.generic)) else x.get()
    return np.asarray(host, dtype=dtype)


def to_numpy(x: Array) -> np.ndarray:
    """x as a NumPy array. From a GPU this copies and synchronises: for printing, saving and tests only."""
    return to_backend(x.dense() if hasattr(x, "dense") else x, "numpy")


def as_like(x: Array, like: Array) -> Array:
    """x moved to where `like` lives; its own dtype is kept (token ids stay integers)."""
    return to_backend(x, backend_name(like)) if get_xp(x) is not get_xp(like) else x


def constant(x: np.ndarray, like: Array) -> Array:
    """`as_like` for what comes again in every step, as positions do: on a device it is kept, and found by its content. Only to be read."""
    return x if get_xp(like) is np else _kept(x.tobytes(), x.dtype, x.shape, get_xp(like))


def kept_on_device(make: Made) -> Made:
    """functools.lru_cache, for what makes arrays on a device that every layer of a step asks for."""
    _caches.append(lru_cache(maxsize=256)(make))
    return _caches[-1]


def forget_constants() -> None:
    """Let go of all that is kept so: a recorded step needs what it reads in memory of its own (kernels/cuda/replay.py)."""
    for cache in _caches:
        cache.cache_clear()


@kept_on_device
def _kept(content: bytes, dtype: np.dtype, shape: tuple[int, ...], xp: Any) -> Array:
    return xp.asarray(np.frombuffer(content, dtype).reshape(shape))


def import_cupy() -> Any:
    """The cupy module, after a check that it can be used.

    Raises ImportError that names the extra to install, or RuntimeError that names the missing driver or device.
    """
    try:
        import cupy
    except ImportError as error:
        why = "" if error.name == "cupy" else f" What is installed cannot be imported ({error}): is it for another CUDA?"
        needs = "the cupy backend needs CuPy: pip install 'minilora[cuda13]' (driver 580 or newer) or 'minilora[cuda12]'."
        raise ImportError(needs + why) from error
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy raises CUDARuntimeError, which cannot be named without CuPy
        raise RuntimeError(
            f"CuPy is installed but found no usable NVIDIA driver ({error}); install one, or use --backend numpy."
        ) from error
    if devices == 0:
        raise RuntimeError("CuPy is installed but sees no GPU; is CUDA_VISIBLE_DEVICES empty? Otherwise use --backend numpy.")
    return cupy


def choose_backend(name: str = "auto", quiet: bool = False) -> str:
    """Resolve 'auto' | 'numpy' | 'cupy' to a backend that works here.

    'auto' takes CuPy where it can be used, else NumPy, and says so in one line on standard error.
    'cupy' raises as `import_cupy` does.
    """
    if name == "numpy":
        return name
    if name == "cupy":
        import_cupy()
        return name
    if name != "auto":
        raise ValueError(f"unknown backend {name!r}; choose auto, numpy or cupy.")
    try:
        import_cupy()
        return "cupy"
    except (ImportError, RuntimeError) as error:
        if not quiet:
            reason = "CuPy cannot be imported" if isinstance(error, ImportError) else "CuPy finds no GPU"
            print(f"backend: numpy ({reason})", file=sys.stderr)
        return "numpy"


_generator = np.random.default_rng(0)


def seed(value: int) -> None:
    """Restart the generator that draws initial weights. Unset, it starts at 0: scripts repeat by default."""
    global _generator
    _generator = np.random.default_rng(value)


def generator(rng: Rng = None) -> np.random.Generator:
    """A host generator: the one given, one seeded by an integer, or the module's own."""
    if rng is None:
        return _generator
    return rng if isinstance(rng, np.random.Generator) else np.random.default_rng(rng)


def synchronize(backend: str) -> None:
    """Wait until the device has finished; nothing to wait for on NumPy."""
    if backend == "cupy":
        import_cupy().cuda.get_current_stream().synchronize()


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed for the next array, in place of giving it back to the system.

    A step makes and frees the same arrays again and again; each that comes fresh from the system is paid for page by page, as it is
    first written to: 7 % of a step of GPT-2 small (docs/speed.md). Elsewhere than on glibc this does nothing. For long work only:
    a process that calls this does not shrink again.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory(backend: str = "numpy") -> int:
    """Peak bytes: of this process (NumPy), or held by CuPy's memory pools: those shrink only where this was asked before."""
    if backend == "cupy":
        global _most_held
        pools = import_cupy().get_default_memory_pool(), *(owner.pool for owner in POOL_OWNERS)
        _most_held = max(_most_held, sum(int(pool.total_bytes()) for pool in pools))
        return _most_held
    try:
        import resource
    except ImportError:  # Windows has no resource module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
