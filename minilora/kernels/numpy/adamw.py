"""A step of AdamW in place, in blocks: each array is read from memory once, and all that is between stays in the cache."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.kernels.numpy.blocks import blocks


def adamw(w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, rates: Any, decays: Any, step: F.AdamStep) -> None:
    """As functional.adamw, in place."""
    _, weight_decay, b1, b2, c1, c2, eps, decoupled = step
    for w_, g_, m_, v_, rate, decay in blocks(w, g, m, v, rates, decays):
        lr = step.lr * rate
        if weight_decay and decoupled:
            w_ *= 1 - lr * weight_decay * decay
        elif weight_decay:
            g_ = g_ + weight_decay * decay * w_
        m_ *= b1
        m_ += (1 - b1) * g_
        v_ *= b2
        v_ += (1 - b2) * (g_ * g_)
        w_ -= (lr / c1) * m_ / (np.sqrt(v_) / math.sqrt(c2) + eps)
