"""Loss scaling for float16 activations (arXiv 1710.03740, section 3.2): float16's smallest number, 6e-8, is larger than many gradients.

The loss is multiplied by a power of two before the backward pass, and the gradients are divided by it afterwards, in float32. When a
gradient overflows, that step's update is skipped and the scale halved; after a long run of good steps the scale is doubled. bfloat16
has the range of float32 and needs no scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.layers import Layer


class LossScale:
    """`value`, which `update` changes after each step. good, left_out: the number of good, or of skipped, steps in a row.

    Raises ValueError for a value that is not above 0.
    """

    START, PATIENCE, LIMIT = 2.0**15, 2000, 20  # initial value; good steps before it is doubled; skipped steps that are too many

    def __init__(self, value: float = START, good: int = 0, left_out: int = 0) -> None:
        if not value > 0:
            raise ValueError(f"a loss scale must be above 0, got {value}.")
        self.value, self.good, self.left_out = float(value), good, left_out

    @classmethod
    def of(cls, model: Layer) -> LossScale | None:
        """A new one if the model has float16 activations, else None."""
        return cls() if any(p.data.dtype == np.float16 for _, p in model.parameters()) else None

    def update(self, finite: bool) -> None:
        """finite: whether the gradients of the last step were."""
        if not finite:
            self.value, self.good, self.left_out = self.value / 2, 0, self.left_out + 1
            return
        self.good, self.left_out = self.good + 1, 0
        if self.good == self.PATIENCE:
            self.value, self.good = self.value * 2, 0

    @property
    def lost(self) -> bool:
        """Whether so many steps were skipped that the scale cannot be the cause."""
        return self.left_out >= self.LIMIT

    def state(self) -> dict[str, Any]:
        """The arguments of a LossScale that continues from here."""
        return {"value": self.value, "good": self.good, "left_out": self.left_out}
