"""The steps of grouped attention (kernels/grouped.py) on NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

product = scores = np.matmul


def weights(S: np.ndarray, limit: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """E = exp(S - max) in place of S, and 1 / sum, where a query may look."""
    n, _, _, e = S.shape
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
