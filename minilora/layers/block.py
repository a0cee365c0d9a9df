"""A pre-norm transformer block, as in GPT-2, written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array, Rng
from minilora.layers.activations import GELU
from minilora.layers.attention import Attention
from minilora.layers.base import Layer, Saved
from minilora.layers.dropout import Dropout
from minilora.layers.linear import Linear
from minilora.layers.norm import LayerNorm


class FeedForward(Layer):
    """y = gelu(x W_fc) W_proj.   x (T, d) -> y (T, d), with n_inner features in between."""

    def __init__(self, d_model: int, n_inner: int, *, rng: Rng = None, dtype: Any = "float32") -> None:
        self.c_fc = Linear(d_model, n_inner, rng=rng, dtype=dtype)
        self.act = GELU("tanh")
        self.c_proj = Linear(n_inner, d_model, rng=rng, dtype=dtype)

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> tuple[Array, Saved | None]:
        below = need_dx or self.c_fc.trainable
        h, s_fc = self.c_fc.forward(x, keep=keep and below, need_dx=need_dx)
        a, s_act = self.act.forward(h, keep=keep and below)
        y, s_proj = self.c_proj.forward(a, keep=keep, need_dx=below)
        return y, self.save(need_dx, below, s_fc, s_act, s_proj) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        below, s_fc, s_act, s_proj = self.load(saved, need_dx)
        da = self.c_proj.backward(dy, s_proj, need_dx=below)  # y = c_proj(a)
        if not below:
            return None
        dh = self.act.backward(da, s_act)  #                    a = gelu(h)
        return self.c_fc.backward(dh, s_fc, need_dx=need_dx)  # h = c_fc(x)


class Block(Layer):
    """h = x + attn(ln_1(x));   y = h + mlp(ln_2(h)).   x (T, d) -> y (T, d), or the `rows` of it that are asked for, (R, d).

    Each residual add sends the gradient both ways: dh = dy + (what comes back through mlp and ln_2), and so on.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        n_inner: int | None = None,
        eps: float = 1e-5,
        dropout: float = 0.0,
        *,
        rng: Rng = None,
        dtype: Any = "float32",
    ) -> None:
        self.ln_1 = LayerNorm(d_model, eps, dtype=dtype)
        self.attn = Attention(d_model, n_head, rng=rng, dtype=dtype)
        self.drop_1 = Dropout(dropout)
        self.ln_2 = LayerNorm(d_model, eps, dtype=dtype)
        self.mlp = FeedForward(d_model, n_inner or 4 * d_model, rng=rng, dtype=dtype)
        self.drop_2 = Dropout(dropout)

    def forward(
        self, x: Array, keep: bool = True, need_dx: bool = True, offsets: Sequence[int] | None = None, rows: np.ndarray | None = None
    ) -> tuple[Array, Saved | None]:
        # Who needs a gradient? Each part that has something trainable at or below it.
        at_a = need_dx or self.ln_1.trainable
        at_h = at_a or self.attn.trainable
        at_m = at_h or self.ln_2.trainable
        at_y = at_m or self.mlp.trainable

        a, s_ln_1 = self.ln_1.forward(x, keep=keep and at_a, need_dx=need_dx)
        a, s_attn = self.attn.forward(a, keep=keep and at_h, need_dx=at_a, offsets=offsets, rows=rows)
        a, s_drop_1 = self.drop_1.forward(a, keep=keep and at_h, need_dx=at_h)
        h = K.add(F.take_rows(x, rows), a)

        m, s_ln_2 = self.ln_2.forward(h, keep=keep and at_m, need_dx=at_h)
        m, s_mlp = self.mlp.forward(m, keep=keep and at_y, need_dx=at_m)
        m, s_drop_2 = self.drop_2.forward(m, keep=keep and at_y, need_dx=at_y)
        y = K.add(h, m)

        if not keep:
            return y, None
        needs = (at_a, at_h, at_m, at_y)
        return y, self.save(need_dx, needs, rows, len(x), s_ln_1, s_attn, s_drop_1, s_ln_2, s_mlp, s_drop_2)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        needs, rows, T, s_ln_1, s_attn, s_drop_1, s_ln_2, s_mlp, s_drop_2 = self.load(saved, need_dx)
        at_a, at_h, at_m, at_y = needs

        if not at_y:
            return None
        dm = self.drop_2.backward(dy, s_drop_2)  #                     y = h + m
        dm = self.mlp.backward(dm, s_mlp, need_dx=at_m)
        if not at_m:
            return None
        dh = self.ln_2.backward(dm, s_ln_2, need_dx=at_h)
        if not at_h:
            return None
        dh = K.add(dy, dh)  #                                           h feeds y twice: directly, and through ln_2 and mlp

        da = self.drop_1.backward(dh, s_drop_1)  #                     h = x[rows] + a
        da = self.attn.backward(da, s_attn, need_dx=at_a)
        if not at_a:
            return None
        dx = self.ln_1.backward(da, s_ln_1, need_dx=need_dx)
        return K.add(F.take_rows_backward(dh, rows, T), dx) if need_dx else None  # x feeds h twice
