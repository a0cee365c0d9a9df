"""Fake cupy.cuda.Stream and Graph: work between begin_capture and end_capture is not done but added to a graph; graph.launch() does it.

During capture, everything that would make the host wait and copies from the host raise, as in CUDA; CuPy's own products raise, as in CuPy.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fakecupy.counting import note


class Graph:
    """A captured graph. It holds the memory that its steps read and write, as a private pool of CuPy does."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.kept: list[Any] = []

    def launch(self, stream: Any = None) -> None:
        assert capturing() is None
        note(launches=1)
        for step in self.steps:
            step()


class Stream:
    """The parts that minilora uses: `with stream:`, begin_capture, end_capture, synchronize, record, ptr."""

    _open: Graph | None = None
    _current: list[Stream] = []  # noqa: RUF012

    def __init__(self, non_blocking: bool = False) -> None:
        self.non_blocking, self.ptr = non_blocking, id(self)

    def __enter__(self) -> Stream:
        Stream._current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Stream._current.remove(self)

    def begin_capture(self) -> None:
        if not self.non_blocking or Stream._open is not None:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported: the default stream cannot be captured.")
        Stream._open = Graph()

    def end_capture(self) -> Graph:
        graph, Stream._open = Stream._open, None
        assert graph is not None
        return graph

    def synchronize(self) -> None:
        waits()
        note(syncs=1)

    def record(self) -> Any:
        """An event, as cupy.cuda.Event: everything before it has been done at once."""
        return SimpleNamespace(done=True)


class Default(Stream):
    """The default stream."""

    def __init__(self) -> None:
        self.non_blocking, self.ptr = False, 0


default = Default()


def current() -> Stream:
    return Stream._current[-1] if Stream._current else default


def capturing() -> Graph | None:
    return Stream._open


def perform(run: Callable[[], None]) -> None:
    """Run now, or add to the graph that is being captured."""
    if (graph := capturing()) is None:
        run()
    else:
        graph.steps.append(run)


def waits() -> None:
    """Raise during capture: the host may neither wait nor copy from its own memory."""
    if capturing() is not None:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing")


def refuse_product() -> None:
    if capturing() is not None:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
