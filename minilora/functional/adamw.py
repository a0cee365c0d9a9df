"""One step of Adam and AdamW."""

from __future__ import annotations

import math
from typing import NamedTuple

from minilora.backend import Array, get_xp


class AdamStep(NamedTuple):
    """The numbers of a step: b1 and b2 the betas, c1 = 1 - b1^t and c2 = 1 - b2^t (or 1, without bias correction)."""

    lr: float
    weight_decay: float
    b1: float
    b2: float
    c1: float
    c2: float
    eps: float
    decoupled: bool


def adamw(
    w: Array, g: Array, m: Array, v: Array, rates: Array | float, decays: Array | float, step: AdamStep
) -> tuple[Array, Array, Array]:
    """The new weights and moments (Adam, arXiv 1412.6980, algorithm 1; AdamW, arXiv 1711.05101, algorithm 2). All arrays (n,).

        m' = b1 m + (1 - b1) g,   v' = b2 v + (1 - b2) g^2
        w' = w - lr weight_decay w - lr (m' / c1) / (sqrt(v' / c2) + eps)

    rates and decays are factors of lr and weight_decay. Adam (not decoupled) adds weight_decay w to g instead.
    """
    lr, decay = step.lr * rates, step.weight_decay * decays
    if not step.decoupled:
        g = g + decay * w
    m = step.b1 * m + (1 - step.b1) * g
    v = step.b2 * v + (1 - step.b2) * (g * g)
    if step.decoupled:
        w = w * (1 - lr * decay)
    return w - (lr / step.c1) * m / (get_xp(v).sqrt(v) / math.sqrt(step.c2) + step.eps), m, v
