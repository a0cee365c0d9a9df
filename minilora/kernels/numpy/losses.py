"""The head and its loss: one buffer for the logits of a block of the vocabulary, and every step in place."""

from collections.abc import Collection

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels.half import upcast
from minilora.tuned import sizes


def fits(x: Array, W: Array, labels: Array, count: int | None = None, need: Collection[str] = ("dx", "dW")) -> bool:
    """Whether the head is frozen."""
    return "dW" not in need


def linear_cross_entropy(
    x: np.ndarray, W: Array, labels: np.ndarray, count: int | None = None, need: Collection[str] = ("dx",)
) -> tuple[Array, np.ndarray | None, None]:
    """As functional.linear_cross_entropy, without dW. A head in half precision is upcast a block at a time."""
    get_xp(x, W)
    dtype, x = x.dtype, upcast(x)
    F.check_ids(labels, W.shape[1], "linear_cross_entropy")
    (T, d), V = x.shape, W.shape[1]
    width = min(V, max(256, sizes["logits"] // max(T, 1)))
    buffer, product = np.empty(T * width, x.dtype), np.empty((T, d), x.dtype)
    m, total = np.full((T, 1), -np.inf, x.dtype), np.zeros((T, 1), x.dtype)
    dx = np.zeros((T, d), x.dtype) if "dx" in need else None
    for first in range(0, V, width):
        W_block = upcast(W[:, first : first + width])
        z = np.matmul(x, W_block, out=buffer[: T * W_block.shape[1]].reshape(T, W_block.shape[1]))
        m_old, m = m, np.maximum(m, z.max(axis=1, keepdims=True))
        shrink = np.exp(m_old - m)
        z -= m
        e = np.exp(z, out=z)
        total *= shrink
        total += e @ np.ones((e.shape[1], 1), x.dtype)
        if dx is not None:
            dx *= shrink
            dx += np.matmul(e, W_block.T, out=product)

    N = T if count is None else count
    W_label = upcast(W.T[labels])  # (T, d)
    loss = (m[:, 0] + np.log(total[:, 0]) - np.einsum("ij,ij->i", x, W_label)).sum() / N
    if dx is not None:
        dx /= total
        dx -= W_label
        dx /= N
        with np.errstate(over="ignore"):  # beyond float16 there is infinity; training checks for it
            dx = dx.astype(dtype, copy=False)
    return loss, dx, None
