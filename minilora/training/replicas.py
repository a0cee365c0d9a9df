"""Data parallelism on one computer: lanes of a batch on replicas that share the weights and own their gradients.

A batch is cut into shards, and shards are dealt to a fixed number of lanes. A lane sums the gradients of its shards in order, and lanes are
summed by a fixed tree. Workers only decide who computes which lane: one or eight leave the same gradient, bit for bit.

Workers have one BLAS thread each, which is faster than one worker with a parallel BLAS, because elementwise work is divided too
(docs/flat-buffer.md). They are processes where copies of this one can be made (processes.py), else threads: on a device, and in each of
several ranks (ranks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from minilora.backend import Array, get_xp
from minilora.data.batches import Batch
from minilora.kernels.memory import keep_freed_memory, shared_zeros
from minilora.layers import reseed
from minilora.models.stack import Prefix
from minilora.optim.flat import FlatBuffer, adopt, fill_missing
from minilora.training import processes
from minilora.training.prefix import PrefixCache
from minilora.training.ranks import Ranks, add_by_tree
from minilora.tuned import sizes

SHARD_ON_DEVICE = 2**14  # products have to be larger there, and memory is scarcer than launches


class Replicas:
    """`gradients(batches)` leaves the gradient of the whole step in `flat.grad`.

    A batch is cut into shards of whole sequences, of about `tokens` tokens at most, and what a shard saves for its backward is freed
    before the next one starts: the memory of a step does not grow with the batch. prefix: cache for the outputs of frozen blocks.
    lanes: by default as many as threads; on a device one a rank, which runs in parallel by itself. ranks: other processes (ranks.py).

    Use as a context manager: it holds the workers, and limits BLAS to one thread each while it is open. Processes have the model as it was
    when it was opened, but for the values of trainable parameters. Raises ValueError for fewer than one thread or lane.
    """

    def __init__(
        self,
        model: Any,
        flat: FlatBuffer,
        threads: int = 1,
        prefix: PrefixCache | None = None,
        tokens: int | None = None,
        lanes: int | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        lanes = threads if lanes is None else lanes
        if min(threads, lanes) < 1:
            raise ValueError(f"threads must be at least 1, got {threads}." if threads < 1 else f"lanes must be at least 1, got {lanes}.")
        on_host = get_xp(flat.data) is np
        self.lanes = lanes if on_host else 1 if ranks is None else ranks.size
        self.ranks, self.block = ranks, range(self.lanes) if ranks is None else ranks.blocks(self.lanes)[ranks.rank]
        self.workers = min(threads, len(self.block))
        self.flat, self.prefix, self.tokens = flat, prefix, tokens or (sizes["shard"] if on_host else SHARD_ON_DEVICE)
        self.copied = self.workers > 1 and on_host and ranks is None and processes.available
        self.models = [model] + [model.replica() for _ in range(0 if self.copied else self.workers - 1)]
        self.parameters = [flat.parameters] + [[p for _, p in each.parameters() if p.trainable] for each in self.models[1:]]
        zeros = shared_zeros if self.copied else get_xp(flat.grad).zeros
        self.grads = [flat.grad] + [zeros(flat.grad.size, flat.grad.dtype) for _ in self.block[1:]]  # of each lane
        self._open = ExitStack()

    def __enter__(self) -> Replicas:
        self._open.enter_context(threadpool_limits(1, user_api="blas"))
        if self.copied:
            self.ask: Callable[..., Future[Any]] = self._open.enter_context(processes.Copies(self.workers - 1, self._run)).ask
        elif self.workers > 1:
            pool = self._open.enter_context(ThreadPoolExecutor(self.workers - 1))
            self.ask = lambda *args: pool.submit(self._run, *args)
        keep_freed_memory()  # after the copies: Linux refuses to copy a heap that is larger than the machine's memory
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._open.close()
        if self.ranks is not None:
            self.ranks.end(kind)

    def shards(self, batches: Sequence[Batch]) -> tuple[list[Batch], int]:
        """(the shards of a step's batches, the number of labels in all). Raises ValueError when there is no label."""
        count = sum(b.labelled for b in batches)
        if count == 0:
            raise ValueError("no token in this batch is labelled; there is nothing to learn from.")
        n = self.lanes
        return [shard for b in batches for shard in b.split(n * -(-len(b.ids) // (n * self.tokens)))], count

    def gradients(self, batches: Sequence[Batch], seed: Sequence[int] = (), scale: float = 1.0) -> Array:
        """Forward and backward over all batches of a step, as if they were one batch. Returns their mean loss per labelled token.

        Weighted by tokens: every shard divides by the number of labels in the whole step, so that accumulation equals the large batch.
        seed: (the run's, the step), of which dropout masks are a function. scale: factor of the gradients, but not of the loss
        (loss_scale.py); it is applied by dividing by a smaller number.
        """
        shards, count = self.shards(batches)
        step = count if scale == 1 else count / scale, seed
        self.flat.check()
        mine, *theirs = (self._task(worker, shards) for worker in range(self.workers))
        others = [self.ask(*task, *step) for task in theirs]
        losses, _ = self._run(*mine, *step)
        for more, new in map(processes.answer, others):
            losses |= more
            if self.prefix is not None:
                for ids, x in new.items():
                    self.prefix.keep(ids, x)
        self.flat.gather()
        rows = dict(zip(self.block, self.grads, strict=True))
        if self.ranks is None:
            add_by_tree(rows, self.lanes, self.lanes)
        else:
            losses = dict(enumerate(self.ranks.losses([losses[lane] for lane in self.block], seed[-1])))
            self.ranks.add(rows, self.lanes, self.flat.grad)
        total = sum(loss for _, loss in sorted(losses.items()) if loss is not None)
        return total if scale == 1 else total / scale

    def _task(self, worker: int, shards: Sequence[Batch]) -> tuple[int, dict[int, list[Batch]], PrefixCache | None]:
        """(worker, {i: the shards of lane block[i]}, cache). 0 is last: `flat.grad` is then where the model's gradients are."""
        mine = reversed(range(worker, len(self.block), self.workers))
        lanes = {i: [shard for shard in shards[self.block[i] :: self.lanes] if shard.labelled] for i in mine}
        part = self.prefix.part(chain(*lanes.values())) if self.prefix is not None and self.copied and worker else self.prefix
        return worker, lanes, part

    def _run(
        self, worker: int, lanes: dict[int, list[Batch]], prefix: PrefixCache | None, divisor: float, seed: Sequence[int]
    ) -> tuple[dict[int, Array | None], dict[bytes, Prefix]]:
        """({lane: its loss}, what a copy has added to its part of the cache) of a worker's lanes, whose gradients are then in `grads`."""
        model, parameters = (each[worker % len(each)] for each in (self.models, self.parameters))
        losses: dict[int, Array | None] = {}
        for i, shards in lanes.items():
            lane, total = self.block[i], None
            reseed(model, *seed, lane)
            if i or len(lanes) > 1:
                adopt(self.grads[i], parameters)
            for p in parameters:
                p.grad = None
            with np.errstate(all="ignore"):  # `Watch` reports what is not finite, once
                for shard in shards:
                    start = {} if prefix is None else {"prefix": prefix(model, shard)}
                    loss, saved = model.loss(shard.ids, shard.labels, shard.offsets, divisor, **start)
                    model.loss_backward(saved)
                    del saved  # before the next shard starts
                    total = loss if total is None else total + loss
            fill_missing(parameters)
            losses[lane] = total
        return losses, {} if prefix is None or prefix is self.prefix else prefix.new()
