"""What all adapters have in common: a frozen weight and trained parameters next to it, which can be merged and switched off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora import kernels as K
from minilora.backend import Array, as_like
from minilora.kernels.half import is_half
from minilora.layers.base import Layer, Parameter, Saved
from minilora.layers.dropout import Dropout
from minilora.layers.linear import Linear

INSTEAD = "load the model with dtype='float32', or with quantize='nf4'."


class Adapted(Layer):
    """Base of the layers that `inject` puts in place of others: the original weight, frozen, and what is trained in addition."""

    weight: Parameter
    trains: tuple[str, ...] = ("lora_A", "lora_B")  # the names of the trained parameters
    enabled = True
    merged: Array | None = None  # weight + delta, while merged; the weight itself is never written to

    def delta(self) -> Array:
        """What the adapter adds to the weight, in the shape of the weight."""
        raise NotImplementedError(f"{type(self).__name__} has no delta.")

    def merge(self) -> float:
        """Use weight + delta from now on, at the cost of the base layer. Returns the largest change of a weight.

        Raises ValueError for half-precision weights, in which small changes would be lost.
        """
        check_float32(self.weight.data, "merge")
        delta = self.delta()
        self.merged = (self.weight.data + delta).astype(self.weight.data.dtype)
        return float(abs(delta).max())

    def unmerge(self) -> None:
        """Undo `merge`, exactly, since the weight was not touched."""
        self.merged = None

    def alone(self, keep: bool) -> Array | None:
        """The weight to use without the adapter: the merged one, or the base's own where the adapter is off; else None."""
        if not self.enabled:
            return self.weight.data
        if self.merged is not None and keep and any(getattr(self, name).trainable for name in self.trains):
            raise RuntimeError(f"this {type(self).__name__} is merged and cannot be trained; call minilora.unmerge(model) first.")
        return self.merged

    def shared(self) -> dict[str, Array]:
        """{name: array} that all layers of a model share and a file holds once; `share` sets them."""
        return {}

    def share(self, arrays: dict[str, Array]) -> None:
        raise NotImplementedError(f"{type(self).__name__} shares nothing.")

    def to(self, backend: str | None = None, dtype: Any = None) -> Adapted:
        super().to(backend, dtype)
        if self.merged is not None:
            self.merged = as_like(self.merged, self.weight.data).astype(self.weight.data.dtype)
        return self


class AdaptedLinear(Adapted, Linear):
    """A Linear with an adapter. Takes over the weight and bias of `base` (their paths stay those of the checkpoint) and freezes them.

    A method implements `adapted_forward` and `adapted_backward`; forward and backward are those of a plain Linear while the adapter is
    merged or off. Saved: the weight then; else what `adapted_forward` returns.
    """

    def __init__(self, base: Linear, dropout: float = 0.0) -> None:
        self.weight, self.bias = base.weight, base.bias
        self.freeze()
        self.dropout = Dropout(dropout)

    def adapted_forward(self, x: Array, b: Array | None, keep: bool) -> tuple[Array, tuple[Any, ...]]:
        """y, and what backward needs."""
        raise NotImplementedError(f"{type(self).__name__} has no adapted_forward.")

    def adapted_backward(self, dy: Array, saved: list[Any], need_dx: bool) -> Array | None:
        """dx, or None without need_dx; adds to the gradients of what is trained."""
        raise NotImplementedError(f"{type(self).__name__} has no adapted_backward.")

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> tuple[Array, Saved | None]:
        b = None if self.bias is None else self.bias.data
        if (W := self.alone(keep)) is not None:
            y, inner = K.linear(x, W, b)
            return y, self.save(need_dx, W, inner) if keep else None
        y, values = self.adapted_forward(x, b, keep)
        return y, self.save(need_dx, None, *values) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        W, *values = self.load(saved, need_dx)
        if self.bias is not None and self.bias.trainable:  # LoraConfig(bias="all" or "lora_only")
            self.bias.add_grad(K.upcast(dy).sum(axis=0))
        if W is not None:
            return K.linear_backward(dy, values[0], None, W, {"dx"})[0] if need_dx else None
        return self.adapted_backward(dy, values, need_dx)

    def next_key(self, keep: bool) -> Any:
        """The key of the next dropout mask, or None without dropout."""
        return self.dropout.next_key() if keep and self.dropout.p > 0 else None

    def mask(self, x: Array, key: Any) -> Array | None:
        """The dropout mask (rows of x, in) of a key, or None without."""
        if key is None:
            return None
        return K.dropout_mask(getattr(self, self.trains[0]).data, (x.shape[0], self.in_features), self.dropout.p, key)


@dataclass
class Adaptation:
    """What `inject` did to a model, which has it as its attribute `adaptation`; `adaptation(model)` reads it."""

    config: Any = None
    base_values: dict[str, Array] = field(default_factory=dict)  # {path: array}: the model's own trained parameters, before training


def adaptation(model: Layer) -> Adaptation:
    """What `inject` did to the model; an empty Adaptation if nothing."""
    return getattr(model, "adaptation", None) or Adaptation()


def lora_layers(model: Layer) -> list[tuple[str, Any]]:
    """(path, layer) of every Adapted layer in the model."""
    return [(path, layer) for path, layer in model.modules() if isinstance(layer, Adapted)]


def adapter_parameters(model: Layer) -> dict[str, Parameter]:
    """{path: parameter} that the adapters in the model train."""
    return {f"{path}.{name}": getattr(layer, name) for path, layer in lora_layers(model) for name in layer.trains}


def trained_dtype(W: Array) -> Any:
    """The dtype of an adapter's parameters: that of the weight, but float32 for weights in half precision."""
    return np.dtype("float32") if is_half(W) else W.dtype


def check_float32(W: Array, what: str) -> None:
    """Raise ValueError if W is of half precision, where `what` reads the weight itself."""
    if is_half(W):
        raise ValueError(f"{what} needs weights of float32, these are of {W.dtype}; {INSTEAD}")
