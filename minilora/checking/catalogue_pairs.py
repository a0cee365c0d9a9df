"""The part of the catalogue that is pairs of functions (minilora/functional, and those of LoRA's variants)."""

from collections.abc import Collection, Iterator
from inspect import signature
from types import SimpleNamespace
from typing import Any

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array
from minilora.checking.subjects import OFFSETS, Subject
from minilora.layers import Layer, Parameter, Saved
from minilora.layers.base import Output
from minilora.lora.variants import dora, embedding, vera


class Pair(Layer):
    """`name` and `name_backward` of a module, with the contract of a layer. (What follows a comma in the name is a remark.)

    arguments: of `name`, the first of which is x here. Other arrays of floats are parameters, without a gradient if `frozen` names them.
    returns: what `name` returns, y first, under the names that `name_backward` has for it; a loss returns its gradients.
    """

    def __init__(self, module: Any, name: str, returns: str = "y", frozen: str = "", **arguments: Any) -> None:
        self.name, self.returns = name, returns.split()
        function = name.partition(",")[0]
        self.f, self.f_backward = getattr(module, function), getattr(module, f"{function}_backward", None)
        (self.x_name, self.first), *others = arguments.items()
        self.constants = {}
        for key, value in others:
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                setattr(self, key, Parameter(value, key not in frozen.split()))
            else:
                self.constants[key] = value

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        known = {self.x_name: x, **self.constants, **{key: p.data for key, p in self.parameters()}}
        result = self.f(**known)
        known |= zip(self.returns, result if len(self.returns) > 1 else [result], strict=True)
        return known[self.returns[0]], self.save(need_dx, known) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        (known,) = self.load(saved, need_dx)
        names = [f"d{self.x_name}", *(f"d{key}" for key, p in self.parameters() if p.trainable)]
        if self.f_backward is None:
            grads = {name: None if known[name] is None else dy * known[name] for name in self.returns[1:]}
            grads.setdefault(names[0], grads.get("dy"))  # the gradient of mse is called dy
        else:
            takes = signature(self.f_backward).parameters
            given = {key: known[key] for key in takes if key in known} | ({"need": set(names)} if "need" in takes else {})
            result = self.f_backward(dy, **given)
            grads = dict(
                zip(takes["need"].default if "need" in takes else names, result if isinstance(result, tuple) else [result], strict=True)
            )
        for key, p in self.parameters():
            if p.trainable:
                p.add_grad(grads[f"d{key}"])
        return grads[names[0]] if need_dx else None


def pairs(rng: np.random.Generator) -> Iterator[Subject]:
    """Every functional pair that layers are made of."""
    yield from ((pair.name, pair, pair.first, {}) for pair in _pairs(rng))


def _pairs(rng: np.random.Generator) -> Iterator[Pair]:
    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    x, ids, labels = draw(6, 5), rng.integers(0, 6, 9), np.array([0, 3, -100, 1, 4, 4])
    yield Pair(F, "linear", x=x, W=draw(5, 4), b=draw(4))
    for name in ("relu", "gelu", "gelu_tanh", "silu", "tanh", "softmax"):
        yield Pair(F, name, x=x)
    yield Pair(F, "swiglu", "y saved", g=x, u=draw(6, 5))
    yield Pair(F, "layer_norm", "y saved", x=x, gamma=draw(5), beta=draw(5))
    yield Pair(F, "rms_norm", "y saved", x=x, gamma=draw(5))
    yield Pair(F, "rms_norm, frozen x", "y saved", "x", gamma=draw(5), x=x)
    yield Pair(F, "layer_norm, frozen x", "y saved", "x", gamma=draw(5), x=x, beta=draw(5))
    yield Pair(F, "dropout", x=x, p=0.4, key=11)
    yield Pair(F, "embedding", E=x, ids=ids)
    for remark, offsets, causal in (("causal", OFFSETS, True), ("both ways", OFFSETS, False), ("one sequence", None, True)):
        q, k, v = draw(9, 6), draw(9, 6), draw(9, 6)
        yield Pair(F, f"attention, {remark}", "y saved", q=q, k=k, v=v, n_head=3, offsets=offsets, causal=causal)
    for causal in (True, False):
        window: dict[str, Any] = {"n_head": 3, "offsets": [0, 9], "causal": causal, "window": 3}
        yield Pair(F, f"attention, a window{'' if causal else ', both ways'}", "y saved", q=q, k=k, v=v, **window)
    for needless in ("k", "v", "k v"):
        yield Pair(F, f"attention, no {needless}", "y saved", needless, q=q, k=k, v=v, n_head=2, offsets=OFFSETS)
    for needless in ("q", "q v"):
        yield Pair(F, f"attention, no {needless}", "y saved", needless, k=k, q=q, v=v, n_head=2, offsets=OFFSETS)
    yield Pair(F, "attention, v alone", "y saved", "q k", v=v, q=q, k=k, n_head=2, offsets=OFFSETS)
    q, k, v = draw(9, 12), draw(9, 4), draw(9, 4)
    yield Pair(F, "attention, grouped heads", "y saved", q=q, k=k, v=v, n_head=6, n_kv_head=2, offsets=OFFSETS)
    cos, sin = F.rotary_tables(F.positions(9, OFFSETS, 9), 4, 100.0, x)
    yield Pair(F, "rotary", frozen="cos sin", x=draw(9, 12), cos=cos, sin=sin)
    yield Pair(F, "mse", "loss dy", frozen="target", y=x, target=np.full(x.shape, 0.3))
    yield Pair(F, "cross_entropy", "loss dy", logits=x, labels=labels)
    yield Pair(F, "cross_entropy, times", "loss dy", logits=x, labels=labels, times=0.7)
    yield Pair(F, "linear_cross_entropy", "loss dx dW", x=draw(5, 5), W=draw(5, 7), labels=labels[labels != -100], block=2)

    yield Pair(F, "linear_cross_entropy, frozen head", "loss dx dW", "W", x=x, W=draw(5, 7), labels=ids[:6], need={"dx"}, block=3)

    def chosen(x: Array, W: Array, labels: Array, need: Collection[str] = ("dx", "dW")) -> Any:
        return K.linear_cross_entropy(x, W, labels, None, need)

    rows, kernels = rng.integers(0, 300, 4200), SimpleNamespace(linear_cross_entropy=chosen)  # two blocks of the vocabulary
    yield Pair(kernels, "linear_cross_entropy, large", "loss dx dW", "W", x=draw(4200, 2), W=draw(2, 300), labels=rows, need={"dx"})

    W: dict[str, Any] = {"frozen": "W", "W": draw(5, 4), "b": None, "s": 0.7}
    A, B = draw(5, 2), draw(2, 4)
    yield Pair(F, "lora_linear", "y u", x=x, A=A, B=B, **W)
    squares = (W["W"] ** 2).sum(axis=0)
    yield Pair(dora, "column_norms", "c AtV", frozen="W squares", A=A, B=B, W=W["W"], s=0.7, squares=squares)
    yield Pair(dora, "dora_linear", "y z u", x=x, A=A, B=B, m=draw(4), c=draw(4), **W)
    vera_W = {"frozen": "W A B", "W": W["W"], "b": None, "A": draw(5, 7), "B": draw(7, 4)}
    yield Pair(vera, "vera_linear", "y u", x=x, d=draw(7), e=draw(4), **vera_W)
    yield Pair(embedding, "lora_embedding", "y u", frozen="E", A=draw(6, 2), B=draw(2, 5), E=draw(6, 5), ids=ids, s=0.7)
