"""Low-rank adaptation of a dense layer (LoRA, arXiv 2106.09685, section 4.1)."""

from __future__ import annotations

from collections.abc import Collection

from minilora.backend import Array, get_xp
from minilora.functional.linear import linear, linear_backward


def lora_linear(x: Array, W: Array, b: Array | None, A: Array, B: Array, s: float, mask: Array | None = None) -> tuple[Array, Array]:
    """y = x W + b + s (x A) B,   saved u = x A.

    Shapes: x (T, m), W (m, n), b (n,), A (m, r), B (r, n), scale s = alpha / r -> y (T, n), u (T, r).
    `mask` (T, m), zeros and 1 / (1 - p), is the dropout on what the low-rank branch reads; W reads x itself.

    W + s A B is never formed: two thin products cost 2 T r (m + n) operations instead of 2 m n r + an m x n array.
    Saved: x (for dA; recomputing it would cost the layers below) and u (r numbers a token; recomputing it costs 2 T m r).
    """
    check_lora(W, A, B)
    y = linear(x, W, b)
    u = (x if mask is None else x * mask) @ A
    y += (s * u) @ B
    return y, u


def lora_linear_backward(
    dy: Array,
    x: Array,
    u: Array,
    W: Array,
    A: Array,
    B: Array,
    s: float,
    mask: Array | None = None,
    need: Collection[str] = ("dx", "dA", "dB"),
) -> tuple[Array, Array, Array]:
    """Gradients of y = x W + b + s u B with u = x A; W and b are frozen and get none.

        dB = s u^T dy             (r, n)
        du = s dy B^T             (T, r)    zero at the first step, when B = 0: then only B moves
        dA = x^T du               (m, r)
        dx = dy W^T + du A^T      (T, m)

    x^T dy (m, n) is never formed: that is the saving of section 4.2. x may be None without "dA", u without "dB".
    """
    dB = (s * u).T @ dy if "dB" in need else None  # y += (s * u) @ B
    dx = linear_backward(dy, None, W, need={"dx"})[0] if "dx" in need else None  # y = linear(x, W, b)
    if dx is None and "dA" not in need:
        return None, None, dB
    du = s * (dy @ B.T)
    dA = None
    if "dA" in need:
        dA = (x if mask is None else x * mask).T @ du  # u = (x * mask) @ A
    if "dx" in need:
        dx += du @ A.T if mask is None else (du @ A.T) * mask
    return dx, dA, dB


def check_lora(W: Array, A: Array, B: Array) -> None:
    """Raise ValueError unless A B has the shape of W, TypeError where they live on different devices."""
    get_xp(W, A, B)
    if A.ndim != 2 or B.ndim != 2 or A.shape != (W.shape[0], B.shape[0]) or B.shape[1] != W.shape[1]:
        raise ValueError(f"lora_linear: W {W.shape} asks for A ({W.shape[0]}, r) and B (r, {W.shape[1]}), got {A.shape} and {B.shape}.")
