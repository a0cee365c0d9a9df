"""Data parallelism in one process: shards of a batch on replicas that share the weights and own their gradients.

NumPy releases the GIL in every product and ufunc, so Python threads with one BLAS thread each run in parallel. They are faster than one
thread with a parallel BLAS, because elementwise work is divided too (docs/flat-buffer.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from minilora.backend import Array, get_xp
from minilora.data.batches import Batch
from minilora.kernels.memory import keep_freed_memory
from minilora.layers import reseed
from minilora.optim.flat import FlatBuffer, adopt, fill_missing
from minilora.training.prefix import PrefixCache

SHARD = 768  # tokens: enough for products at full speed
SHARD_ON_DEVICE = 2**14  # products have to be larger there, and memory is scarcer than launches


class Replicas:
    """`gradients(batches)` leaves the gradient of the whole step in `flat.grad`; the sum runs in a fixed order.

    A batch is cut into shards of whole sequences, of about `tokens` tokens at most, and what a shard saves for its backward is freed
    before the next one starts: the memory of a step does not grow with the batch. prefix: cache for the outputs of frozen blocks.

    Use as a context manager: it holds the threads, and limits BLAS to one thread each while it is open.
    Raises ValueError for fewer than one thread.
    """

    def __init__(
        self, model: Any, flat: FlatBuffer, threads: int = 1, prefix: PrefixCache | None = None, tokens: int | None = None
    ) -> None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}.")
        on_host = get_xp(flat.data) is np
        threads = threads if on_host else 1  # one device runs in parallel by itself
        self.flat, self.prefix, self.tokens = flat, prefix, tokens or (SHARD if on_host else SHARD_ON_DEVICE)
        self.models = [model] + [model.replica() for _ in range(threads - 1)]
        self.parameters = [flat.parameters] + [[p for _, p in each.parameters() if p.trainable] for each in self.models[1:]]
        self.grads = [flat.grad] + [get_xp(flat.grad).zeros_like(flat.grad) for _ in self.models[1:]]
        for grad, parameters in zip(self.grads[1:], self.parameters[1:], strict=True):
            adopt(grad, parameters)
        self._open = ExitStack()

    def __enter__(self) -> Replicas:
        keep_freed_memory()
        self._open.enter_context(threadpool_limits(1, user_api="blas"))
        self.pool = self._open.enter_context(ThreadPoolExecutor(len(self.models)))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def shards(self, batches: Sequence[Batch]) -> tuple[list[Batch], int]:
        """(the shards of a step's batches, the number of labels in all). Raises ValueError when there is no label."""
        count = sum(b.labelled for b in batches)
        if count == 0:
            raise ValueError("no token in this batch is labelled; there is nothing to learn from.")
        n = len(self.models)
        return [shard for b in batches for shard in b.split(n * -(-len(b.ids) // (n * self.tokens)))], count

    def kept(self, shard: Batch) -> bool:
        """Whether the outputs of frozen blocks for this shard come from a cache."""
        return self.prefix is not None and self.prefix(self.models[0], shard) is not None

    def gradients(self, batches: Sequence[Batch], seed: Sequence[int] = (), scale: float = 1.0) -> Array:
        """Forward and backward over all batches of a step, as if they were one batch. Returns their mean loss per labelled token.

        Weighted by tokens: every shard divides by the number of labels in the whole step, so that accumulation equals the large batch.
        seed: (the run's, the step), of which dropout masks are a function. scale: factor of the gradients, but not of the loss
        (loss_scale.py); it is applied by dividing by a smaller number.
        """
        shards, count = self.shards(batches)
        divisor = count if scale == 1 else count / scale
        n = len(self.models)

        def run(k: int) -> Array | None:
            model, total = self.models[k], None
            reseed(model, *seed, k)
            for p in self.parameters[k]:
                p.grad = None
            with np.errstate(all="ignore"):  # `Watch` reports what is not finite, once
                for shard in (s for s in shards[k::n] if s.labelled):
                    prefix = {} if self.prefix is None else {"prefix": self.prefix(model, shard)}
                    loss, saved = model.loss(shard.ids, shard.labels, shard.offsets, divisor, **prefix)
                    model.loss_backward(saved)
                    del saved  # before the next shard starts
                    total = loss if total is None else total + loss
            return total

        losses = list((self.pool.map if n > 1 else map)(run, range(n)))
        self.flat.gather()
        for grad, parameters in zip(self.grads[1:], self.parameters[1:], strict=True):  # in order: the sum is repeatable
            fill_missing(parameters)
            self.flat.grad += grad
        total = sum(loss for loss in losses if loss is not None)
        return total if scale == 1 else total / scale
