"""Records in files: .jsonl and .csv, one record a line, with errors that name the file and the line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

WANTED = {
    "lm": 'the field "text", or "prompt" and "completion", or "messages"',
    "classify": 'the fields "text" and "label"',
}


def read_records(file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, record) of a .jsonl or .csv file; empty lines are skipped. Raises ValueError when a line does not parse."""
    file = Path(file)
    if file.suffix not in READERS:
        raise ValueError(f"{file}: wanted a .jsonl or .csv file.")
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}.")
    none = True
    for line, record in READERS[file.suffix](file):
        none = False
        yield line, record
    if none:
        raise ValueError(f"{file} is empty: line 1 should be a record with {WANTED['lm']}, or {WANTED['classify']}.")


def _jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for n, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8-sig" if n == 1 else "utf-8")
            record = json.loads(line) if line.strip() else None
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, line {n}: this is not UTF-8 text ({error.reason} at byte {error.start}).") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {n}: this is not JSON ({error}); wanted one object a line.") from None
        if not line.strip():
            continue
        if not isinstance(record, dict):
            raise ValueError(f"{file}, line {n}: wanted a JSON object, got {type(record).__name__}.")
        yield n, record


def _csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        n = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {n}: this is not UTF-8 text ({error.reason}); save the file as UTF-8.") from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for row in rows:
            if row and header is None:
                header = row
                if len(set(header)) < len(header):
                    raise ValueError(f"{file}, line {line}: the header names a column twice: {', '.join(header)}.")
            elif row and header is not None:
                if len(row) != len(header):
                    raise ValueError(f"{file}, line {line}: wanted {len(header)} fields ({', '.join(header)}), got {len(row)}.")
                yield line, dict(zip(header, row, strict=True))
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}, line {line}: this is not CSV ({error}).") from None


READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {".jsonl": _jsonl, ".csv": _csv}
