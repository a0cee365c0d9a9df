"""What all methods have in common: a frozen weight with something trained beside it, that can be merged, and switched off."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.backend import Array, as_like
from minilora.kernels.half import is_half, upcast
from minilora.layers.base import Layer, Parameter
from minilora.layers.embedding import Embedding

INSTEAD = "load the model with dtype='float32', or with quantize='nf4'."


class Adapted(Layer):
    """What stands in the place of an adapted layer: its weight, frozen, and beside it what is trained. The base of the whole family."""

    weight: Parameter
    trains: tuple[str, ...] = ("lora_A", "lora_B")  # the names of what is trained
    enabled = True
    merged: Array | None = None  # the weight and its change, while merged; the weight itself is never written to

    def delta(self) -> Array:
        """What the weight is changed by, of its shape."""
        raise NotImplementedError(f"{type(self).__name__} has no delta.")

    def merge(self) -> float:
        """Answer with weight + delta from now on, at the cost of the base layer. Returns the largest change of a weight.

        Raises ValueError for weights of 16 bits, in which small changes would be lost.
        """
        if is_half(self.weight.data):
            raise ValueError(f"merge needs weights of float32, these are of {self.weight.data.dtype}; {INSTEAD}")
        delta = self.delta()
        self.merged = (self.weight.data + delta).astype(self.weight.data.dtype)
        return float(abs(delta).max())

    def unmerge(self) -> None:
        """Back to the weight with what is trained beside it; exactly, since the weight was not touched."""
        self.merged = None

    def alone(self, keep: bool) -> Array | None:
        """The weight that answers alone: the merged one, or the base's own where the adapter is off; else None."""
        if not self.enabled:
            return self.weight.data
        if self.merged is not None and keep and any(getattr(self, name).trainable for name in self.trains):
            raise RuntimeError(f"this {type(self).__name__} is merged and cannot be trained; call minilora.unmerge(model) first.")
        return self.merged

    def shared(self) -> dict[str, Array]:
        """{name: array} of what all layers of a model share and a file holds once; `share` takes it back."""
        return {}

    def share(self, arrays: dict[str, Array]) -> None:
        raise NotImplementedError(f"{type(self).__name__} shares nothing.")

    def to(self, backend: str | None = None, dtype: Any = None) -> Adapted:
        super().to(backend, dtype)
        if self.merged is not None:
            self.merged = as_like(self.merged, self.weight.data).astype(self.weight.data.dtype)
        return self


def lora_layers(model: Layer) -> list[tuple[str, Any]]:
    """(path, layer) of everything in the model that is Adapted."""
    return [(path, layer) for path, layer in model.modules() if isinstance(layer, Adapted)]


def adapter_parameters(model: Layer) -> dict[str, Parameter]:
    """{path: parameter} of what the adapters in the model train."""
    return {f"{path}.{name}": getattr(layer, name) for path, layer in lora_layers(model) for name in layer.trains}


def trained_dtype(W: Array) -> Any:
    """The dtype of what is trained beside a weight: the weight's own, but float32 beside 16 bits."""
    return np.dtype("float32") if is_half(W) else W.dtype


def train_only(model: Layer, trained: set[str]) -> None:
    """Freeze all parameters but those of these paths, which are upcast to float32 from half precision."""
    for path, p in model.parameters():
        p.trainable = path in trained
        if p.trainable:
            p.data = upcast(p.data)


def check_whole(path: str, layer: Layer) -> None:
    """Raise ValueError where training `layer` whole would make activations of 16 bits wider: an embedding is where they begin."""
    if any(isinstance(part, Embedding) and is_half(part.weight.data) for _, part in layer.modules()):
        raise ValueError(f"to train {path} needs weights of float32; {INSTEAD}")
