"""Dropout: on in training (keep=True), off in inference (keep=False)."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora import kernels as K
from minilora.backend import Array
from minilora.layers.base import Layer, Output, Saved


class Dropout(Layer):
    """y = x * mask / (1 - p). Each call draws a new mask, a function of (seed, number of the call) alone.

    `reseed` before a step makes the masks of that step a function of the step: a run that is split over replicas,
    recomputed or resumed draws the same ones. Saved: the key of the mask, one integer.
    """

    def __init__(self, p: float = 0.1, seed: int = 0) -> None:
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p is {p}; it must be at least 0 and below 1.")
        self.p = p
        self.seed: tuple[int, ...] = (seed,)
        self.calls = 0
        self.placed: Array | None = None  # the keys of the next calls in device memory, for a captured step (kernels/cuda/replay.py)

    def next_key(self) -> Any:
        """The key of the next mask."""
        self.calls += 1
        if self.placed is not None:
            return self.placed[self.calls - 1]
        return int(np.random.SeedSequence((*self.seed, self.calls - 1)).generate_state(1, np.uint64)[0])

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        if not keep:
            return x, None
        if self.p == 0:
            return x, self.save(need_dx, None)
        key = self.next_key()
        y, inner = K.dropout(x, self.p, key)
        return y, self.save(need_dx, (inner, key))

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        (drawn,) = self.load(saved, need_dx)
        if drawn is None or not need_dx:
            return dy if need_dx else None
        inner, key = drawn
        return K.dropout_backward(dy, inner, self.p, key)


def reseed(layer: Layer, *numbers: int) -> None:
    """Restart every Dropout below `layer` with a seed made of `numbers` (the run's seed, the step, the replica) and its place."""
    dropouts = (m for _, m in layer.modules() if isinstance(m, Dropout))
    for place, dropout in enumerate(dropouts):
        dropout.seed, dropout.calls = (*numbers, place), 0
