"""Linear: y = x W + b, W is (in, out)."""

from __future__ import annotations

import math
from typing import Any

from minilora import kernels as K
from minilora.backend import Array, Rng, generator
from minilora.layers.base import Layer, Output, Parameter, Saved, needed


class Linear(Layer):
    """y = x W + b.   x (T, in_features) -> y (T, out_features); `weight` (in, out), `bias` (out,) or None.

    Initial values: U(-1/sqrt(in), 1/sqrt(in)) for both, as in PyTorch. Saved: x, if the weight is trainable; a frozen
    layer saves nothing.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, rng: Rng = None, dtype: Any = "float32") -> None:
        if in_features < 1 or out_features < 1:
            raise ValueError(f"Linear({in_features}, {out_features}): both sizes must be at least 1.")
        rng, bound = generator(rng), 1 / math.sqrt(in_features)  # drawn in float64 on the host: equal values on all backends
        self.weight = Parameter(rng.uniform(-bound, bound, (in_features, out_features)).astype(dtype))
        self.bias = Parameter(rng.uniform(-bound, bound, out_features).astype(dtype)) if bias else None

    @property
    def in_features(self) -> int:
        return int(self.weight.data.shape[0])

    @property
    def out_features(self) -> int:
        return int(self.weight.data.shape[1])

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        y, inner = K.linear(x, self.weight.data, None if self.bias is None else self.bias.data)
        return y, self.save(need_dx, inner, x if self.weight.trainable else None) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        inner, x = self.load(saved, need_dx)
        need = needed(dx=need_dx, dW=self.weight.trainable, db=self.bias is not None and self.bias.trainable)
        dx, dW, db = K.linear_backward(dy, inner, x, self.weight.data, need)
        self.weight.add_grad(dW)
        if self.bias is not None:
            self.bias.add_grad(db)
        return dx
