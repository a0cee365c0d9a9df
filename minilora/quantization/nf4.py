"""NF4: frozen weights in four bits (QLoRA, arXiv 2305.14314, section 3).

A weight is cut into blocks of 64 numbers. Each block keeps its largest magnitude, and each number the nearest of 16 fractions of it,
which are quantiles of a normal distribution. The magnitudes are themselves kept in eight bits (double quantization): less their
mean, in blocks of 256, as the nearest of 256 fractions of each block's largest. In all 4.127 bits a number instead of 32.

The layout is that of bitsandbytes: numbers in the order of PyTorch's (out, in), two to a byte, the first in the upper half.
A product reads a block of rows at a time: neither the dense weight nor its gradient is ever formed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from minilora.backend import Array, Matrix, backend_name, get_xp, to_backend, to_numpy
from minilora.kernels import product

BLOCK, NESTED = 64, 256
CHUNK = 2**19  # numbers that are dequantized at a time

CODE = np.array(  # the quantiles, as bitsandbytes publishes them; 0 and both ends are among them
    """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0""".split(),
    dtype=np.float32,
)


def dynamic_code() -> np.ndarray:
    """The 256 fractions for the magnitudes: a sign, up to seven bits that say how small, the rest linear (arXiv 1511.04561).

    10^-e times the middles of 2^(6 - e) equal parts of [0.1, 1], for e = 0 to 6, with both signs; 0 and 1.
    """
    parts = []
    for e in range(7):
        edges = np.linspace(0.1, 1, 2 ** (6 - e) + 1)
        middles = 10.0**-e * (edges[:-1] + edges[1:]) / 2
        parts += [middles, -middles]
    return np.sort(np.concatenate([*parts, [0.0, 1.0]])).astype(np.float32)


DYNAMIC = dynamic_code()


def quantize_blocks(values: np.ndarray, block: int, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index of the nearest fraction for each value (n,), the largest magnitude of each block (n / block,)) of values (n,).

    code: the fractions, in order; in the middle of two, the lower is taken.
    """
    count = -(-values.size // block)
    padded = np.zeros((count, block), np.float32)
    padded.ravel()[: values.size] = values
    largest = np.abs(padded).max(axis=1)
    padded *= 1 / np.maximum(largest, np.float32(1e-38))[:, None]
    index = np.searchsorted((code[:-1] + code[1:]) / np.float32(2), padded.ravel()[: values.size])
    return index.astype(np.uint8), largest


class NF4(Matrix):
    """A frozen matrix (m, n) in NF4.

    codes (m n / 2,) two numbers a byte, absmax (blocks,) bytes, nested_absmax (blocks / 256,) and offset: see the module.
    dtype is that of what is dequantized; nested_code the fractions of nested_absmax, which a file may have of its own.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        codes: Array,
        absmax: Array,
        nested_absmax: Array,
        offset: float,
        dtype: Any = "float32",
        nested_code: np.ndarray = DYNAMIC,
    ) -> None:
        self.shape: tuple[int, int] = shape
        self.codes, self.absmax, self.nested_absmax, self.offset = codes, absmax, nested_absmax, offset
        self.dtype, self.like, self.transposed = np.dtype(dtype), codes, False
        home = backend_name(codes)
        high, low = np.divmod(np.arange(256), 16)
        pairs = CODE[np.stack([high, low], axis=1)].astype(self.dtype)  # the two numbers of each byte, read as one number of twice the size
        self.pairs = to_backend(pairs.view({2: "f4", 4: "f8", 8: "c16"}[self.dtype.itemsize]).ravel(), home)
        self.nested_code = to_backend(nested_code, home)

    @classmethod
    def of(cls, W: Array, dtype: Any = "float32") -> NF4:
        """W (m, n) quantized, on the host, and kept where W is."""
        values = np.ascontiguousarray(to_numpy(W).T, dtype=np.float32).ravel()
        q, largest = quantize_blocks(values, BLOCK, CODE)
        q = np.append(q, np.uint8(7)) if q.size % 2 else q
        offset = largest.mean()
        absmax, nested = quantize_blocks(largest - offset, NESTED, DYNAMIC)
        home = backend_name(W)
        codes, absmax, nested = (to_backend(a, home) for a in (q[::2] << 4 | q[1::2], absmax, nested))
        return cls(tuple(W.shape), codes, absmax, nested, float(offset), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for this weight: 0.129 of float32 where it is not tiny."""
        return self.codes.nbytes + self.absmax.nbytes + self.nested_absmax.nbytes + 4

    @property
    def T(self) -> NF4:
        W = copy.copy(self)
        W.shape, W.transposed = self.shape[::-1], not self.transposed
        return W

    def rows(self) -> Iterator[tuple[int, int, Array]]:
        """(a, b, columns a to b of W, as rows (b - a, m)), dequantized, a chunk at a time."""
        n, m = self.shape if self.transposed else self.shape[::-1]
        xp, unit = get_xp(self.codes), BLOCK // math.gcd(m, BLOCK)  # rows after which a block begins
        step = max(CHUNK // m // unit, 1) * unit
        for a in range(0, n, step):
            b = min(a + step, n)
            first, last = a * m // BLOCK, -(-b * m // BLOCK)
            scale = self.nested_code[self.absmax[first:last]]
            scale *= self.nested_absmax[xp.arange(first, last) // NESTED]
            scale += np.float32(self.offset)
            values = self.pairs[self.codes[a * m // 2 : -(-b * m // 2)]].view(self.dtype)[: (b - a) * m]
            if values.size < scale.size * BLOCK:  # the last block is not full
                values, read = xp.zeros(scale.size * BLOCK, dtype=self.dtype), values
                values[: read.size] = read
            values = values.reshape(-1, BLOCK)
            values *= scale[:, None].astype(self.dtype)
            yield a, b, values.ravel()[: (b - a) * m].reshape(b - a, m)

    def __rmatmul__(self, x: Array) -> Array:
        xp = get_xp(x)
        y = (xp.zeros if self.transposed else xp.empty)((x.shape[0], self.shape[1]), dtype=self.dtype)
        for a, b, rows in self.rows():
            if self.transposed:
                y += product(x[:, a:b], rows)  # x W^T, summed over the columns of W
            else:
                y[:, a:b] = product(x, rows.T)
        return y

    def dense(self) -> Array:
        """The matrix, dequantized."""
        W = get_xp(self.codes).concatenate([rows for _, _, rows in self.rows()])
        return W if self.transposed else W.T

    def column_squares(self) -> Array:
        """The squared lengths of the columns (n,)."""
        if self.transposed:
            return (self.dense() ** 2).sum(axis=0)
        return get_xp(self.codes).concatenate([(rows * rows).sum(axis=1) for _, _, rows in self.rows()])

    def to_backend(self, backend: str, dtype: Any = None) -> NF4:
        """The same, moved; `dtype` is of what is dequantized."""
        codes, absmax, nested = (to_backend(a, backend) for a in (self.codes, self.absmax, self.nested_absmax))
        moved = NF4(self.shape, codes, absmax, nested, self.offset, dtype or self.dtype, to_numpy(self.nested_code))
        moved.transposed = self.transposed
        return moved


def is_nf4(value: Any) -> bool:
    return isinstance(value, NF4)
