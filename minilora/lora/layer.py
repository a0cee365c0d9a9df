"""LoRALinear: a frozen dense layer with a trainable low-rank update beside it (arXiv 2106.09685)."""

from __future__ import annotations

import math
from typing import Any

from minilora import kernels as K
from minilora.backend import Array, Rng, backend_name, generator, to_backend
from minilora.layers.base import Parameter, Saved
from minilora.layers.dropout import Dropout
from minilora.layers.linear import Linear
from minilora.lora.adapted import Adapted, trained_dtype
from minilora.lora.config import LoraConfig
from minilora.lora.registry import Start, start_of


class LoRALinear(Adapted, Linear):
    """y = x W + b + scaling (x A) B,   scaling = alpha / r, or alpha / sqrt(r) with use_rslora.

    Takes over the weight and bias of `base` (their paths stay those of the checkpoint) and freezes them; adds `lora_A`
    (in, r) and `lora_B` (r, out). Saved: x if A is trained, u = x A if B is.
    init: a value of LoraConfig.init_lora_weights, or init(layer, generator) -> (A, B), which may set `layer.start`.

    Raises ValueError for a rank below 1. One beyond min(in, out) is a waste, but there are adapters that have it.
    """

    config_class = LoraConfig

    def __init__(
        self,
        base: Linear,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: bool | str | Start = True,
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
        self.start: Any = None  # what A B began with, where that is taken off the weight; see W
        self.dropout = Dropout(dropout)
        home, dtype = backend_name(base.weight.data), dtype or trained_dtype(base.weight.data)
        A, B = start_of(init)(self, generator(rng))
        self.lora_A, self.lora_B = (Parameter(to_backend(value, home, dtype)) for value in (A, B))

    @classmethod
    def of(cls, base: Linear, config: LoraConfig, path: str, init: bool | str | Start, **options: Any) -> LoRALinear:
        """The layer that `config` asks for at `path`."""
        return cls(base, config.rank_of(path), config.alpha_of(path), config.lora_dropout, config.use_rslora, init, **options)

    @property
    def W(self) -> Array:
        """What is frozen beside A B: the weight, or the weight less what A B began with (PiSSA); that is never formed."""
        return self.weight.data if self.start is None else self.start.off(self.weight.data)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def delta(self) -> Array:
        """scaling A B, (in, out), less what it began with where that is taken off the weight."""
        delta = self.scaling * (self.lora_A.data @ self.lora_B.data)
        return delta if self.start is None else delta - self.start.product()

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> tuple[Array, Saved | None]:
        b = None if self.bias is None else self.bias.data
        if (W := self.alone(keep)) is not None:
            y, inner = K.linear(x, W, b)
            return y, self.save(need_dx, W, None, inner, None) if keep else None

        key = self.dropout.next_key() if keep and self.dropout.p > 0 else None
        y, u = K.lora_linear(x, self.W, b, self.lora_A.data, self.lora_B.data, self.scaling, self._mask(x, key))
        if not keep:
            return y, None
        u = u if self.lora_B.trainable else u._replace(value=None)
        return y, self.save(need_dx, None, x if self.lora_A.trainable else None, u, key)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        W, x, u, key = self.load(saved, need_dx)
        if self.bias is not None and self.bias.trainable:  # LoraConfig(bias="all" or "lora_only")
            self.bias.add_grad(K.upcast(dy).sum(axis=0))
        if W is not None:
            return K.linear_backward(dy, u, None, W, {"dx"})[0] if need_dx else None
        A, B = self.lora_A, self.lora_B
        need = {name for name, wanted in (("dx", need_dx), ("dA", A.trainable), ("dB", B.trainable)) if wanted}
        dx, dA, dB = K.lora_linear_backward(dy, x, u, self.W, A.data, B.data, self.scaling, self._mask(dy, key), need)
        if dA is not None:
            A.add_grad(dA)
        if dB is not None:
            B.add_grad(dB)
        return dx

    def _mask(self, like: Array, key: Any) -> Array | None:
        """The dropout mask (tokens of `like`, in), or None without dropout."""
        if key is None:
            return None
        return K.dropout_mask(self.lora_A.data, (like.shape[0], self.in_features), self.dropout.p, key)
