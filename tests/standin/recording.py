"""cupy.cuda.Stream and Graph: what is launched between begin_capture and end_capture is not done, but noted, and done by graph.launch().

As CUDA does, it refuses meanwhile whatever would make the host wait, and copies from the host; as CuPy does, it refuses its own products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from standin.counting import note


class Graph:
    """What was recorded. It keeps the memory that its steps read and write, as CuPy's pool does where nobody else takes from it."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.kept: list[Any] = []

    def launch(self, stream: Any = None) -> None:
        assert recording() is None
        note(launches=1)
        for step in self.steps:
            step()


class Stream:
    """As far as it is used: `with stream:`, begin_capture, end_capture, synchronize, ptr."""

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
            raise RuntimeError("cudaErrorStreamCaptureUnsupported: the default stream cannot be recorded.")
        Stream._open = Graph()

    def end_capture(self) -> Graph:
        graph, Stream._open = Stream._open, None
        assert graph is not None
        return graph

    def synchronize(self) -> None:
        waits()
        note(syncs=1)


class Default(Stream):
    """The default stream."""

    def __init__(self) -> None:
        self.non_blocking, self.ptr = False, 0


default = Default()


def current() -> Stream:
    return Stream._current[-1] if Stream._current else default


def recording() -> Graph | None:
    return Stream._open


def perform(run: Callable[[], None]) -> None:
    """Do it, or note it."""
    if (graph := recording()) is None:
        run()
    else:
        graph.steps.append(run)


def waits() -> None:
    """Raise where a recording forbids that the host waits, or reads its own memory."""
    if recording() is not None:
        raise RuntimeError("cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing")


def refuse_product() -> None:
    if recording() is not None:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
