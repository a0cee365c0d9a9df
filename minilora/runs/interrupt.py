"""Interruptions: signals that end a run after its step, and a lock that keeps a second process out of its folder."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interruption:
    """`requested` is true after the first Ctrl-C, SIGTERM or SIGHUP: the run saves after its step. The second one raises KeyboardInterrupt.

    A context manager. Only the main thread receives signals: in another one, nothing is changed.
    """

    requested = False

    def __enter__(self) -> Interruption:
        on_main = threading.current_thread() is threading.main_thread()
        self.before = {each: signal.signal(each, self._note) for each in _SIGNALS} if on_main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if there is none, and removed if nothing was written to it.

    Raises BlockingIOError, naming the process, when another one holds it. The system releases the lock of a process that ends in any way,
    so there is no stale one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                raise BlockingIOError(f"{folder} is in use by {holder}; wait until it ends, or name another --out.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if list(folder.iterdir()) == [folder / ".lock"]:
                (folder / ".lock").unlink()
                folder.rmdir()
