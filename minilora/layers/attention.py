"""Self-attention with a fused projection of queries, keys and values, as in GPT-2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minilora import kernels as K
from minilora.backend import Array, Rng
from minilora.layers.base import Layer, Saved
from minilora.layers.linear import Linear


class Attention(Layer):
    """[q k v] = x W_attn;   o = attention(q, k, v);   y = o W_proj.   x (T, d) -> y (T, d).

    `offsets` are the bounds of the sequences in x, and `rows` the rows of y to compute (functional/attention.py). Saved, if a gradient
    has to pass through the attention: q, k, v and what the attention itself saves.
    """

    def __init__(self, d_model: int, n_head: int, causal: bool = True, *, rng: Rng = None, dtype: Any = "float32") -> None:
        if d_model % n_head:
            raise ValueError(f"Attention: d_model {d_model} is not a multiple of n_head {n_head}.")
        self.n_head, self.causal = n_head, causal
        self.c_attn = Linear(d_model, 3 * d_model, rng=rng, dtype=dtype)
        self.c_proj = Linear(d_model, d_model, rng=rng, dtype=dtype)

    def forward(
        self, x: Array, keep: bool = True, need_dx: bool = True, offsets: Sequence[int] | None = None, rows: np.ndarray | None = None
    ) -> tuple[Array, Saved | None]:
        through = need_dx or self.c_attn.trainable
        qkv, s_attn = self.c_attn.forward(x, keep=keep and through, need_dx=need_dx)
        q, k, v = _thirds(qkv)
        q = K.take_rows(q, rows)
        o, inner = K.attention(q, k, v, self.n_head, offsets, self.causal, keep=keep and through, rows=rows)
        y, s_proj = self.c_proj.forward(o, keep=keep, need_dx=through)
        if not keep:
            return y, None
        return y, self.save(need_dx, s_attn, (q, k, v, inner, offsets, rows) if through else None, s_proj)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        s_attn, through, s_proj = self.load(saved, need_dx)
        do = self.c_proj.backward(dy, s_proj, need_dx=through is not None)  #    y = c_proj(o)
        if through is None:
            return None
        q, k, v, inner, offsets, rows = through
        dqkv = K.attention_backward_joined(do, q, k, v, inner, self.n_head, offsets, rows)  # o = attention(q, k, v)
        return self.c_attn.backward(dqkv, s_attn, need_dx=need_dx)  #            qkv = c_attn(x)

    def decode(self, x: Array, extend: Callable[[Array, Array], tuple[Array, Array]]) -> Array:
        """`forward` of the next tokens of one sequence; extend(k, v) appends theirs to those of the earlier ones and returns all."""
        q, k, v = _thirds(self.c_attn.forward(x, keep=False)[0])
        k, v = extend(k, v)
        o, _ = K.attention(q, k, v, self.n_head, keep=False, rows=np.arange(len(k) - len(q), len(k)))
        return self.c_proj.forward(o, keep=False)[0]


def _thirds(qkv: Array) -> tuple[Array, Array, Array]:
    """The three column blocks of (T, 3d), as views."""
    d = qkv.shape[1] // 3
    return qkv[:, :d], qkv[:, d : 2 * d], qkv[:, 2 * d :]
