"""Initialisers that depend on shapes alone. Each has `layer` (in_features, out_features, r) and returns A (in, r) and B (r, out)."""

import math
from typing import Any

import numpy as np

Factors = tuple[np.ndarray, np.ndarray]


def kaiming(layer: Any, rng: np.random.Generator) -> Factors:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, the usual choice: the adapted layer first computes what the base layer does.

    A gets its first gradient at the second step."""
    bound = 1 / math.sqrt(layer.in_features)
    return rng.uniform(-bound, bound, (layer.in_features, layer.r)), np.zeros((layer.r, layer.out_features))


def both_uniform(layer: Any, rng: np.random.Generator) -> Factors:
    """A and B Kaiming-uniform: the adapted layer differs from the base layer at once. PEFT has it for tests."""
    A, _ = kaiming(layer, rng)
    bound = 1 / math.sqrt(layer.r)
    return A, rng.uniform(-bound, bound, (layer.r, layer.out_features))


def gaussian(layer: Any, rng: np.random.Generator) -> Factors:
    """A ~ N(0, 1 / r^2), B = 0."""
    return rng.normal(0, 1 / layer.r, (layer.in_features, layer.r)), np.zeros((layer.r, layer.out_features))


def normal(layer: Any, rng: np.random.Generator) -> Factors:
    """A, B ~ N(0, 1), as in the sample this project grew from. s A B then adds about s sqrt(r) to each weight, far more than W itself."""
    return rng.normal(0, 1, (layer.in_features, layer.r)), rng.normal(0, 1, (layer.r, layer.out_features))


def orthogonal(layer: Any, rng: np.random.Generator) -> Factors:
    """A and B both random and not zero, but A B = 0, so that both have a gradient at the first step (PEFT's "orthogonal").

    Q (r, r) orthonormal,   A = R_1 Q_even / 10,   B = Q_odd^T R_2 / 10,   R_1 (in, r / 2) and R_2 (r / 2, out) ~ N(0, 1)

    Q_even are the rows 0, 2, ..., Q_odd the rows between: Q_even Q_odd^T = 0. Raises ValueError when r is odd.
    """
    r, m, n = layer.r, layer.in_features, layer.out_features
    if r % 2:
        raise ValueError(f"orthogonal: the rank must be even, got {r}.")
    Q, _ = np.linalg.qr(rng.standard_normal((r, r)))
    A, B = rng.standard_normal((m, r // 2)) @ Q[::2], Q[1::2].T @ rng.standard_normal((r // 2, n))
    return A / 10, B / 10
