"""Attention by groups of sequences (kernels/grouped.py) on NumPy: its steps."""

import math
import sys
from functools import partial
from typing import Any

import numpy as np

from minilora.kernels import grouped

product = scores = np.matmul


def weights(S: np.ndarray, begin: int, first: np.ndarray | None, last: np.ndarray, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """E = exp(S - max) in place of S, and 1 / sum, where a query may look: at the keys first to last. S holds those from `begin` on."""
    n, _, _, e = S.shape
    keys, scores = np.arange(begin, begin + e), S.reshape(n, -1, last.shape[1], e)
    late = int(last.min()) + 1 - begin  # keys before this one are not too late for any query
    early = 0 if first is None else int(first.max()) - begin  # keys from this one on are not too early
    if late < e:
        scores[..., late:] += np.where(keys[late:] > last[:, :, None], -math.inf, 0).astype(S.dtype)[:, None]
    if first is not None and early > 0:
        scores[..., :early] += np.where(keys[:early] < first[:, :, None], -math.inf, 0).astype(S.dtype)[:, None]
    S -= S.max(axis=-1, keepdims=True)
    E = np.exp(S, out=S)
    return E, 1 / (E @ np.ones((e, 1), E.dtype))


def through_softmax(dS: np.ndarray, E: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """dS = E (dS - D'), D' = (row sum of E * dS) / sum, in place."""
    dS -= np.einsum("ngts,ngts->ngt", dS, E)[..., None] * inverse
    dS *= E
    return dS


attention, attention_backward = (partial(f, sys.modules[__name__]) for f in (grouped.attention, grouped.attention_backward))
