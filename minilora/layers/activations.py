"""ReLU, GELU, SiLU and Tanh as layers: no parameters, one array saved, and only if dx will be asked for."""

from __future__ import annotations

from collections.abc import Callable

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array
from minilora.layers.base import Layer, Saved


class Activation(Layer):
    """y, z = f(x, keep) and dx = f_backward(dy, z): z is what backward reads, x, y, or the slope f'(x) (kernels/activations.py)."""

    def __init__(self, f: Callable[[Array, bool], tuple[Array, Array | None]], f_backward: Callable[[Array, Array], Array]) -> None:
        self.f, self.f_backward = f, f_backward

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> tuple[Array, Saved | None]:
        y, z = self.f(x, keep and need_dx)
        return y, self.save(need_dx, z if need_dx else None) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        (z,) = self.load(saved, need_dx)
        return self.f_backward(dy, z) if need_dx else None


class ReLU(Activation):
    """y = max(x, 0); saves x."""

    def __init__(self) -> None:
        super().__init__(lambda x, keep: (F.relu(x), x), F.relu_backward)


class Tanh(Activation):
    """y = tanh x; saves y."""

    def __init__(self) -> None:
        super().__init__(lambda x, keep: ((y := F.tanh(x)), y), F.tanh_backward)


class SiLU(Activation):
    """y = x sigmoid(x)."""

    def __init__(self) -> None:
        super().__init__(K.silu, K.silu_backward)


class GELU(Activation):
    """y = x Phi(x); approximate="tanh" is GPT-2's formula, "none" the exact one (names as in PyTorch)."""

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GELU: approximate is {approximate!r}; choose 'none' or 'tanh'.")
        if approximate == "tanh":
            super().__init__(K.gelu_tanh, K.gelu_tanh_backward)
        else:
            super().__init__(K.gelu, K.gelu_backward)
