"""LoRALinear, and what it shares with every other adapter: a frozen weight, and trained parameters that can be merged or switched off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minilora import kernels as K
from minilora.backend import Array, Rng, as_like, backend_name, generator, to_backend
from minilora.kernels.half import is_half
from minilora.layers.base import Layer, Output, Parameter, Saved, needed
from minilora.layers.dropout import Dropout
from minilora.layers.linear import Linear
from minilora.lora.registry import Initialiser, initialiser


class Adapted(Layer):
    """Base of the layers that `inject` puts in place of others: the original weight, frozen, and what is trained in addition."""

    weight: Parameter
    trains: tuple[str, ...] = ("lora_A", "lora_B")  # the names of the trained parameters
    enabled = True
    delta: Callable[[], Array]  # what the adapter adds to the weight, in the shape of the weight
    merged: Array | None = None  # weight + delta, while merged; the weight itself is never written to

    def merge(self) -> float:
        """Use weight + delta from now on, at the cost of the base layer. Returns the largest change of a weight.

        Raises ValueError for half-precision weights, in which small changes would be lost.
        """
        check_float32(self.weight.data, "merge")
        delta = self.delta()
        self.merged = (self.weight.data + delta).astype(self.weight.data.dtype)
        return float(abs(delta).max())

    def alone(self, keep: bool) -> Array | None:
        """The weight to use without the adapter: the merged one, or the base's own where the adapter is off; else None."""
        W = self.weight.data
        if not self.enabled or self.merged is None:
            return None if self.enabled else W
        if keep and any(getattr(self, name).trainable for name in self.trains):
            raise RuntimeError(f"this {type(self).__name__} is merged and cannot be trained; call minilora.unmerge(model) first.")
        self.merged = as_like(self.merged, W).astype(W.dtype, copy=False)  # the layer may have moved
        return self.merged

    def shared(self) -> dict[str, Array]:
        """{name: array} that all layers of a model share, and that a file holds once."""
        return {}


class AdaptedLinear(Adapted, Linear):
    """A Linear with an adapter. Takes over the weight and bias of `base` (their paths stay those of the checkpoint) and freezes them.

    While the adapter is merged or off, forward and backward are a plain Linear's. Saved: the weight then; else None, the key of the
    dropout mask, and what `adapted_forward` returned.
    """

    adapted_forward: Callable[..., tuple[Array, tuple[Any, ...]]]  # (x, bias, mask) -> y, and what backward needs
    adapted_backward: Callable[..., Array | None]  # (dy, that, mask, need_dx) -> dx; adds to the gradients of what is trained

    def __init__(self, base: Linear, dropout: float = 0.0) -> None:
        self.weight, self.bias = base.weight, base.bias
        self.freeze()
        self.dropout = Dropout(dropout)

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        b = None if self.bias is None else self.bias.data
        if (W := self.alone(keep)) is not None:
            y, inner = K.linear(x, W, b)
            return y, self.save(need_dx, W, None, inner) if keep else None
        key = self.dropout.next_key() if keep and self.dropout.p > 0 else None
        y, values = self.adapted_forward(x, b, None if key is None else self.mask(x, key))
        return y, self.save(need_dx, None, key, *values) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        W, key, *values = self.load(saved, need_dx)
        if self.bias is not None and self.bias.trainable:  # LoraConfig(bias="all" or "lora_only")
            self.bias.add_grad(K.upcast(dy).sum(axis=0))
        if W is None:
            return self.adapted_backward(dy, values, None if key is None else self.mask(dy, key), need_dx)
        return K.linear_backward(dy, values[0], None, W, {"dx"})[0] if need_dx else None

    def mask(self, x: Array, key: Any) -> Array:
        """The dropout mask (rows of x, in) of a key."""
        return K.dropout_mask(getattr(self, self.trains[0]).data, (x.shape[0], self.in_features), self.dropout.p, key)


class LoRALinear(AdaptedLinear):
    """y = x W + b + scaling (x A) B,   scaling = alpha / r, or alpha / sqrt(r) with use_rslora.

    Adds `lora_A` (in, r) and `lora_B` (r, out) to the frozen weight and bias of `base`. Saved: x if A is trained, u = x A if B is.
    init: a value of LoraConfig.init_lora_weights, or f(layer, generator) -> (A, B), which may set `layer.offset`.

    Raises ValueError for a rank below 1. One beyond min(in, out) is wasteful, but some published adapters have it.
    """

    def __init__(
        self,
        base: Linear,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: bool | str | Initialiser = True,
        *,
        rng: Rng = None,
        dtype: Any = None,
    ) -> None:
        if r < 1:
            raise ValueError(f"LoRALinear: the rank must be at least 1, got {r}.")
        super().__init__(base, dropout)
        self.r, self.alpha, self.scaling = r, alpha, scaling(alpha, r, use_rslora)
        self.offset: Any = None  # the initial scaling A B, where it is subtracted from the weight (PiSSA); see W
        home, dtype = backend_name(base.weight.data), dtype or trained_dtype(base.weight.data)
        A, B = initialiser(init)(self, generator(rng))
        self.lora_A, self.lora_B = (Parameter(to_backend(value, home, dtype)) for value in (A, B))

    @classmethod
    def of(cls, base: Linear, config: Any, path: str, init: bool | str | Initialiser, **options: Any) -> LoRALinear:
        """The layer for `path` of a model, by a LoraConfig."""
        return cls(base, config.rank_of(path), config.alpha_of(path), config.lora_dropout, config.use_rslora, init, **options)

    @property
    def W(self) -> Array:
        """The frozen matrix beside A B: the weight, or the weight less the initial A B (PiSSA), which is never formed."""
        return self.weight.data if self.offset is None else self.offset.off(self.weight.data)

    def delta(self) -> Array:
        """scaling A B, (in, out), less the initial one where that is subtracted from the weight."""
        delta = self.scaling * (self.lora_A.data @ self.lora_B.data)
        return delta if self.offset is None else delta - self.offset.product()

    def adapted_forward(self, x: Array, b: Array | None, mask: Array | None) -> tuple[Array, tuple[Any, ...]]:
        A, B = self.lora_A, self.lora_B
        y, u = K.lora_linear(x, self.W, b, A.data, B.data, self.scaling, mask)
        u = u if B.trainable else u._replace(value=None)  # x A, and the implementation that ran
        return y, (x if A.trainable else None, u)

    def adapted_backward(self, dy: Array, saved: list[Any], mask: Array | None, need_dx: bool) -> Array | None:
        (x, u), A, B = saved, self.lora_A, self.lora_B
        need = needed(dx=need_dx, dA=A.trainable, dB=B.trainable)
        dx, dA, dB = K.lora_linear_backward(dy, x, u, self.W, A.data, B.data, self.scaling, mask, need)
        A.add_grad(dA)
        B.add_grad(dB)
        return dx


def scaling(alpha: float, r: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) with use_rslora."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def trained_dtype(W: Array) -> Any:
    """The dtype of an adapter's parameters: that of the weight, but float32 for weights in half precision."""
    return np.dtype("float32") if is_half(W) else W.dtype


def check_float32(W: Array, what: str) -> None:
    """Raise ValueError if W is of half precision, where `what` reads the weight itself."""
    if is_half(W):
        instead = "load the model with dtype='float32', or with quantize='nf4'"
        raise ValueError(f"{what} needs weights of float32, these are of {W.dtype}; {instead}.")
