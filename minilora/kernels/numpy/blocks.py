"""Blocks of large arrays, small enough for the cache and large enough for threads."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from minilora.tuned import sizes

# A block has tuned.sizes["block"] elements. Where lanes run in threads, these wait for each other between operations, since NumPy releases
# the GIL inside of them only: with blocks of 2^14 two threads take three times as long as with 2^17 (docs/speed.md). Processes do not.


def blocks(*arrays: Any) -> Iterator[list[Any]]:
    """Matching pieces of contiguous arrays of one size, as one-dimensional views; a number or None is the same in each."""
    flat = [a.reshape(-1) if isinstance(a, np.ndarray) else a for a in arrays]
    block = sizes["block"]
    if flat[0].size <= block:
        yield flat
        return
    for i in range(0, flat[0].size, block):
        yield [a[i : i + block] if isinstance(a, np.ndarray) else a for a in flat]


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cut `rows` rows of `columns` elements into blocks."""
    step = max(1, sizes["block"] // columns)
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def scratch(like: np.ndarray, count: int) -> list[np.ndarray]:
    """`count` one-dimensional buffers that hold a block of `like`."""
    size = min(like.size, sizes["block"])
    return [np.empty(size, like.dtype) for _ in range(count)]
