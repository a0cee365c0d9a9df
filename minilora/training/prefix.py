"""What frozen blocks give is the same in every epoch: it is computed once for each sequence, and kept.

With adapters in the top 2 of 6 blocks, an epoch from the second on costs a third of the first. Dropout is off in frozen blocks, so
nothing is lost; a sequence whose blocks ran in another batch differs by rounding alone.
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
    """`cache(model, batch)` is model.prefix(batch.ids, batch.offsets), where each sequence is computed once.

    Up to `limit` bytes stay in memory, or on the device. What comes after goes, on NumPy, into a file in `folder` (default: the
    system's temporary one) that is mapped, and removed with the cache; on CuPy it is computed again. Raises OSError, naming the
    sizes, when the file does not fit on the disk.
    """

    def __init__(self, limit: int = IN_MEMORY, folder: str | Path | None = None) -> None:
        self.limit, self.folder = limit, Path(folder or tempfile.gettempdir())
        self.kept: dict[bytes, Array] = {}
        self.bytes = 0
        self.blocks = 0
        self._file: Any = None
        self._lock = threading.Lock()

    def __call__(self, model: Any, batch: Batch) -> Prefix | None:
        """Threads may ask at once; a sequence that two of them have is computed twice, and kept once."""
        bounds = [(int(a), int(b)) for a, b in pairwise(batch.offsets)]
        keys = [batch.ids[a:b].tobytes() for a, b in bounds]
        new = [i for i, key in enumerate(keys) if key not in self.kept]
        found = {}
        if new:
            ids = np.concatenate([batch.ids[slice(*bounds[i])] for i in new])
            lengths = [bounds[i][1] - bounds[i][0] for i in new]
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            prefix = model.prefix(ids, offsets)
            if prefix is None:
                return None
            if self.kept and prefix.blocks != self.blocks:
                raise ValueError(f"this cache is of {self.blocks} frozen blocks, the model has {prefix.blocks}; take a cache of its own.")
            self.blocks, x = prefix
            for i, a, b in zip(new, offsets[:-1], offsets[1:], strict=True):
                found[keys[i]] = x[a:b]
                self._keep(keys[i], x[a:b])
        rows = [found[key] if key in found else self.kept[key] for key in keys]
        return Prefix(self.blocks, get_xp(rows[0]).concatenate(rows))

    def _keep(self, key: bytes, x: Array) -> None:
        with self._lock:  # one place in the file, and one count of bytes, for each sequence
            if key in self.kept:
                return
            if self.bytes + x.nbytes <= self.limit:
                self.kept[key] = x.copy()
            elif get_xp(x) is np:
                self.kept[key] = self._to_file(x)
            else:
                return
            self.bytes += x.nbytes

    def _to_file(self, x: np.ndarray) -> np.ndarray:
        """x at the end of the file, as a read-only view."""
        free = shutil.disk_usage(self.folder).free
        if x.nbytes > free:
            raise OSError(
                f"what the frozen blocks give has filled {self.bytes / 1e9:.1f} GB, and {self.folder} has no room for more; "
                "go on without it (--no-cache), or set TMPDIR to a larger disk."
            )
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder, prefix="minilora-")  # noqa: SIM115  (lives as long as the cache)
            weakref.finalize(self, self._file.close)
        start = self._file.seek(0, 2)
        start += -start % 64  # aligned for every dtype
        self._file.seek(start)
        self._file.write(np.ascontiguousarray(x).view(np.uint8).data)  # as bytes: of bfloat16 NumPy gives no others
        self._file.flush()
        return np.memmap(self._file, x.dtype, "r", start, x.shape)
