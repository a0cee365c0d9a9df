"""Files that are either whole or not there."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_file(path: str | Path, write: Callable[[str], None]) -> None:
    """Call write(temporary path) and rename the result to `path`: a reader never sees half a file.

    On any error the temporary file is removed and what was at `path` stays. Raises OSError when the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """`write_file` for UTF-8 text."""

    def write(temporary: str) -> None:
        Path(temporary).write_text(text, encoding="utf-8")

    write_file(path, write)


def write_json(path: str | Path, value: Any) -> None:
    """`write_file` for JSON, indented, keys in the order given; see `to_json`."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON, in which null stands for the numbers that it has not: nan and inf."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError, naming the file, for anything else."""
    return json_object(Path(path).read_bytes(), path)


def json_object(text: bytes, where: str | Path) -> dict[str, Any]:
    """The JSON object in UTF-8. Raises ValueError, naming `where`, for anything else: no JSON, nested too deep, numbers too long."""
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({str(error).splitlines()[0]:.100}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, not {type(value).__name__}.")
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
