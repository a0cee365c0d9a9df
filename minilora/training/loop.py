"""The training loop: a generator of steps. What to print, log or save is the caller's affair."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from minilora.backend import get_xp
from minilora.layers import Layer
from minilora.training.data import Batch
from minilora.training.flat import FlatBuffer
from minilora.training.loss_scale import LossScale
from minilora.training.optimizers import Optimizer
from minilora.training.prefix import PrefixCache
from minilora.training.recorded import Gradients
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
    """The loss or a gradient is no longer finite. The parameters are those after step `kept`, the last that was looked at."""

    def __init__(self, step: int, parameter: str, loss: float, kept: int) -> None:
        what = "the gradient" if math.isfinite(loss) else "the loss"
        super().__init__(f"{what} is not finite at step {step}, first in {parameter}; training stopped there. A lower --lr may help.")
        self.kept = kept


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
    prefix: PrefixCache | None = None,
    record: bool = True,
    loss_scale: LossScale | None = None,
) -> Iterator[Step]:
    """Take `steps` steps of `accumulate` batches each, at optimizer.lr * schedule(step); yield each as a Step.

    On NumPy every loss is looked at before its update is made. On a GPU that would synchronise: there the losses are read,
    and steps yielded, in groups of `check_every` (default 10), a copy of the parameters from the last check is kept, and the
    parameter that Diverged names is found at the end of the group.
    prefix: keeps what frozen blocks give, for data that comes again. record: on a GPU, launch steps of one shape whole (recorded.py).
    loss_scale: how gradients are kept within float16's range (default: a new one where activations are in float16); then every step is
    looked at before its update, on a GPU too, and one whose gradients overflow is yielded, with a norm that is not finite, but changes
    nothing. After 20 of them in a row Diverged is raised.
    Raises Diverged when a loss or gradient norm is not finite, with the last good parameters back in place; ValueError when
    `batches` ends early or a batch has no label.
    """
    flat, peak = optimizer.flat, optimizer.lr
    scaling = LossScale.of(model) if loss_scale is None else loss_scale
    check_every = 1 if scaling is not None else check_every or (1 if get_xp(flat.data) is np else 10)
    good = None if check_every == 1 else flat.data.copy()
    pending: list[tuple[Any, Any, float, int]] = []  # (loss, gradient norm, lr, tokens), still where they were computed
    with Replicas(model, flat, threads, prefix) as replicas, closing(Gradients(replicas, clip, record)) as gradients:
        begun = time.perf_counter()
        for step in range(1, steps + 1):
            micro = list(islice(batches, accumulate))
            if len(micro) < accumulate:
                raise ValueError(f"the data ended at step {step} of {steps}.")
            optimizer.lr = peak * schedule(step - 1)
            with np.errstate(all="ignore"):  # what is not finite is told below, once
                scale = 1.0 if scaling is None else scaling.value
                loss, norm = gradients(micro, (seed, step), scale)
                pending.append((loss, norm, optimizer.lr, sum(len(b.ids) for b in micro)))
                due = step % check_every == 0 or step == steps
                read = [(float(loss), float(norm), lr, tokens) for loss, norm, lr, tokens in pending] if due else []
                bad = next((i for i, (loss, norm, *_) in enumerate(read) if not (math.isfinite(loss) and math.isfinite(norm))), None)
                if scaling is not None:
                    scaling.update(finite=bad is None)
                if bad is not None and (scaling is None or scaling.lost):
                    if good is not None:
                        flat.data[...] = good
                    kept = step - (len(read) if scaling is None else scaling.left_out)
                    raise Diverged(step - len(read) + 1 + bad, _first_bad(flat), read[bad][0], kept)
                if bad is None:
                    optimizer.step()
            if due:
                if good is not None:
                    good[...] = flat.data
                seconds = (time.perf_counter() - begun) / len(read)
                for i, (loss, norm, lr, tokens) in enumerate(read):
                    yield Step(step - len(read) + 1 + i, loss, lr, norm, tokens, seconds)
                pending.clear()
                begun = time.perf_counter()
    optimizer.lr = peak


def _first_bad(flat: FlatBuffer) -> str:
    """The path of the first parameter whose gradient is not finite."""
    for path, p in zip(flat.paths, flat.parameters, strict=True):
        if p.grad is not None and not bool(get_xp(p.grad).isfinite(p.grad).all()):
            return path
    return "none of the gradients"
