"""Layers that watch their inputs and gradients, for the initialisers that read data (EVA, LoRA-GA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from minilora.layers import Layer, Linear
from minilora.lora.layer import check_float32


class Watched(Linear):
    """A Linear with the parameters of another one, which counts its backward passes."""

    def __init__(self, base: Linear) -> None:
        self.weight, self.bias, self.calls = base.weight, base.bias, 0

    def backward(self, dy: Any, saved: Any, need_dx: bool = True) -> Any:
        self.calls += 1
        return super().backward(dy, saved, need_dx)


@contextmanager
def watching(model: Layer, targets: dict[str, Any], kind: Callable[[Any], Any]) -> Iterator[dict[str, Any]]:
    """{path: kind(layer)} for the layers of `targets`, each in place of its layer inside the `with`. Clears all gradients.

    Raises ValueError for another layer than a Linear, and for half-precision weights.
    """
    for path, layer in targets.items():
        if not isinstance(layer, Linear):
            raise ValueError(f"initialisers that read data are for linear layers; {path} is of type {type(layer).__name__}.")
        check_float32(layer.weight.data, "an initialiser that reads data")
    watchers = {path: kind(layer) for path, layer in targets.items()}
    trained = [(p, p.trainable) for _, p in model.parameters()]
    try:
        for path, watcher in watchers.items():
            model.replace(path, watcher)
        yield watchers
    finally:
        for path, layer in targets.items():
            model.replace(path, layer)
        for p, trainable in trained:
            p.grad, p.trainable = None, trainable
