"""Loss scaling for float16 activations (arXiv 1710.03740, section 3.2): float16's smallest number, 6e-8, is larger than many gradients.

The loss is multiplied by a power of two before the backward pass, and the gradients are divided by it afterwards, in float32. When a
gradient overflows, that step's update is skipped and the scale halved; after a long run of good steps the scale is doubled. bfloat16
has the range of float32 and needs no scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from minilora.layers import Layer


@dataclass
class LossScale:
    """`value`, which `update` changes after each step. Raises ValueError for one that is not above 0."""

    PATIENCE: ClassVar[int] = 2000  # good steps before the scale is doubled
    LIMIT: ClassVar[int] = 20  # skipped steps in a row that are too many

    value: float = 2.0**15
    good: int = 0  # steps in a row
    left_out: int = 0  # skipped steps in a row

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise ValueError(f"a loss scale must be above 0, got {self.value}.")

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
