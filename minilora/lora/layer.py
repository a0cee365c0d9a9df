"""LoRALinear: a frozen dense layer and a trainable low-rank update of its weight (arXiv 2106.09685)."""

from __future__ import annotations

import math
from typing import Any

from minilora import kernels as K
from minilora.backend import Array, Rng, backend_name, generator, to_backend
from minilora.layers.base import Parameter
from minilora.layers.linear import Linear
from minilora.lora.adapted import AdaptedLinear, trained_dtype
from minilora.lora.initialise import Initialiser, initialiser


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
        m, n = base.in_features, base.out_features
        if r < 1:
            raise ValueError(f"LoRALinear: rank {r} does not fit a layer of {m} x {n}; choose 1 to {min(m, n)}.")
        super().__init__(base, dropout)
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
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

    @property
    def scaling(self) -> float:
        return scaling(self.alpha, self.r, self.use_rslora)

    def delta(self) -> Array:
        """scaling A B, (in, out), less the initial one where that is subtracted from the weight."""
        delta = self.scaling * (self.lora_A.data @ self.lora_B.data)
        return delta if self.offset is None else delta - self.offset.product()

    def adapted_forward(self, x: Array, b: Array | None, keep: bool) -> tuple[Array, tuple[Any, ...]]:
        A, B, key = self.lora_A, self.lora_B, self.next_key(keep)
        y, u = K.lora_linear(x, self.W, b, A.data, B.data, self.scaling, self.mask(x, key))
        u = u if B.trainable else u._replace(value=None)  # x A, and the implementation that ran
        return y, (x if A.trainable else None, u, key)

    def adapted_backward(self, dy: Array, saved: list[Any], need_dx: bool) -> Array | None:
        (x, u, key), A, B = saved, self.lora_A, self.lora_B
        need = {name for name, needed in (("dx", need_dx), ("dA", A.trainable), ("dB", B.trainable)) if needed}
        dx, dA, dB = K.lora_linear_backward(dy, x, u, self.W, A.data, B.data, self.scaling, self.mask(dy, key), need)
        if dA is not None:
            A.add_grad(dA)
        if dB is not None:
            B.add_grad(dB)
        return dx


def scaling(alpha: float, r: int, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) with use_rslora."""
    return alpha / (math.sqrt(r) if use_rslora else r)
