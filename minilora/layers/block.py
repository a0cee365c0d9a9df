"""A pre-norm transformer block, written out by hand: `PreNormBlock` for any attention and feed-forward layer, and GPT-2's `Block`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minilora import kernels as K
from minilora.backend import Array, Rng
from minilora.layers.activations import GELU
from minilora.layers.attention import Attention
from minilora.layers.base import Layer, Saved
from minilora.layers.dropout import Dropout
from minilora.layers.linear import Linear
from minilora.layers.norm import LayerNorm

Offsets = Sequence[int] | None  # the bounds of packed sequences: [0, 5, 9] is two, of 5 and 4 tokens; None: one sequence
Rows = np.ndarray | None  # which rows of the result to compute, on the host; None: all
Output = tuple[Array, Saved | None]  # y, and what backward reads


class PreNormBlock(Layer):
    """h = x + attn(norm_1(x));   y = h + mlp(norm_2(h)).   x (T, d) -> y (T, d), or the requested `rows` of it, (R, d).

    Each residual add sends the gradient both ways: dh = dy + (the gradient through mlp and norm_2), and so on. A subclass names its
    four layers as its checkpoint does, and returns them from `parts`. Dropout, if there is any, follows attn and mlp.
    """

    drop_1 = drop_2 = Dropout(0.0)

    def parts(self) -> tuple[Layer, Any, Layer, Layer]:
        """(norm_1, attn, norm_2, mlp)."""
        raise NotImplementedError(f"{type(self).__name__} has no parts.")

    def forward(
        self, x: Array, keep: bool = True, need_dx: bool = True, offsets: Offsets = None, rows: Rows = None, **inputs: Any
    ) -> Output:
        """inputs: further arguments of the attention."""
        norm_1, attn, norm_2, mlp = self.parts()
        # The gradient is needed at each place that has something trainable at or below it.
        at_a = need_dx or norm_1.trainable
        at_h = at_a or attn.trainable
        at_m = at_h or norm_2.trainable
        at_y = at_m or mlp.trainable

        a, s_norm_1 = norm_1.forward(x, keep=keep and at_a, need_dx=need_dx)
        a, s_attn = attn.forward(a, keep=keep and at_h, need_dx=at_a, offsets=offsets, rows=rows, **inputs)
        a, s_drop_1 = self.drop_1.forward(a, keep=keep and at_h, need_dx=at_h)
        h = K.add(K.take_rows(x, rows), a)

        m, s_norm_2 = norm_2.forward(h, keep=keep and at_m, need_dx=at_h)
        m, s_mlp = mlp.forward(m, keep=keep and at_y, need_dx=at_m)
        m, s_drop_2 = self.drop_2.forward(m, keep=keep and at_y, need_dx=at_y)
        y = K.add(h, m)

        if not keep:
            return y, None
        needs = (at_a, at_h, at_m, at_y)
        return y, self.save(need_dx, needs, rows, len(x), s_norm_1, s_attn, s_drop_1, s_norm_2, s_mlp, s_drop_2)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        needs, rows, T, s_norm_1, s_attn, s_drop_1, s_norm_2, s_mlp, s_drop_2 = self.load(saved, need_dx)
        at_a, at_h, at_m, at_y = needs
        norm_1, attn, norm_2, mlp = self.parts()

        if not at_y:
            return None
        dm: Any = self.drop_2.backward(dy, s_drop_2)  #                y = h + m
        dm = mlp.backward(dm, s_mlp, need_dx=at_m)
        if not at_m:
            return None
        dh: Any = norm_2.backward(dm, s_norm_2, need_dx=at_h)
        if not at_h:
            return None
        dh = K.add(dy, dh)  #                                          h feeds y twice: directly, and through norm_2 and mlp

        da: Any = self.drop_1.backward(dh, s_drop_1)  #                h = x[rows] + a
        da = attn.backward(da, s_attn, need_dx=at_a)
        if not at_a:
            return None
        dx = norm_1.backward(da, s_norm_1, need_dx=need_dx)
        return K.add(K.take_rows_backward(dh, rows, T), dx) if need_dx else None  # x feeds h twice

    def decode(self, x: Array, extend: Callable[[Array, Array], tuple[Array, Array]], **inputs: Any) -> Array:
        """Inference for the next tokens of one sequence. extend(k, v) appends theirs to the earlier ones, and returns all."""
        norm_1, attn, norm_2, mlp = self.parts()
        h = x + attn.decode(norm_1.forward(x, keep=False)[0], extend, **inputs)
        return h + mlp.forward(norm_2.forward(h, keep=False)[0], keep=False)[0]


class FeedForward(Layer):
    """y = gelu(x W_fc) W_proj.   x (T, d) -> y (T, d), with n_inner features in between."""

    def __init__(self, d_model: int, n_inner: int, *, rng: Rng = None, dtype: Any = "float32") -> None:
        self.c_fc = Linear(d_model, n_inner, rng=rng, dtype=dtype)
        self.act = GELU("tanh")
        self.c_proj = Linear(n_inner, d_model, rng=rng, dtype=dtype)

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
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


class Block(PreNormBlock):
    """GPT-2's block: layer norm, attention with a fused projection, GELU, and dropout before each residual add."""

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

    def parts(self) -> tuple[Layer, Any, Layer, Layer]:
        return self.ln_1, self.attn, self.ln_2, self.mlp
