"""Initialisers that depend on shapes alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minilora.layers.linear import uniform


def kaiming(layer: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0, the usual choice: the adapted layer first computes what the base layer does.

    A gets its first gradient at the second step."""
    return uniform(rng, (layer.in_features, layer.r), 1 / math.sqrt(layer.in_features), "float64"), np.zeros((layer.r, layer.out_features))


def both_uniform(layer: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A and B Kaiming-uniform: the adapted layer differs from the base layer at once. PEFT has it for tests."""
    r, m, n = layer.r, layer.in_features, layer.out_features
    return uniform(rng, (m, r), 1 / math.sqrt(m), "float64"), uniform(rng, (r, n), 1 / math.sqrt(r), "float64")


def gaussian(layer: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A ~ N(0, 1 / r^2), B = 0."""
    return rng.normal(0, 1 / layer.r, (layer.in_features, layer.r)), np.zeros((layer.r, layer.out_features))


def normal(layer: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A, B ~ N(0, 1), as in the sample this project grew from. s A B then adds about s sqrt(r) to each weight, far more than W itself."""
    return rng.normal(0, 1, (layer.in_features, layer.r)), rng.normal(0, 1, (layer.r, layer.out_features))
