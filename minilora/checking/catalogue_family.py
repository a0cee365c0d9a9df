"""The part of the catalogue that is LoRA's family (minilora/family): a method has its pairs and its layer here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minilora.backend import Array, as_like
from minilora.checking.subjects import MODES, LossOf, Pair, Subject, fixed_weight, shaken
from minilora.layers import Embedding, Linear
from minilora.lora import LoraConfig, LoRALinear, inject, lora_layers
from minilora.lora.variants import dora, embedding, vera
from minilora.models import GPT2, GPT2Config


class HeldNorms(dora.DoRALinear):
    """DoRA with the column norms of its first moment: of this function, use_dora=True gives the gradient."""

    held: tuple[Array, Array] | None = None

    def norms(self) -> tuple[Array, Array]:
        if self.held is None:
            self.held = super().norms()
        return tuple(as_like(v, self.lora_A.data).astype(self.lora_A.data.dtype) for v in self.held)


def family(rng: np.random.Generator) -> Iterator[Subject]:
    """Every method's pairs, its layer, and the ways in which it may be used."""
    d: dict[str, Any] = {"rng": rng, "dtype": "float64"}

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    x = draw(6, 5)

    def started(layer: Any) -> Any:
        """What is trained, away from where it starts."""
        return shaken(layer, rng, layer.trains)

    def norms(x: Array, A: Array, B: Array) -> tuple[Array, Any]:
        W = fixed_weight(x)
        c, K = dora.column_norms(W, A, B, 0.7, (W * W).sum(axis=0))
        return c, (c, K)

    def norms_backward(dc: Array, saved: Any, x: Array, A: Array, B: Array) -> list[Array]:
        c, K = saved
        return [x * 0, *dora.column_norms_backward(dc, c, K, fixed_weight(x), A, B, 0.7)]

    def dora_linear(x: Array, A: Array, B: Array, m: Array, c: Array) -> tuple[Array, Any]:
        y, *saved = dora.dora_linear(x, fixed_weight(x), None, A, B, m, c, 0.7)
        return y, saved

    def dora_linear_backward(dy: Array, saved: Any, x: Array, A: Array, B: Array, m: Array, c: Array) -> tuple[Array, ...]:
        z, u = saved
        return dora.dora_linear_backward(dy, x, z, u, fixed_weight(x), A, B, m, c, 0.7)

    yield "column_norms", Pair("column_norms", norms, norms_backward, A=draw(5, 2), B=draw(2, 4)), x, {}
    arrays = {"A": draw(5, 2), "B": draw(2, 4), "m": draw(4), "c": draw(4)}
    yield "dora_linear", Pair("dora_linear", dora_linear, dora_linear_backward, **arrays), x, {}
    yield "DoRALinear, norms held", started(HeldNorms(Linear(5, 4, **d), r=2, **d)), x, {}
    yield "DoRALinear, exact", started(dora.DoRALinear(Linear(5, 4, **d), r=2, exact=True, **d)), x, {}
    yield "DoRALinear, exact, rsLoRA, dropout", started(dora.DoRALinear(Linear(5, 4, **d), 3, 8, 0.3, True, exact=True, **d)), x, {}
    only_A = started(HeldNorms(Linear(5, 4, **d), 2, 8, 0.3, **d))
    only_A.lora_B.trainable = only_A.lora_magnitude_vector.trainable = False
    yield "DoRALinear, norms held, dropout, only A trained", only_A, x, {}
    for mode, switch in MODES.items():
        yield f"DoRALinear, exact, {mode}", switch(started(dora.DoRALinear(Linear(5, 4, **d), r=2, exact=True, **d))), x, {}
        vectors = vera.VeRALinear(Linear(5, 4, **d), vera.VeraConfig(r=3), vera.Projections(draw(5, 3), draw(3, 4)))
        yield f"VeRALinear, {mode}", switch(started(vectors)), x, {}
    for init in ("pissa", "olora"):
        layer = LoRALinear(Linear(5, 4, **d), 2, 3, 0.2, init=init, **d)
        yield f"LoRALinear, {init}", started(layer), x, {}
    yield "DoRALinear, exact, pissa", started(dora.DoRALinear(Linear(5, 4, **d), r=2, init="pissa", exact=True, **d)), x, {}
    ids = rng.integers(0, 6, 9)

    def lora_embedding(A: Array, B: Array) -> tuple[Array, Any]:
        return embedding.lora_embedding(ids, as_like(table, A).astype(A.dtype), A, B, 0.7)

    def lora_embedding_backward(dy: Array, u: Any, A: Array, B: Array) -> tuple[Array, Array]:
        return embedding.lora_embedding_backward(dy, ids, u, A, B, 0.7)

    table = draw(6, 5)
    yield "lora_embedding", Pair("lora_embedding", lora_embedding, lora_embedding_backward, B=draw(2, 5)), draw(6, 2), {}
    yield "LoRAEmbedding", started(embedding.LoRAEmbedding(Embedding(6, 5, **d), 2, 5, rng=rng)), ids, {}

    def vera_linear(x: Array, d: Array, e: Array) -> tuple[Array, Any]:
        W, A, B = matrices(x)
        return vera.vera_linear(x, W, None, A, B, d, e)

    def vera_linear_backward(dy: Array, u: Any, x: Array, d: Array, e: Array) -> tuple[Array, ...]:
        W, A, B = matrices(x)
        return vera.vera_linear_backward(dy, u, W, A, B, d, e)

    random = draw(5, 7), draw(7, 4)

    def matrices(x: Array) -> list[Array]:
        return [as_like(M, x).astype(x.dtype) for M in (fixed_weight(x), *random)]

    yield "vera_linear", Pair("vera_linear", vera_linear, vera_linear_backward, d=draw(7), e=draw(4)), x, {}
    for r, dropout in ((7, 0.0), (3, 0.3)):
        vectors = vera.VeRALinear(Linear(5, 4, **d), vera.VeraConfig(r=r, vera_dropout=dropout), vera.Projections.drawn(6, 5, r, 1))
        yield f"VeRALinear, r = {r}", started(vectors), x, {}
    config = GPT2Config(vocab_size=7, n_positions=6, n_embd=6, n_layer=1, n_head=3, n_inner=9)
    model = GPT2(config, **d)
    inject(model, LoraConfig(r=2, use_dora="exact"), rng=rng)
    yield "GPT2, DoRA", model, ids[:6], {}
    model = shaken(GPT2(config, **d), rng)
    inject(model, LoraConfig(r=2, target_modules=["wte", "wpe", "c_fc"]), rng=rng)
    for _, layer in lora_layers(model):
        started(layer)
    yield "GPT2.loss, embeddings adapted, head tied", LossOf(model, np.append(ids[1:6], -100)), ids[:6], {}
