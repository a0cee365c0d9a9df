"""Elementwise non-linearities. Each is y = f(x) and dx = dy * f'(x); x of any shape.

Only tanh saves its output (f' = 1 - y^2 needs nothing else); the others save their input. GELU is in gelu.py.
"""

from __future__ import annotations

from collections.abc import Collection

from minilora.backend import Array, get_xp


def relu(x: Array) -> Array:
    """y = max(x, 0)."""
    return get_xp(x).maximum(x, 0)


def relu_backward(dy: Array, x: Array) -> Array:
    """dx = dy where x > 0, else 0. At the kink, x = 0, the derivative is taken as 0 (PyTorch's choice)."""
    return dy * (x > 0)


def tanh(x: Array) -> Array:
    """y = tanh x."""
    return get_xp(x).tanh(x)


def tanh_backward(dy: Array, y: Array) -> Array:
    """dx = dy (1 - y^2), from the output: tanh' = 1 - tanh^2."""
    return dy * (1 - y * y)


def _sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) = (1 + tanh(x / 2)) / 2, which overflows for no x."""
    return 0.5 * (1 + get_xp(x).tanh(0.5 * x))


def silu(x: Array) -> Array:
    """y = x sigmoid(x), also called swish."""
    return x * _sigmoid(x)


def silu_backward(dy: Array, x: Array) -> Array:
    """dx = dy (g + x g (1 - g)), g = sigmoid(x)."""
    g = _sigmoid(x)
    return dy * (g + x * g * (1 - g))


def swiglu(g: Array, u: Array) -> tuple[Array, tuple[Array, Array]]:
    """y = silu(g) * u (arXiv 2002.05202, section 2), saved g and u. All arrays have one shape."""
    if g.shape != u.shape:
        raise ValueError(f"swiglu: g has shape {g.shape} but u {u.shape}; they must be equal.")
    return silu(g) * u, (g, u)


def swiglu_backward(dy: Array, saved: tuple[Array, Array], need: Collection[str] = ("dg", "du")) -> tuple[Array | None, Array | None]:
    """dg = dy u silu'(g),   du = dy silu(g); each formed only if `need` names it."""
    g, u = saved
    return silu_backward(dy * u, g) if "dg" in need else None, dy * silu(g) if "du" in need else None
