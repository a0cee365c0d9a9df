"""Scaled dot-product attention over sequences laid end to end (arXiv 1706.03762, section 3.2.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.functional.softmax import softmax, softmax_backward


def attention(
    q: Array, k: Array, v: Array, n_head: int, offsets: Sequence[int] | None = None, causal: bool = True, keep: bool = True
) -> tuple[Array, list[Array]]:
    """o = softmax(q k^T / sqrt d) v, for each sequence and each head on its own.

    Shapes: q, k, v (T, H d) hold H heads of d features side by side -> o (T, H d). Sequence i is the rows
    offsets[i] to offsets[i + 1] of all of them; None means that all rows are one sequence. `causal` lets a token
    see itself and what came before it in its sequence.

    Saved: the probabilities P of every sequence (H, t, t), which is t / d times the size of q. Recomputing them would
    cost one of the four products below. With keep=False nothing is kept.
    """
    check_offsets(offsets, q.shape[0])
    if q.ndim != 2 or q.shape != k.shape or q.shape != v.shape or q.shape[1] % n_head:
        raise ValueError(f"attention: q {q.shape}, k {k.shape} and v {v.shape} must be equal, with columns for {n_head} heads.")
    xp = get_xp(q, k, v)
    o = xp.empty_like(q)
    saved = []
    for rows in sequences(offsets, q.shape[0]):
        Q, K, V = _split(q[rows], n_head), _split(k[rows], n_head), _split(v[rows], n_head)  # (H, t, d)
        S = (Q @ K.transpose(0, 2, 1)) * _scale(Q)  # (H, t, t)
        if causal:
            S = xp.where(_future(S.shape[1], xp), -math.inf, S)
        P = softmax(S)
        o[rows] = _join(P @ V)
        if keep:
            saved.append(P)
    return o, saved


def attention_backward(
    do: Array, q: Array, k: Array, v: Array, saved: list[Array], n_head: int, offsets: Sequence[int] | None = None
) -> tuple[Array, Array, Array]:
    """Gradients of o = P V, P = softmax(S), S = Q K^T / sqrt d, sequence by sequence.

    dV = P^T dO         dP = dO V^T
    dS = softmax'(dP)   zero where the mask put -inf, as P is zero there
    dQ = dS K / sqrt d  dK = dS^T Q / sqrt d
    """
    xp = get_xp(do, q)
    dq, dk, dv = xp.empty_like(q), xp.empty_like(k), xp.empty_like(v)
    for rows, P in zip(sequences(offsets, q.shape[0]), saved, strict=True):
        Q, K, V, dO = (_split(z[rows], n_head) for z in (q, k, v, do))
        dv[rows] = _join(P.transpose(0, 2, 1) @ dO)  #              O = P @ V
        dS = softmax_backward(dO @ V.transpose(0, 2, 1), P)  #      P = softmax(S)
        dS *= _scale(Q)  #                                          S = Q @ K^T * scale
        dq[rows] = _join(dS @ K)
        dk[rows] = _join(dS.transpose(0, 2, 1) @ Q)
    return dq, dk, dv


def check_offsets(offsets: Sequence[int] | None, tokens: int) -> None:
    """Raise ValueError unless offsets rise from 0 to `tokens`: [0, 5, 9] is two sequences, of 5 and 4 tokens."""
    if offsets is None:
        return
    steps = np.diff(np.asarray(offsets))
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != tokens or (steps <= 0).any():
        raise ValueError(f"offsets must rise from 0 to the number of tokens, {tokens}, with no empty sequence; got {list(offsets)[:8]}.")


def sequences(offsets: Sequence[int] | None, tokens: int) -> Iterator[slice]:
    """The rows of each sequence, as slices."""
    bounds = [0, tokens] if offsets is None else [int(i) for i in offsets]
    return (slice(a, b) for a, b in pairwise(bounds))


def _split(x: Array, n_head: int) -> Array:
    """(t, H d) -> (H, t, d), a view."""
    return x.reshape(x.shape[0], n_head, -1).transpose(1, 0, 2)


def _join(x: Array) -> Array:
    """(H, t, d) -> (t, H d), the inverse of `_split`."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def _scale(Q: Array) -> float:
    return 1 / math.sqrt(Q.shape[-1])


def _future(t: int, xp: Any) -> Array:
    """(t, t) True where the column comes after the row."""
    i = xp.arange(t)
    return i[:, None] < i[None, :]
