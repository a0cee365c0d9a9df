"""The part of the catalogue that is layers, plain and adapted (minilora/layers, minilora/lora, minilora/adapters)."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from minilora import layers as L
from minilora.adapters import BottleneckLinear, PerSequence
from minilora.backend import Array, as_like
from minilora.checking.subjects import OFFSETS, Subject, frozen_but, shaken
from minilora.layers.base import Output
from minilora.lora import LoRALinear
from minilora.lora.init.data import Watched
from minilora.lora.variants.dora import DoRALinear
from minilora.lora.variants.embedding import LoRAEmbedding
from minilora.lora.variants.vera import Projections, VeraConfig, VeRALinear
from minilora.models import MLP, Attention, Block, FeedForward
from minilora.models.attention import HeadNorm


class InBuffer(L.Linear):
    """A Linear whose gradients are part of a buffer that holds other numbers, as an optimizer's does after a step."""

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        for _, p in self.parameters():
            p.home = p.data + 1
        return super().forward(x, keep, need_dx)


def layers(rng: np.random.Generator) -> Iterator[Subject]:
    """Every layer, and every way in which it may be used."""

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    d: dict[str, Any] = {"rng": rng, "dtype": "float64"}
    yield "Linear", L.Linear(5, 4, **d), draw(6, 5), {}
    yield "Linear, no bias", L.Linear(5, 4, bias=False, **d), draw(6, 5), {}
    yield "Linear, gradients in a buffer", InBuffer(5, 4, **d), draw(6, 5), {}
    yield "Embedding", L.Embedding(7, 5, **d), rng.integers(0, 7, 9), {}
    yield "Embedding, a row of padding", L.Embedding(7, 5, 3, **d), np.array([0, 2, 2, 6]), {}
    yield "LayerNorm", shaken(L.LayerNorm(5, dtype="float64"), rng), draw(6, 5), {}
    yield "RMSNorm", shaken(L.RMSNorm(5, dtype="float64"), rng), draw(6, 5), {}
    yield "RMSNorm, 1 + weight", shaken(L.RMSNorm(5, 1e-6, 1, dtype="float64"), rng), draw(6, 5), {}
    yield "HeadNorm", shaken(HeadNorm(3, dtype="float64"), rng), draw(6, 6), {}
    for layer in (L.ReLU(), L.GELU(), L.SiLU(), L.Tanh(), L.Dropout(0.4)):
        yield type(layer).__name__, layer, draw(6, 5), {}
    yield "GELU, tanh", L.GELU("tanh"), draw(6, 5), {}
    yield "Attention, causal", Attention(6, 3, **d), draw(9, 6), {"offsets": OFFSETS}
    yield "Attention, one sequence", Attention(6, 3, **d), draw(9, 6), {}
    yield "Attention, some rows", Attention(6, 3, **d), draw(9, 6), {"offsets": OFFSETS, "rows": np.array([0, 2, 7])}
    yield "Attention, both ways", Attention(6, 2, causal=False, **d), draw(9, 6), {"offsets": OFFSETS}
    yield "FeedForward", FeedForward(4, 7, **d), draw(6, 4), {}
    yield "Block", shaken(Block(6, 3, dropout=0.2, **d), rng), draw(9, 6), {"offsets": OFFSETS}
    for part in ("nothing", "mlp", "ln_2"):
        block = frozen_but(shaken(Block(6, 3, **d), rng), part)
        yield f"Block, {part} trained", block, draw(9, 6), {"offsets": OFFSETS}
    yield "Attention, c_proj trained", frozen_but(Attention(6, 3, **d), "c_proj"), draw(9, 6), {"offsets": OFFSETS}
    yield "RMSNorm, frozen", shaken(L.RMSNorm(5, dtype="float64"), rng).freeze(), draw(6, 5), {}
    yield "Sequential", L.Sequential(L.Linear(5, 4, **d), L.Tanh(), L.Dropout(0.2), L.Linear(4, 3, **d)), draw(6, 5), {}
    yield "Sequential, frozen below", L.Sequential(L.Linear(5, 4, **d).freeze(), L.ReLU(), L.Linear(4, 3, **d)), draw(6, 5), {}
    yield "MLP", MLP([5, 7, 6, 3], L.Tanh, **d), draw(6, 5), {}


