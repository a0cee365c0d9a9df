"""Lanes of a step on processes of this computer: copies of this one, forked before the first step.

NumPy holds the GIL between operations, and OpenBLAS a lock in each product, so that threads wait for each other thousands of times a
step (docs/speed.md). A copy has the same model; its pages are shared until one is written to. Trainable parameters and all gradients are
in memory that the copies write to in common (`shared_zeros` in kernels/memory.py).
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from minilora.kernels import memory

_work: Callable[..., Any]  # in a copy: what it is asked to do
available = sys.platform == "linux"  # macOS has libraries that do not survive a fork


class Copies(AbstractContextManager[Any]):
    """`count` copies of this process as it is now; each can be asked to call `work`. A context manager, which ends them.
    They ignore signals, which are for this process, and end if it is killed. Raises RuntimeError where the system refuses one."""

    def __init__(self, count: int, work: Callable[..., Any]) -> None:
        before = set(multiprocessing.active_children())
        self.pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), initializer=_begin, initargs=(work,))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)  # of other threads: none of theirs is waited for in a copy
            try:
                self.pool.submit(os.getpid).result()  # forks all
            except OSError as error:
                for copy in set(multiprocessing.active_children()) - before:  # those that were made wait for work for ever
                    copy.kill()
                    copy.join()
                raise RuntimeError(f"this process cannot be copied ({error.strerror}): use --threads 1, or free memory.") from None
        self.processes = set(multiprocessing.active_children()) - before

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # one has been killed
            memory.most_of_copies = max(memory.most_of_copies, memory.private_memory(self.processes))
        self.pool.shutdown()

    def ask(self, *args: Any) -> Future[Any]:
        """work(*args), in one of the copies; see `answer`."""
        with _alive():
            return self.pool.submit(_call, *args)


def answer(asked: Future[Any]) -> Any:
    """The result. Raises what `work` raises there; RuntimeError when the copy has ended."""
    with _alive():
        return asked.result()


@contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        why = "a process that computed a part of the step was killed; if memory ran out: try fewer threads, or a smaller batch."
        raise RuntimeError(why) from None


def _begin(work: Callable[..., Any]) -> None:
    global _work
    _work = work
    memory.keep_freed_memory()
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG


def _call(*args: Any) -> Any:
    return _work(*args)
