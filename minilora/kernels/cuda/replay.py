"""Work whose shapes repeat, recorded once as a CUDA graph and launched whole after that: Python then costs one call, not hundreds.

A recording holds the kernels, their numbers, and the places in memory that they read and write. Hence

- what changes from one time to the next is an array, copied to a place of its own before each launch; numbers stay as they were;
- what the work allocates comes from a pool that nobody else takes from;
- the work may neither wait for the device nor read memory of the host, and its products have to go by cuda/blas.py.

What cannot be recorded runs as it is, and a warning says why, once. A recording is kept only if it gives what the work itself gave.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from minilora import backend
from minilora.backend import Array, import_cupy, to_numpy

Work = Callable[..., tuple[Array, ...]]
AFTER = 3  # times in a row that work has to come with the same key and shapes


class Replay:
    """`replay(key, work, arrays)` is work(*arrays): done as it is, until the same key and shapes have come AFTER times in a row; then it is
    recorded, and from then on launched. One recording is kept, the last: it holds the memory of its work.

    work       takes arrays of the device, and returns a tuple of them; what it gives depends on them, on `key` and on arrays that stay
               where they are (weights, gradients), on nothing else. Random numbers and step numbers would be those of the recording
    arrays     of the host or the device
    """

    def __init__(self) -> None:
        self.last: Hashable = None  # the key that came last, and how often in a row
        self.times = 0
        self.recorded: tuple[Hashable, _Recording] | None = None
        self.refused: str | None = None  # why nothing could be recorded

    def __call__(self, key: Hashable, work: Work, arrays: Sequence[Array]) -> tuple[Array, ...]:
        key = key, tuple((x.shape, str(x.dtype)) for x in arrays)
        if self.recorded is not None and self.recorded[0] == key:
            return self.recorded[1].launch(arrays)
        self.last, self.times = key, self.times + 1 if self.last == key else 1
        if self.refused is None and self.times >= AFTER:
            self.close()  # before the next one takes memory of its own
            return self._record(key, work, arrays)
        try:
            return _as_it_is(work, arrays)
        except MemoryError:
            if self.recorded is None:
                raise
        self.close()
        self.refused = "out of memory"  # without a recording there may be room
        return _as_it_is(work, arrays)

    def close(self) -> None:
        """Let go of the recording and its memory, which nothing else would free."""
        if self.recorded is not None:
            self.recorded[1].close()
            self.recorded = None

    def _record(self, key: Hashable, work: Work, arrays: Sequence[Array]) -> tuple[Array, ...]:
        recording = _Recording()
        try:
            given = recording.rehearse(work, arrays)
            recording.record(work)
            again = recording.launch(arrays)
            if not all(np.allclose(to_numpy(x), to_numpy(y), rtol=1e-3, equal_nan=True) for x, y in zip(given, again, strict=True)):
                raise RuntimeError("the recording gives something else than the step itself")
            self.recorded = key, recording
            return again
        except MemoryError:  # as it is, there may be room
            self.refused = "out of memory"
        except Exception as error:  # CuPy's errors have no common class, and none of them may cost the run
            self.refused = " ".join(str(error).split())
            warnings.warn(f"steps run one launch after the other, as this one could not be recorded: {self.refused}", stacklevel=2)
        recording.close()
        return _as_it_is(work, arrays)


def _as_it_is(work: Work, arrays: Sequence[Array]) -> tuple[Array, ...]:
    cupy = import_cupy()
    return work(*(cupy.asarray(x) for x in arrays))


class _Recording:
    """CuPy frees nothing of a memory pool that is gone: whoever makes one of these has to close it."""

    graph: Any = None
    outputs: tuple[Array, ...] = ()

    def __init__(self) -> None:
        self.cupy = import_cupy()
        backend.POOL_OWNERS.add(self)
        self.pool = self.cupy.cuda.MemoryPool()  # kept: it owns what the graph reads and writes
        self.stream = self.cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be recorded
        self.inputs: list[Array] = []

    def rehearse(self, work: Work, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """The work as it is, where it will be recorded: kernels are compiled, and constants are put where the recording finds them."""
        backend.peak_memory("cupy")  # which is to know of what is freed now
        self.cupy.get_default_memory_pool().free_all_blocks()
        backend.forget_constants()  # one from elsewhere might be freed before the recording is
        self.cupy.cuda.get_current_stream().synchronize()
        with self.cupy.cuda.using_allocator(self.pool.malloc), self.stream:
            self.inputs = [self.cupy.asarray(x).copy() for x in arrays]
            given = tuple(x.copy() for x in work(*self.inputs))
            self.stream.synchronize()
        return given

    def record(self, work: Work) -> None:
        with self.cupy.cuda.using_allocator(self.pool.malloc), self.stream:
            gc.collect()
            gc.disable()  # what it found now might free something of the device in the middle of the recording
            self.stream.begin_capture()
            try:
                self.outputs = work(*self.inputs)
            except BaseException:
                with contextlib.suppress(Exception):  # it is of no use any more, but has to be ended
                    self.stream.end_capture()
                raise
            finally:
                gc.enable()
            self.graph = self.stream.end_capture()

    def launch(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """On the current stream. The results are copies: the next launch writes to the same places."""
        for place, x in zip(self.inputs, arrays, strict=True):
            if isinstance(x, np.ndarray):
                x = self.cupy.asarray(x)  # through pinned memory: copied straight to its place it might wait for the device
            place[...] = x
        self.graph.launch()
        return tuple(x.copy() for x in self.outputs)

    def close(self) -> None:
        """Free what it holds. Constants that were put into its pool go first, as they would hold on to it."""
        self.cupy.cuda.get_current_stream().synchronize()
        backend.peak_memory("cupy")
        self.graph, self.outputs, self.inputs = None, (), []
        backend.forget_constants()
        self.pool.free_all_blocks()
        backend.POOL_OWNERS.discard(self)
