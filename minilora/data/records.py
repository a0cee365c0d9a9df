"""Files as text and as records: formats, encodings, and the splits of a folder.

    .jsonl .ndjson .json      one JSON object a line, or one list of objects
    .csv .tsv                 the header names the fields; quotes as in RFC 4180
    .parquet                  needs pyarrow
    all of these as .gz       decompressed first

Suffixes and the names of splits are read in any letter case. Every other file is plain text. Errors name the file and the line.
"""

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minilora.data import TASKS
from minilora.formats import extra

Record = dict[str, Any]

SPLITS = {"train": ("train", "training"), "valid": ("valid", "validation", "dev", "eval", "val"), "test": ("test",)}


def note(text: str) -> None:
    """Print a line on standard error."""
    print(text, file=sys.stderr)


def read_bytes(file: Path) -> bytes:
    """The bytes of a file, decompressed where its name ends in .gz. Raises FileNotFoundError, or ValueError for damaged gzip data."""
    raw = file.read_bytes()
    if file.suffix.lower() != ".gz":
        return raw
    try:
        with gzip.open(io.BytesIO(raw)) as opened:
            text = opened.read(most := 2**26 + 100 * len(raw))
            more = opened.read(1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is not a whole gzip file ({error}).") from None
    if more:
        raise ValueError(f"{file} is more than {most:,} bytes without its compression, which is hardly text; decompress it first.")
    return text


def decode_bytes(raw: bytes, file: Path, encoding: str = "utf-8") -> str:
    """Bytes as text, without a byte order mark. Raises ValueError, naming file and line, for binary data and for another encoding."""
    try:
        text = raw.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except UnicodeError as error:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{file}, line 1: this is utf-16 text, not {encoding}; give --encoding utf-16.") from None
        n = raw[: getattr(error, "start", 0)].count(b"\n") + 1
        advice = "it is binary data" if b"\0" in raw else "name its encoding with --encoding, for instance latin-1"
        raise ValueError(f"{file}, line {n}: this is not {encoding.upper()} text ({getattr(error, 'reason', error)}); {advice}.") from None
    except LookupError:
        raise ValueError(f"there is no encoding {encoding!r}; choose one that Python knows, for instance utf-8 or latin-1.") from None
    if (at := text.find("\0")) >= 0:
        line = text.count("\n", 0, at) + 1
        raise ValueError(f"{file}, line {line}: this is binary data (it holds a zero byte), not text.")
    return text.removeprefix("\ufeff")


def kind_of(file: str | Path) -> str | None:
    """The suffix that decides how records are read from a file, in lower case and without .gz; None for plain text."""
    suffix = Path(str(file).lower().removesuffix(".gz")).suffix
    return suffix if suffix in READERS else None


def read_records(file: str | Path, encoding: str = "utf-8") -> Iterator[tuple[int, Record]]:
    """(line number from 1, record) of a record file; empty lines are skipped. In JSON lists and Parquet files, records are counted.

    Raises FileNotFoundError; ValueError, naming file and line, for what does not parse; ImportError for .parquet without pyarrow.
    """
    file = Path(file)
    kind = kind_of(file)
    if kind is None:
        raise ValueError(f"{file} is not a record file; its name must end in {', '.join(READERS)}, or one of these and .gz.")
    records = READERS[kind](file, encoding)
    if (first := next(records, None)) is None:
        raise ValueError(f"{file} is empty: there are no records in it.")
    yield first
    yield from records


def _json(file: Path, encoding: str) -> Iterator[tuple[int, Record]]:
    text = decode_bytes(read_bytes(file), file, encoding)
    found: Iterator[tuple[int, Any]]
    if text.lstrip().startswith("["):
        found = enumerate(_parsed(text, str(file)), start=1)
    else:
        lines = enumerate((line.removeprefix("\ufeff").strip() for line in text.split("\n")), start=1)
        found = ((n, _parsed(line, f"{file}, line {n}")) for n, line in lines if line)
    for n, value in found:
        if not isinstance(value, dict):
            raise ValueError(f"{file}, line {n}: expected a JSON object, got {type(value).__name__}.")
        yield n, value


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: this is not JSON ({error}); expected one object a line, or one list.") from None


def _once(pairs: list[tuple[str, Any]]) -> Record:
    table: Record = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"the key {name!r} appears twice")
        table[name] = value
    return table


