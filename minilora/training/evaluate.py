"""Held-out loss."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from threadpoolctl import threadpool_limits

from minilora.training.data import Batch
from minilora.training.replicas import LanguageModel


def evaluate(model: LanguageModel, batches: Iterable[Batch], threads: int = 1) -> tuple[float, int]:
    """(mean loss per labelled token in nats, number of labelled tokens). Nothing is saved, dropout is off.

    The batches are shared out over threads; their losses are added in order, so the result does not depend on the threads.
    """
    batches = list(batches)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        sums = list(pool.map(lambda b: float(model.loss(b.ids, b.labels, b.offsets, 1, keep=False)[0]), batches))
    tokens = sum(b.labelled for b in batches)
    if tokens == 0:
        raise ValueError("there is nothing to evaluate: no token is labelled.")
    return sum(sums) / tokens, tokens
