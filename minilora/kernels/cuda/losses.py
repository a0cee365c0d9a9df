"""The head and its loss: two products and one kernel (softmax.cu) for each block of the vocabulary.

In half precision the logits, what is summed over them, and the loss are of float32: only the factors of products are rounded.
"""

from collections.abc import Collection

import numpy as np

from minilora import functional as F
from minilora.backend import Array, as_like, get_xp
from minilora.kernels import cuda
from minilora.kernels.cuda.linear import product
from minilora.kernels.half import is_half, upcast

LOGITS = 2**26  # how many exist at a time


def linear_cross_entropy(
    x: Array, W: Array, labels: Array, count: int | None = None, need: Collection[str] = ("dx", "dW")
) -> tuple[Array, Array | None, Array | None]:
    """As functional.linear_cross_entropy; dW needs the final maximum and sum, hence a second pass."""
    F.check_ids(labels, W.shape[1], "linear_cross_entropy")
    xp, T, V = get_xp(x, W), x.shape[0], W.shape[1]
    N = T if count is None else count
    real, half, width = cuda.real_of(x), is_half(x), min(V, max(256, LOGITS // max(T, 1)))
    if width > 256:
        width -= width % 8  # so that rows of logits begin at multiples of 16 bytes; the last few are a block of their own
    m, total, shrink = xp.full((T, 1), -np.inf, dtype=real), xp.zeros((T, 1), dtype=real), xp.empty((T, 1), dtype=real)
    dx = xp.zeros(x.shape, dtype=real) if "dx" in need else None
    for first in range(0, V, width):
        W_block = W[:, first : first + width]
        n, step = W_block.shape[1], -(-W_block.shape[1] // 8) * 8  # rows begin at multiples of 16 bytes
        z = cuda.gemm(x, W_block, xp.empty((T, step), dtype=real)[:, :n])
        e = xp.empty((T, step), dtype=x.dtype)[:, :n] if half and dx is not None else None  # exp(z - m), for the next product
        args = (z, np.int64(step), np.int32(n), m, total, shrink, cuda.NULL if e is None else e, np.int64(step))
        cuda.rowwise("softmax", "online_exp", T, n, *args, like=x)
        if dx is not None:
            dx *= shrink
            cuda.gemm(z if e is None else e, W_block.T, dx, 1, 1)
    labels = as_like(labels, x)
    W_label = upcast(W.T[labels])  # (T, d)
    loss = (m[:, 0] + xp.log(total[:, 0]) - (upcast(x) * W_label).sum(axis=1)).sum() / N
    dW = xp.empty_like(W) if "dW" in need else None
    for first in range(0, V if dW is not None else 0, width):
        p = product(x, W[:, first : first + width])
        p -= m
        xp.exp(p, out=p)
        p /= total
        p -= labels[:, None] == xp.arange(first, first + p.shape[1])  # softmax - onehot
        cuda.gemm(x.T, p, dW[:, first : first + width], 1 / N)  # type: ignore[index]
    return loss, ((dx / total - W_label) / N).astype(x.dtype, copy=False) if dx is not None else None, dW
