"""A cache for the outputs of frozen blocks: they are the same in every epoch, so each sequence is computed once.

With adapters in the top 2 of 6 blocks, every epoch after the first costs a third of it. Dropout is off in frozen blocks, so the
result is the same; outputs computed in another batch differ by rounding only.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.data.batches import Batch
from minilora.models.stack import Prefix

IN_MEMORY = 2**30  # bytes; beyond it, what is kept goes into a file


class PrefixCache:
    """`cache(model, batch)` is model.prefix(batch.ids, batch.offsets), with each sequence computed once.

    Up to `limit` bytes stay in memory, or on the device. Beyond that, NumPy writes to a memory-mapped file in `folder` (default: the
    system's temporary folder), removed with the cache; CuPy computes again. Raises OSError when the file does not fit on the disk,
    and ValueError for a model with another number of frozen blocks.
    """

    def __init__(self, limit: int = IN_MEMORY, folder: str | Path | None = None) -> None:
        self.limit, self.folder = limit, Path(folder or tempfile.gettempdir())
        self.kept: dict[bytes, Array] = {}
        self.bytes = self.blocks = 0
        self._file: Any = None
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
                self._keep(keys[i], x[a:b])
        rows = [found[key] if key in found else self.kept[key] for key in keys]
        return Prefix(self.blocks, get_xp(rows[0]).concatenate(rows))

    def _keep(self, key: bytes, x: Array) -> None:
        with self._lock:  # each sequence is stored and counted once
            fits = self.bytes + x.nbytes <= self.limit
            if key not in self.kept and (fits or get_xp(x) is np):
                self.kept[key] = x.copy() if fits else self._to_file(x)
                self.bytes += x.nbytes

    def _to_file(self, x: np.ndarray) -> np.ndarray:
        """x at the end of the file, as a read-only view."""
        if x.nbytes > shutil.disk_usage(self.folder).free:
            what = f"the outputs of frozen blocks fill {self.bytes / 1e9:.1f} GB, and {self.folder} has no room for more"
            raise OSError(f"{what}; run with --no-cache, or set TMPDIR to a larger disk.")
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder, prefix="minilora-")  # noqa: SIM115  (lives as long as the cache)
            weakref.finalize(self, self._file.close)
        start = self._file.seek(0, 2)
        start += -start % 64  # aligned for every dtype
        self._file.seek(start)
        self._file.write(np.ascontiguousarray(x).view(np.uint8).data)  # as bytes: NumPy has no other buffer for bfloat16
        self._file.flush()
        return np.memmap(self._file, x.dtype, "r", start, x.shape)
