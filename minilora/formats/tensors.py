"""Reading and writing safetensors files, with errors that name the file.

The format: 8 bytes, the length n of the header; n bytes of JSON, {name: {dtype, shape, data_offsets: [begin, end]}}; the data.
Nothing in a file is run, and nothing it says is believed before it is checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors.numpy import save_file

from minilora.formats.atomic import write_file
from minilora.quantization.half import dtype_of

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"}
_DTYPES |= {f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind in "IU" for n in (1, 2, 4, 8)}
_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_MOST_AXES = 8


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: array}, metadata) of a safetensors file, in memory. Raises as `map_tensors`."""
    tensors, metadata = map_tensors(path)
    return {name: np.array(value) for name, value in tensors.items()}, metadata


def map_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: array}, metadata) of a safetensors file, mapped: the arrays are read-only views of the file, read when they are used.

    The file must not be written to while they live; `write_tensors` is safe, as it puts a new file in the place of the old one.
    BF16, which NumPy has not, becomes float32 in memory: it is the upper half of one.
    Raises FileNotFoundError, or ValueError when the file is cut off, is something else, contradicts itself, or holds another dtype.
    """
    extents, metadata, start = _extents(Path(path))
    data = np.memmap(path, dtype=np.uint8, mode="r")
    tensors = {}
    for name, (dtype, shape, a, _) in extents.items():
        value = np.ndarray(shape, _DTYPES[dtype], buffer=data, offset=start + a)
        if dtype == "BF16":
            value = (value.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = value if value.flags.aligned else value.copy()
    return tensors, metadata


def stored_dtypes(path: str | Path) -> dict[str, str]:
    """{name: dtype in words, "float32" or "bfloat16"} of a safetensors file, by its header. Raises as `map_tensors`."""
    return {name: "bfloat16" if dtype == "BF16" else str(np.dtype(_DTYPES[dtype])) for name, (dtype, *_) in _extents(Path(path))[0].items()}


def _extents(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], dict[str, str], int]:
    """({name: (dtype, shape, begin, end)}, metadata, where the data starts) of a file, after a check that all of it agrees."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    header, start, size = _header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        _refuse(path, "its metadata is not a table of texts")
    extents = {name: _extent(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (_, _, a, b) in sorted(extents.items(), key=lambda item: item[1][2:]):
        if a != end:
            _refuse(path, f"the data of {name!r:.80} begins at byte {a}, where that before it ends at {end}")
        end = b
    if end != size - start:
        _refuse(path, f"its header speaks of {end} bytes of data, but {size - start} are there; is it cut off?")
    return extents, metadata, start


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data starts, and the size of the file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            _refuse(path, f"its header would be {length} bytes long, of {size} in all" if size >= 8 else f"it has {size} bytes")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is no JSON: {str(error).splitlines()[0]:.100}")
    if not isinstance(header, dict):
        _refuse(path, f"its header is a {type(header).__name__}")
    return header, 8 + length, size


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _extent(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one tensor, after a check that they agree."""
    if not isinstance(entry, dict) or not _naturals(entry.get("shape")) or not _naturals(entry.get("data_offsets"), 2):
        _refuse(path, f"the entry of {name!r:.80} is not a dtype, a shape and two offsets")
    dtype, shape, (a, b) = entry.get("dtype"), tuple(entry["shape"]), entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        _refuse(path, f"{name!r:.80} is of dtype {dtype!r:.20}; supported: {', '.join(_DTYPES)}")
    wanted = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
    if b - a != wanted:
        _refuse(path, f"{name!r:.80} is {dtype} of shape {shape!s:.80}, which is {wanted} bytes, but has bytes {a} to {b}")
    if math.prod(max(n, 1) for n in shape) >= 2**60:  # of no elements, but beyond what an array's strides can say
        _refuse(path, f"{name!r:.80} has shape {shape!s:.80}")
    return dtype, shape, a, b


def _naturals(value: Any, count: int | None = None) -> bool:
    """A list of whole numbers, none negative, of which there are `count`?"""
    return (
        isinstance(value, list)
        and len(value) <= _MOST_AXES
        and count in (None, len(value))
        and all(type(n) is int and 0 <= n < 2**62 for n in value)
    )


def _refuse(path: Path, why: str) -> NoReturn:
    raise ValueError(f"{path} is not a readable safetensors file ({why}).")


def write_tensors(
    path: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None, dtypes: Mapping[str, str] = {}
) -> None:
    """Write a safetensors file, whole or not at all. By default the metadata is format=pt, which transformers asks for.

    dtypes: {name: "float64", "float32", "float16" or "bfloat16"} to round to; by default a tensor's own.
    Give at most one entry of metadata: the library writes several in an order that changes from run to run.
    Raises ValueError for numbers beyond float16's, ImportError for bfloat16 without ml_dtypes.
    """
    written = {}
    for name, value in tensors.items():
        dtype = dtypes.get(name, value.dtype.name)
        x = np.ascontiguousarray(rounded(value, dtype))
        if dtype == "float16" and value.dtype.itemsize > 2 and np.isinf(x).any():
            raise ValueError(f"{path}: {name} has numbers beyond float16's 65504; choose bfloat16 or float32.")
        written[name] = x.view(dtype_of(dtype)) if dtype == "bfloat16" else x
    write_file(path, lambda temporary: save_file(written, temporary, metadata=metadata or {"format": "pt"}))


def holds_bfloat16(x: np.ndarray) -> bool:
    """Is every number of a float32 array one of bfloat16, the upper half of a float32?"""
    return x.dtype == np.float32 and not (np.ascontiguousarray(x).view(np.uint32) & 0xFFFF).any()


def rounded(value: np.ndarray, dtype: str) -> np.ndarray:
    """The value in this dtype, to the nearest, ties to even; for "bfloat16", which NumPy has not, its bits as uint16."""
    if dtype != "bfloat16" or value.dtype.name == "bfloat16":
        with np.errstate(over="ignore"):
            return value.astype(dtype, copy=False)
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
