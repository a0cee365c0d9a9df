"""The part of the catalogue that is layers, plain and adapted (minilora/layers, minilora/lora, minilora/adapters)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minilora import layers as L
from minilora.adapters import BottleneckLinear, PerSequence
from minilora.backend import Array, as_like
from minilora.checking.subjects import OFFSETS, Subject, shaken
from minilora.lora import LoRALinear
from minilora.lora.init.watch import Watched
from minilora.lora.variants.dora import DoRALinear
from minilora.lora.variants.embedding import LoRAEmbedding
from minilora.lora.variants.vera import Projections, VeraConfig, VeRALinear
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


class HeldNorms(DoRALinear):
    """DoRA with the column norms of its first call: of this function, use_dora=True computes the gradient."""

    held: tuple[Array, Array] | None = None

    def norms(self) -> tuple[Array, Array]:
        if self.held is None:
            self.held = super().norms()
        return tuple(as_like(v, self.lora_A.data).astype(self.lora_A.data.dtype) for v in self.held)


def adapters(rng: np.random.Generator) -> Iterator[Subject]:
    """Every adapted layer, with its trained parameters away from their initial values."""
    d: dict[str, Any] = {"rng": rng, "dtype": "float64"}
    x, ids = rng.standard_normal((6, 5)), rng.integers(0, 6, 9)

    def base() -> L.Linear:
        return L.Linear(5, 4, **d)

    def shaken_lora(layer: Any) -> Any:
        return shaken(layer, rng, layer.trains)

    def shaken_vera(r: int, projections: Projections, dropout: float = 0.0) -> Any:
        return shaken_lora(VeRALinear(base(), VeraConfig(r=r, vera_dropout=dropout), projections))

    only_A = shaken_lora(HeldNorms(base(), 2, 8, 0.3, **d))
    only_A.lora_B.trainable = only_A.lora_magnitude_vector.trainable = False
    bottleneck = _bias_trained(shaken(BottleneckLinear(base(), 2, rng=rng), rng))
    several = [base(), LoRALinear(base(), r=2, **d), bottleneck]
    groups = {6: [np.array(rows, dtype=int) for rows in ([0, 3], [1, 2, 5], [4])]}
    subjects = {
        "Linear, watched": Watched(base()),
        "LoRALinear": LoRALinear(base(), r=2, **d),
        "LoRALinear, rsLoRA, dropout": LoRALinear(base(), 3, 8, 0.3, True, **d),
        "LoRALinear, normal init": LoRALinear(base(), r=2, init="normal", **d),
        "LoRALinear, pissa": shaken_lora(LoRALinear(base(), 2, 3, 0.2, init="pissa", **d)),
        "LoRALinear, olora": shaken_lora(LoRALinear(base(), 2, 3, 0.2, init="olora", **d)),
        "DoRALinear, norms held": shaken_lora(HeldNorms(base(), r=2, **d)),
        "DoRALinear, norms held, dropout, only A trained": only_A,
        "DoRALinear, exact": shaken_lora(DoRALinear(base(), r=2, exact=True, **d)),
        "DoRALinear, exact, rsLoRA, dropout": shaken_lora(DoRALinear(base(), 3, 8, 0.3, True, exact=True, **d)),
        "DoRALinear, exact, pissa": shaken_lora(DoRALinear(base(), r=2, init="pissa", exact=True, **d)),
        "VeRALinear, r = 7": shaken_vera(7, Projections.drawn(6, 5, 7, 1)),
        "VeRALinear, r = 3": shaken_vera(3, Projections.drawn(6, 5, 3, 1), dropout=0.3),
        "BottleneckLinear, GELU": shaken(BottleneckLinear(base(), 3, L.GELU(), **d), rng),
        "BottleneckLinear, ReLU": shaken(BottleneckLinear(base(), 3, L.ReLU(), **d), rng),
        "BottleneckLinear, the bias trained": bottleneck,
        "BottleneckLinear, off": _off(BottleneckLinear(base(), 2, rng=rng)),
        "PerSequence": PerSequence(several, groups),
    }
    for mode, switch in {"the bias trained": _bias_trained, "off": _off, "merged": _merged}.items():
        subjects[f"LoRALinear, {mode}"] = switch(shaken(LoRALinear(base(), r=2, **d), rng))
        subjects[f"DoRALinear, exact, {mode}"] = switch(shaken_lora(DoRALinear(base(), r=2, exact=True, **d)))
        projections = Projections(rng.standard_normal((5, 3)), rng.standard_normal((3, 4)))
        subjects[f"VeRALinear, {mode}"] = switch(shaken_vera(3, projections))
    yield from ((name, layer, x, {}) for name, layer in subjects.items())
    yield "LoRAEmbedding", shaken_lora(LoRAEmbedding(L.Embedding(6, 5, **d), 2, 5, rng=rng)), ids, {}


def _bias_trained(layer: Any) -> Any:
    """As with bias="all"."""
    layer.bias.trainable = True
    return layer


def _off(layer: Any) -> Any:
    layer.enabled = False
    return _bias_trained(layer)


def _merged(layer: Any) -> Any:
    layer.freeze().merge()
    return _bias_trained(layer)
