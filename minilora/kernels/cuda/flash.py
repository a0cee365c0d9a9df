"""Attention on tensor cores without the scores in memory (flash.cu), and which block of threads takes which rows.

For half precision, and for float32 where products may be taken in TF32 (CUPY_TF32=1); heads of 32, 64 or 128 features. Saved: o, and for
each row and head the logarithm of the sum that the softmax divides by. Memory is linear in the length of a sequence.
"""

import math
import warnings
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, get_xp, kept_on_device
from minilora.functional.attention import bounds_of, check_attention
from minilora.kernels import cuda
from minilora.kernels.cuda.blas import tf32
from minilora.kernels.grouped import seen_keys

ROWS = 64  # of a block
_THREADS = 128
HEADS = (32, 64, 128)  # features of a head that there is a kernel for


class Saved(NamedTuple):
    """What attention keeps for its backward pass."""

    o: Array
    log_sum: Array
    causal: bool
    window: int | None


class Tiles(NamedTuple):
    """(first, count, offset, other_first, other_count) of each block, and the first and last key that each query sees, in its sequence.

    offset: the place in its sequence of the first key.
    """

    of_queries: Array
    of_keys: Array
    seen: Array  # (queries, 2)


def fits(q: Array, k: Array, v: Array, n_head: int, *_: Any) -> bool:
    """Whether there is a kernel for these arrays, whose rows it reads 16 bytes at a time."""
    kind = q.dtype.itemsize == 2 or (q.dtype == np.float32 and tf32())
    if not kind or not cuda.alike(q, k, v) or not _has_the_instructions(get_xp(q)):
        return False
    aligned = (x.strides[1] == x.itemsize and x.strides[0] % 16 == 0 and x.data.ptr % 16 == 0 for x in (q, k, v))
    return q.shape[1] // n_head in HEADS and all(aligned)


@cache
def _has_the_instructions(xp: Any) -> bool:
    """From compute capability 8.0 on, Ampere's. A warning says what an older GPU lacks."""
    capability = int(xp.cuda.Device().compute_capability)
    if capability < 80:
        slow = "attention runs without its kernel, bfloat16 and TF32 without tensor cores; --dtype float16 is faster here."
        warnings.warn(f"this GPU's compute capability is {capability / 10}, below 8.0: {slow}", stacklevel=2)
    return capability >= 80


def attention(
    q: Array,
    k: Array,
    v: Array,
    n_head: int,
    offsets: Sequence[int] | None = None,
    causal: bool = True,
    keep: bool = True,
    n_kv_head: int | None = None,
    rows: np.ndarray | None = None,
    window: int | None = None,
) -> tuple[Array, Saved]:
    """As functional.attention."""
    xp, G = get_xp(q), n_kv_head or n_head
    check_attention(q, k, v, n_head, G, rows)
    tiles, d = _tiles(bounds_of(offsets, len(k)), rows, causal, window, xp), q.shape[1] // n_head
    o, log_sum = xp.empty(q.shape, dtype=q.dtype), xp.empty((len(q), n_head), dtype=xp.float32)
    args = (q, k, v, tiles.of_queries, tiles.seen, *_numbers(q, k, v, n_head, G))
    _launch("flash_forward", len(tiles.of_queries) * n_head, d, (1, 1), *args, o, log_sum)
    return o, Saved(o, log_sum, causal, window)


def attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    saved: Saved,
    n_head: int,
    offsets: Sequence[int] | None = None,
    n_kv_head: int | None = None,
    need: Collection[str] = ("dq", "dk", "dv"),
    rows: np.ndarray | None = None,
    into: Sequence[Array | None] = (None, None, None),
) -> tuple[Array | None, Array | None, Array | None]:
    """As functional.attention_backward. The gradients are new, or written `into` arrays, whose rows may lie apart."""
    xp, G = get_xp(q), n_kv_head or n_head
    do = xp.ascontiguousarray(do)
    tiles, d = _tiles(bounds_of(offsets, len(k)), rows, saved.causal, saved.window, xp), q.shape[1] // n_head
    numbers = _numbers(q, k, v, n_head, G)
    delta = xp.empty(saved.log_sum.shape, dtype=xp.float32)
    dq, dk, dv = into
    dq = xp.empty(q.shape, dtype=q.dtype) if dq is None else dq
    # flash_dq also computes delta, which flash_dkv reads.
    args = (q, k, v, saved.o, do, saved.log_sum, tiles.of_queries, tiles.seen, *numbers)
    _launch("flash_dq", len(tiles.of_queries) * n_head, d, (2, 1), *args, delta, dq, _step(dq))
    if {"dk", "dv"} & set(need):
        dk, dv = (xp.empty(k.shape, dtype=k.dtype) if x is None else x for x in (dk, dv))
        args = (q, k, v, do, saved.log_sum, delta, tiles.of_keys, tiles.seen, *numbers)
        _launch("flash_dkv", len(tiles.of_keys) * G, d, (2, 2), *args, dk, _step(dk), dv, _step(dv))
    return dq if "dq" in need else None, dk if "dk" in need else None, dv if "dv" in need else None


def _numbers(q: Array, k: Array, v: Array, n_head: int, n_kv_head: int) -> tuple[Any, ...]:
    scale = np.float32(1 / math.sqrt(q.shape[1] // n_head))
    return scale, np.int32(n_head), np.int32(n_head // n_kv_head), *map(_step, (q, k, v))


def _step(x: Array) -> np.int64:
    """From a row to the next, in numbers."""
    return np.int64(x.strides[0] // x.itemsize)


def _launch(name: str, blocks: int, d: int, tiles: tuple[int, int], q: Array, *args: Any) -> None:
    """With room in shared memory for so many tiles in row order, and transposed; in half precision two, twice: tiles.cuh. d: of a head."""
    itemsize = q.itemsize
    stages, (straight, transposed) = (2, (2, 0)) if itemsize == 2 else (1, tiles)
    loop = min(64, 8192 // (d * itemsize))
    words = stages * (straight * loop * (d * itemsize // 4 + 4) + transposed * d * (loop * itemsize // 4 + 4) + 4 * loop)
    if blocks:
        cuda.function(get_xp(q), q.dtype, "flash", name, f"-DD={d}")((blocks,), (_THREADS,), (q, *args), shared_mem=4 * words)


@kept_on_device
def _tiles(bounds: np.ndarray, rows: np.ndarray | None, causal: bool, window: int | None, xp: Any) -> Tiles:
    rows = np.arange(bounds[-1]) if rows is None else rows
    cuts = np.searchsorted(rows, bounds)
    of_row = np.repeat(np.arange(len(bounds) - 1), np.diff(cuts))  # the sequence of each query
    first, last = seen_keys(rows - bounds[of_row], np.diff(bounds)[of_row] - 1, causal, window)
    queries, keys = [], []
    for i in range(len(bounds) - 1):
        (q, q_end), (k, k_end) = cuts[i : i + 2], bounds[i : i + 2]
        for a in range(q, q_end, ROWS):
            count, at = min(ROWS, q_end - a), first[a]
            queries.append((a, count, at, k + at, last[a + count - 1] + 1 - at))
        for a in range(k, k_end, ROWS):
            count = min(ROWS, k_end - a)
            at, end = q + np.searchsorted(last[q:q_end], a - k), q + np.searchsorted(first[q:q_end], a - k + count)
            keys.append((a, count, a - k, at, max(end - at, 0)))
    tiles = [np.array(sorted(x, key=lambda tile: -tile[4]), dtype=np.int32).reshape(-1, 5) for x in (queries, keys)]  # the longest first
    return Tiles(*(xp.asarray(x) for x in (*tiles, np.stack([first, last], axis=1).astype(np.int32))))
