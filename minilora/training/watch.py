"""What each step measured, and the check that losses and gradients are finite."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp, to_numpy
from minilora.data.batches import Batch
from minilora.optim.flat import FlatBuffer


@dataclass
class Step:
    """One optimizer step: its number from 1, mean loss per labelled token in nats, rate, gradient norm before clipping, tokens, seconds.

    norms   (2, trainable parameters), on the steps that `Watch` measures: the norms of each one's gradient before clipping, and of its
            values before the update
    latest  whether the parameters are those after this step: where several steps are read at once, only for the last of them
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float = 0.0
    norms: np.ndarray | None = None
    latest: bool = False

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Diverged(ArithmeticError):
    """The loss or a gradient is not finite. The parameters are those after step `kept`, the last whose own loss was finite."""

    def __init__(self, what: str, kept: int) -> None:
        super().__init__(f"{what}; training stopped there. A lower --lr may help.")
        self.kept = kept


class Watch:
    """Reads losses and gradient norms from where they were computed, `every` steps at a time, and keeps the last good parameters.

    good          a copy of the last parameters whose own loss is known to be finite; `kept` is the step that made them
    norms_every   steps between two measurements of `Step.norms`, from the first step on; 0 for none
    """

    def __init__(self, flat: FlatBuffer, every: int, norms_every: int = 0, done: int = 0) -> None:
        self.flat, self.every, self.norms_every = flat, every, norms_every
        self.good, self.kept = flat.data.copy(), done
        self.pending: list[tuple[int, Array, float, Array, int, Array | None]] = []  # not yet read: what `_read` takes
        self.steps: list[Step] = []  # read, not yet reported
        self.begun = time.perf_counter()

    def read(self, step: int, loss: Array, norm: Array, lr: float, batch: Sequence[Batch], last: bool) -> bool:
        """Note a step before its update. False when a loss or a norm is not finite among those read now; on most steps none is read."""
        measured = self.norms_every and (last or (step - 1) % self.norms_every == 0)
        self.pending.append((step, loss, lr, norm, sum(len(b.ids) for b in batch), self.flat.norms() if measured else None))
        if step % self.every and not last:
            return True
        self.steps, self.pending = [_read(*each) for each in self.pending], []
        if all(math.isfinite(s.loss) for s in self.steps):
            self.good[...], self.kept = self.flat.data, step - 1
        return all(s.finite for s in self.steps)

    def report(self) -> Iterator[Step]:
        """The steps that were read, each with its share of the seconds since the last report."""
        for s in self.steps:
            s.seconds, s.latest = (time.perf_counter() - self.begun) / len(self.steps), s is self.steps[-1]
        yield from self.steps
        if self.steps:
            self.steps, self.begun = [], time.perf_counter()

    def diverged(self) -> Diverged:
        """Put the last good parameters back. Returns the error, which names the first step and the first gradient that were not finite."""
        bad = next(s for s in self.steps if not s.finite)
        what = "the gradient" if math.isfinite(bad.loss) else "the loss"
        grads = ((path, p.grad) for path, p in zip(self.flat.paths, self.flat.parameters, strict=True) if p.grad is not None)
        first = next((path for path, grad in grads if not bool(get_xp(grad).isfinite(grad).all())), "none of the gradients")
        self.flat.data[...] = self.good
        return Diverged(f"{what} is not finite at step {bad.step}, first in {first}", self.kept)

    def check_result(self, model: Any, shards: Sequence[Batch], step: int) -> None:
        """After the last update: raise Diverged unless the parameters and their loss on the last step's batches are finite."""
        with np.errstate(all="ignore"):
            finite = bool(get_xp(self.flat.data).isfinite(self.flat.data).all())
            losses = (float(model.loss(s.ids, s.labels, s.offsets, keep=False)[0]) for s in shards if s.labelled)
            if not (finite and all(map(math.isfinite, losses))):
                self.flat.data[...] = self.good
                raise Diverged(f"the loss is not finite after the last update (step {step})", self.kept)


def _read(step: int, loss: Array, lr: float, norm: Array, tokens: int, norms: Array | None) -> Step:
    """What was noted of a step, on the host."""
    read = Step(step, float(loss), lr, float(norm), tokens)
    if norms is not None:
        read.norms = to_numpy(norms).astype(np.float64)
        clipped = float(np.linalg.norm(read.norms[0]))
        read.norms[0] *= read.grad_norm / clipped if clipped > 0 else 1  # as they were before clipping
    return read
