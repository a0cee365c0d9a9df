"""Files and folders that exist completely or not at all, and JSON."""

import errno
import json
import math
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_file(path: str | Path, write: Callable[[str], object]) -> None:
    """Call write(temporary path), then rename the result to `path`: a reader never sees a partial file, after a power failure neither.

    On any error the temporary file is removed and `path` keeps its old content. Raises OSError when the folder cannot be written, and for a
    device or a pipe: the new file would take its place.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "this is not a file, and is not replaced by one", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    temporary.touch(exist_ok=False)
    try:
        mode = (path if path.exists() else temporary).stat().st_mode
        write(str(temporary))
        temporary.chmod(mode)  # that of the file before, or of a new file: a library may have chosen another
        put_in_place(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk
            error.filename = str(path)
        raise


def temporary_of(path: Path) -> Path:
    """A free name beside `path`, for what is to be renamed to it."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")


def is_temporary(path: Path) -> bool:
    """Whether the name is one of `temporary_of`: a file or folder that was being written when the process ended."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}(\.[a-z]+)?", path.name) is not None


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a file, or a folder of files, once everything in it is on the disk; and the new name, too."""
    for each in (*(temporary.iterdir() if temporary.is_dir() else ()), temporary):
        _synchronise(each)
    os.replace(temporary, path)
    _synchronise(path.parent)


def _synchronise(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folder
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_text(path: str | Path, text: str) -> None:
    """`write_file` for UTF-8 text."""
    write_file(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """`write_file` for JSON, indented, with the keys in the order of `value`; see `to_json`."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON, with null for NaN and infinity, which JSON lacks."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def read_json(path: str | Path, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in a file; `absent`, where given, if there is no file. Raises ValueError, naming the file, for anything else."""
    if absent is not None and not Path(path).is_file():
        return absent
    return json_object(Path(path).read_bytes(), path)


def json_object(text: bytes, where: str | Path) -> dict[str, Any]:
    """The JSON object in UTF-8 text. Raises ValueError, naming `where`, for invalid JSON, other JSON values, and excessive nesting."""
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({str(error).splitlines()[0]:.100}).") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, not {type(value).__name__}.")
    return value
