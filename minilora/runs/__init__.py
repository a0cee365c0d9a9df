"""What a verb does; Python users call the same functions. Each reports to `say`, line by line."""

from collections.abc import Callable

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Reports nothing."""
