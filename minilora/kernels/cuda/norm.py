"""Layer norm and RMS norm with one launch forward and one for dx (norm.cu), a block of threads for each row."""

from collections.abc import Collection
from functools import partial
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import cuda
from minilora.kernels.half import upcast

ALL = ("dx", "dgamma", "dbeta")


def layer_norm(x: Array, gamma: Array, beta: Array | None, eps: float = 1e-5) -> tuple[Array, tuple[Array, Array]]:
    """As functional.layer_norm; as functional.rms_norm without beta."""
    xp, n = F.check_norm(x, gamma, beta), x.shape[1]
    x = xp.ascontiguousarray(x)
    y, xhat, rstd = xp.empty_like(x), xp.empty_like(x), xp.empty((len(x), 1), dtype=cuda.real_of(x))
    args = (x, gamma, cuda.NULL if beta is None else beta, cuda.real_of(x)(eps), np.int32(n))
    cuda.rowwise("norm", "norm_forward", len(x), n * x.itemsize // 16, *args, y, xhat, rstd)
    return y, (xhat, rstd)


def rms_norm(x: Array, gamma: Array, eps: float = 1e-6) -> tuple[Array, tuple[Array, Array]]:
    """As functional.rms_norm."""
    return layer_norm(x, gamma, None, eps)


def _backward(
    dy: Array, saved: tuple[Array, Array], gamma: Array, need: Collection[str] = ALL, *, reference: Any
) -> tuple[Array | None, ...]:
    """As the reference, which computes the gradients of parameters: sums over rows, for which half precision is upcast."""
    of_parameters, dx = set(need) - {"dx"}, None
    _, *gradients = reference(*(upcast((dy, saved)) if of_parameters else (dy, saved)), gamma, of_parameters)
    if "dx" in need:
        xp, n = get_xp(dy), dy.shape[1]
        dx = xp.empty_like(saved[0])
        args = (xp.ascontiguousarray(dy), *saved, gamma, np.int32(reference is F.layer_norm_backward), np.int32(n))
        cuda.rowwise("norm", "norm_backward", len(dy), n * dx.itemsize // 16, *args, dx)
    return dx, *gradients


layer_norm_backward, rms_norm_backward = (partial(_backward, reference=f) for f in (F.layer_norm_backward, F.rms_norm_backward))
