"""Watching layers at work: what initial values from data (EVA, LoRA-GA) look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from minilora.layers import Layer, Linear


class Watched(Linear):
    """Stands in for a Linear, with its parameters, and counts how often it was run backward."""

    def __init__(self, base: Linear) -> None:
        self.weight, self.bias, self.calls = base.weight, base.bias, 0

    def backward(self, dy: Any, saved: Any, need_dx: bool = True) -> Any:
        self.calls += 1
        return super().backward(dy, saved, need_dx)


@contextmanager
def watching(model: Layer, targets: dict[str, Any], kind: Callable[[Any], Any]) -> Iterator[dict[str, Any]]:
    """{path: kind(layer)}, each in the place of the layer of `targets` that is at this path until the end. Gradients are then gone."""
    from minilora.lora.injection import replace_module

    watchers = {path: kind(layer) for path, layer in targets.items()}
    trained = [(p, p.trainable) for _, p in model.parameters()]
    try:
        for path, watcher in watchers.items():
            replace_module(model, path, watcher)
        yield watchers
    finally:
        for path, layer in targets.items():
            replace_module(model, path, layer)
        for p, trainable in trained:
            p.grad, p.trainable = None, trainable
