"""Twins of functional/activations.py that give the slope along with the value: y = f(x) and f'(x) in one pass, then dx = dy f'(x).

The slope takes the place of x, which backward no longer needs: it costs no memory, and backward is one multiplication.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import cuda
from minilora.kernels.blocks import blocks, scratch
from minilora.kernels.elementwise import multiply
from minilora.kernels.half import NARROW, in_float32

_C = math.sqrt(2 / math.pi)
_LARGEST = 5.6  # Phi is 1 to rounding in float32 from here on; P is good up to here
_P = (  # erf(x / sqrt 2) = tanh(x P(x^2)) to 1.3e-7 for |x| <= 5.6; tests/golden/make_gelu.py prints them
    0.7978849411010742,
    0.036333318799734116,
    -3.322647899040021e-05,
    -5.4763433581683785e-05,
    3.7640213577105897e-06,
    -9.614897322762772e-08,
    -1.5064520741958631e-09,
    1.3997511483232472e-10,
    -2.2305737985839347e-12,
)


@in_float32(NARROW, NARROW)
def gelu(x: Array, keep: bool = True) -> tuple[Array, Array | None]:
    """y = x Phi(x), and Phi(x) + x phi(x) if `keep`. In float64, where the polynomial is not good enough, the plain pair."""
    if cuda.usable(x):
        return _on_device("gelu", x, keep)
    if get_xp(x) is not np or x.dtype == np.float64:
        return F.gelu(x), x
    return _with_slope(_gelu, x, keep)


@in_float32(NARROW)
def gelu_backward(dy: Array, saved: Array) -> Array:
    """dx = dy * slope, or the pair's where that ran."""
    if cuda.usable(dy):
        return multiply(dy, saved)
    return F.gelu_backward(dy, saved) if get_xp(dy) is not np or dy.dtype == np.float64 else dy * saved


@in_float32(NARROW, NARROW)
def gelu_tanh(x: Array, keep: bool = True) -> tuple[Array, Array | None]:
    """y = x (1 + tanh z) / 2, and its slope if `keep`."""
    if cuda.usable(x):
        return _on_device("gelu_tanh", x, keep)
    return _with_slope(_gelu_tanh, x, keep) if get_xp(x) is np else (F.gelu_tanh(x), x)


@in_float32(NARROW)
def gelu_tanh_backward(dy: Array, saved: Array) -> Array:
    """dx = dy * slope."""
    return multiply(dy, saved) if get_xp(dy) is np or cuda.usable(dy) else F.gelu_tanh_backward(dy, saved)


@in_float32(NARROW, NARROW)
def silu(x: Array, keep: bool = True) -> tuple[Array, Array | None]:
    """y = x sigmoid(x), and its slope if `keep`."""
    if cuda.usable(x):
        return _on_device("silu", x, keep)
    return _with_slope(silu_block, x, keep) if get_xp(x) is np else (F.silu(x), x)


@in_float32(NARROW)
def silu_backward(dy: Array, saved: Array) -> Array:
    """dx = dy * slope."""
    return multiply(dy, saved) if get_xp(dy) is np or cuda.usable(dy) else F.silu_backward(dy, saved)


def _on_device(name: str, x: Array, keep: bool) -> tuple[Array, Array | None]:
    xp = get_xp(x)
    x = xp.ascontiguousarray(x)
    y, slope = xp.empty_like(x), xp.empty_like(x) if keep else None
    cuda.elementwise("activations", name, x.size, x, y, cuda.NULL if slope is None else slope, each=16 // x.itemsize)
    return y, slope


# -- one block each: x -> y, and the slope if there is a place for it; a and t are scratch -----------------------------------

Block = Callable[..., None]


def _with_slope(fill: Block, x: np.ndarray, keep: bool) -> tuple[np.ndarray, np.ndarray | None]:
    x = np.ascontiguousarray(x)
    y, slope = np.empty_like(x), np.empty_like(x) if keep else None
    a, t = scratch(x, 2)
    for part in blocks(x, y, slope) if slope is not None else blocks(x, y):
        n = part[0].size
        fill(*part, *[None] * (3 - len(part)), a[:n], t[:n])
    return y, slope


def _gelu(x: np.ndarray, y: np.ndarray, slope: np.ndarray | None, a: np.ndarray, t: np.ndarray) -> None:
    np.clip(x, -_LARGEST, _LARGEST, out=y)
    np.multiply(y, y, out=a)  #                          a = x^2
    np.multiply(a, _P[-1], out=t)
    for p in _P[-2:0:-1]:
        t += p
        t *= a
    t += _P[0]
    t *= x  #                                            beyond _LARGEST a straight line, which tanh takes to 1 exactly
    np.tanh(t, out=t)
    t += 1
    t *= 0.5  #                                          t = Phi(x)
    np.multiply(x, t, out=y)
    if slope is not None:  #                             Phi + x phi
        np.multiply(x, x, out=a)  #                      of x itself: far out x phi is zero only if phi knows how far
        a *= -0.5
        np.exp(a, out=a)
        a *= 1 / math.sqrt(2 * math.pi)
        a *= x
        np.add(a, t, out=slope)


def _gelu_tanh(x: np.ndarray, y: np.ndarray, slope: np.ndarray | None, a: np.ndarray, t: np.ndarray) -> None:
    np.multiply(x, x, out=a)  #                          a = x^2
    np.multiply(a, _C * 0.044715, out=t)
    t += _C
    t *= x
    np.tanh(t, out=t)  #                                 t = tanh z
    if slope is not None:  #                             (1 + t) / 2 + x z' (1 - t^2) / 2
        a *= 3 * 0.044715 * _C
        a += _C
        a *= x  #                                        a = x z'
        np.multiply(t, t, out=slope)
        np.subtract(1, slope, out=slope)
        slope *= a
        slope += t
        slope += 1
        slope *= 0.5
    t += 1
    np.multiply(x, t, out=y)
    y *= 0.5


def silu_block(x: np.ndarray, y: np.ndarray, slope: np.ndarray | None, a: np.ndarray, t: np.ndarray) -> None:
    np.multiply(x, 0.5, out=t)
    np.tanh(t, out=t)
    t += 1
    t *= 0.5  #                                          t = sigmoid(x)
    np.multiply(x, t, out=y)
    if slope is not None:  #                             t + y (1 - t)
        np.subtract(1, t, out=slope)
        slope *= y
        slope += t
