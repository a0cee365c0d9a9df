"""ReLU, GELU, SiLU and Tanh as layers: no parameters, one array saved, and only if dx will be needed."""

from __future__ import annotations

from typing import Any

from minilora import kernels as K
from minilora.backend import Array
from minilora.layers.base import Layer, Output, Saved


class Activation(Layer):
    """y = f(x) and dx = dy f'(x), by two functions of kernels/."""

    f: Any
    f_backward: Any

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        y, saved = self.f(x, keep=keep and need_dx)
        return y, self.save(need_dx, saved) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        (inner,) = self.load(saved, need_dx)
        return self.f_backward(dy, inner) if need_dx else None


class ReLU(Activation):
    """y = max(x, 0)."""

    f, f_backward = staticmethod(K.relu), staticmethod(K.relu_backward)


class Tanh(Activation):
    """y = tanh x."""

    f, f_backward = staticmethod(K.tanh), staticmethod(K.tanh_backward)


class SiLU(Activation):
    """y = x sigmoid(x)."""

    f, f_backward = staticmethod(K.silu), staticmethod(K.silu_backward)


class GELU(Activation):
    """y = x Phi(x); approximate="tanh" is GPT-2's formula, "none" the exact one (names as in PyTorch)."""

    def __init__(self, approximate: str = "none") -> None:
        pairs = {"none": (K.gelu, K.gelu_backward), "tanh": (K.gelu_tanh, K.gelu_tanh_backward)}
        if approximate not in pairs:
            raise ValueError(f"GELU: approximate is {approximate!r}; choose 'none' or 'tanh'.")
        self.f, self.f_backward = pairs[approximate]
