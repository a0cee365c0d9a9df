"""The training loop: a generator of steps. What to print, log or save is the caller's affair."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from minilora.backend import get_xp
from minilora.layers import Layer
from minilora.training.data import Batch
from minilora.training.flat import FlatBuffer, clip_grad_norm
from minilora.training.optimizers import Optimizer
from minilora.training.replicas import Replicas
from minilora.training.schedules import Schedule


@dataclass
class Step:
    """One optimizer step: its number from 1, mean loss per labelled token in nats, rate, gradient norm before clipping, tokens, seconds."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


class Diverged(ArithmeticError):
    """The loss or a gradient is no longer finite. The parameters are those of the last good step, `step`."""

    def __init__(self, step: int, parameter: str, loss: float) -> None:
        what = "the loss" if not math.isfinite(loss) else "the gradient"
        super().__init__(f"{what} is not finite at step {step}, first in {parameter}; training stopped there. A lower --lr may help.")
        self.step = step - 1


def train(
    model: Layer,
    optimizer: Optimizer,
    batches: Iterator[Batch],
    steps: int,
    schedule: Schedule,
    *,
    clip: float = 1.0,
    accumulate: int = 1,
    threads: int = 1,
    seed: int = 0,
    check_every: int | None = None,
) -> Iterator[Step]:
    """Take `steps` steps of `accumulate` batches each, at optimizer.lr * schedule(step); yield each as a Step.

    On NumPy every loss is looked at before its update is made. On a GPU that would synchronise: there the losses are read,
    and steps yielded, in groups of `check_every` (default 10), and a copy of the parameters from the last check is kept.
    Raises Diverged when a loss or gradient norm is not finite, with the last good parameters back in place; ValueError when
    `batches` ends early or a batch has no label.
    """
    flat, peak = optimizer.flat, optimizer.lr
    on_host = get_xp(flat.data) is np
    check_every = check_every or (1 if on_host else 10)
    good = None if check_every == 1 else flat.data.copy()
    pending: list[tuple[int, object, float, object, int]] = []
    with Replicas(model, flat, threads) as replicas:
        begun = time.perf_counter()
        for step in range(1, steps + 1):
            micro = list(islice(batches, accumulate))
            if len(micro) < accumulate:
                raise ValueError(f"the data ended at step {step} of {steps}.")
            optimizer.lr = peak * schedule(step - 1)
            with np.errstate(all="ignore"):  # what is not finite is told below, once
                loss = replicas.gradients(micro, seed=(seed, step))
                norm = clip_grad_norm(flat, clip)
                pending.append((step, loss, optimizer.lr, norm, sum(len(b.ids) for b in micro)))
                if check_every == 1:
                    _check(pending, flat)
                optimizer.step()
            if step % check_every == 0 or step == steps:
                if good is not None:
                    try:
                        _check(pending, flat)
                    except Diverged:
                        flat.data[...] = good
                        raise
                    good[...] = flat.data
                seconds, begun = time.perf_counter() - begun, time.perf_counter()
                for number, loss, lr, norm, tokens in pending:
                    yield Step(number, float(loss), lr, float(norm), tokens, seconds / len(pending))  # type: ignore[arg-type]
                pending.clear()
                begun = time.perf_counter()
    optimizer.lr = peak


def _check(pending: list[tuple[int, object, float, object, int]], flat: FlatBuffer) -> None:
    """Raise Diverged for the first step whose loss or gradient norm is not finite."""
    for step, loss, _, norm, _ in pending:
        if not (math.isfinite(float(loss)) and math.isfinite(float(norm))):  # type: ignore[arg-type]
            bad = (path for path, p in zip(flat.paths, flat.parameters, strict=True) if p.grad is None or not bool(_finite(p.grad)))
            raise Diverged(step, next(bad, flat.paths[0]), float(loss))  # type: ignore[arg-type]


def _finite(x):  # type: ignore[no-untyped-def]
    return get_xp(x).isfinite(x).all()
