"""Activations with their derivative in one launch (activations.cu): y = f(x) and f'(x), then dx = dy f'(x)."""

from __future__ import annotations

from collections.abc import Collection

from minilora.backend import Array, get_xp
from minilora.kernels import cuda


def gelu(x: Array, keep: bool = True) -> tuple[Array, Array | None]:
    """y = x Phi(x), saved Phi(x) + x phi(x)."""
    return _with_derivative("gelu", x, keep)


def gelu_tanh(x: Array, keep: bool = True) -> tuple[Array, Array | None]:
    """y = x (1 + tanh z) / 2, saved its derivative."""
    return _with_derivative("gelu_tanh", x, keep)


def silu(x: Array, keep: bool = True) -> tuple[Array, Array | None]:
    """y = x sigmoid(x), saved its derivative."""
    return _with_derivative("silu", x, keep)


def activation_backward(dy: Array, derivative: Array) -> Array:
    """dx = dy f'(x)."""
    return dy * derivative


def swiglu(g: Array, u: Array, keep: bool = True) -> tuple[Array, tuple[Array, Array] | None]:
    """y = silu(g) * u, saved u silu'(g), which is dy / dg, and silu(g), which is dy / du."""
    xp = get_xp(g, u)
    g, u = xp.ascontiguousarray(g), xp.ascontiguousarray(u)
    y, *kept = (xp.empty_like(g) for _ in range(3 if keep else 1))
    cuda.elementwise("activations", "swiglu", g.size, g, u, y, *(kept or (cuda.NULL, cuda.NULL)))
    return y, (kept[1], kept[0]) if keep else None


def swiglu_backward(dy: Array, saved: tuple[Array, Array], need: Collection[str] = ("dg", "du")) -> tuple[Array | None, Array | None]:
    """dg = dy u silu'(g),   du = dy silu(g)."""
    by_g, by_u = saved
    return dy * by_g if "dg" in need else None, dy * by_u if "du" in need else None


def _with_derivative(name: str, x: Array, keep: bool) -> tuple[Array, Array | None]:
    xp = get_xp(x)
    x = xp.ascontiguousarray(x)
    y, derivative = xp.empty_like(x), xp.empty_like(x) if keep else None
    cuda.elementwise("activations", name, x.size, x, y, cuda.NULL if derivative is None else derivative)
    return y, derivative