def large(rng: np.random.Generator) -> Iterator[Subject]:
    """Sizes above one block of rows (2^17 numbers), of queries (128), or of kept probabilities (192 keys)."""
    d: dict[str, Any] = {"rng": rng, "dtype": "float64"}
    packed: dict[str, Any] = {"offsets": [0, 40, 250, 262, 270], "rows": np.array([3, *range(60, 249), 261])}  # the last has no query
    subjects: dict[str, tuple[Any, tuple[int, int], dict[str, Any]]] = {
        "LoRALinear": (LoRALinear(L.Linear(32, 40, **d), r=2, **d), (3500, 32), {}),
        "LoRALinear, no bias": (LoRALinear(L.Linear(32, 40, bias=False, **d), r=2, **d), (3500, 32), {}),
        "LoRALinear, A alone": (LoRALinear(L.Linear(32, 40, **d), r=2, **d), (3500, 32), {}),
        "LoRALinear, B alone": (LoRALinear(L.Linear(32, 40, **d), r=2, **d), (3500, 32), {}),
        "LoRALinear, dropout": (LoRALinear(L.Linear(32, 40, **d), 2, 16, 0.3, **d), (3500, 32), {}),
        "LayerNorm": (L.LayerNorm(40, dtype="float64"), (3500, 40), {}),
        "RMSNorm": (L.RMSNorm(40, dtype="float64"), (3500, 40), {}),
        "GELU, tanh": (L.GELU("tanh"), (3500, 40), {}),
        "SiLU": (L.SiLU(), (3500, 40), {}),
        "Attention, causal": (Attention(6, 2, **d), (270, 6), packed),
        "Attention, both ways": (Attention(6, 2, causal=False, **d), (270, 6), packed),
    }
    for name, (layer, shape, options) in subjects.items():
        shaken(layer, rng)
        if name.endswith("alone"):
            (layer.lora_B if "A alone" in name else layer.lora_A).trainable = False
        yield f"{name}, large", layer, rng.standard_normal(shape), options


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

    def moved(layer: Any) -> Any:
        return shaken(layer, rng, getattr(layer, "trains", None))

    def vera(r: int, dropout: float = 0.0) -> Any:
        return moved(VeRALinear(base(), VeraConfig(r=r, vera_dropout=dropout), Projections.drawn(6, 5, r, 1)))

    only_A = moved(HeldNorms(base(), 2, 8, 0.3, **d))
    only_A.lora_B.trainable = only_A.lora_magnitude_vector.trainable = False
    bottleneck = moved(BottleneckLinear(base(), 2, rng=rng))
    groups = {6: [np.array(rows, dtype=int) for rows in ([0, 3], [1, 2, 5], [4])]}
    subjects = {
        "Linear, watched": Watched(base()),
        "LoRALinear": LoRALinear(base(), r=2, **d),
        "LoRALinear, rsLoRA, dropout": LoRALinear(base(), 3, 8, 0.3, True, **d),
        "LoRALinear, normal init": LoRALinear(base(), r=2, init="normal", **d),
        "LoRALinear, pissa": moved(LoRALinear(base(), 2, 3, 0.2, init="pissa", **d)),
        "LoRALinear, olora": moved(LoRALinear(base(), 2, 3, 0.2, init="olora", **d)),
        "DoRALinear, norms held": moved(HeldNorms(base(), r=2, **d)),
        "DoRALinear, norms held, dropout, only A trained": only_A,
        "DoRALinear, exact": moved(DoRALinear(base(), r=2, exact=True, **d)),
        "DoRALinear, exact, rsLoRA, dropout": moved(DoRALinear(base(), 3, 8, 0.3, True, exact=True, **d)),
        "DoRALinear, exact, pissa": moved(DoRALinear(base(), r=2, init="pissa", exact=True, **d)),
        "VeRALinear, r = 7": vera(7),
        "VeRALinear, r = 3": vera(3, dropout=0.3),
        "BottleneckLinear, GELU": moved(BottleneckLinear(base(), 3, L.GELU(), **d)),
        "BottleneckLinear, ReLU": moved(BottleneckLinear(base(), 3, L.ReLU(), **d)),
        "BottleneckLinear, the bias trained": bottleneck,
        "BottleneckLinear, off": moved(BottleneckLinear(base(), 2, rng=rng)),
        "PerSequence": PerSequence([base(), LoRALinear(base(), r=2, **d), bottleneck], groups),
    }
    alone = {"lora_A": LoRALinear(base(), r=2, **d), "lora_B": LoRALinear(base(), r=2, **d)}
    alone |= {name: vera(3) for name in ("vera_lambda_b", "vera_lambda_d", "nothing")}
    for trained, layer in alone.items():
        for name in layer.trains:
            getattr(layer, name).trainable = name == trained
        subjects[f"{type(layer).__name__}, {trained} alone"] = moved(layer)
    for mode in ("the bias trained", "off", "merged"):
        subjects[f"LoRALinear, {mode}"] = moved(LoRALinear(base(), r=2, **d))
        subjects[f"DoRALinear, exact, {mode}"] = moved(DoRALinear(base(), r=2, exact=True, **d))
        subjects[f"VeRALinear, {mode}"] = vera(3)
    for name, layer in subjects.items():
        if name.endswith(("the bias trained", "off", "merged")):
            if name.endswith("merged"):
                layer.freeze().merge()
            layer.bias.trainable = True  # as with bias="all"
            layer.enabled = not name.endswith("off")
        yield name, layer, x, {}
    yield "LoRAEmbedding", moved(LoRAEmbedding(L.Embedding(6, 5, **d), 2, 5, rng=rng)), ids, {}
