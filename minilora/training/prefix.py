"""A cache for the outputs of frozen blocks: they are the same in every epoch, so each sequence is computed once.

With adapters in the top 2 of 6 blocks, every epoch after the first costs a third of it. Dropout is off in frozen blocks. Each sequence is
computed alone: its outputs, to the bit, do not depend on the batch in which it first came, nor on what the cache holds.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.data.batches import Batch
from minilora.models.stack import Prefix


class PrefixCache:
    """`cache(model, batch)` is model.body.prefix(batch.ids, batch.offsets), with each sequence computed once.

    Up to `limit` bytes are kept, where the model is; other sequences are computed again. Raises ValueError for a model with another
    number of frozen blocks.
    """

    _lock = threading.Lock()  # of the class: a cache is sent to other processes

    def __init__(self, limit: int = 2**30) -> None:
        self.limit = limit
        self.kept: dict[bytes, Array] = {}
        self.bytes = self.blocks = 0
        self.known: frozenset[bytes] = frozenset()  # of a part: what it began with

    def part(self, batches: Iterable[Batch]) -> PrefixCache:
        """A cache for the sequences of these batches, to be filled by another process, with what this one holds of them."""
        part = PrefixCache(self.limit)
        part.bytes, part.blocks = self.bytes, self.blocks
        keys = {batch.ids[a:b].tobytes() for batch in batches for a, b in pairwise(batch.offsets)}
        part.known = frozenset(keys & self.kept.keys())
        part.kept = {key: self.kept[key] for key in part.known}
        return part

    def new(self) -> dict[bytes, Prefix]:
        """What a part holds beyond that, for `keep`."""
        return {key: Prefix(self.blocks, x) for key, x in self.kept.items() if key not in self.known}

    def __call__(self, model: Any, batch: Batch) -> Prefix | None:
        """Thread-safe: a sequence that two threads have at the same time is computed twice, and kept once."""
        rows = [self._sequence(model, batch.ids[a:b]) for a, b in pairwise(batch.offsets)]
        return Prefix(self.blocks, get_xp(rows[0]).concatenate(rows)) if rows[0] is not None else None

    def _sequence(self, model: Any, ids: np.ndarray) -> Array | None:
        """The outputs of one sequence; None for a model without frozen blocks."""
        key = ids.tobytes()
        if key in self.kept:
            return self.kept[key]
        prefix = model.body.prefix(ids, np.array([0, len(ids)]))
        if prefix is None:
            return None
        return self.keep(key, prefix)

    def keep(self, key: bytes, prefix: Prefix) -> Array:
        """The outputs of the sequence with these ids, kept if there is room. Thread-safe."""
        if self.kept and prefix.blocks != self.blocks:
            what = f"this cache holds outputs of {self.blocks} frozen blocks, the model has {prefix.blocks}"
            raise ValueError(f"{what}; use another cache.")
        self.blocks, x = prefix
        with self._lock:  # each sequence is stored and counted once
            if key not in self.kept and self.bytes + x.nbytes <= self.limit:
                self.kept[key] = x
                self.bytes += x.nbytes
        return x
