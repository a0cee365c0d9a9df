"""Memory: peaks, and how freed memory is kept."""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakSet

from minilora.backend import import_cupy

POOL_OWNERS: WeakSet[Any] = WeakSet()  # objects with a memory pool besides CuPy's own, as .pool (kernels/cuda/replay.py)
_most_held = 0  # by CuPy's memory pools


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for the next array, instead of returning it to the system.

    A step makes and frees the same arrays again and again; memory from the system costs a page fault for each page: 7 % of a step of GPT-2
    small (docs/speed.md). Without glibc this does nothing. The process does not shrink again.
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
    """Peak bytes: of this process (NumPy), or held by CuPy's memory pools, which shrink only where this was called before."""
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
