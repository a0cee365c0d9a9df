"""Twin of `linear_cross_entropy` in functional/losses.py: one buffer for the logits of a block, and every step in place.

In 16 bits the logits, what is summed over them, and the loss are of float32: the products round their factors, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from minilora import functional as F
from minilora.backend import Array, as_like, get_xp
from minilora.kernels import cuda
from minilora.kernels.half import NARROW, WIDE, in_float32, is_half, wide
from minilora.kernels.linear import product

_LOGITS = 2**20  # how many exist at a time
_LOGITS_ON_DEVICE = 2**26


def cross_entropy(logits: Array, labels: np.ndarray | F.Labelled, times: float = 1.0) -> tuple[Array, Array]:
    """functional.cross_entropy `times` a number; of logits of 16 bits the loss is of float32, and the gradient is narrowed last."""
    loss, dlogits = F.cross_entropy(wide(logits), labels)
    return loss * times, (dlogits * times).astype(logits.dtype, copy=False)


@in_float32(WIDE, NARROW, WIDE)
def linear_cross_entropy(
    x: Array, W: Array, labels: Array, count: int | None = None, need: Collection[str] = ("dx", "dW")
) -> tuple[Array, Array | None, Array | None]:
    """As functional.linear_cross_entropy; on NumPy, where dW is needed, that one itself."""
    if is_half(x) and not is_half(W):  # a head that is trained
        loss, dx, dW = linear_cross_entropy(wide(x), W, labels, count, need)
        return loss, None if dx is None else dx.astype(x.dtype), dW
    if cuda.usable(x, W) and x.shape[0]:
        return _on_device(x, W, labels, x.shape[0] if count is None else count, need)
    if get_xp(x, W) is not np or "dW" in need or x.shape[0] == 0:
        return F.linear_cross_entropy(x, W, labels, count, need)
    F.check_ids(labels, W.shape[1], "linear_cross_entropy")
    (T, d), V = x.shape, W.shape[1]
    width = min(V, max(256, _LOGITS // T))
    buffer, product = np.empty(T * width, x.dtype), np.empty((T, d), x.dtype)
    m, total = np.full((T, 1), -np.inf, x.dtype), np.zeros((T, 1), x.dtype)
    dx = np.zeros((T, d), x.dtype) if "dx" in need else None
    for first in range(0, V, width):
        W_block = W[:, first : first + width]
        z = np.matmul(x, W_block, out=buffer[: T * W_block.shape[1]].reshape(T, -1))
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
    W_label = W.T[labels]  # (T, d)
    loss = (m[:, 0] + np.log(total[:, 0]) - np.einsum("ij,ij->i", x, W_label)).sum() / N
    if dx is not None:
        dx /= total
        dx -= W_label
        dx /= N
    return loss, dx, None


def _on_device(x: Array, W: Array, labels: Array, N: int, need: Collection[str]) -> tuple[Array, Array | None, Array | None]:
    """Two products and one kernel for each block of the vocabulary; dW needs the final maximum and sum, hence a second pass."""
    F.check_ids(labels, W.shape[1], "linear_cross_entropy")
    xp, T, V = get_xp(x), x.shape[0], W.shape[1]
    real, half, width = cuda.real_of(x), is_half(x), min(V, max(256, _LOGITS_ON_DEVICE // T))
    if width > 256:
        width -= width % 8  # so that rows of logits begin at multiples of 16 bytes; the last few are a block of their own
    m, total, shrink = xp.full((T, 1), -np.inf, dtype=real), xp.zeros((T, 1), dtype=real), xp.empty((T, 1), dtype=real)
    dx = xp.zeros(x.shape, dtype=real) if "dx" in need else None
    for first in range(0, V, width):
        W_block = W[:, first : first + width]
        n, step = W_block.shape[1], -(-W_block.shape[1] // 8) * 8  # rows begin at multiples of 16 bytes
        z = cuda.gemm(x, W_block, xp.empty((T, step), dtype=real)[:, :n])
        e = xp.empty((T, step), dtype=x.dtype)[:, :n] if half and dx is not None else None  # exp(z - m), for the next product
        given = (z, np.int64(step), np.int32(n), m, total, shrink, cuda.NULL if e is None else e, np.int64(step))
        cuda.rowwise("softmax", "online_exp", T, n, *given, like=x)
        if dx is not None:
            dx *= shrink
            cuda.gemm(z if e is None else e, W_block.T, dx, 1, 1)
    labels = as_like(labels, x)
    W_label = wide(W.T[labels])  # (T, d)
    loss = (m[:, 0] + xp.log(total[:, 0]) - (wide(x) * W_label).sum(axis=1)).sum() / N
    dW = xp.empty_like(W) if "dW" in need else None
    for first in range(0, V if dW is not None else 0, width):
        p = product(x, W[:, first : first + width])
        p -= m
        xp.exp(p, out=p)
        p /= total
        p -= labels[:, None] == xp.arange(first, first + p.shape[1])  # softmax - onehot
        cuda.gemm(x.T, p, dW[:, first : first + width], 1 / N)  # type: ignore[index]
    return loss, ((dx / total - W_label) / N).astype(x.dtype, copy=False) if dx is not None else None, dW
