"""Operations on each element, in blocks that stay in the cache (blocks.py): activations, and the step of AdamW.

Activations compute their derivative along with the value, y = f(x) and f'(x) in one pass. It is saved in place of x: it takes no more
memory, and backward is one multiplication, dx = dy f'(x).
"""

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import get_xp
from minilora.kernels.numpy.blocks import blocks, scratch

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


def activation_backward(dy: np.ndarray, derivative: np.ndarray) -> np.ndarray:
    """dx = dy f'(x)."""
    return dy * derivative


gelu_backward = gelu_tanh_backward = silu_backward = activation_backward


def swiglu(g: np.ndarray, u: np.ndarray, keep: bool = True) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
    """y = silu(g) * u, saved u silu'(g), which is dy / dg, and silu(g), which is dy / du."""
    get_xp(g, u)
    g, u = np.ascontiguousarray(g), np.ascontiguousarray(u)
    y, by_u = np.empty_like(g), np.empty_like(g)
    by_g = np.empty_like(g) if keep else None
    a, t = scratch(g, 2)
    for g_, u_, y_, by_u_, d in blocks(g, u, y, by_u, by_g):
        _silu(g_, by_u_, d, a[: g_.size], t[: g_.size])
        np.multiply(by_u_, u_, out=y_)
        if d is not None:
            d *= u_
    return y, (by_g, by_u) if by_g is not None else None


def swiglu_backward(
    dy: np.ndarray, saved: tuple[np.ndarray, np.ndarray], need: Collection[str] = ("dg", "du")
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """dg = dy u silu'(g),   du = dy silu(g)."""
    by_g, by_u = saved
    return dy * by_g if "dg" in need else None, dy * by_u if "du" in need else None


def adamw(w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, rates: Any, decays: Any, step: F.AdamStep) -> None:
    """As functional.adamw, in place."""
    _, weight_decay, b1, b2, c1, c2, eps, decoupled = step
    for w_, g_, m_, v_, rate, decay in blocks(w, g, m, v, rates, decays):
        lr = step.lr * rate
        if weight_decay and decoupled:
            w_ *= 1 - lr * weight_decay * decay
        elif weight_decay:
            g_ = g_ + weight_decay * decay * w_
        m_ *= b1
        m_ += (1 - b1) * g_
        v_ *= b2
        v_ += (1 - b2) * (g_ * g_)
        w_ -= (lr / c1) * m_ / (np.sqrt(v_) / math.sqrt(c2) + eps)


# -- one block each: x -> y, and the derivative where d is an array; a and t are scratch -------------------------------------


def _with_derivative(fill: Callable[..., None], x: np.ndarray, keep: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
    """y = f(x), saved f'(x). fill computes a block of each."""
    x = np.ascontiguousarray(x)
    y, d = np.empty_like(x), np.empty_like(x) if keep else None
    a, t = scratch(x, 2)
    for x_, y_, d_ in blocks(x, y, d):
        fill(x_, y_, d_, a[: x_.size], t[: x_.size])
    return y, d


def _gelu(x: np.ndarray, y: np.ndarray, d: np.ndarray | None, a: np.ndarray, t: np.ndarray) -> None:
    np.clip(x, -_LARGEST, _LARGEST, out=y)
    np.multiply(y, y, out=a)  #                          a = x^2
    np.multiply(a, _P[-1], out=t)
    for p in _P[-2:0:-1]:
        t += p
        t *= a
    t += _P[0]
    t *= x  #                                            beyond _LARGEST a straight line, of which tanh is exactly 1
    np.tanh(t, out=t)
    t += 1
    t *= 0.5  #                                          t = Phi(x)
    np.multiply(x, t, out=y)
    if d is not None:  #                                 Phi + x phi
        np.multiply(x, x, out=a)  #                      of x itself: far out x phi is zero only if phi knows how far
        a *= -0.5
        np.exp(a, out=a)
        a *= 1 / math.sqrt(2 * math.pi)
        a *= x
        np.add(a, t, out=d)


def _gelu_tanh(x: np.ndarray, y: np.ndarray, d: np.ndarray | None, a: np.ndarray, t: np.ndarray) -> None:
    np.multiply(x, x, out=a)  #                          a = x^2
    np.multiply(a, _C * 0.044715, out=t)
    t += _C
    t *= x
    np.tanh(t, out=t)  #                                 t = tanh z
    if d is not None:  #                                 (1 + t) / 2 + x z' (1 - t^2) / 2
        a *= 3 * 0.044715 * _C
        a += _C
        a *= x  #                                        a = x z'
        np.multiply(t, t, out=d)
        np.subtract(1, d, out=d)
        d *= a
        d += t
        d += 1
        d *= 0.5
    t += 1
    np.multiply(x, t, out=y)
    y *= 0.5


def _silu(x: np.ndarray, y: np.ndarray, d: np.ndarray | None, a: np.ndarray, t: np.ndarray) -> None:
    np.multiply(x, 0.5, out=t)
    np.tanh(t, out=t)
    t += 1
    t *= 0.5  #                                          t = sigmoid(x)
    np.multiply(x, t, out=y)
    if d is not None:  #                                 t + y (1 - t)
        np.subtract(1, t, out=d)
        d *= y
        d += t


gelu, gelu_tanh, silu = (partial(_with_derivative, block) for block in (_gelu, _gelu_tanh, _silu))
