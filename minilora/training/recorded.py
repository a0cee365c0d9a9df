"""The gradient of a batch on a GPU, and its norm, as one recorded piece of work where batches have one shape (kernels/cuda/replay.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.data.batches import Batch
from minilora.kernels import cuda
from minilora.kernels.cuda import blas
from minilora.kernels.cuda.replay import Replay
from minilora.layers import Dropout, reseed
from minilora.optim.flat import clip_grad_norm
from minilora.training.replicas import Replicas


class Gradients:
    """`gradients(micro_batches, seed)` leaves the clipped gradient in the flat buffer; returns the loss and the norm before clipping.

    Batches of one shape, with labels of tokens in the same rows, are recorded; the keys of dropout masks, new in every step, go to the
    device with them. What frozen blocks gave, where it is kept (training/prefix.py), comes from elsewhere: such steps are not.
    """

    def __init__(self, replicas: Replicas, clip: float, record: bool = True) -> None:
        self.replicas, self.clip = replicas, clip
        model, on_host = replicas.models[0], get_xp(replicas.flat.data) is np
        self.prefixed: bool | None = None  # is there something that frozen blocks give? asked once
        self.dropouts = [layer for _, layer in model.modules() if isinstance(layer, Dropout) and layer.p > 0]
        able = not on_host and cuda.ENABLED and blas.bindings() is not None
        self.replay = Replay() if record and able and hasattr(model, "config") else None

    def __call__(self, micro_batches: Sequence[Batch], seed: Sequence[int] = (), scale: float = 1.0) -> tuple[Array, Array]:
        if self.replay is not None and not any(b.per_sequence for b in micro_batches):
            shards, count = self.replicas.shards(micro_batches)
            shards = [shard for shard in shards if shard.labelled]
            if self.prefixed is None:
                self.prefixed = self.replicas.kept(shards[0])
            if not self.prefixed:
                return self._recorded(self.replay, shards, count, seed, scale)
        loss = self.replicas.gradients(micro_batches, seed, scale)
        return loss, clip_grad_norm(self.replicas.flat, self.clip, scale)

    def _recorded(self, replay: Replay, shards: list[Batch], count: int, seed: Sequence[int], scale: float) -> tuple[Array, Array]:
        model, flat, labelled = self.replicas.models[0], self.replicas.flat, [F.labelled(shard.labels) for shard in shards]
        for shard, label in zip(shards, labelled, strict=True):  # on the device nobody looks at them
            F.check_ids(shard.ids, model.config.vocab_size, "embedding")
            F.check_ids(label.targets, model.config.vocab_size, "cross_entropy")

        divisor = count if scale == 1 else count / scale

        def work(*placed: Array) -> tuple[Array, Array]:
            flat.zero_grad()
            losses = []
            try:
                for dropout, keys in zip(self.dropouts, placed[-1] if self.dropouts else (), strict=True):
                    dropout.placed, dropout.calls = keys, 0
                for i, (shard, label) in enumerate(zip(shards, labelled, strict=True)):
                    loss, saved = model.loss(placed[2 * i], label._replace(targets=placed[2 * i + 1]), shard.offsets, divisor)
                    model.loss_backward(saved)
                    losses.append(loss)
            finally:
                for dropout in self.dropouts:
                    dropout.placed = None
            total = sum(losses[1:], losses[0])
            return total if scale == 1 else total / scale, clip_grad_norm(flat, self.clip, scale)

        rows = [None if label.rows is None else label.rows.tobytes() for label in labelled]
        key = count, scale, tuple(shard.offsets.tobytes() for shard in shards), tuple(rows)
        arrays = [x for shard, label in zip(shards, labelled, strict=True) for x in (shard.ids, label.targets)]
        if self.dropouts:  # a forward pass calls each once
            reseed(model, *seed, 0)
            arrays.append(np.array([[dropout.next_key() for _ in shards] for dropout in self.dropouts], dtype=np.uint64))
        loss, norm = replay(key, work, arrays)
        flat.claim()
        return loss, norm

    def close(self) -> None:
        """Free the recording, if there is one."""
        if self.replay is not None:
            self.replay.close()
