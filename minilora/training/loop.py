"""The training loop: a generator of steps. What to print, log or save is the caller's affair."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.backend import get_xp
from minilora.data.batches import Batch
from minilora.layers import Layer
from minilora.optim.flat import FlatBuffer
from minilora.optim.optimizers import Optimizer
from minilora.optim.schedules import Schedule
from minilora.training.loss_scale import LossScale
from minilora.training.prefix import PrefixCache
from minilora.training.recorded import Gradients
from minilora.training.replicas import Replicas


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
    """The loss or a gradient is no longer finite. The parameters are those after step `kept`, the last whose own loss was finite."""

    def __init__(self, where: str, loss: float, kept: int) -> None:
        what = "the gradient" if math.isfinite(loss) else "the loss"
        super().__init__(f"{what} is not finite {where}; training stopped there. A lower --lr may help.")
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

    A step takes fewer than `accumulate` batches where an epoch ends (Batch.ends_epoch).
    On NumPy every loss is looked at before its update is made. On a GPU that would synchronise: there the losses are read,
    and steps yielded, in groups of `check_every` (default 10), and the parameter that Diverged names is found at the end of the group.
    A copy is kept of the last parameters whose own loss is known to be finite; those after the last step have theirs computed.
    prefix: keeps what frozen blocks give, for data that comes again. record: on a GPU, launch steps of one shape whole (recorded.py).
    loss_scale: how gradients are kept within float16's range (default: a new one where activations are in float16); then every step is
    looked at before its update, on a GPU too, and one whose gradients overflow is yielded, with a norm that is not finite, but changes
    nothing. After 20 of them in a row Diverged is raised.
    Raises Diverged when a loss or gradient norm is not finite, with the copy back in place; ValueError when
    `batches` ends early or a batch has no label.
    """
    flat, peak = optimizer.flat, optimizer.lr
    scaling = LossScale.of(model) if loss_scale is None else loss_scale
    check_every = 1 if scaling is not None else check_every or (1 if get_xp(flat.data) is np else 10)
    good, kept = flat.data.copy(), 0  # the last parameters whose own loss was finite, and the step that made them
    pending: list[tuple[Any, Any, float, int]] = []  # (loss, gradient norm, lr, tokens), still where they were computed
    with Replicas(model, flat, threads, prefix) as replicas, closing(Gradients(replicas, clip, record)) as gradients:
        begun = time.perf_counter()
        for step in range(1, steps + 1):
            micro = _take(batches, accumulate)
            if not micro or (len(micro) < accumulate and not micro[-1].ends_epoch):
                raise ValueError(f"the data ended at step {step} of {steps}.")
            optimizer.lr = peak * schedule(step - 1)
            with np.errstate(all="ignore"):  # what is not finite is reported below, once
                scale = 1.0 if scaling is None else scaling.value
                loss, norm = gradients(micro, (seed, step), scale)
                pending.append((loss, norm, optimizer.lr, sum(len(b.ids) for b in micro)))
                due = step % check_every == 0 or step == steps
                read = [(float(loss), float(norm), lr, tokens) for loss, norm, lr, tokens in pending] if due else []
                bad = next((i for i, (loss, norm, *_) in enumerate(read) if not (math.isfinite(loss) and math.isfinite(norm))), None)
                if due and all(math.isfinite(loss) for loss, *_ in read):
                    good[...], kept = flat.data, step - 1
                if scaling is not None:
                    scaling.update(finite=bad is None)
                if bad is not None and (scaling is None or scaling.lost):
                    where = f"at step {step - len(read) + 1 + bad}, first in {_first_bad(flat)}"
                    flat.data[...] = good
                    raise Diverged(where, read[bad][0], kept)
                if bad is None:
                    optimizer.step()
            if due:
                seconds = (time.perf_counter() - begun) / len(read)
                for i, (loss, norm, lr, tokens) in enumerate(read):
                    yield Step(step - len(read) + 1 + i, loss, lr, norm, tokens, seconds)
                pending.clear()
                begun = time.perf_counter()
        if steps and not _is_good(model, flat, replicas.shards(micro)[0]):
            flat.data[...] = good
            raise Diverged(f"after the last update (step {steps})", math.nan, kept)
    optimizer.lr = peak


def _take(batches: Iterator[Batch], n: int) -> list[Batch]:
    """The next n batches, fewer where an epoch ends."""
    micro: list[Batch] = []
    while len(micro) < n and not (micro and micro[-1].ends_epoch) and (batch := next(batches, None)) is not None:
        micro.append(batch)
    return micro


def _is_good(model: Any, flat: FlatBuffer, shards: list[Batch]) -> bool:
    """Are the parameters finite, and their own loss on the batches of the last step?"""
    with np.errstate(all="ignore"):
        if not bool(get_xp(flat.data).isfinite(flat.data).all()):
            return False
        return all(math.isfinite(float(model.loss(s.ids, s.labels, s.offsets, keep=False)[0])) for s in shards if s.labelled)


def _first_bad(flat: FlatBuffer) -> str:
    """The path of the first parameter whose gradient is not finite."""
    for path, p in zip(flat.paths, flat.parameters, strict=True):
        if p.grad is not None and not bool(get_xp(p.grad).isfinite(p.grad).all()):
            return path
    return "none of the gradients"
