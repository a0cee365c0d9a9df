"""L2-SP: weight decay towards the initial weights, not towards zero (arXiv 1802.01483, section 3)."""

from __future__ import annotations

from typing import Any

from minilora.backend import Array
from minilora.optim.flat import Parameters
from minilora.optim.optimizers import AdamW


class AdamWL2SP(AdamW):
    """AdamW, and before each step  w <- w - lr l2_sp (w - w_0),  w_0 the weights when the optimizer was made.

    Raises ValueError for an l2_sp below 0.
    """

    def __init__(self, params: Parameters, lr: float, l2_sp: float, **options: Any) -> None:
        super().__init__(params, lr, **options)
        if not l2_sp >= 0:
            raise ValueError(f"AdamWL2SP: l2_sp must be at least 0, got {l2_sp}.")
        self.l2_sp = l2_sp
        self.initial: Array = self.flat.data.copy()

    def step(self) -> None:
        w = self.flat.data
        w -= (self.lr * self.l2_sp * self.rates) * (w - self.initial)
        super().step()
