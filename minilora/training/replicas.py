"""Data parallelism in one process: shards of a batch on replicas that share the weights and own their gradients.

NumPy leaves Python's lock in every product and ufunc, so Python threads with one BLAS thread each run truly side by side,
and better than one thread with a parallel BLAS: the elementwise work is shared out too (docs/flat-buffer.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from threadpoolctl import threadpool_limits

from minilora.backend import Array, get_xp
from minilora.data.batches import Batch
from minilora.kernels.memory import keep_freed_memory
from minilora.layers import Parameter, reseed
from minilora.optim.flat import FlatBuffer, adopt, fill_missing
from minilora.training.prefix import PrefixCache

SHARD = 768  # tokens: enough for products at full speed
SHARD_ON_DEVICE = 2**14  # there a product has to be large, and memory is scarcer than launches


class LanguageModel(Protocol):
    """What can be trained here: `loss` gives (loss, saved), `loss_backward` adds the gradients. GPT2 is one."""

    def loss(
        self, ids: Array, labels: np.ndarray, offsets: Sequence[int] | None = None, count: int | None = None, keep: bool = True
    ) -> tuple[Array, Any]: ...

    def loss_backward(self, saved: Any) -> None: ...

    def parameters(self) -> Iterator[tuple[str, Parameter]]: ...


class Replicas:
    """`gradients(batch)` leaves the gradient of the whole batch in `flat.grad`; the sum runs in a fixed order.

    A batch is cut into shards of whole sequences, of about `tokens` tokens at most, and what a shard saves for its backward is gone
    when the next one begins: the memory of a step does not grow with the batch. `prefix` keeps what frozen blocks give.

    Use as a context manager: it holds the threads, and limits BLAS to one thread each while it is open.
    """

    def __init__(  # type: ignore[no-untyped-def]
        self, model, flat: FlatBuffer, threads: int = 1, prefix: PrefixCache | None = None, tokens: int | None = None
    ) -> None:
        on_host = get_xp(flat.data) is np
        tokens = (SHARD if on_host else SHARD_ON_DEVICE) if tokens is None else tokens
        for name, value in (("threads", threads), ("tokens", tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if not on_host:
            threads = 1  # one device: it is parallel enough by itself
        self.flat, self.prefix, self.tokens = flat, prefix, tokens
        self.models = [model] + [model.replica() for _ in range(threads - 1)]
        self.grads = [flat.grad]
        self.parameters = [flat.parameters]
        for twin in self.models[1:]:
            trainable = [p for _, p in twin.parameters() if p.trainable]
            self.grads.append(get_xp(flat.grad).zeros_like(flat.grad))
            self.parameters.append(trainable)
            adopt(self.grads[-1], trainable)
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None
        self._limits: threadpool_limits | None = None

    def __enter__(self) -> Replicas:
        keep_freed_memory()
        self._limits = threadpool_limits(1, user_api="blas")
        return self

    def __exit__(self, *_: object) -> None:
        if self._limits is not None:
            self._limits.restore_original_limits()
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def shards(self, micro_batches: Sequence[Batch]) -> tuple[list[Batch], int]:
        """(what is computed at a time, the number of labels in all). Raises ValueError when there is none."""
        count = sum(b.labelled for b in micro_batches)
        if count == 0:
            raise ValueError("no token in this batch is labelled; there is nothing to learn from.")
        n = len(self.models)
        return [shard for b in micro_batches for shard in b.split(n * -(-len(b.ids) // (n * self.tokens)))], count

    def kept(self, shard: Batch) -> bool:
        """Is there something that frozen blocks give for it, and a place where that is kept?"""
        return self.prefix is not None and self.prefix(self.models[0], shard) is not None

    def gradients(self, micro_batches: Sequence[Batch], seed: Sequence[int] = (), scale: float = 1.0) -> Array:
        """Forward and backward over all micro-batches, as if they were one batch. Returns their mean loss per labelled token.

        Weighted by tokens: every part divides by the number of labels in the whole, so that accumulation equals the large batch.
        `seed` (the run's, the step) makes dropout masks a function of the step. The gradients, but not the loss, are left `scale` times
        as large: what loss and gradients are divided by is that much smaller (loss_scale.py).
        """
        shards, count = self.shards(micro_batches)
        divisor = count if scale == 1 else count / scale  # no count any more, but all that is done with one is to divide by it
        n = len(self.models)
        work = [[s for s in shards[k::n] if s.labelled] for k in range(n)]

        def run(k: int) -> Array | None:
            model, total = self.models[k], None
            reseed(model, *seed, k)
            for p in self.parameters[k]:
                p.grad = None
            with np.errstate(all="ignore"):  # a loss that is not finite is told by `train`, once
                for shard in work[k]:
                    given = {} if self.prefix is None else {"prefix": self.prefix(model, shard)}
                    loss, saved = model.loss(shard.ids, shard.labels, shard.offsets, divisor, **given)
                    model.loss_backward(saved)
                    del saved  # before the next shard begins
                    total = loss if total is None else total + loss
            return total

        losses = list(map(run, range(len(self.models)))) if self.pool is None else list(self.pool.map(run, range(len(self.models))))
        self.flat.gather()
        for grad, parameters in zip(self.grads[1:], self.parameters[1:], strict=True):  # in order: the sum is repeatable
            fill_missing(parameters)
            self.flat.grad += grad
        total = sum(loss for loss in losses if loss is not None)
        return total if scale == 1 else total / scale