def _csv(file: Path, encoding: str) -> Iterator[tuple[int, Record]]:
    text = decode_bytes(read_bytes(file), file, encoding)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a field may be as long as the file; the default limit is 131,072
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind_of(file) == ".tsv" else ",", strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for row in rows:
            if len(row) < 2 and not "".join(row).strip():
                pass  # an empty line
            elif header is None:
                header = [name.strip() for name in row]
                if len(set(header)) < len(header):
                    raise ValueError(f"{file}, line {line}: the header names a column twice: {', '.join(header)}.")
                if len(header) == 1 and (mark := next((m for m in (";", "\t", "|") if m in header[0]), None)):
                    raise ValueError(f"{file}, line {line}: the columns are separated by {mark!r}; save the file with commas.")
            elif len(row) != len(header):
                raise ValueError(f"{file}, line {line}: expected {len(header)} fields ({', '.join(header)}), got {len(row)}.")
            else:
                yield line, dict(zip(header, row, strict=True))
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}, line {line}: this is not CSV ({error}).") from None


def _parquet(file: Path, encoding: str) -> Iterator[tuple[int, Record]]:
    arrow, parquet = (extra(module, "parquet", f"reading {file}") for module in ("pyarrow", "pyarrow.parquet"))
    try:
        rows = parquet.read_table(io.BytesIO(read_bytes(file))).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable Parquet file ({str(error).splitlines()[0].rstrip('.')}).") from None
    for n, row in enumerate(rows, start=1):
        yield n, {name: value for name, value in row.items() if value is not None}  # empty columns of a row


def field_of(record: Record, name: str, task: str) -> Any:
    """A field of a record. Raises ValueError, naming those that the task needs, if it is not there."""
    if name not in record:
        raise ValueError(f"expected {TASKS[task]}; it has {', '.join(map(repr, record)) or 'none'}.")
    return record[name]


READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, Record]]]] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _json),
    **dict.fromkeys((".csv", ".tsv"), _csv),
    ".parquet": _parquet,
}


def is_dataset(path: str | Path) -> bool:
    """Whether this path holds records: a record file, or a folder with a file for a split. Everything else is plain text.

    Raises ValueError for a folder of record files of which none is named after a split.
    """
    path = Path(path)
    if not path.is_dir():
        return kind_of(path) is not None
    splits, others = _folder(path)
    if not splits and (odd := [name for name in others if kind_of(name) not in (None, ".json")]):
        raise ValueError(
            f"{path} holds records ({listed(odd)}), but no file is named train, valid or test; rename one, or give the file itself."
        )
    return bool(splits)


def split_files(path: str | Path, quiet: bool = True) -> dict[str, Path]:
    """{"train", "valid", "test": file} of a folder, or {"train": file}. quiet=False: name unused files on standard error.

    Raises FileNotFoundError when there are no records, ValueError when two files claim the same split.
    """
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}.")
        return {"train": path}
    splits, others = _folder(path)
    if twice := next((files for files in splits.values() if len(files) > 1), None):
        raise ValueError(f"{path} has both {twice[0].name} and {twice[1].name}, which are the same split; keep one.")
    if not splits:
        has = f"; it has {listed(others)}" if others else ""
        raise FileNotFoundError(f"there are no records in {path}: expected train.jsonl (or .csv, ...), perhaps valid and test{has}.")
    if others and not quiet:
        note(f"{path}: {listed(others)} {'is' if len(others) == 1 else 'are'} not used.")
    return {split: files[0] for split, files in splits.items()}


def _folder(path: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """({split: record files that claim it}, names of the other files), hidden files aside."""
    splits: dict[str, list[Path]] = {}
    others = []
    for file in sorted(path.iterdir()):
        kind = kind_of(file)
        stem = file.name.lower().removesuffix(".gz").removesuffix(kind or "")
        split = next((split for split, names in SPLITS.items() if stem in names), None)
        if file.is_file() and split and kind:
            splits.setdefault(split, []).append(file)
        elif not file.name.startswith("."):
            others.append(file.name)
    return {split: splits[split] for split in SPLITS if split in splits}, others


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names of a list, and the number of the others."""
    return ", ".join(f"{name:.60}" for name in names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
