"""Standard output and error as the command line writes to them: no control characters, and no end of a run when the reader has gone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Printable:
    """A text stream. Control characters, which may come from any file that is read, are written as escapes, but a carriage return that a
    progress bar begins with. When the reader has closed the pipe: `go_on` drops what is written, else BrokenPipeError is raised."""

    def __init__(self, stream: Any, go_on: bool) -> None:
        self.stream, self.go_on = stream, go_on

    def write(self, text: str) -> int:
        begin, rest = ("\r", text[1:]) if text.startswith("\r") else ("", text)
        self._do(lambda: self.stream.write(begin + rest.translate(_CONTROL)))
        return len(text)

    def flush(self) -> None:
        self._do(lambda: self.stream.flush())

    def _do(self, action: Any) -> None:
        try:
            if self.stream is not None:  # it is None where Python was started without one
                action()
        except (BrokenPipeError, ValueError) as error:
            if not self.go_on:
                raise BrokenPipeError from error
            self.stream = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def printable(exact: bool, go_on: bool) -> Iterator[None]:
    """Let sys.stdout and sys.stderr be Printable. exact: standard output is left unchanged, unless it is a terminal."""
    before = sys.stdout, sys.stderr
    if not (exact and sys.stdout is not None and not sys.stdout.isatty()):
        sys.stdout = Printable(sys.stdout, go_on)
    sys.stderr = Printable(sys.stderr, True)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


def ignore_the_rest() -> None:
    """After a closed pipe: let the interpreter's own flush at its end succeed."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
