"""Softmax, and scaled dot-product attention over packed sequences (arXiv 1706.03762, section 3.2.1)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

import numpy as np

from minilora.backend import Array, constant, get_xp

Offsets = Sequence[int] | None  # the bounds of packed sequences: [0, 5, 9] is two, of 5 and 4 tokens; None: one sequence
Rows = np.ndarray | None  # the rows of the result to compute, rising and on the host; None: all


def softmax(x: Array) -> Array:
    """y_i = exp(x_i) / sum_j exp(x_j), over the last axis; any shape.

    The row's maximum is subtracted first: the result is the same and exp never overflows. y is saved.
    """
    e = get_xp(x).exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_backward(dy: Array, y: Array) -> Array:
    """dx_i = y_i (dy_i - sum_j dy_j y_j): raising one input lowers all the other outputs."""
    return y * (dy - (dy * y).sum(axis=-1, keepdims=True))


def attention(
    q: Array,
    k: Array,
    v: Array,
    n_head: int,
    offsets: Offsets = None,
    causal: bool = True,
    keep: bool = True,
    n_kv_head: int | None = None,
    rows: Rows = None,
    window: int | None = None,
) -> tuple[Array, list[Array]]:
    """o = softmax(q k^T / sqrt d) v, for each sequence and each head on its own.

    Shapes: q (R, H d) holds H heads of d features in its columns, k and v (T, G d) hold G = n_kv_head (default H) -> o (R, H d).
    Grouped heads (arXiv 2305.13245): with n = H / G, the query heads g n to g n + n - 1 share the key and value head g.
    Sequence i is the rows offsets[i] to offsets[i + 1] of k and v; None means that all rows are one sequence. `causal`
    lets a token see itself and what precedes it in its sequence; `window` (arXiv 2004.05150) only what is nearer than that many tokens.
    `rows` (R,), rising and on the host, are the rows of k that the queries belong to: the last layer of a model needs only those that
    its head will read. None: all, R = T.

    Saved: the probabilities P of every sequence (G, n t, s), which is s / d times the size of q. Recomputing them would
    cost one of the four products below. With keep=False nothing is kept.
    """
    G = n_kv_head or n_head
    check_attention(q, k, v, n_head, G, rows)
    o = get_xp(q, k, v).empty_like(q)
    saved = []
    for at, seq, places in _sequences(offsets, k.shape[0], rows):
        Q, K, V = _heads(q[at], n_head, G), _heads(k[seq], G, G), _heads(v[seq], G, G)
        P = _probabilities(Q, K, n_head, causal, places, window)  # (G, n t, s)
        o[at] = _columns(P @ V, n_head)
        if keep:
            saved.append(P)
    return o, saved


def attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    saved: list[Array],
    n_head: int,
    offsets: Offsets = None,
    n_kv_head: int | None = None,
    need: Collection[str] = ("dq", "dk", "dv"),
    rows: Rows = None,
) -> tuple[Array, Array, Array]:
    """Gradients of o = P V, P = softmax(S), S = Q K^T / sqrt d, sequence by sequence; each formed only if `need` names it.

    dV = P^T dO         dP = dO V^T
    dS = softmax'(dP)   zero where the mask put -inf, as P is zero there
    dQ = dS K / sqrt d  dK = dS^T Q / sqrt d

    Query heads that share a key head are stacked in the rows of Q, so the products with P^T and dS^T sum over them.
    """
    G = n_kv_head or n_head
    xp = get_xp(do, q)
    dq, dk, dv = (xp.empty_like(z) if name in need else None for name, z in (("dq", q), ("dk", k), ("dv", v)))
    for (at, seq, _), P in zip(_sequences(offsets, k.shape[0], rows), saved, strict=True):
        (Q, dO), (K, V) = (_heads(z[at], n_head, G) for z in (q, do)), (_heads(z[seq], G, G) for z in (k, v))
        if dv is not None:
            dv[seq] = _columns(P.transpose(0, 2, 1) @ dO, G)  #           O = P @ V
        if dq is None and dk is None:
            continue
        dS = softmax_backward(dO @ V.transpose(0, 2, 1), P)  #      P = softmax(S)
        dS *= 1 / math.sqrt(Q.shape[-1])  #                         S = Q @ K^T / sqrt d
        if dq is not None:
            dq[at] = _columns(dS @ K, n_head)
        if dk is not None:
            dk[seq] = _columns(dS.transpose(0, 2, 1) @ Q, G)
    return dq, dk, dv


def positions(tokens: int, offsets: Offsets, limit: int) -> np.ndarray:
    """(tokens,) 0, 1, 2, ... from the start of each sequence, on the host. Raises ValueError for a sequence beyond `limit`."""
    bounds = bounds_of(offsets, tokens)
    lengths = np.diff(bounds)
    if lengths.max() > limit:
        raise ValueError(f"a sequence of {lengths.max()} tokens is longer than the model's {limit} positions.")
    return np.arange(tokens) - np.repeat(bounds[:-1], lengths)


def bounds_of(offsets: Offsets, tokens: int) -> np.ndarray:
    """The bounds of the sequences, (their number + 1,): offsets, or those of one. Raises ValueError unless they rise from 0 to `tokens`."""
    bounds = np.array([0, tokens] if offsets is None else offsets, dtype=np.int64)
    if offsets is not None and (len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or (np.diff(bounds) <= 0).any()):
        raise ValueError(f"offsets must rise from 0 to the number of tokens, {tokens}, with no empty sequence; got {bounds[:8].tolist()}.")
    return bounds


def _sequences(offsets: Offsets, tokens: int, rows: Rows) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """(its rows of q, its rows of k and v, the places of the former among the latter) of each sequence."""
    bounds, rows = bounds_of(offsets, tokens), np.arange(tokens) if rows is None else rows
    for (a, b), (first, last) in zip(pairwise(bounds), pairwise(np.searchsorted(rows, bounds)), strict=True):
        yield slice(first, last), slice(a, b), rows[first:last] - a


def check_attention(q: Array, k: Array, v: Array, H: int, G: int, rows: Rows) -> None:
    """Raise ValueError unless q (R, H d) and k, v (T, G d) fit each other and the numbers of heads, and R is the number of `rows`."""
    fits = q.ndim == k.ndim == 2 and k.shape == v.shape and H % G == 0 and q.shape[1] % H == 0
    if not fits or q.shape[1] // H * G != k.shape[1]:
        heads = f"{H} heads" if H == G else f"{H} and {G} heads"
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} must have columns for {heads} of one size.")
    if q.shape[0] != (k.shape[0] if rows is None else len(rows)):
        raise ValueError(f"attention: q {q.shape} and k {k.shape} must have as many rows{'' if rows is None else ' as `rows` names'}.")


def _probabilities(Q: Array, K: Array, n_head: int, causal: bool, places: np.ndarray, window: int | None = None) -> Array:
    """P = softmax(S), S = Q K^T / sqrt d: Q (G, n t, d), K (G, s, d) -> P (G, n t, s).

    A query sees the keys that are less than `window` away from its own place, places (t,), and if causal none after it.
    """
    S = (Q @ K.transpose(0, 2, 1)) * (1 / math.sqrt(Q.shape[-1]))
    if causal or window:
        xp = get_xp(S)
        ahead = xp.arange(S.shape[2])[None, :] - constant(places, S)[:, None]  # (t, s)
        hidden = (abs(ahead) >= (window or math.inf)) | (causal & (ahead > 0))
        S = xp.where(hidden, -math.inf, S.reshape(n_head, *hidden.shape)).reshape(S.shape)
    return softmax(S)


def _heads(x: Array, n_head: int, n_kv_head: int) -> Array:
    """(t, H d) -> (G, n t, d): one matrix for each of the G key heads, the n = H / G heads that share it stacked. A view if n is 1."""
    t, d = x.shape[0], x.shape[1] // n_head
    return x.reshape(t, n_head, d).transpose(1, 0, 2).reshape(n_kv_head, -1, d)


def _columns(x: Array, n_head: int) -> Array:
    """(G, n t, d) -> (t, H d), the inverse of `_heads`."""
    d = x.shape[2]
    return x.reshape(n_head, -1, d).transpose(1, 0, 2).reshape(-1, n_head * d)
