"""Layer norm and RMS norm in blocks of rows. Sums over a row are products with a vector, or `einsum`: both beat `mean` by far."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from minilora import functional as F
from minilora.kernels.numpy.blocks import row_blocks

Saved = tuple[np.ndarray, np.ndarray]  # xhat (T, n), rstd (T, 1)


def layer_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, eps: float = 1e-5) -> tuple[np.ndarray, Saved]:
    """As functional.layer_norm."""
    return _forward(x, gamma, beta, eps)


def rms_norm(x: np.ndarray, gamma: np.ndarray, eps: float = 1e-6) -> tuple[np.ndarray, Saved]:
    """As functional.rms_norm."""
    return _forward(x, gamma, None, eps)


def layer_norm_backward(
    dy: np.ndarray, saved: Saved, gamma: np.ndarray, need: Collection[str] = ("dx", "dgamma", "dbeta")
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """As functional.layer_norm_backward."""
    dbeta = np.ones(len(dy), dy.dtype) @ dy if "dbeta" in need else None
    return *_backward(dy, saved, gamma, need, True), dbeta


def rms_norm_backward(
    dy: np.ndarray, saved: Saved, gamma: np.ndarray, need: Collection[str] = ("dx", "dgamma")
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """As functional.rms_norm_backward."""
    return _backward(dy, saved, gamma, need, False)


def _forward(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray | None, eps: float) -> tuple[np.ndarray, Saved]:
    F.check_norm(x, gamma, beta)
    y, xhat, rstd, average = _empty(x)
    for at in row_blocks(*x.shape):
        if beta is None:
            xhat[at] = x[at]
        else:
            np.subtract(x[at], (x[at] @ average)[:, None], out=xhat[at])
        _scale(xhat[at], rstd[at], eps)
        np.multiply(xhat[at], gamma, out=y[at])
        if beta is not None:
            y[at] += beta
    return y, (xhat, rstd)


def _backward(
    dy: np.ndarray, saved: Saved, gamma: np.ndarray, need: Collection[str], centred: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat)), the first mean only where x was centred; and dgamma."""
    xhat, rstd = saved
    dgamma = np.einsum("ij,ij->j", dy, xhat) if "dgamma" in need else None
    if "dx" not in need:
        return None, dgamma
    dx, _, _, average = _empty(xhat)
    for at in row_blocks(*dy.shape):
        dxhat = np.multiply(dy[at], gamma, out=dx[at])
        mean = dxhat @ average if centred else None
        along = np.einsum("ij,ij->i", dxhat, xhat[at])
        along /= xhat.shape[1]
        dxhat -= xhat[at] * along[:, None]
        if mean is not None:
            dxhat -= mean[:, None]
        dxhat *= rstd[at]
    return dx, dgamma


def _empty(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Room for y, xhat and rstd, and the vector whose product with a row is its mean."""
    T, n = x.shape
    return np.empty((T, n), x.dtype), np.empty((T, n), x.dtype), np.empty((T, 1), x.dtype), np.full(n, 1 / n, x.dtype)


def _scale(x: np.ndarray, rstd: np.ndarray, eps: float) -> None:
    """rstd = 1 / sqrt(mean(x^2) + eps) for each row;  x *= rstd."""
    np.divide(np.einsum("ij,ij->i", x, x)[:, None], x.shape[1], out=rstd)
    rstd += eps
    np.sqrt(rstd, out=rstd)
    np.divide(1, rstd, out=rstd)
    x *= rstd
