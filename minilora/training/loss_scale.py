"""Loss scaling for activations in float16 (arXiv 1710.03740, section 3.2), whose smallest number, 6e-8, is larger than many a gradient.

The loss is multiplied by a power of two before the backward pass and the gradients divided by it after, in float32. It is halved where a
gradient has overflown, and that step's update left out; after a long run of good steps it is doubled. bfloat16 has float32's range.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.layers import Layer


class LossScale:
    """`value`, which `update` moves after each step; `good` and `left_out` count the steps in a row that were so."""

    START, PATIENCE, LIMIT = 2.0**15, 2000, 20  # steps before it is doubled; steps left out in a row that are too many

    def __init__(self, value: float = START, good: int = 0, left_out: int = 0) -> None:
        if not value > 0:
            raise ValueError(f"a loss scale must be above 0, got {value}.")
        self.value, self.good, self.left_out = float(value), good, left_out

    @classmethod
    def of(cls, model: Layer) -> LossScale | None:
        """A new one where the model has activations in float16, else None."""
        return cls() if any(p.data.dtype == np.float16 for _, p in model.parameters()) else None

    def update(self, finite: bool) -> None:
        """After a step whose gradients were finite, or else was left out."""
        if not finite:
            self.value, self.good, self.left_out = self.value / 2, 0, self.left_out + 1
            return
        self.good, self.left_out = self.good + 1, 0
        if self.good == self.PATIENCE:
            self.value, self.good = self.value * 2, 0

    @property
    def lost(self) -> bool:
        """Have so many steps been left out that it is not the scale?"""
        return self.left_out >= self.LIMIT

    def state(self) -> dict[str, Any]:
        """What `from_state` takes: a run that goes on from there takes the same steps."""
        return {"value": self.value, "good": self.good, "left_out": self.left_out}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LossScale:
        return cls(**state)
