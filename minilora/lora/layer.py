"""LoRALinear: a frozen dense layer with a trainable low-rank update beside it (arXiv 2106.09685)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array, Rng, as_like, backend_name, generator, get_xp, to_backend
from minilora.layers.base import Layer, Parameter, Saved
from minilora.layers.dropout import Dropout
from minilora.layers.linear import Linear, uniform
from minilora.lora.config import LoraConfig


class Adapted(Layer):
    """What stands in the place of an adapted layer: its weight, frozen, and beside it what is trained. The base of the whole family."""

    weight: Parameter
    trains: tuple[str, ...] = ("lora_A", "lora_B")  # the names of what is trained
    start: Any = None  # what it began with, where that was taken off the weight; see LoRALinear.W
    enabled = True
    merged: Array | None = None  # the weight and its change, while merged; the weight itself is never written to

    def delta(self) -> Array:
        """What the weight is changed by, of its shape."""
        raise NotImplementedError(f"{type(self).__name__} has no delta.")

    def merge(self) -> float:
        """Answer with weight + delta from now on, at the cost of the base layer. Returns the largest change of a weight."""
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

    def to(self, backend: str | None = None, dtype: Any = None) -> Adapted:
        super().to(backend, dtype)
        if self.merged is not None:
            self.merged = as_like(self.merged, self.weight.data).astype(self.weight.data.dtype)
        return self


class LoRALinear(Adapted, Linear):
    """y = x W + b + scaling (x A) B,   scaling = alpha / r, or alpha / sqrt(r) with use_rslora.

    Takes over the weight and bias of `base` (their paths stay those of the checkpoint) and freezes them; adds `lora_A`
    (in, r) and `lora_B` (r, out). Saved: x if A is trained, u = x A if B is.

    Raises ValueError for a rank below 1. One beyond min(in, out) is a waste, but there are adapters that have it.
    """

    def __init__(
        self,
        base: Linear,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: bool | str = True,
        *,
        rng: Rng = None,
        dtype: Any = None,
    ) -> None:
        m, n = base.in_features, base.out_features
        if r < 1:
            raise ValueError(f"LoRALinear: rank {r} does not fit a layer of {m} x {n}; choose 1 to {min(m, n)}.")
        self.weight, self.bias = base.weight, base.bias
        self.weight.trainable = False
        if self.bias is not None:
            self.bias.trainable = False
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        A, B = initial(m, n, r, init, generator(rng))
        home, dtype = backend_name(base.weight.data), dtype or base.weight.data.dtype
        self.lora_A = Parameter(to_backend(A.astype(dtype), home))
        self.lora_B = Parameter(to_backend(B.astype(dtype), home))
        self.dropout = Dropout(dropout)

    @classmethod
    def of(cls, base: Linear, config: LoraConfig, path: str, **options: Any) -> LoRALinear:
        """The layer that `config` asks for at `path`."""
        c = config
        return cls(base, c.rank_of(path), c.alpha_of(path), c.lora_dropout, c.use_rslora, c.init_lora_weights, **options)

    @property
    def W(self) -> Array:
        """What is frozen: the weight, less what the adapter began with where it took that off the weight (PiSSA)."""
        return self.weight.data if self.start is None else self.start.off(self.weight.data)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def delta(self) -> Array:
        """scaling A B, (in, out)."""
        return self.scaling * (self.lora_A.data @ self.lora_B.data)

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> tuple[Array, Saved | None]:
        b = None if self.bias is None else self.bias.data
        if (W := self.alone(keep)) is not None:
            return F.linear(x, W, b), self.save(need_dx, W, None, None, None) if keep else None

        key = self.dropout.next_key() if keep and self.dropout.p > 0 else None
        y, u = F.lora_linear(x, self.W, b, self.lora_A.data, self.lora_B.data, self.scaling, self._mask(x, key))
        if not keep:
            return y, None
        return y, self.save(need_dx, None, x if self.lora_A.trainable else None, u if self.lora_B.trainable else None, key)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        W, x, u, key = self.load(saved, need_dx)
        if self.bias is not None and self.bias.trainable:  # LoraConfig(bias="all" or "lora_only")
            self.bias.add_grad(dy.sum(axis=0))
        if W is not None:
            return dy @ W.T if need_dx else None
        need = {"dx"} if need_dx else set()
        if self.lora_A.trainable:
            need.add("dA")
        if self.lora_B.trainable:
            need.add("dB")
        mask = self._mask(dy, key)
        dx, dA, dB = F.lora_linear_backward(dy, x, u, self.W, self.lora_A.data, self.lora_B.data, self.scaling, mask, need)
        if dA is not None:
            self.lora_A.add_grad(dA)
        if dB is not None:
            self.lora_B.add_grad(dB)
        return dx

    def _mask(self, like: Array, key: int | None) -> Array | None:
        """The dropout mask (tokens of `like`, in), or None without dropout."""
        if key is None:
            return None
        return F.dropout_mask((like.shape[0], self.in_features), self.dropout.p, key, get_xp(like), like.dtype)


def initial(m: int, n: int, r: int, init: bool | str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Initial A (m, r) and B (r, n) in float64; see LoraConfig.init_lora_weights.

    With B = 0 the adapted layer starts as the base layer, and A gets its first gradient at the second step. The seed's
    N(0, 1) for both adds s A B of about s sqrt(r) a weight: at once, and far more than W (PAPERS, known answer 1).
    """
    if init is True or init is False:
        A = uniform(rng, (m, r), 1 / math.sqrt(m), "float64")
        return A, np.zeros((r, n)) if init else uniform(rng, (r, n), 1 / math.sqrt(r), "float64")
    if init == "gaussian":
        return rng.normal(0, 1 / r, (m, r)), np.zeros((r, n))
    if init == "seed":
        return rng.normal(0, 1, (m, r)), rng.normal(0, 1, (r, n))
    raise ValueError(f"LoRALinear: init is {init!r}; choose True, False, 'gaussian' or 'seed'.")


def lora_layers(model: Layer) -> list[tuple[str, Any]]:
    """(path, layer) of everything in the model that is Adapted."""
    return [(path, layer) for path, layer in model.modules() if isinstance(layer, Adapted)]


def adapter_parameters(model: Layer) -> dict[str, Parameter]:
    """{path: parameter} of what the adapters in the model train."""
    return {f"{path}.{name}": getattr(layer, name) for path, layer in lora_layers(model) for name in layer.trains}
