"""What the parts of the catalogue share."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minilora.backend import Array
from minilora.functional.attention import Offsets
from minilora.layers import Layer, Saved
from minilora.layers.base import Output

OFFSETS = [0, 3, 4, 9]  # three sequences, of 3, 1 and 5 tokens
Subject = tuple[str, Any, Array, dict[str, Any]]  # name, object, x, forward options


class LossOf(Layer):
    """A model's `loss`, and its `loss_backward` for dy = 1, with the contract of a layer: y is the loss."""

    def __init__(self, model: Any, labels: np.ndarray, count: int | None = None, prefix: bool = False) -> None:
        self.name, self.model, self.labels, self.count = f"{type(model).__name__}.loss", model, labels, count
        self.prefix = prefix  # whether the frozen blocks at the bottom are run on their own

    def forward(self, x: Array, keep: bool = True, need_dx: bool = False, offsets: Offsets = None) -> Output:
        prefix = self.model.body.prefix(x, offsets) if self.prefix else None
        return self.model.loss(x, self.labels, offsets, self.count, keep=keep, prefix=prefix)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> None:
        trained = [p for _, p in self.parameters() if p.trainable]
        for p in trained:
            p.grad = None if p.grad is None else p.grad / dy
        self.model.loss_backward(saved)
        for p in trained:
            p.grad = None if p.grad is None else p.grad * dy

    def modules(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        yield prefix, self
        yield from self.model.modules(prefix)


def shaken(layer: Any, rng: np.random.Generator, names: Sequence[str] | None = None) -> Any:
    """The layer with every parameter, or those called `names`, away from its initial value: a gain of 1 or a bias of 0 hides mistakes."""
    for path, p in layer.parameters():
        if names is None or path in names:
            p.data = p.data + 0.3 * rng.standard_normal(p.data.shape)
    return layer


def frozen_but(layer: Any, *paths: str) -> Any:
    """The layer with only those parameters trainable whose path begins with one of these."""
    for path, p in layer.parameters():
        p.trainable = path.startswith(paths)
    return layer
