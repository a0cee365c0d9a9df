"""Out of memory: the size of batch that would have fitted."""

from __future__ import annotations

from typing import Any

from minilora.backend import backend_name, import_cupy
from minilora.data.batches import Batch


def advice(model: Any, batch: Batch, tokens_flag: str, recompute: bool) -> str:
    """The flags with which a batch fits, as part of an error message. tokens_flag: that for tokens a batch, "" if sequences are counted."""
    n, fit = len(batch.offsets) - 1, sequences_that_fit(model, batch)
    size = f"{tokens_flag} {int(batch.offsets[fit])}" if tokens_flag else f"--batch-size {fit}"
    text = f"{fit} of a batch's {n} sequences fit: {size}" if fit else f"not one of {n} sequences fits: use a shorter --window"
    return text + ("" if recompute else ", or --recompute")


def sequences_that_fit(model: Any, batch: Batch) -> int:
    """The most sequences of the batch, found by halving, whose forward and backward pass fits into memory; 0 if not even one does."""
    n, backend = len(batch.offsets) - 1, backend_name(next(p for _, p in model.parameters() if p.trainable).data)
    while n := n // 2:
        if backend == "cupy":
            import_cupy().get_default_memory_pool().free_all_blocks()  # held by the pool, but unused
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
