"""What each step measured, and the check that losses and gradients are finite."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.data.batches import Batch
from minilora.optim.flat import FlatBuffer


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
    """The loss or a gradient is not finite. The parameters are those after step `kept`, the last whose own loss was finite."""

    def __init__(self, where: str, loss: float, kept: int) -> None:
        what = "the gradient" if math.isfinite(loss) else "the loss"
        super().__init__(f"{what} is not finite {where}; training stopped there. A lower --lr may help.")
        self.kept = kept


class Watch:
    """Reads losses and gradient norms from where they were computed, `every` steps at a time, and keeps the last good parameters.

    good   a copy of the last parameters whose own loss is known to be finite; `kept` is the step that made them
    """

    def __init__(self, flat: FlatBuffer, every: int) -> None:
        self.flat, self.every = flat, every
        self.good, self.kept = flat.data.copy(), 0
        self.pending: list[tuple[Array, Array, float, int]] = []  # (loss, gradient norm, lr, tokens), not yet read
        self.steps: list[Step] = []  # read, not yet reported
        self.begun = time.perf_counter()

    def read(self, step: int, loss: Array, norm: Array, lr: float, batch: Sequence[Batch], last: bool) -> bool:
        """Note a step before its update. False when a loss or a norm is not finite among those read now; on most steps none is read."""
        self.pending.append((loss, norm, lr, sum(len(b.ids) for b in batch)))
        if step % self.every and not last:
            return True
        first = step - len(self.pending) + 1
        values = enumerate(self.pending)
        self.steps = [Step(first + i, float(loss), lr, float(norm), tokens, 0.0) for i, (loss, norm, lr, tokens) in values]
        self.pending = []
        if all(math.isfinite(s.loss) for s in self.steps):
            self.good[...], self.kept = self.flat.data, step - 1
        return all(_finite(s) for s in self.steps)

    def report(self) -> Iterator[Step]:
        """The steps that were read, each with its share of the seconds since the last report."""
        if not self.steps:
            return
        seconds = (time.perf_counter() - self.begun) / len(self.steps)
        for s in self.steps:
            s.seconds = seconds
            yield s
        self.steps = []
        self.begun = time.perf_counter()

    def diverged(self) -> Diverged:
        """Put the last good parameters back. Returns the error for the first step that was not finite."""
        bad = next(s for s in self.steps if not _finite(s))
        where = f"at step {bad.step}, first in {_first_bad(self.flat)}"
        self.flat.data[...] = self.good
        return Diverged(where, bad.loss, self.kept)

    def check_result(self, model: Any, shards: Sequence[Batch], step: int) -> None:
        """After the last update: raise Diverged unless the parameters and their loss on the last step's batches are finite."""
        with np.errstate(all="ignore"):
            finite = bool(get_xp(self.flat.data).isfinite(self.flat.data).all())
            losses = (float(model.loss(s.ids, s.labels, s.offsets, keep=False)[0]) for s in shards if s.labelled)
            if not (finite and all(map(math.isfinite, losses))):
                self.flat.data[...] = self.good
                raise Diverged(f"after the last update (step {step})", math.nan, self.kept)


def _finite(step: Step) -> bool:
    return math.isfinite(step.loss) and math.isfinite(step.grad_norm)


def _first_bad(flat: FlatBuffer) -> str:
    """The path of the first parameter whose gradient is not finite."""
    for path, p in zip(flat.paths, flat.parameters, strict=True):
        if p.grad is not None and not bool(get_xp(p.grad).isfinite(p.grad).all()):
            return path
    return "none of the gradients"
