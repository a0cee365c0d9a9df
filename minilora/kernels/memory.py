"""Memory: peaks, and how freed memory is kept."""

import mmap
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from minilora.backend import import_cupy

POOL_OWNERS: WeakSet[Any] = WeakSet()  # objects with a memory pool besides CuPy's own, as .pool (kernels/cuda/replay.py)
_most_held = 0  # by CuPy's memory pools
most_of_copies = 0  # by copies of this process (training/processes.py)
_kept = False  # whether `keep_freed_memory` has been called


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for the next array, in one heap for all threads, and in huge pages where the system has them.

    A step makes and frees the same arrays again and again. Memory from the system costs a page fault for each page, and small pages cost
    searches of the page table (docs/speed.md). The heap is extended once, by half of the machine's memory: addresses, which become memory
    when they are written to. Without glibc this does nothing. The process does not shrink again.
    """
    global _kept
    if _kept or not sys.platform.startswith("linux"):
        return
    import ctypes

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl has none
        return
    _kept = True
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX, MADV_HUGEPAGE = -1, -4, -8, 14
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):  # -1: never return any
        libc.mallopt(option, value)
    setting = Path("/proc/sys/vm/overcommit_memory")
    if setting.is_file() and setting.read_text().strip() == "2":  # addresses count as memory there
        return
    libc.malloc.restype, size, page = ctypes.c_size_t, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2, 2**21
    if at := libc.malloc(ctypes.c_size_t(size)):  # at the end of the heap
        begin = -(-at // page) * page
        libc.madvise(ctypes.c_size_t(begin), ctypes.c_size_t(at + size - begin), MADV_HUGEPAGE)
        libc.free(ctypes.c_size_t(at))


def shared_zeros(size: int, dtype: Any) -> np.ndarray:
    """Zeros (size,) which this process and copies that are forked from it write to in common."""
    return np.frombuffer(mmap.mmap(-1, size * np.dtype(dtype).itemsize), dtype)


def peak_memory(backend: str = "numpy") -> int:
    """Peak bytes: of this process and its copies (NumPy), or of CuPy's memory pools, which shrink only where this was called before."""
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
    return peak if sys.platform == "darwin" else peak * 1024 + most_of_copies  # Linux counts in KiB


def private_memory(processes: Iterable[Any]) -> int:
    """Bytes that these processes of `multiprocessing` hold for themselves (Linux)."""
    text = "".join(Path(f"/proc/{each.pid}/smaps_rollup").read_text() for each in processes)
    return 1024 * sum(map(int, re.findall(r"^Private_.*?(\d+) kB$", text, re.MULTILINE)))
