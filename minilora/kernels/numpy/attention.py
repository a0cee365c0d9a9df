"""Attention by groups of sequences and blocks of queries (kernels/grouped.py), on NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minilora.kernels import grouped


def attention(*args: Any, **options: Any) -> tuple[np.ndarray, list]:
    """As functional.attention; saved as kernels/grouped.py says."""
    return grouped.attention(_steps(), *args, **options)


def attention_backward(*args: Any, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As functional.attention_backward."""
    return grouped.attention_backward(_steps(), *args, **options)


def _steps() -> grouped.Steps:
    return grouped.Steps(np.matmul, np.matmul, weights, through_softmax)


def weights(S: np.ndarray, group: grouped.Group, at: slice, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """E = exp(S - max) in place of S, and 1 / sum, where a query may look."""
    limit, (n, _, _, e) = group.limit[:, at], S.shape
    first = int(limit.min()) + 1  # keys before this one are seen by every query
    if first < e:
        hidden = np.where(np.arange(first, e) > limit[:, :, None], -math.inf, 0).astype(S.dtype)
        S.reshape(n, -1, limit.shape[1], e)[..., first:] += hidden[:, None]
    S -= S.max(axis=-1, keepdims=True)
    E = np.exp(S, out=S)
    return E, 1 / (E @ np.ones((e, 1), E.dtype))


def through_softmax(dS: np.ndarray, E: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """dS = E (dS - D'), D' = (row sum of E * dS) / sum, in place."""
    dS -= np.einsum("ngts,ngts->ngt", dS, E)[..., None] * inverse
    dS *= E
    return dS
