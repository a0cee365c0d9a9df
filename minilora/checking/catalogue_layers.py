"""The part of the catalogue that is layers (minilora/layers, LoRALinear, minilora/adapters)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minilora import kernels as K
from minilora.adapters import BottleneckLinear, PerSequence
from minilora.checking.subjects import MODES, OFFSETS, Subject, shaken
from minilora.layers import (
    GELU,
    Attention,
    Block,
    Dropout,
    Embedding,
    FeedForward,
    LayerNorm,
    Linear,
    ReLU,
    RMSNorm,
    Sequential,
    SiLU,
    Tanh,
)
from minilora.lora import LoRALinear
from minilora.lora.init.watch import Watched
from minilora.models import MLP


def layers(rng: np.random.Generator) -> Iterator[Subject]:
    """Every layer, and every way in which it may be used."""

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    d: dict[str, Any] = {"rng": rng, "dtype": "float64"}
    ids = rng.integers(0, 7, 9)
    yield "Linear", Linear(5, 4, **d), draw(6, 5), {}
    yield "Linear, no bias", Linear(5, 4, bias=False, **d), draw(6, 5), {}
    yield "Linear, watched", Watched(Linear(5, 4, **d)), draw(6, 5), {}
    yield "LoRALinear", LoRALinear(Linear(5, 4, **d), r=2, **d), draw(6, 5), {}
    yield "LoRALinear, rsLoRA, dropout", LoRALinear(Linear(5, 4, **d), 3, 8, 0.3, True, **d), draw(6, 5), {}
    for mode, switch in MODES.items():
        yield f"LoRALinear, {mode}", switch(shaken(LoRALinear(Linear(5, 4, **d), r=2, **d), rng)), draw(6, 5), {}
    yield "LoRALinear, the seed's init", LoRALinear(Linear(5, 4, **d), r=2, init="seed", **d), draw(6, 5), {}
    for act in (GELU(), ReLU()):
        yield f"BottleneckLinear, {type(act).__name__}", shaken(BottleneckLinear(Linear(5, 4, **d), 3, act, **d), rng), draw(6, 5), {}
    bottleneck = MODES["the bias trained"](shaken(BottleneckLinear(Linear(5, 4, **d), 2, rng=rng), rng))
    yield "BottleneckLinear, the bias trained", bottleneck, draw(6, 5), {}
    yield "BottleneckLinear, off", MODES["off"](BottleneckLinear(Linear(5, 4, **d), 2, rng=rng)), draw(6, 5), {}
    several = [Linear(5, 4, **d), LoRALinear(Linear(5, 4, **d), r=2, **d), bottleneck]
    yield "PerSequence", PerSequence(several, {6: [np.array(rows, dtype=int) for rows in ([0, 3], [1, 2, 5], [4])]}), draw(6, 5), {}
    yield "Embedding", Embedding(7, 5, **d), ids, {}
    yield "LayerNorm", shaken(LayerNorm(5, dtype="float64"), rng), draw(6, 5), {}
    yield "RMSNorm", shaken(RMSNorm(5, dtype="float64"), rng), draw(6, 5), {}
    for layer in (ReLU(), GELU(), GELU("tanh"), SiLU(), Tanh(), Dropout(0.4)):
        yield type(layer).__name__ + (", tanh" if layer.__dict__.get("f") is K.gelu_tanh else ""), layer, draw(6, 5), {}
    yield "Attention, causal", Attention(6, 3, **d), draw(9, 6), {"offsets": OFFSETS}
    yield "Attention, one sequence", Attention(6, 3, **d), draw(9, 6), {}
    yield "Attention, some rows", Attention(6, 3, **d), draw(9, 6), {"offsets": OFFSETS, "rows": np.array([0, 2, 7])}
    yield "Attention, both ways", Attention(6, 2, causal=False, **d), draw(9, 6), {"offsets": OFFSETS}
    yield "FeedForward", FeedForward(4, 7, **d), draw(6, 4), {}
    yield "Block", shaken(Block(6, 3, dropout=0.2, **d), rng), draw(9, 6), {"offsets": OFFSETS}
    yield "Sequential", Sequential(Linear(5, 4, **d), Tanh(), Dropout(0.2), Linear(4, 3, **d)), draw(6, 5), {}
    yield "Sequential, frozen below", Sequential(Linear(5, 4, **d).freeze(), ReLU(), Linear(4, 3, **d)), draw(6, 5), {}
    yield "MLP", MLP([5, 7, 6, 3], Tanh, **d), draw(6, 5), {}
