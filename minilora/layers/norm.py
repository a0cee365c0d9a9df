"""LayerNorm and RMSNorm, over the features of each token."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora import kernels as K
from minilora.backend import Array, constant
from minilora.layers.base import Layer, Output, Parameter, Saved, needed


class LayerNorm(Layer):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, or without bias.   x (T, n) -> y (T, n).

    Saved: the normalised x and 1 / sqrt(var + eps), if anything will read them.
    """

    def __init__(self, n: int, eps: float = 1e-5, *, bias: bool = True, dtype: Any = "float32") -> None:
        self.eps = eps
        self.weight = Parameter(np.ones(n, dtype=dtype))
        self.bias = Parameter(np.zeros(n, dtype=dtype)) if bias else None

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        w = self.weight.data
        y, inner = K.layer_norm(x, w, constant(np.zeros(len(w), w.dtype), w) if self.bias is None else self.bias.data, self.eps)
        return y, self.save(need_dx, inner if need_dx or self.weight.trainable else None) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        (inner,) = self.load(saved, need_dx)
        need = needed(dx=need_dx, dgamma=self.weight.trainable, dbeta=self.bias is not None and self.bias.trainable)
        if inner is None:  # the bias alone is trained, if anything
            dx, dgamma, dbeta = None, None, K.upcast(dy).sum(axis=0) if "dbeta" in need else None
        else:
            dx, dgamma, dbeta = K.layer_norm_backward(dy, inner, self.weight.data, need)
        self.weight.add_grad(dgamma)
        if self.bias is not None:
            self.bias.add_grad(dbeta)
        return dx


class RMSNorm(Layer):
    """y = (offset + weight) * x / sqrt(mean(x^2) + eps).   x (T, n) -> y (T, n). offset: 0, or 1 as in Gemma. Saved as in LayerNorm."""

    def __init__(self, n: int, eps: float = 1e-6, offset: int = 0, *, dtype: Any = "float32") -> None:
        self.eps, self.offset = eps, offset
        self.weight = Parameter(np.full(n, 1 - offset, dtype=dtype))

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        y, inner = K.rms_norm(x, self.weight.data + 1 if self.offset else self.weight.data, self.eps)
        return y, self.save(need_dx, inner if need_dx or self.weight.trainable else None) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        (inner,) = self.load(saved, need_dx)
        if inner is None:
            return None
        gamma = self.weight.data + 1 if self.offset else self.weight.data
        dx, dgamma = K.rms_norm_backward(dy, inner, gamma, needed(dx=need_dx, dgamma=self.weight.trainable))
        self.weight.add_grad(dgamma)
        return dx
