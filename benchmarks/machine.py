"""The description of the machine, the peak memory of a process, and the load of other processes."""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import resource
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from minilora.tuned import kernels, processor, sizes


def describe() -> dict[str, Any]:
    """CPU, and versions of the libraries that compute."""
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "blas": _blas(),
        "tuned": {"kernels": kernels, **sizes},
        **{name: _version(name) for name in ("numpy", "torch", "transformers", "peft")},
        **{name: os.environ[name] for name in ("OPENBLAS_CORETYPE", "LD_PRELOAD") if name in os.environ},
    }


def slug() -> str:
    """The processor for the name of a file, as amd-epyc-25-17 (family 25, model 17): results of one never replace another's."""
    words = re.findall("[a-z0-9]+", processor().rpartition(",")[0].lower())
    return "-".join(word for word in words if word not in ("family", "model"))


def peak_memory() -> int:
    """Peak resident memory of this process in bytes, and what its forked copies hold beside it.

    On Linux from VmHWM: ru_maxrss includes the memory of the parent at the time of the fork.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        own = re.findall(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        if copies := multiprocessing.active_children():  # of minilora: no rival loads it
            from minilora.kernels.memory import private_memory
        return 1024 * int(own[0]) + (private_memory(copies) if copies else 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def busy_cores(seconds: float) -> float | None:
    """Number of busy cores while this process sleeps for `seconds`; None where there is no /proc/stat."""
    before = _times()
    time.sleep(seconds)
    after = _times()
    if before is None or after is None or after[0] == before[0]:
        return None
    return (os.cpu_count() or 1) * (1 - (after[1] - before[1]) / (after[0] - before[0]))


def _times() -> tuple[int, int] | None:
    """Clock ticks of all cores: (total, idle)."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    ticks = [int(word) for word in stat.read_text().splitlines()[0].split()[1:9]]
    return sum(ticks), ticks[3] + ticks[4]


def _blas() -> str:
    import numpy  # noqa: F401  (loads its BLAS)
    from threadpoolctl import threadpool_info

    return "; ".join(
        f"{i['internal_api']} {i['version']} {i.get('architecture', '')}".strip() for i in threadpool_info() if i["user_api"] == "blas"
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
