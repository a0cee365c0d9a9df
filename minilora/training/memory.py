"""Out of memory: the size of batch that would have fitted."""

from typing import Any

from minilora.backend import backend_name, import_cupy
from minilora.data.batches import Batch


def advice(model: Any, batch: Batch, tokens_flag: str, recompute: bool) -> str:
    """The flags with which a batch fits, as part of an error message: the most sequences, found by halving, that pass forward and backward.

    tokens_flag: that for tokens a batch, "" if sequences are counted.
    """
    sequences = fit = len(batch.offsets) - 1
    on_device = backend_name(next(p for _, p in model.parameters() if p.trainable).data) == "cupy"
    while fit := fit // 2:
        if on_device:
            import_cupy().get_default_memory_pool().free_all_blocks()  # held by the pool, but unused
        part = batch.sequences(range(fit))
        try:
            if part.labelled:
                model.loss_backward(model.loss(part.ids, part.labels, part.offsets)[1])
            break
        except MemoryError:
            continue
        finally:
            for _, p in model.parameters():
                p.grad = None
    size = f"{tokens_flag} {int(batch.offsets[fit])}" if tokens_flag else f"--batch-size {fit}"
    text = (
        f"{fit} of a batch's {sequences} sequences fit: {size}" if fit else f"not one of {sequences} sequences fits: use a shorter --window"
    )
    return text + ("" if recompute else ", or --recompute")
