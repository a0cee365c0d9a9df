"""LoRA on large arrays: the low-rank product is added to the dense one block by block, and the bias along with it."""

import numpy as np

from minilora import functional as F
from minilora.backend import Array
from minilora.kernels.numpy.blocks import row_blocks
from minilora.tuned import sizes


def fits(x: Array, W: Array, b: Array | None, A: Array, B: Array, s: float, mask: Array | None = None) -> bool:
    """Whether x and y together are larger than a block: below that the reference is as fast."""
    return len(x) * sum(W.shape) >= sizes["block"] and x.ndim == 2 and x.dtype == A.dtype


def lora_linear(
    x: np.ndarray, W: Array, b: np.ndarray | None, A: np.ndarray, B: np.ndarray, s: float, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As functional.lora_linear."""
    F.check_lora(W, A, B)
    y = F.linear(x, W, None)
    u = (x if mask is None else x * mask) @ A
    if b is None:
        _add_product(y, s * u, B)
    else:  # y += [s u, 1] @ [B; b]: one pass for both
        r = u.shape[1]
        su_1 = np.ones((len(u), r + 1), u.dtype)
        np.multiply(u, s, out=su_1[:, :r])
        _add_product(y, su_1, np.concatenate([B, b[None]]))
    return y, u


def _add_product(y: np.ndarray, u: np.ndarray, B: np.ndarray) -> None:
    """y += u @ B, without an array of the size of y."""
    for at in row_blocks(*y.shape):
        y[at] += u[at] @ B


lora_linear_backward = F.lora_linear_backward
