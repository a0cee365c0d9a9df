"""AdamW over the whole flat buffer in one launch; the equations are in optim/optimizers.py, which also has the plain one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minilora.backend import Array
from minilora.kernels import cuda


def adamw(
    w: Array,
    g: Array,
    m: Array,
    v: Array,
    rates: Any,
    decays: Any,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    corrections: tuple[float, float],
    eps: float,
    decoupled: bool,
) -> None:
    """One step, in place. rates and decays: numbers, or arrays of the buffer's size. Everything is on the device."""
    f, (b1, b2) = w.dtype.type, betas
    scales = [(x, f(y)) if hasattr(x, "shape") and x.shape else (cuda.NULL, f(x * y)) for x, y in ((rates, lr), (decays, weight_decay))]
    (rates, lr_), (decays, decay) = scales
    numbers = (lr_, decay, f(b1), f(b2), f(1 - b1), f(1 - b2), f(corrections[0]), f(math.sqrt(corrections[1])), f(eps), np.int32(decoupled))
    cuda.elementwise("adamw", "adamw", w.size, w, g, m, v, rates, decays, *numbers)
