"""Losses. Each returns the loss and its gradient at once: (loss, dy). The loss is a 0-d value on the arrays' backend."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from minilora.backend import Array, as_like, get_xp
from minilora.functional.embedding import check_ids, take_rows, take_rows_backward

IGNORE = -100  # the label that says "no loss here", as in PyTorch and transformers


def mse(y: Array, target: Array) -> tuple[Array, Array]:
    """loss = mean((y - target)^2) over all N elements,   dy = 2 (y - target) / N. Any shape, but the same one."""
    get_xp(y, target)
    if y.shape != target.shape:
        raise ValueError(f"mse: y has shape {y.shape} but target {target.shape}.")
    error = y - target
    return (error * error).mean(), error * (2 / error.size)


class Labelled(NamedTuple):
    """The rows of `total` that have a label, on the host (None: all), and their labels, on the host or where the model is."""

    rows: np.ndarray | None
    targets: Array
    total: int


def labelled(labels: Array | Labelled, ignore_index: int = IGNORE) -> Labelled:
    """Labels (T,) without those that do not count. They have to be on the host: counting them on a device would synchronise."""
    if isinstance(labels, Labelled):
        return labels
    if not isinstance(labels, np.ndarray):
        raise TypeError("labels must be a NumPy array: keep them on the host, they are moved when needed.")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be a one-dimensional integer array, got {labels.dtype} of shape {labels.shape}.")
    counts = labels != ignore_index
    rows = None if np.count_nonzero(counts) == counts.size else np.flatnonzero(counts)
    return Labelled(rows, labels if rows is None else labels[rows], labels.size)


def cross_entropy(logits: Array, labels: Array | Labelled, ignore_index: int = IGNORE, times: float = 1.0) -> tuple[Array, Array]:
    """loss = mean over labelled rows of (logsumexp(z_t) - z_t[label_t]),   dz_t = (softmax(z_t) - onehot(label_t)) / N.

    Shapes: logits (T, V), labels (T,) on the host -> loss (), dlogits (T, V), zero in rows labelled `ignore_index`; both `times` a factor.
    For a large vocabulary use `linear_cross_entropy`, which never holds the logits.
    """
    rows, label, T = labelled(labels, ignore_index)
    if logits.ndim != 2 or logits.shape[0] != T:
        raise ValueError(f"cross_entropy: logits have shape {logits.shape}, labels ({T},); they must be (T, V) and (T,).")
    if label.size == 0:
        raise ValueError(f"cross_entropy: no row is labelled (all {T} are {ignore_index}).")
    check_ids(label, logits.shape[1], "cross_entropy")
    xp, label = get_xp(logits), as_like(label, logits)
    z = take_rows(logits, rows)
    z = z - z.max(axis=1, keepdims=True)
    e = xp.exp(z)
    total = e.sum(axis=1, keepdims=True)
    onehot = label[:, None] == xp.arange(z.shape[1])
    loss = (xp.log(total[:, 0]) - (z * onehot).sum(axis=1)).mean()
    dlogits = take_rows_backward((e / total - onehot) / len(z), rows, T)
    return (loss, dlogits) if times == 1 else (loss * times, dlogits * times)


def linear_cross_entropy(
    x: Array, W: Array, labels: Array, count: int | None = None, need: Collection[str] = ("dx", "dW"), block: int = 8192
) -> tuple[Array, Array | None, Array | None]:
    """The head and its loss in one: z = x W, loss = (1 / N) sum_t (logsumexp(z_t) - z_t[label_t]).

    Shapes: x (T, d) the labelled rows only, W (d, V), labels (T,) -> loss (), dx (T, d), dW (d, V).
    `count` is N, when these rows are part of a larger batch over which the mean is taken; by default N = T.

    The vocabulary is taken in blocks of columns, so of the logits only (T, block) ever exist. With m the running
    maximum, what was summed under the old one is shrunk by exp(m_old - m_new) (the "online softmax",
    arXiv 1805.02867); dx rides along in the same pass, as it is a sum over the vocabulary too:

        dx = (1 / N) (sum_v softmax(z)_v W_v^T - W_label^T)
        dW = (1 / N) x^T (softmax(z) - onehot)          needs the final maximum and sum, hence a second pass
    """
    check_ids(labels, W.shape[1], "linear_cross_entropy")
    xp = get_xp(x, W)
    labels = as_like(labels, x)
    N = x.shape[0] if count is None else count
    blocks = [slice(a, min(a + block, W.shape[1])) for a in range(0, W.shape[1], block)]

    m = xp.full(x.shape[0], -np.inf, dtype=x.dtype)
    total = xp.zeros(x.shape[0], dtype=x.dtype)
    dx = xp.zeros_like(x) if "dx" in need else None
    for columns in blocks:
        z = x @ W[:, columns]
        m_old, m = m, xp.maximum(m, z.max(axis=1))
        shrink = xp.exp(m_old - m)
        e = xp.exp(z - m[:, None])
        total = total * shrink + e.sum(axis=1)
        if dx is not None:
            dx = dx * shrink[:, None] + e @ W[:, columns].T

    W_label = W.T[labels]  # (T, d)
    loss = (m + xp.log(total) - (x * W_label).sum(axis=1)).sum() / N
    if dx is not None:
        dx = (dx / total[:, None] - W_label) / N

    dW = None
    if "dW" in need:
        dW = xp.empty_like(W)
        for columns in blocks:
            p = xp.exp(x @ W[:, columns] - m[:, None]) / total[:, None]
            p -= labels[:, None] == xp.arange(columns.start, columns.stop)
            dW[:, columns] = x.T @ p / N
    return loss, dx, dW
