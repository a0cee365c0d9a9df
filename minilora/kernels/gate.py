"""SwiGLU (arXiv 2002.05202): y = silu(g) * u. Two arrays are kept in place of g and u, and backward is two multiplications."""

from __future__ import annotations

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import cuda
from minilora.kernels.activations import silu_block
from minilora.kernels.blocks import blocks, scratch
from minilora.kernels.elementwise import multiply
from minilora.kernels.half import NARROW, in_float32


@in_float32(NARROW, (NARROW, NARROW))
def swiglu(g: Array, u: Array, keep: bool = True) -> tuple[Array, tuple[Array, Array] | None]:
    """y = silu(g) * u.   Saved: silu(g), which is dy / du, and u silu'(g), which is dy / dg."""
    xp = get_xp(g, u)
    if cuda.usable(g, u) and g.shape == u.shape:
        g, u = xp.ascontiguousarray(g), xp.ascontiguousarray(u)
        y, *kept = (xp.empty_like(g) for _ in range(3 if keep else 1))
        cuda.elementwise("activations", "swiglu", g.size, g, u, y, *(kept or (cuda.NULL, cuda.NULL)), each=16 // g.itemsize)
        return y, (kept[0], kept[1]) if keep else None
    if xp is not np:
        return F.silu(g) * u, (g, u)
    g, u = np.ascontiguousarray(g), np.ascontiguousarray(u)
    y, by_u = np.empty_like(g), np.empty_like(g)
    by_g = np.empty_like(g) if keep else None
    a, t = scratch(g, 2)
    for g_, u_, y_, by_u_, *rest in blocks(g, u, y, by_u, *([] if by_g is None else [by_g])):
        slope = rest[0] if rest else None
        silu_block(g_, by_u_, slope, a[: g_.size], t[: g_.size])
        np.multiply(by_u_, u_, out=y_)
        if slope is not None:
            slope *= u_
    return y, (by_u, by_g) if by_g is not None else None


@in_float32(NARROW, NARROW)
def swiglu_backward(dy: Array, saved: tuple[Array, Array], need: tuple[bool, bool] = (True, True)) -> tuple[Array | None, Array | None]:
    """(dg, du), each formed only if needed:  dg = dy u silu'(g),   du = dy silu(g)."""
    if get_xp(dy) is not np and not cuda.usable(dy):
        g, u = saved
        return F.silu_backward(dy * u, g) if need[0] else None, dy * F.silu(g) if need[1] else None
    by_u, by_g = saved
    return multiply(dy, by_g) if need[0] else None, multiply(dy, by_u) if need[1] else None
