"""The part of the catalogue that is LoRA's family (minilora/family): a method has its pairs and its layer here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minilora.backend import Array, as_like
from minilora.checking.catalogue import Pair, fixed_weight
from minilora.family import dora
from minilora.layers import Linear
from minilora.lora import LoraConfig, LoRALinear, inject
from minilora.models import GPT2, GPT2Config


class HeldNorms(dora.DoRALinear):
    """DoRA with the column norms of its first moment: of this function, use_dora=True gives the gradient."""

    held: tuple[Array, Array] | None = None

    def norms(self) -> tuple[Array, Array]:
        if self.held is None:
            self.held = super().norms()
        return tuple(as_like(v, self.lora_A.data) for v in self.held)


def family(seed: int) -> Iterator[tuple[str, Any, Array, dict[str, Any]]]:
    """(name, object, x, forward options), as in `catalogue`."""
    rng = np.random.default_rng(seed)
    d: dict[str, Any] = {"rng": rng, "dtype": "float64"}

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    x = draw(6, 5)

    def shaken(layer: Any) -> Any:
        """What is trained, away from where it starts."""
        for name in layer.trains:
            p = getattr(layer, name)
            p.data = p.data + 0.3 * rng.standard_normal(p.data.shape)
        return layer

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
    yield "DoRALinear, norms held", shaken(HeldNorms(Linear(5, 4, **d), r=2, **d)), x, {}
    yield "DoRALinear, exact", shaken(dora.DoRALinear(Linear(5, 4, **d), r=2, exact=True, **d)), x, {}
    yield "DoRALinear, exact, rsLoRA, dropout", shaken(dora.DoRALinear(Linear(5, 4, **d), 3, 8, 0.3, True, exact=True, **d)), x, {}
    for init in ("pissa", "olora"):
        started = LoRALinear(Linear(5, 4, **d), 2, 3, 0.2, init=init, **d)
        yield f"LoRALinear, {init}", shaken(started), x, {}
    yield "DoRALinear, exact, pissa", shaken(dora.DoRALinear(Linear(5, 4, **d), r=2, init="pissa", exact=True, **d)), x, {}
    model = GPT2(GPT2Config(vocab_size=7, n_positions=6, n_embd=6, n_layer=1, n_head=3, n_inner=9), **d)
    inject(model, LoraConfig(r=2, use_dora="exact"), rng=1)
    yield "GPT2, DoRA", model, rng.integers(0, 7, 6), {}
