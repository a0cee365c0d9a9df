"""Self-attention with separate projections of queries, keys and values, as in BERT and Llama. (Fused: layers/attention.py.)"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora import kernels as K
from minilora.backend import Array
from minilora.layers import Layer, Saved
from minilora.layers.block import Offsets, Output, Rows
from minilora.models.cache import Extend

Tables = tuple[Array, Array]  # cos and sin of the rotary angles, (T, head_dim / 2) each


class SelfAttention(Layer):
    """q = rotary(x W_q),  k = rotary(x W_k),  v = x W_v;   o = attention(q, k, v).   x (T, d) -> o (T, n_head head_dim), or its `rows`.

    A subclass sets n_head, names the three projections as its checkpoint does, and returns them from `projections`.
    rope: the rotary tables; None: no rotation. n_kv_head: fewer heads of keys and values than of queries; None: as many.
    Saved, if a gradient has to pass: q and k as rotated, v, and what K.attention returns for its backward.
    """

    n_head: int
    n_kv_head: int | None = None
    causal = True

    def projections(self) -> tuple[Layer, Layer, Layer]:
        """(W_q, W_k, W_v)."""
        raise NotImplementedError(f"{type(self).__name__} has no projections.")

    def forward(
        self, x: Array, keep: bool = True, need_dx: bool = True, offsets: Offsets = None, rows: Rows = None, rope: Tables | None = None
    ) -> Output:
        to_q, to_k, to_v = self.projections()
        need = {name for name, layer in (("dq", to_q), ("dk", to_k), ("dv", to_v)) if need_dx or layer.trainable}
        q, s_q = to_q.forward(K.take_rows(x, rows), keep=keep and "dq" in need, need_dx=need_dx)
        k, s_k = to_k.forward(x, keep=keep and "dk" in need, need_dx=need_dx)
        v, s_v = to_v.forward(x, keep=keep and "dv" in need, need_dx=need_dx)
        r_q = r_k = None
        if rope is not None:
            (q, r_q), (k, r_k) = K.rotary(q, *_take(rope, rows)), K.rotary(k, *rope)
        o, P = K.attention(q, k, v, self.n_head, offsets, self.causal, keep=keep and bool(need), n_kv_head=self.n_kv_head, rows=rows)
        if not keep:
            return o, None
        return o, self.save(need_dx, need, (q, k, v, P, offsets, rows, rope, r_q, r_k) if need else None, s_q, s_k, s_v)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        need, through, s_q, s_k, s_v = self.load(saved, need_dx)
        if not need:
            return None
        q, k, v, P, offsets, rows, rope, r_q, r_k = through
        to_q, to_k, to_v = self.projections()
        dx_q: Any = None
        dx_k: Any = None
        dx_v: Any = None
        dq, dk, dv = K.attention_backward(dy, q, k, v, P, self.n_head, offsets, self.n_kv_head, need, rows)  # o = attention(q, k, v)
        if "dv" in need:
            dx_v = to_v.backward(dv, s_v, need_dx=need_dx)  #                           v = x W_v
        if "dk" in need:
            dk = dk if rope is None else K.rotary_backward(dk, r_k, *rope)  #                k = rotary(x W_k)
            dx_k = to_k.backward(dk, s_k, need_dx=need_dx)
        if "dq" in need:
            dq = dq if rope is None else K.rotary_backward(dq, r_q, *_take(rope, rows))  #   q = rotary(x[rows] W_q)
            dx_q = to_q.backward(dq, s_q, need_dx=need_dx)
        return K.add(K.add(K.take_rows_backward(dx_q, rows, len(k)), dx_k), dx_v) if need_dx else None  # x feeds all three

    def decode(self, x: Array, extend: Extend, rope: Tables | None = None) -> Array:
        """Inference for the next tokens of one sequence, see PreNormBlock.decode."""
        q, k, v = (layer.forward(x, keep=False)[0] for layer in self.projections())
        if rope is not None:
            q, k = K.rotary(q, *rope)[0], K.rotary(k, *rope)[0]
        k, v = extend(k, v)
        last = np.arange(len(k) - len(q), len(k))
        return K.attention(q, k, v, self.n_head, keep=False, n_kv_head=self.n_kv_head, rows=last)[0]


def _take(rope: Tables, rows: Rows) -> list[Array]:
    return [K.take_rows(table, rows) for table in rope]
