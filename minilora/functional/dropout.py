"""Dropout whose masks are a function of a key, equal on every backend."""

from __future__ import annotations

import math

import numpy as np

from minilora.backend import Array, get_xp


def dropout(x: Array, p: float, key: int) -> Array:
    """y = x * mask: each element is zeroed with probability p, the others are scaled by 1 / (1 - p).

    Saved: the key alone, one integer. Backward draws the mask again, which costs about ten passes of integer
    arithmetic over the elements and no memory between the two.
    """
    return x * dropout_mask(x, x.shape, p, key)


def dropout_backward(dy: Array, p: float, key: int) -> Array:
    """dx = dy * mask, the same mask: what was not read gets no gradient."""
    return dy * dropout_mask(dy, dy.shape, p, key)


def dropout_mask(like: Array, shape: tuple[int, ...], p: float, key: int) -> Array:
    """An array of 0 (probability p) and 1 / (1 - p), a pure function of (shape, p, key), where `like` lives and in its dtype.

    Its bits are the finaliser of SplitMix64 applied to the counters key, key + 1, ... (Steele, Lea, Flood, "Fast splittable pseudorandom
    number generators", 2014). Integer arithmetic modulo 2^64 is the same everywhere, so NumPy and CuPy agree to the bit.
    """
    check_p(p)
    xp = get_xp(like)
    z = xp.arange(math.prod(shape), dtype=xp.uint64) + np.uint64(key % 2**64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    u = z >> np.uint64(40)  # 24 uniform bits: 0 <= u < 2^24
    kept = (u >= round(p * 2**24)).reshape(shape)
    return kept.astype(like.dtype) * (1 / (1 - p))


def check_p(p: float) -> None:
    """Raise ValueError unless 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p is {p}; it must be at least 0 and below 1.")
