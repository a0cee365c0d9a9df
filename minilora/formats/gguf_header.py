"""The header of a GGUF file. Every number in it is checked against the size of the file before anything of that size is made.

    "GGUF", version (u32), tensors (u64), fields (u64)
    a field     name (string), type (u32), value        a string: length (u64), UTF-8        an array: type (u32), count (u64), values
    a tensor    name (string), dimensions (u32), sizes (u64 each, the last axis first), type (u32), offset (u64) from the aligned end

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The library's reader makes an object of every element.
"""

import math
import struct
import sys
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.formats import extra

_NUMBERS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")  # by type; as in the modules struct and array
_STRING, _ARRAY = 8, 9
_SHORT = 4096
_VERSIONS = (2, 3)
SIZES = {  # of every model, in the metadata: field of the configuration
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}


class Tensor(NamedTuple):
    """data: the bytes (rows, bytes of a row), mapped from the file."""

    name: str
    shape: tuple[int, ...]
    tensor_type: Any  # gguf.GGMLQuantizationType
    data: np.ndarray


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(metadata, {name: tensor}) of a file. Raises FileNotFoundError, ImportError, or ValueError for an unreadable file.

    An array is a list, but a long one of numbers an array.array, which takes no more memory than it does in the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    extra("gguf", "gguf", f"reading {path}")
    try:
        return _header(path)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not a readable GGUF file: it is truncated or of another format ({error}).") from None


def short(value: Any) -> Any:
    """The shortest decimal number equal to a float32: 1e-5 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def dequantized(tensor: Tensor, path: Path) -> np.ndarray:
    """A tensor in floating point, (out, in)."""
    import gguf

    try:
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"{path}: {tensor.name} is quantized as {tensor.tensor_type.name}, which is not supported ({error}).") from None
    if value.ndim not in (1, 2):
        raise ValueError(f"{path}: {tensor.name} has shape {value.shape}; expected a matrix or a vector.")
    return np.asarray(value)


def _header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    import gguf

    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensors, fields = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in _VERSIONS:
        raise ValueError("its byte order is not this machine's" if version & 0xFFFF == 0 else f"it is of version {version}")
    meta: dict[str, Any] = {}
    for _ in range(_at_most(fields, len(data) // 13)):
        name = cursor.string()
        if name in meta:
            raise ValueError(f"it has the field {name!r:.80} twice")
        meta[name] = cursor.value(cursor.number("I"))
    infos = []
    for _ in range(_at_most(tensors, len(data) // 24)):
        name, axes = cursor.string(), cursor.number("I")
        sizes = [cursor.number("Q") for _ in range(_at_most(axes, 4))]
        infos.append((name, tuple(sizes[::-1]), cursor.number("I"), cursor.number("Q")))
    alignment = meta.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in (2**k for k in range(3, 17)):
        raise ValueError(f"its alignment is {alignment!r:.40}")
    start, found = -(-cursor.at // alignment) * alignment, {}
    for name, shape, number, offset in infos:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if name in found or 0 in shape or (shape[-1:] or (1,))[0] % block:
            raise ValueError(f"its tensor {name!r:.80} is there twice, empty, or of no whole number of blocks")
        length, first = math.prod(shape) // block * size, start + offset
        if first + length > len(data):
            raise ValueError("it is shorter than its header says")
        rows = shape[:-1] or (1,) * (not shape)
        found[name] = Tensor(name, shape, kind, data[first : first + length].reshape(*rows, -1))
    return meta, found


def _at_most(count: int, most: int) -> int:
    if count > most:
        raise ValueError("it is shorter than its header says")
    return count


class _Cursor:
    """A place in the bytes of a file."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = memoryview(data), 0  # type: ignore[arg-type]

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.at:
            raise ValueError("it is shorter than its header says")
        self.at += length
        return bytes(self.data[self.at - length : self.at])

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_code(kind))
        inner, count = self.number("I"), self.number("Q")
        if inner == _STRING:
            return [self.string() for _ in range(_at_most(count, (len(self.data) - self.at) // 8))]
        values = array(_code(inner).replace("?", "B"))
        values.frombytes(self.take(count * values.itemsize))
        if sys.byteorder == "big":
            values.byteswap()
        return values.tolist() if count <= _SHORT else values


def _code(kind: int) -> str:
    if (code := _NUMBERS[kind] if kind < len(_NUMBERS) else None) is None:
        raise ValueError(f"it has a value of type {kind}")
    return code
