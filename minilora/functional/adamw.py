"""One step of Adam and AdamW."""

from __future__ import annotations

import math

from minilora.backend import Array, get_xp


def adamw(
    w: Array,
    g: Array,
    m: Array,
    v: Array,
    rates: Array | float,
    decays: Array | float,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    corrections: tuple[float, float],
    eps: float,
    decoupled: bool,
) -> tuple[Array, Array, Array]:
    """The new weights, and first and second moments (Adam, arXiv 1412.6980, algorithm 1; AdamW, arXiv 1711.05101, algorithm 2).

        m' = b1 m + (1 - b1) g,   v' = b2 v + (1 - b2) g^2
        w' = w - lr weight_decay w - lr (m' / c1) / (sqrt(v' / c2) + eps)

    All arrays (n,). corrections c1 = 1 - b1^t and c2 = 1 - b2^t at step t, or 1; rates and decays, factors of lr and weight_decay, are
    numbers or (n,). Adam (decoupled=False) adds weight_decay w to g instead.
    """
    xp, (b1, b2), (c1, c2) = get_xp(w, g, m, v), betas, corrections
    lr_, decay = lr * rates, weight_decay * decays
    if not decoupled:
        g = g + decay * w
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * (g * g)
    if decoupled:
        w = w * (1 - lr_ * decay)
    return w - (lr_ / c1) * m / (xp.sqrt(v) / math.sqrt(c2) + eps), m, v
