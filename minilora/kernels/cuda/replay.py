"""Work whose shapes repeat, captured once as a CUDA graph and replayed after that: Python then costs one call, not hundreds.

A graph holds the kernels, their numbers, and the addresses that they read and write. Hence

- what changes from one time to the next is an array, copied to an address of its own before each replay; numbers stay those of the capture;
- what the work allocates comes from a memory pool of its own;
- the work may neither wait for the device nor read memory of the host, and its products have to go through cuda/blas.py.

Work that cannot be captured runs directly, and a warning says why, once. A graph is kept only if its results equal those of the work.
"""

import contextlib
import gc
import sys
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from minilora.backend import Array, forget_constants, import_cupy, to_numpy
from minilora.kernels.memory import POOL_OWNERS, peak_memory

Work = Callable[..., tuple[Array, ...]]
AFTER = 3  # times in a row that work has to come with the same key and shapes


class Replay:
    """`replay(key, work, arrays)` is work(*arrays). When the same key and shapes have come AFTER times in a row, the work is captured, and
    replayed from then on. One graph is kept, the last: it holds the memory of its work.

    work       takes arrays of the device and returns a tuple of them. Its results depend on these, on `key`, and on arrays at fixed
               addresses (weights, gradients), on nothing else: random numbers and step numbers would be those of the capture
    arrays     of the host or the device
    """

    def __init__(self) -> None:
        self.last: Hashable = None  # the key that came last, and how often in a row
        self.times = 0
        self.captured: tuple[Hashable, _Graph] | None = None
        self.refused: str | None = None  # why nothing could be captured

    def __call__(self, key: Hashable, work: Work, arrays: Sequence[Array]) -> tuple[Array, ...]:
        key = key, tuple((x.shape, str(x.dtype)) for x in arrays)
        if self.captured is not None and self.captured[0] == key:
            return self.captured[1].launch(arrays)
        self.last, self.times = key, self.times + 1 if self.last == key else 1
        capturing = self.refused is None and self.times >= AFTER
        try:
            return self._capture(key, work, arrays) if capturing else _directly(work, arrays)
        except Exception as error:  # CuPy's errors have no common class
            memory = isinstance(error, MemoryError)  # without a graph there may be room
            if not capturing and not (memory and self.captured):
                raise
            self.refused = "out of memory" if memory else " ".join(str(error).split())
            if not memory:
                warnings.warn(f"steps run one launch after the other, as this one could not be captured: {self.refused}", stacklevel=2)
        self.close()
        return _directly(work, arrays)

    def close(self) -> None:
        """Free the graph and its memory, which nothing else would free; at the end of the interpreter, the driver does."""
        if self.captured is not None and not sys.is_finalizing():
            self.captured[1].close()
        self.captured = None

    def _capture(self, key: Hashable, work: Work, arrays: Sequence[Array]) -> tuple[Array, ...]:
        self.close()  # before the next one takes memory of its own
        graph = _Graph()
        self.captured = key, graph
        expected = graph.warm_up(work, arrays)
        graph.capture(work)
        result = graph.launch(arrays)
        if not all(np.allclose(to_numpy(x), to_numpy(y), rtol=1e-3, equal_nan=True) for x, y in zip(expected, result, strict=True)):
            raise RuntimeError("the graph gives other results than the step itself")
        return result


def _directly(work: Work, arrays: Sequence[Array]) -> tuple[Array, ...]:
    cupy = import_cupy()
    return work(*(cupy.asarray(x) for x in arrays))


class _Graph:
    """CuPy frees nothing of a memory pool that is deleted: each of these has to be closed."""

    graph: Any = None
    outputs: tuple[Array, ...] = ()

    def __init__(self) -> None:
        self.cupy = import_cupy()
        POOL_OWNERS.add(self)
        self.pool = self.cupy.cuda.MemoryPool()  # kept: it owns what the graph reads and writes
        self.stream = self.cupy.cuda.Stream(non_blocking=True)  # the default stream cannot be captured
        self.inputs: list[Array] = []

    def warm_up(self, work: Work, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """The work itself, with this pool and stream: kernels are compiled, and constants are put where the capture finds them."""
        peak_memory("cupy")  # before what the pool holds is freed
        self.cupy.get_default_memory_pool().free_all_blocks()
        forget_constants()  # one from elsewhere might be freed before the graph is
        self.cupy.cuda.get_current_stream().synchronize()
        with self.cupy.cuda.using_allocator(self.pool.malloc), self.stream:
            self.inputs = [self.cupy.asarray(x).copy() for x in arrays]
            result = tuple(x.copy() for x in work(*self.inputs))
            self.stream.synchronize()
        return result

    def capture(self, work: Work) -> None:
        with self.cupy.cuda.using_allocator(self.pool.malloc), self.stream:
            gc.collect()
            gc.disable()  # a collection could free something of the device in the middle of the capture
            try:
                self.stream.begin_capture()
                self.outputs = work(*self.inputs)
                self.graph = self.stream.end_capture()
            except BaseException:
                with contextlib.suppress(Exception):  # a capture that failed has to be ended
                    self.stream.end_capture()
                raise
            finally:
                gc.enable()

    def launch(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        """Replay on the current stream. The results are copies: the next replay writes to the same addresses."""
        for place, x in zip(self.inputs, arrays, strict=True):
            if isinstance(x, np.ndarray):
                x = self.cupy.asarray(x)  # through pinned memory: copied straight to its place it might wait for the device
            place[...] = x
        self.graph.launch()
        return tuple(x.copy() for x in self.outputs)

    def close(self) -> None:
        """Free what it holds. Constants in its pool go first, as they would keep it."""
        self.cupy.cuda.get_current_stream().synchronize()
        peak_memory("cupy")
        self.graph, self.outputs, self.inputs = None, (), []
        forget_constants()
        self.pool.free_all_blocks()
        POOL_OWNERS.discard(self)
