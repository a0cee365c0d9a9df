"""ReLU, GELU, SiLU and Tanh as layers: no parameters, one array saved, and only if dx will be asked for."""

from __future__ import annotations

from collections.abc import Callable

from minilora import functional as F
from minilora.backend import Array
from minilora.layers.base import Layer, Saved


class Activation(Layer):
    """y = f(x) and dx = f_backward(dy, z), where z is x, or y if `from_output`."""

    def __init__(self, f: Callable[[Array], Array], f_backward: Callable[[Array, Array], Array], from_output: bool = False) -> None:
        self.f, self.f_backward, self.from_output = f, f_backward, from_output

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> tuple[Array, Saved | None]:
        y = self.f(x)
        if not keep:
            return y, None
        return y, self.save(need_dx, (y if self.from_output else x) if need_dx else None)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        (z,) = self.load(saved, need_dx)
        return self.f_backward(dy, z) if need_dx else None


class ReLU(Activation):
    """y = max(x, 0)."""

    def __init__(self) -> None:
        super().__init__(F.relu, F.relu_backward)


class Tanh(Activation):
    """y = tanh x; saves y."""

    def __init__(self) -> None:
        super().__init__(F.tanh, F.tanh_backward, from_output=True)


class SiLU(Activation):
    """y = x sigmoid(x)."""

    def __init__(self) -> None:
        super().__init__(F.silu, F.silu_backward)


class GELU(Activation):
    """y = x Phi(x); approximate="tanh" is GPT-2's formula, "none" the exact one (names as in PyTorch)."""

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GELU: approximate is {approximate!r}; choose 'none' or 'tanh'.")
        if approximate == "tanh":
            super().__init__(F.gelu_tanh, F.gelu_tanh_backward)
        else:
            super().__init__(F.gelu, F.gelu_backward)
