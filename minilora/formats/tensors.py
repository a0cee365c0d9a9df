"""safetensors files: read as arrays mapped from the file, and written atomically.

The format: 8 bytes with the length n of the header; n bytes of JSON, {name: {dtype, shape, data_offsets: [begin, end]}}; the data.
"""

import errno
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minilora.formats.atomic import write_file
from minilora.quantization.quantize import half_dtype

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"}
_DTYPES |= {f"{kind}{8 * n}": f"<{kind.lower()}{n}" for kind in "IU" for n in (1, 2, 4, 8)}


def map_tensors(path: str | Path, bfloat16: Any = None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: array}, metadata) of a safetensors file. The arrays are read-only views of the mapped file, read from disk on first use.

    The file must not be modified while they exist; `write_tensors` is safe, since it replaces the file instead of writing into it.
    BF16, which NumPy lacks, becomes float32 in memory, or stays in the file as an array of the dtype `bfloat16` (ml_dtypes').
    Raises FileNotFoundError; ValueError when the file is truncated, inconsistent, of another format, or holds an unsupported dtype.
    """
    header, start = _header(Path(path))
    metadata = header.pop("__metadata__", None) or {}
    data = np.memmap(path, dtype=np.uint8, mode="r")
    tensors = {}
    for name, entry in header.items():
        try:
            value = np.ndarray(entry["shape"], _DTYPES[entry["dtype"]], buffer=data, offset=start + entry["data_offsets"][0])
        except (ValueError, OverflowError) as error:  # an empty array of 2^61 rows, or of 99 dimensions
            raise _unreadable(path, f"{name!r:.80} has shape {entry['shape']!s:.80}: {error}") from None
        if entry["dtype"] == "BF16" and bfloat16 is not None:
            value = value.view(bfloat16)
        elif entry["dtype"] == "BF16":  # the upper half of a float32
            value = (value.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = value if value.flags.aligned else value.copy()
    return tensors, metadata


def stored_dtypes(path: str | Path) -> dict[str, str]:
    """{name: dtype, as "float32" or "bfloat16"} of a safetensors file, from its header. Raises as `map_tensors`."""
    header, _ = _header(Path(path))
    dtypes = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    return {name: "bfloat16" if dtype == "BF16" else np.dtype(_DTYPES[dtype]).name for name, dtype in dtypes.items()}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """(the header, the offset of the data), after the library has checked that the header is consistent and covers the whole file."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise _unreadable(path, f"{str(error).splitlines()[0]:.300}") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] not in _DTYPES:
            raise _unreadable(path, f"{name!r:.80} has dtype {entry['dtype']!r:.20}; supported: {', '.join(_DTYPES)}")
    return header, 8 + length


def _unreadable(path: str | Path, why: str) -> ValueError:
    return ValueError(f"{path} is not a readable safetensors file ({why}).")


def write_tensors(
    path: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None, dtypes: Mapping[str, str] = {}
) -> None:
    """Write a safetensors file atomically. The default metadata is {"format": "pt"}, which transformers requires.

    dtypes: {name: "float64", "float32", "float16" or "bfloat16"} to round to; by default each tensor keeps its own.
    Pass at most one entry of metadata: the library writes several in an order that varies from run to run.
    Raises ValueError for numbers beyond float16's range, ImportError for bfloat16 without ml_dtypes.
    """
    written = {}
    for name, value in tensors.items():
        dtype = dtypes.get(name, value.dtype.name)
        x = np.ascontiguousarray(rounded(value, dtype))
        if dtype == "float16" and value.dtype.itemsize > 2 and np.isinf(x).any():
            raise ValueError(f"{path}: {name} has numbers beyond float16's 65504; choose bfloat16 or float32.")
        written[name] = x.view(half_dtype(dtype)) if dtype == "bfloat16" else x

    def save(temporary: str) -> None:
        try:
            save_file(written, temporary, metadata=metadata or {"format": "pt"})
        except SafetensorError as error:  # a full disk
            number = int((re.findall(r"os error (\d+)", str(error)) or [errno.EIO])[0])
            raise OSError(number, os.strerror(number)) from None

    write_file(path, save)


def holds_bfloat16(x: np.ndarray) -> bool:
    """Whether every number of a float32 array is exact in bfloat16, that is, has a lower half of zeros."""
    return x.dtype == np.float32 and not (np.ascontiguousarray(x).view(np.uint32) & 0xFFFF).any()


def rounded(value: np.ndarray, dtype: str) -> np.ndarray:
    """The value in this dtype, rounded to nearest, ties to even; "bfloat16", which NumPy lacks, is returned as its bits in uint16."""
    if dtype != "bfloat16" or value.dtype.name == "bfloat16":
        with np.errstate(over="ignore"):
            return value.astype(dtype, copy=False)
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
