"""Orthogonal: A and B are both random and not zero, but A B is zero (datta0, "Rethink LoRA initialisation"; PEFT's "orthogonal").

    Q (r, r) orthonormal,   A = R_1 Q_even / 10,   B = Q_odd^T R_2 / 10,   R_1 (m, r / 2) and R_2 (r / 2, n) ~ N(0, 1)

Q_even are the rows 0, 2, ..., Q_odd the rows between: Q_even Q_odd^T = 0. So both factors have a gradient at the first step.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def orthogonal(layer: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A and B of `layer`. Raises ValueError when r is odd."""
    r, m, n = layer.r, layer.in_features, layer.out_features
    if r % 2:
        raise ValueError(f"orthogonal: the rank must be even, got {r}.")
    Q, _ = np.linalg.qr(rng.standard_normal((r, r)))
    A, B = rng.standard_normal((m, r // 2)) @ Q[::2], Q[1::2].T @ rng.standard_normal((r // 2, n))
    return A / 10, B / 10
