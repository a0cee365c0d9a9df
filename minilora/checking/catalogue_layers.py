"""The part of the catalogue that is layers without adapters (minilora/layers)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minilora import layers as L
from minilora.checking.subjects import OFFSETS, Subject, shaken
from minilora.models import MLP


def layers(rng: np.random.Generator) -> Iterator[Subject]:
    """Every layer, and every way in which it may be used."""

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    d: dict[str, Any] = {"rng": rng, "dtype": "float64"}
    yield "Linear", L.Linear(5, 4, **d), draw(6, 5), {}
    yield "Linear, no bias", L.Linear(5, 4, bias=False, **d), draw(6, 5), {}
    yield "Embedding", L.Embedding(7, 5, **d), rng.integers(0, 7, 9), {}
    yield "LayerNorm", shaken(L.LayerNorm(5, dtype="float64"), rng), draw(6, 5), {}
    yield "RMSNorm", shaken(L.RMSNorm(5, dtype="float64"), rng), draw(6, 5), {}
    for layer in (L.ReLU(), L.GELU(), L.SiLU(), L.Tanh(), L.Dropout(0.4)):
        yield type(layer).__name__, layer, draw(6, 5), {}
    yield "GELU, tanh", L.GELU("tanh"), draw(6, 5), {}
    yield "Attention, causal", L.Attention(6, 3, **d), draw(9, 6), {"offsets": OFFSETS}
    yield "Attention, one sequence", L.Attention(6, 3, **d), draw(9, 6), {}
    yield "Attention, some rows", L.Attention(6, 3, **d), draw(9, 6), {"offsets": OFFSETS, "rows": np.array([0, 2, 7])}
    yield "Attention, both ways", L.Attention(6, 2, causal=False, **d), draw(9, 6), {"offsets": OFFSETS}
    yield "FeedForward", L.FeedForward(4, 7, **d), draw(6, 4), {}
    yield "Block", shaken(L.Block(6, 3, dropout=0.2, **d), rng), draw(9, 6), {"offsets": OFFSETS}
    yield "Sequential", L.Sequential(L.Linear(5, 4, **d), L.Tanh(), L.Dropout(0.2), L.Linear(4, 3, **d)), draw(6, 5), {}
    yield "Sequential, frozen below", L.Sequential(L.Linear(5, 4, **d).freeze(), L.ReLU(), L.Linear(4, 3, **d)), draw(6, 5), {}
    yield "MLP", MLP([5, 7, 6, 3], L.Tanh, **d), draw(6, 5), {}
