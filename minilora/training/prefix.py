"""A cache for the outputs of frozen blocks: they are the same in every epoch, so each sequence is computed once.

With adapters in the top 2 of 6 blocks, every epoch after the first costs a third of it. Dropout is off in frozen blocks, so the
result is the same; outputs computed in another batch differ by rounding only.
"""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.data.batches import Batch
from minilora.models.stack import Prefix


class PrefixCache:
    """`cache(model, batch)` is model.prefix(batch.ids, batch.offsets), with each sequence computed once.

    Up to `limit` bytes are kept, where the model is; other sequences are computed again. Raises ValueError for a model with another
    number of frozen blocks.
    """

    def __init__(self, limit: int = 2**30) -> None:
        self.limit = limit
        self.kept: dict[bytes, Array] = {}
        self.bytes = self.blocks = 0
        self._lock = threading.Lock()

    def __call__(self, model: Any, batch: Batch) -> Prefix | None:
        """Thread-safe: a sequence that two threads have at the same time is computed twice, and kept once."""
        keys = [batch.ids[a:b].tobytes() for a, b in pairwise(batch.offsets)]
        new = [i for i, key in enumerate(keys) if key not in self.kept]
        found = {}
        if new:
            parts = [batch.ids[batch.offsets[i] : batch.offsets[i + 1]] for i in new]
            offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
            prefix = model.prefix(np.concatenate(parts), offsets)
            if prefix is None:
                return None
            if self.kept and prefix.blocks != self.blocks:
                what = f"this cache holds outputs of {self.blocks} frozen blocks, the model has {prefix.blocks}"
                raise ValueError(f"{what}; use another cache.")
            self.blocks, x = prefix
            for i, (a, b) in zip(new, pairwise(offsets), strict=True):
                found[keys[i]] = x[a:b]
                with self._lock:  # each sequence is stored and counted once
                    if keys[i] not in self.kept and self.bytes + x[a:b].nbytes <= self.limit:
                        self.kept[keys[i]] = x[a:b].copy()
                        self.bytes += x[a:b].nbytes
        rows = [found[key] if key in found else self.kept[key] for key in keys]
        return Prefix(self.blocks, get_xp(rows[0]).concatenate(rows))
