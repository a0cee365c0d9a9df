"""Functional pairs and losses with the contract of a layer, so that they can be checked like one; and helpers of the catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minilora.backend import Array
from minilora.layers import Layer, Parameter, Saved
from minilora.layers.block import Offsets, Output

OFFSETS = [0, 3, 4, 9]  # three sequences, of 3, 1 and 5 tokens
Subject = tuple[str, Any, Array, dict[str, Any]]  # name, object, x, forward options


class Pair(Layer):
    """A functional pair with the contract of a layer; `arrays` are its parameters.

    forward(x, *arrays) -> y, saved        backward(dy, saved, x, *arrays) -> dx, d(array) for each array
    """

    def __init__(self, name: str, forward: Callable[..., Any], backward: Callable[..., Any], **arrays: Array) -> None:
        self.name, self.f, self.f_backward = name, forward, backward
        self.names = list(arrays)
        for key, value in arrays.items():
            setattr(self, key, Parameter(value))

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        y, saved = self.f(x, *(getattr(self, key).data for key in self.names))
        return y, self.save(need_dx, x, saved) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        x, inner = self.load(saved, need_dx)
        dx, *grads = self.f_backward(dy, inner, x, *(getattr(self, key).data for key in self.names))
        for key, g in zip(self.names, grads, strict=True):
            getattr(self, key).add_grad(g)
        return dx if need_dx else None


class LossOf(Layer):
    """A model's `loss`, and its `loss_backward` for dy = 1, with the contract of a layer: y is the loss."""

    def __init__(self, model: Any, labels: np.ndarray) -> None:
        self.name, self.model, self.labels = f"{type(model).__name__}.loss", model, labels

    def forward(self, x: Array, keep: bool = True, need_dx: bool = False, offsets: Offsets = None) -> Output:
        return self.model.loss(x, self.labels, offsets, keep=keep)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> None:
        trained = [p for _, p in self.parameters() if p.trainable]
        for p in trained:
            p.grad = None if p.grad is None else p.grad / dy
        self.model.loss_backward(saved)
        for p in trained:
            p.grad = None if p.grad is None else p.grad * dy

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        return self.model.parameters()


def shaken(layer: Any, rng: np.random.Generator, names: Sequence[str] | None = None) -> Any:
    """The layer with every parameter, or those called `names`, away from its initial value: a gain of 1 or a bias of 0 hides mistakes."""
    for path, p in layer.parameters():
        if names is None or path in names:
            p.data = p.data + 0.3 * rng.standard_normal(p.data.shape)
    return layer
