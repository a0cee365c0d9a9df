"""Layer norm and RMS norm with one launch forward and one for dx (norm.cu), a block of threads for each row."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import cuda
from minilora.kernels.half import upcast


def layer_norm(x: Array, gamma: Array, beta: Array, eps: float = 1e-5) -> tuple[Array, tuple[Array, Array]]:
    """As functional.layer_norm."""
    return _forward(x, gamma, beta, eps)


def rms_norm(x: Array, gamma: Array, eps: float = 1e-6) -> tuple[Array, tuple[Array, Array]]:
    """As functional.rms_norm."""
    return _forward(x, gamma, None, eps)


def layer_norm_backward(
    dy: Array, saved: tuple[Array, Array], gamma: Array, need: Collection[str] = ("dx", "dgamma", "dbeta")
) -> tuple[Array | None, Array | None, Array | None]:
    """As functional.layer_norm_backward."""
    dgamma, dbeta = _of_parameters(F.layer_norm_backward, dy, saved, gamma, {"dgamma", "dbeta"} & set(need))
    return _dx(dy, saved, gamma, True) if "dx" in need else None, dgamma, dbeta


def rms_norm_backward(
    dy: Array, saved: tuple[Array, Array], gamma: Array, need: Collection[str] = ("dx", "dgamma")
) -> tuple[Array | None, Array | None]:
    """As functional.rms_norm_backward."""
    (dgamma,) = _of_parameters(F.rms_norm_backward, dy, saved, gamma, {"dgamma"} & set(need))
    return _dx(dy, saved, gamma, False) if "dx" in need else None, dgamma


def _forward(x: Array, gamma: Array, beta: Array | None, eps: float) -> tuple[Array, tuple[Array, Array]]:
    xp, n = F.check_norm(x, gamma, beta), x.shape[1]
    x = xp.ascontiguousarray(x)
    y, xhat, rstd = xp.empty_like(x), xp.empty_like(x), xp.empty((len(x), 1), dtype=cuda.real_of(x))
    args = (x, gamma, cuda.NULL if beta is None else beta, cuda.real_of(x)(eps), np.int32(n))
    cuda.rowwise("norm", "norm_forward", len(x), n * x.itemsize // 16, *args, y, xhat, rstd)
    return y, (xhat, rstd)


def _of_parameters(reference: Any, dy: Array, saved: tuple[Array, Array], gamma: Array, need: set[str]) -> Any:
    """The gradients of parameters, by the reference: sums over rows, for which half precision is upcast."""
    if need:
        dy, saved = upcast(dy), upcast(saved)
    return reference(dy, saved, gamma, need)[1:]


def _dx(dy: Array, saved: tuple[Array, Array], gamma: Array, centred: bool) -> Array:
    xp, n = get_xp(dy), dy.shape[1]
    dx = xp.empty_like(saved[0])
    args = (xp.ascontiguousarray(dy), *saved, gamma, np.int32(centred), np.int32(n))
    cuda.rowwise("norm", "norm_backward", len(dy), n * dx.itemsize // 16, *args, dx)
    return dx
