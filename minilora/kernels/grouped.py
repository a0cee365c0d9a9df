"""Attention that takes many short sequences at once, and long ones in blocks of queries.

The steps that NumPy and CUDA take in different ways are in numpy/attention.py and cuda/attention.py; `steps` is one of these modules:

    product, scores    a @ b of stacked matrices; scores gives float32 of half precision
    weights            (S, begin, first and last of the queries, dtype of Q) -> E (n, G, H / G t, e) and 1 / sum (..., 1), or P and None
    through_softmax    (dS, E, 1 / sum) -> E (dS - D')

Sequences of about one length make a group: their matrices are stacked in one (n, G, t, s) array, the shorter ones padded. A block of
queries sees the keys from the first to the last that one of them may see: half of a causal square is never computed, nor what no
window reaches.

E = exp(S - max) is kept rather than P = E / sum: with the queries scaled once, O = (E V) / sum, and backward, with dO' = dO / sum,

    dV = E^T dO'      dS = E (dO' V^T - D'),  D' = (row sum of E * (dO' V^T)) / sum

divide by `sum` rows of d features in place of rows of s. Beyond KEPT keys E is not kept, but computed again: memory is then linear in the
length of a sequence. In half precision, on a GPU, E is P itself, and nothing is divided later: dO / sum could be too small for float16.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, get_xp, kept_on_device
from minilora.functional.attention import bounds_of, check_attention

QUERIES = 128  # in a block, at most
SCORES = 2**21  # in a block, or a group: at most about so many
ON_DEVICE = 8, 2**6  # there both are larger by these: what counts is how few launches there are
KEPT = 192


class Places(NamedTuple):
    """The rows of an array (T, heads d) that a group takes: (n, t) of them, sequence by sequence."""

    rows: Any  # a slice, where they follow each other without a gap; else (n, t), padded with the first
    own: Any  # where among the n t those are not padding, in order; None: everywhere
    there: Any  # (n, t, 1) 1 or 0: the same as a factor; None: 1 everywhere


class Group(NamedTuple):
    """n sequences of up to s keys and t queries each. A query sees the keys first to limit, (n, t) each.

    seen: both where the arrays are; None for `first` without a window, where it is 0.
    """

    keys: Places
    queries: Places
    first: np.ndarray
    limit: np.ndarray
    seen: tuple[Any, Any]


def attention(
    steps: Any,
    q: Array,
    k: Array,
    v: Array,
    n_head: int,
    offsets: Sequence[int] | None = None,
    causal: bool = True,
    keep: bool = True,
    n_kv_head: int | None = None,
    rows: np.ndarray | None = None,
    window: int | None = None,
) -> tuple[Array, list]:
    """As functional.attention. Saved: for each group and block of queries E and 1 / sum, or None where they are computed again."""
    xp, G = get_xp(q, k, v), n_kv_head or n_head
    check_attention(q, k, v, n_head, G, rows)
    o, saved = xp.empty(q.shape, dtype=q.dtype), []
    for group in _groups(bounds_of(offsets, len(k)), rows, causal, window, n_head, xp):
        sizes = len(group.limit), G, k.shape[1] // G
        Q, K, V = _take(q, group.queries, *sizes), _take(k, group.keys, *sizes), _take(v, group.keys, *sizes)
        O = _room(o, group.queries, *sizes)
        parts = []
        for at, near in _blocks(group, n_head, xp):
            E, inverse = _weights(steps, _scaled(Q[..., at, :]), K, group, at, near)
            part = steps.product(E, V[:, :, 0, near])
            into = O[..., at, :]
            part = part.reshape(into.shape)
            if inverse is None:
                into[...] = part
            else:
                xp.multiply(part, inverse.reshape(*into.shape[:-1], 1), out=into)
            parts.append((E, inverse) if keep and K.shape[3] <= KEPT else None)
        _put(O, o, group.queries)
        if keep:
            saved.append((causal, window, parts))
    return o, saved


def attention_backward(
    steps: Any,
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    saved: Any,
    n_head: int,
    offsets: Sequence[int] | None = None,
    n_kv_head: int | None = None,
    need: Collection[str] = ("dq", "dk", "dv"),
    rows: np.ndarray | None = None,
) -> tuple[Array, Array, Array]:
    """As functional.attention_backward."""
    xp, G = get_xp(do, q), n_kv_head or n_head
    unread = xp.empty if rows is None else xp.zeros  # a sequence without a query gets no gradient
    dq = xp.empty(q.shape, dtype=q.dtype) if "dq" in need else None
    dk, dv = (unread(k.shape, dtype=k.dtype) if name in need else None for name in ("dk", "dv"))
    groups = _groups(bounds_of(offsets, len(k)), rows, *saved[0][:2], n_head, xp) if saved else []
    for group, (*_, parts) in zip(groups, saved, strict=True):
        sizes = len(group.limit), G, k.shape[1] // G
        Q, K, V = _take(q, group.queries, *sizes), _take(k, group.keys, *sizes), _take(v, group.keys, *sizes)
        dO = _take(do, group.queries, *sizes)
        if group.queries.there is not None:
            dO = (dO * group.queries.there[:, None, None]).astype(do.dtype, copy=False)  # padding has no gradient
        dQ = None if dq is None else _room(dq, group.queries, *sizes)
        dK, dV = (None if x is None else _room(x, group.keys, *sizes) for x in (dk, dv))
        blocks = list(zip(_blocks(group, n_head, xp), parts, strict=True))
        for i, ((at, near), kept) in enumerate(reversed(blocks)):  # without a window, the last sees the most keys
            Q_at = _scaled(Q[..., at, :])
            E, inverse = kept or _weights(steps, Q_at, K, group, at, near)
            dO_at = dO[..., at, :].reshape(Q_at.shape)
            if inverse is not None:
                dO_at = dO_at * inverse
            if dV is not None:
                _collect(dV, steps.product(E.swapaxes(2, 3), dO_at), near, i == 0)  # O = E @ V / sum
            if dQ is None and dK is None:
                continue
            dS = steps.scores(dO_at, V[:, :, 0, near].swapaxes(2, 3))
            dS = steps.through_softmax(dS, E, inverse)  #                       E = exp(S - max)
            if dK is not None:
                _collect(dK, steps.product(dS.swapaxes(2, 3), Q_at), near, i == 0)  # S = Q_at @ K^T
            if dQ is not None:
                part = steps.product(dS, K[:, :, 0, near])
                xp.multiply(part.reshape(dQ[..., at, :].shape), 1 / math.sqrt(Q.shape[-1]), out=dQ[..., at, :])
        for part, x, places in ((dQ, dq, group.queries), (dK, dk, group.keys), (dV, dv, group.keys)):
            if part is not None:
                _put(part, x, places)
    return dq, dk, dv


def _collect(total: Array, part: Array, near: slice, first: bool) -> None:
    """Add the gradient of the keys `near` a block to that of all, (n, G, 1, s, d); the first assigns."""
    seen = total[:, :, 0, near]
    if not first:
        seen += part
        return
    seen[...] = part
    for unseen in (total[:, :, 0, : near.start], total[:, :, 0, near.stop :]):
        if unseen.size:
            unseen[...] = 0


def _weights(steps: Any, Q: Array, K: Array, group: Group, at: slice, near: slice) -> tuple[Array, Array | None]:
    """E = exp(S - max) (n, G, H / G t, e) and 1 / sum (..., 1), or P and None; S = Q K^T where a query may look; Q is scaled."""
    first, last = (None if x is None else x[:, at] for x in group.seen)
    return steps.weights(steps.scores(Q, K[:, :, 0, near].swapaxes(2, 3)), near.start, first, last, Q.dtype)


def _blocks(group: Group, n_head: int, xp: Any) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys from the first to the last that one of them sees) of each block."""
    n, t = group.limit.shape
    queries, scores = _sizes(xp)
    step = max(16, min(queries, scores // (n * n_head * (int(group.limit.max()) + 1))))
    for a in range(0, t, step):
        at = slice(a, min(a + step, t))
        yield at, slice(int(group.first[:, at].min()), int(group.limit[:, at].max()) + 1)


def _sizes(xp: Any) -> tuple[int, int]:
    """(queries in a block, scores in a block or a group), at most."""
    return (QUERIES, SCORES) if xp is np else (QUERIES * ON_DEVICE[0], SCORES * ON_DEVICE[1])


# -- groups ------------------------------------------------------------------------------------------------------------------


@kept_on_device
def _groups(bounds: np.ndarray, rows: np.ndarray | None, causal: bool, window: int | None, n_head: int, xp: Any) -> list[Group]:
    """The groups, from the longest sequences to the shortest."""
    rows = np.arange(bounds[-1]) if rows is None else rows
    cuts = np.searchsorted(rows, bounds)
    lengths, queried = np.diff(bounds), np.diff(cuts)
    order = [int(i) for i in np.argsort(-lengths, kind="stable") if queried[i]]
    groups: list[Group] = []
    queries_most, scores_most = _sizes(xp)
    while order:
        s = int(lengths[order[0]])
        most = max(1, scores_most // (n_head * s * min(s, queries_most)))
        members = [i for i in order[:most] if lengths[i] >= 0.8 * s or s <= 8]
        order = order[len(members) :]
        queries, query_there = _rows_of(cuts, members)
        ends = (lengths[members] - 1)[:, None]
        place = rows[queries] - bounds[members][:, None]
        first, limit = seen_keys(place, ends, causal, window)
        seen = None if window is None else xp.asarray(first.astype(np.int32)), xp.asarray(limit.astype(np.int32))
        groups.append(Group(_places(*_rows_of(bounds, members), xp), _places(queries, query_there, xp), first, limit, seen))
    return groups


def seen_keys(place: np.ndarray, ends: np.ndarray, causal: bool, window: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last key that each query sees, both of the shape of `place`, its own; ends: the last key of its sequence."""
    window = window or int(ends.max()) + 1
    return np.maximum(place - window + 1, 0), np.minimum(place + (0 if causal else window - 1), ends)


def _rows_of(bounds: np.ndarray, members: list[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """(n, longest) the rows of each member, padded with its first, and where they are its own (None: everywhere)."""
    first, count = bounds[members][:, None], np.diff(bounds)[members][:, None]
    step = np.arange(count.max())[None, :]
    there = step < count
    return first + np.where(there, step, 0), None if there.all() else there


def _places(index: np.ndarray, there: np.ndarray | None, xp: Any) -> Places:
    """Index arrays go to where they are needed once for each batch, not in every layer."""
    flat = index.reshape(-1)
    if there is not None:
        return Places(*(xp.asarray(x) for x in (index, np.flatnonzero(there), there[:, :, None].astype(np.int8))))
    if (np.diff(flat) == 1).all():
        return Places(slice(int(flat[0]), int(flat[-1]) + 1), None, None)
    return Places(xp.asarray(index), None, None)


def _take(x: Array, places: Places, n: int, G: int, d: int) -> Array:
    """(n, G, heads / G, t, d) of x (T, heads d). A view where the rows are a slice: what is written there is in x."""
    return x[places.rows].reshape(n, -1, G, x.shape[1] // (G * d), d).transpose(0, 2, 3, 1, 4)


def _room(x: Array, places: Places, n: int, G: int, d: int) -> Array:
    """As `_take`, to be written to and `_put`: what is in x does not matter."""
    if isinstance(places.rows, slice):
        return _take(x, places, n, G, d)
    return get_xp(x).empty((n, G, x.shape[1] // (G * d), places.rows.shape[1], d), dtype=x.dtype)


def _put(part: Array, x: Array, places: Places) -> None:
    """The reverse of `_take`: x[rows] = part, without padding."""
    if isinstance(places.rows, slice):
        return
    rows = part.transpose(0, 3, 1, 2, 4).reshape(places.rows.size, -1)
    index = places.rows.reshape(-1)
    if places.own is None:
        x[index] = rows
    else:
        x[index[places.own]] = rows[places.own]


def _scaled(Q: Array) -> Array:
    """Q / sqrt d, (n, G, H / G t, d): the heads of a group stacked."""
    n, G, _, _, d = Q.shape
    return (Q * (1 / math.sqrt(d))).astype(Q.dtype, copy=False).reshape(n, G, -1, d)
