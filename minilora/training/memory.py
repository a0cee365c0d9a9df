"""Memory has run out: how large a batch would have fit?"""

from __future__ import annotations

from typing import Any

from minilora.backend import backend_name, import_cupy
from minilora.data.batches import Batch


def sequences_that_fit(model: Any, batch: Batch) -> int:
    """The most sequences of the batch, halved again and again, that a forward and backward pass has room for; 0: not even one."""
    n, backend = len(batch.offsets) - 1, backend_name(next(p for _, p in model.parameters() if p.trainable).data)
    while n := n // 2:
        if backend == "cupy":
            import_cupy().get_default_memory_pool().free_all_blocks()  # what the pool holds, but nobody uses
        part = batch.first(n)
        try:
            if part.labelled:
                _, saved = model.loss(part.ids, part.labels, part.offsets)
                model.loss_backward(saved)
            return n
        except MemoryError:
            continue
        finally:
            for _, p in model.parameters():
                p.grad = None
    return 0
