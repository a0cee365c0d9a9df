"""Forward, backward and clipping of a step as one CUDA graph, where batches repeat a shape (kernels/cuda/replay.py). GPU only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import numpy as np

from minilora import functional as F
from minilora.backend import Array
from minilora.data.batches import Batch
from minilora.kernels import cuda
from minilora.kernels.cuda import blas
from minilora.kernels.cuda.replay import Replay
from minilora.layers import Dropout, reseed
from minilora.optim.flat import clip_grad_norm
from minilora.training.replicas import Replicas


@contextmanager
def step_graph(replicas: Replicas, clip: float) -> Iterator[StepGraph | None]:
    """A StepGraph, closed at the end; None where steps cannot be captured: kernels off, no raw cuBLAS, or a model without a config."""
    if not cuda.ENABLED or blas.bindings() is None or not hasattr(replicas.models[0], "config"):
        yield None
        return
    with closing(Replay()) as replay:
        yield StepGraph(replicas, clip, replay)


class StepGraph:
    """`gradients(batches, seed, scale)` leaves the clipped gradient in the flat buffer; returns the loss and the norm before clipping.

    Steps whose batches have one shape, with labels in the same rows, are replayed. Token ids, labels and the keys of dropout masks change
    from step to step, and are copied to the device before each replay.
    """

    def __init__(self, replicas: Replicas, clip: float, replay: Replay) -> None:
        self.replicas, self.clip, self.replay = replicas, clip, replay
        self.prefixed: bool | None = None  # are outputs of frozen blocks cached? The same for all batches
        self.dropouts = [layer for _, layer in replicas.models[0].modules() if isinstance(layer, Dropout) and layer.p > 0]

    def fits(self, batches: Sequence[Batch]) -> bool:
        """Whether these batches can be captured: labels of tokens, and no cached outputs of frozen blocks, which come from the host."""
        if any(b.per_sequence for b in batches):
            return False
        if self.prefixed is None:
            self.prefixed = self.replicas.kept(next(s for s in self.replicas.shards(batches)[0] if s.labelled))
        return not self.prefixed

    def gradients(self, batches: Sequence[Batch], seed: Sequence[int], scale: float) -> tuple[Array, Array]:
        """As Replicas.gradients followed by clip_grad_norm. Raises ValueError for ids or labels outside the vocabulary."""
        model, flat = self.replicas.models[0], self.replicas.flat
        shards, count = self.replicas.shards(batches)
        shards = [shard for shard in shards if shard.labelled]
        labels = [F.labelled(shard.labels) for shard in shards]
        for shard, label in zip(shards, labels, strict=True):  # a replay checks nothing
            F.check_ids(shard.ids, model.config.vocab_size, "embedding")
            F.check_ids(label.targets, model.config.vocab_size, "cross_entropy")
        divisor = count if scale == 1 else count / scale

        def work(*inputs: Array) -> tuple[Array, Array]:
            flat.zero_grad()
            losses = []
            try:
                for dropout, keys in zip(self.dropouts, inputs[-1] if self.dropouts else (), strict=True):
                    dropout.placed, dropout.calls = keys, 0
                for i, (shard, label) in enumerate(zip(shards, labels, strict=True)):
                    loss, saved = model.loss(inputs[2 * i], label._replace(targets=inputs[2 * i + 1]), shard.offsets, divisor)
                    model.loss_backward(saved)
                    losses.append(loss)
            finally:
                for dropout in self.dropouts:
                    dropout.placed = None
            total = sum(losses[1:], losses[0])
            return total if scale == 1 else total / scale, clip_grad_norm(flat, self.clip, scale)

        rows = tuple(None if label.rows is None else label.rows.tobytes() for label in labels)
        key = count, scale, tuple(shard.offsets.tobytes() for shard in shards), rows
        arrays = [x for shard, label in zip(shards, labels, strict=True) for x in (shard.ids, label.targets)]
        if self.dropouts:  # a forward pass calls each once
            reseed(model, *seed, 0)
            arrays.append(np.array([[dropout.next_key() for _ in shards] for dropout in self.dropouts], dtype=np.uint64))
        loss, norm = self.replay(key, work, arrays)
        for p in flat.parameters:  # a replay writes into the buffer only
            p.grad = p.home
        return loss, norm
