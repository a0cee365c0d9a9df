"""Elementwise non-linearities. Each is y = f(x) and dx = dy * f'(x); x of any shape.

Only tanh saves its output (f' = 1 - y^2 needs nothing else); the others save their input.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from minilora.backend import Array, get_xp

_C = math.sqrt(2 / math.pi)
_K = 2.5
# (1 + 2x) exp(x^2) erfc(x) in powers of t = (x - K) / (x + K); tests/golden/make_erf.py prints them
_G = [
    float(c)
    for c in """1.2648381843668617 -0.12235676308240215 -0.09902453957365122 0.1576299190229927 -0.10296705603621854
    0.03276089327566133 0.0009318927733468689 -0.004382078440847587 0.0004918662388834135 0.0006321251464155949
    -8.848168029900339e-05 -0.00011352632492718974 6.2749300957096e-06 2.2712248592600015e-05 2.5875002384947698e-06
    -4.244612526599291e-06 -1.550921327837679e-06 5.650897898007257e-07 4.973311423124062e-07 -2.595789779732572e-09
    -1.0181458785967409e-07 -1.9529757279629242e-08 1.043327246672333e-08 3.3505549185349607e-09""".split()
]


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


def erf(x: Array) -> Array:
    """erf(x) = 2 / sqrt(pi) * integral of exp(-s^2) from 0 to x, to about 5e-16 absolute in float64.

    For x >= 0:  erf(x) = 1 - exp(-x^2) G(t) / (1 + 2x),  G a polynomial in t = (x - K) / (x + K), which maps
    [0, inf) to [-1, 1) (Shepherd and Laframboise, Math. Comp. 36, 1981).  erf is odd, and 1 to rounding from x = 6 on.
    NumPy has no erf, and CuPy's turns float16 into float64.
    """
    xp = get_xp(x)
    a = xp.minimum(abs(x), 6)
    t = (a - _K) / (a + _K)
    G = t * _G[-1] + _G[-2]
    for c in reversed(_G[:-2]):
        G *= t
        G += c
    return xp.copysign(1 - xp.exp(-a * a) * G / (1 + 2 * a), x)


def gelu(x: Array) -> Array:
    """y = x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2: the exact GELU (arXiv 1606.08415), as in BERT."""
    return x * (0.5 * (1 + erf(x / math.sqrt(2))))


def gelu_backward(dy: Array, x: Array) -> Array:
    """dx = dy (Phi(x) + x phi(x)), phi(x) = exp(-x^2 / 2) / sqrt(2 pi) the density of Phi."""
    Phi = 0.5 * (1 + erf(x / math.sqrt(2)))
    phi = get_xp(x).exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return dy * (Phi + x * phi)


def gelu_tanh(x: Array) -> Array:
    """y = x (1 + tanh z) / 2, z = sqrt(2 / pi) (x + 0.044715 x^3): GELU as GPT-2 computes it ("gelu_new")."""
    t = get_xp(x).tanh(_C * x * (1 + 0.044715 * x * x))
    return x * (0.5 * (1 + t))


def gelu_tanh_backward(dy: Array, x: Array) -> Array:
    """dx = dy ((1 + t) / 2 + x (1 - t^2) z' / 2), t = tanh z, z' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)."""
    t = get_xp(x).tanh(_C * x * (1 + 0.044715 * x * x))
    dz = _C * (1 + 3 * 0.044715 * x * x)
    return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * dz)
