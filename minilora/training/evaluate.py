"""Held-out loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from threadpoolctl import threadpool_limits

from minilora.backend import get_xp
from minilora.data.batches import Batch

Result = TypeVar("Result")


def evaluate(model: Any, batches: Iterable[Batch], threads: int = 1) -> tuple[float, int]:
    """(mean loss per labelled token in nats, number of labelled tokens). Nothing is saved, dropout is off.

    Batches are computed in parallel; their losses are added in order, so the result does not depend on the number of threads.
    Raises ValueError when no token is labelled.
    """
    batches = list(batches)
    sums = map_batches(model, batches, lambda model, b: float(model.loss(b.ids, b.labels, b.offsets, 1, keep=False)[0]), threads)
    tokens = sum(b.labelled for b in batches)
    if tokens == 0:
        raise ValueError("there is nothing to evaluate: no token is labelled.")
    return sum(sums) / tokens, tokens


def map_batches(model: Any, batches: Sequence[Batch], f: Callable[[Any, Batch], Result], threads: int = 1) -> list[Result]:
    """[f(model, batch) for every batch], in order, with one BLAS thread in each of `threads` threads."""
    if any(get_xp(p.data) is not np for _, p in model.parameters()):
        threads = 1  # one device runs in parallel by itself
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda batch: f(model, batch), batches))
