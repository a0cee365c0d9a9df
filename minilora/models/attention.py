"""Self-attention with one fused projection of queries, keys and values, as in GPT-2 and ModernBERT, or three; KVCache."""

from collections.abc import Callable
from typing import Any

import numpy as np

from minilora import kernels as K
from minilora.backend import Array, Rng, get_xp
from minilora.functional.attention import Offsets, Rows
from minilora.layers import Layer, Linear, Output, RMSNorm, Saved, needed

Tables = tuple[Array, Array]  # cos and sin of the rotary angles, (T, head_dim / 2) each
Extend = Callable[..., tuple[Array, Array, np.ndarray]]  # `KVCache.extend` for one layer


class KVCache:
    """The keys and values, in each layer, of the `length` tokens of one sequence that `model.decode(ids, cache)` has read.

    A new token then costs one row of products instead of a forward over the whole sequence. The arrays grow by `block` tokens at a
    time. To forget the last tokens, lower `length`; the next ones overwrite them.
    """

    def __init__(self, block: int = 256) -> None:
        self.block, self.length = block, 0
        self._kept: dict[int, Array] = {}  # layer: keys and values, (2, capacity, n_kv_head d)

    def extend(self, layer: int, k: Array, v: Array, window: int | None = None) -> tuple[Array, Array, np.ndarray]:
        """Append k and v (t, n_kv_head d) of new tokens to those of this layer; returns all, (length + t, n_kv_head d), as views, and the
        places (t,) of the new ones. With a window, only those that a new token sees: the last t + window - 1.

        The model adds t to `length` once all its layers have been extended.
        """
        end, kept = self.length + len(k), self._kept.get(layer)
        if kept is None or kept.shape[1] < end:
            grown = get_xp(k).empty((2, -(-end // self.block) * self.block, k.shape[1]), dtype=k.dtype)
            if kept is not None:
                grown[:, : self.length] = kept[:, : self.length]
            self._kept[layer] = kept = grown
        kept[0, self.length : end], kept[1, self.length : end] = k, v
        first = max(0, self.length - window + 1) if window else 0
        return kept[0, first:end], kept[1, first:end], np.arange(self.length - first, end - first)


class Attention(Layer):
    """[q k v] = x W_attn;   o = attention(rotary(q), rotary(k), v);   y = o W_proj.   x (T, d) -> y (T, d).

    window: as in SelfAttention. `offsets` are the bounds of the sequences in x, and `rows` the rows of y to compute
    (functional/attention.py). Saved, if a gradient has to pass through the attention: q, k, v and what the attention itself saves.
    """

    names = "c_attn", "c_proj"
    window: int | None = None

    def __init__(
        self, d_model: int, n_head: int, causal: bool = True, *, bias: bool = True, rng: Rng = None, dtype: Any = "float32"
    ) -> None:
        if d_model % n_head:
            raise ValueError(f"Attention: d_model {d_model} is not a multiple of n_head {n_head}.")
        self.n_head, self.causal = n_head, causal
        for name, n in zip(self.names, (3 * d_model, d_model), strict=True):
            setattr(self, name, Linear(d_model, n, bias, rng=rng, dtype=dtype))

    def projections(self) -> list[Layer]:
        """[W_attn, W_proj]."""
        return [getattr(self, name) for name in self.names]

    def forward(
        self,
        x: Array,
        keep: bool = True,
        need_dx: bool = True,
        offsets: Offsets = None,
        rows: Rows = None,
        rope: Tables | None = None,
        extend: Extend | None = None,
    ) -> Output:
        """rope: the rotary tables; None: no rotation. extend: in inference, appends k and v of the next tokens of one sequence to the
        earlier ones; see KVCache.
        """
        W_attn, W_proj = self.projections()
        through = need_dx or W_attn.trainable
        qkv, s_attn = W_attn.forward(x, keep=keep and through, need_dx=need_dx)
        d, qk, r = qkv.shape[1] // 3, qkv, None
        if rope is not None:
            qk, r = K.rotary(qkv[:, : 2 * d], *rope)  # the heads of q and k by the same angles
        q, k, v = qk[:, :d], qk[:, d : 2 * d], qkv[:, 2 * d :]
        q = K.take_rows(q, rows)
        if extend is not None:
            k, v, rows = extend(k, v)
        o, inner = K.attention(q, k, v, self.n_head, offsets, self.causal, keep=keep and through, rows=rows, window=self.window)
        y, s_proj = W_proj.forward(o, keep=keep, need_dx=through)
        if not keep:
            return y, None
        return y, self.save(need_dx, s_attn, (q, k, v, inner, offsets, rows, rope, r) if through else None, s_proj)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        s_attn, through, s_proj = self.load(saved, need_dx)
        W_attn, W_proj = self.projections()
        do: Any = W_proj.backward(dy, s_proj, need_dx=through is not None)  #    y = o W_proj
        if through is None:
            return None
        q, k, v, inner, offsets, rows, rope, r = through
        dqkv = K.attention_backward_joined(do, q, k, v, inner, self.n_head, offsets, rows)  # o = attention(q, k, v)
        if rope is not None:
            dqk = dqkv[:, : 2 * k.shape[1]]
            dqk[...] = K.rotary_backward(dqk, r, *rope)  #                       q, k = rotary(q), rotary(k)
        return W_attn.backward(dqkv, s_attn, need_dx=need_dx)  #                 [q k v] = x W_attn


class HeadNorm(RMSNorm):
    """RMSNorm of each head on its own.   x (T, H n) -> y (T, H n); weight (n,)."""

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        y, saved = super().forward(x.reshape(-1, len(self.weight.data)), keep, need_dx)
        return y.reshape(x.shape), saved

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        dx = super().backward(dy.reshape(-1, len(self.weight.data)), saved, need_dx)
        return None if dx is None else dx.reshape(dy.shape)


class SelfAttention(Layer):
    """q = rotary(x W_q),  k = rotary(x W_k),  v = x W_v;   o = attention(q, k, v).   x (T, d) -> o (T, n_head head_dim), or its `rows`.

    A subclass names W_q, W_k and W_v as its checkpoint does. n_kv_head: the number of heads of keys and values, a divisor of n_head.
    window: a token sees only tokens that are less far away (functional/attention.py). q_norm and k_norm, if there are any, come before the
    rotation. q_scale: a factor of q, where it is rotated.
    Saved, if a gradient has to pass: q and k as rotated, v, and what K.attention returns.
    """

    names: tuple[str, str, str]
    causal = True
    window: int | None = None
    q_norm: Any = None
    k_norm: Any = None
    q_scale = 1.0

    def __init__(self, d: int, n_head: int, n_kv_head: int, head_dim: int, bias: bool, rng: np.random.Generator, dtype: Any) -> None:
        self.n_head, self.n_kv_head = n_head, n_kv_head
        for name, heads in zip(self.names, (n_head, n_kv_head, n_kv_head), strict=True):
            setattr(self, name, Linear(d, heads * head_dim, bias, rng=rng, dtype=dtype))

    def projections(self) -> list[Layer]:
        """[W_q, W_k, W_v]."""
        return [getattr(self, name) for name in self.names]

    def forward(
        self,
        x: Array,
        keep: bool = True,
        need_dx: bool = True,
        offsets: Offsets = None,
        rows: Rows = None,
        rope: Tables | None = None,
        extend: Extend | None = None,
    ) -> Output:
        """rope: the rotary tables; None: no rotation. extend: as in Attention."""
        to_q, to_k, to_v = self.projections()
        at_q, at_k = need_dx or to_q.trainable, need_dx or to_k.trainable  # below the norms
        above = [norm is not None and norm.trainable for norm in (self.q_norm, self.k_norm)]
        need = needed(dq=at_q or above[0], dk=at_k or above[1], dv=need_dx or to_v.trainable)
        through = keep and bool(need)
        q, s_q = to_q.forward(K.take_rows(x, rows), keep=through, need_dx=need_dx)
        k, s_k = to_k.forward(x, keep=through, need_dx=need_dx)
        v, s_v = to_v.forward(x, keep=through, need_dx=need_dx)
        r_q = r_k = n_q = n_k = None
        if self.q_norm is not None:
            q, n_q = self.q_norm.forward(q, keep=through, need_dx=at_q)
            k, n_k = self.k_norm.forward(k, keep=through, need_dx=at_k)
        if rope is not None:
            (q, r_q), (k, r_k) = K.rotary(q, *self._of_queries(rope, rows)), K.rotary(k, *rope)
        if extend is not None:
            k, v, rows = extend(k, v, self.window)
        heads = {"n_kv_head": self.n_kv_head, "rows": rows, "window": self.window}
        o, P = K.attention(q, k, v, self.n_head, offsets, self.causal, keep=through, **heads)
        if not keep:
            return o, None
        norms = at_q, at_k, n_q, n_k
        return o, self.save(need_dx, (need, q, k, v, P, offsets, rows, rope, r_q, r_k, norms) if through else None, s_q, s_k, s_v)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        through, s_q, s_k, s_v = self.load(saved, need_dx)
        if through is None:
            return None
        need, q, k, v, P, offsets, rows, rope, r_q, r_k, (at_q, at_k, n_q, n_k) = through
        to_q, to_k, to_v = self.projections()
        dx_q = dx_k = dx_v = None
        dq, dk, dv = K.attention_backward(dy, q, k, v, P, self.n_head, offsets, self.n_kv_head, need, rows)  # o = attention(q, k, v)
        if "dv" in need:
            dx_v = to_v.backward(dv, s_v, need_dx=need_dx)  #                           v = x W_v
        if "dk" in need:
            dk = dk if rope is None else K.rotary_backward(dk, r_k, *rope)  #           k = rotary(k_norm(x W_k))
            dk = dk if self.k_norm is None else self.k_norm.backward(dk, n_k, need_dx=at_k)
            dx_k = to_k.backward(dk, s_k, need_dx=need_dx) if at_k else None
        if "dq" in need:
            dq = dq if rope is None else K.rotary_backward(dq, r_q, *self._of_queries(rope, rows))  # q = rotary(q_norm(x[rows] W_q))
            dq = dq if self.q_norm is None else self.q_norm.backward(dq, n_q, need_dx=at_q)
            dx_q = to_q.backward(dq, s_q, need_dx=need_dx) if at_q else None
        return K.add(K.add(K.take_rows_backward(dx_q, rows, len(k)), dx_k), dx_v) if need_dx else None  # x feeds all three

    def _of_queries(self, rope: Tables, rows: Rows) -> list[Array]:
        """The tables of the rows of q, times q_scale."""
        return [K.take_rows(table if self.q_scale == 1 else self.q_scale * table, rows) for table in rope]
