"""Layer norm and RMS norm in blocks of rows. Sums over a row are products with a vector, or `einsum`: both beat `mean` by far."""

from collections.abc import Collection

import numpy as np

from minilora import functional as F
from minilora.kernels.numpy.blocks import row_blocks

Saved = tuple[np.ndarray, np.ndarray]  # xhat (T, n), rstd (T, 1)


def layer_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray | None, eps: float = 1e-5) -> tuple[np.ndarray, Saved]:
    """As functional.layer_norm; as functional.rms_norm without beta."""
    F.check_norm(x, gamma, beta)
    T, n = x.shape
    y, xhat, rstd = (np.empty(shape, x.dtype) for shape in ((T, n), (T, n), (T, 1)))
    average = np.full(n, 1 / n, x.dtype)
    for at in row_blocks(*x.shape):
        if beta is None:
            xhat[at] = x[at]
        else:
            np.subtract(x[at], (x[at] @ average)[:, None], out=xhat[at])
        rstd[at] = 1 / np.sqrt(np.einsum("ij,ij->i", xhat[at], xhat[at])[:, None] / n + eps)
        xhat[at] *= rstd[at]
        np.multiply(xhat[at], gamma, out=y[at])
        if beta is not None:
            y[at] += beta
    return y, (xhat, rstd)


def rms_norm(x: np.ndarray, gamma: np.ndarray, eps: float = 1e-6) -> tuple[np.ndarray, Saved]:
    """As functional.rms_norm."""
    return layer_norm(x, gamma, None, eps)


def layer_norm_backward(
    dy: np.ndarray, saved: Saved, gamma: np.ndarray, need: Collection[str] = ("dx", "dgamma", "dbeta")
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """As functional.layer_norm_backward."""
    dbeta = np.ones(len(dy), dy.dtype) @ dy if "dbeta" in need else None
    return *rms_norm_backward(dy, saved, gamma, need, centred=True), dbeta


def rms_norm_backward(
    dy: np.ndarray, saved: Saved, gamma: np.ndarray, need: Collection[str] = ("dx", "dgamma"), centred: bool = False
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """As functional.rms_norm_backward; dx less the mean of dxhat where x was centred."""
    xhat, rstd = saved
    dgamma = np.einsum("ij,ij->j", dy, xhat) if "dgamma" in need else None
    if "dx" not in need:
        return None, dgamma
    n = xhat.shape[1]
    dx, average = np.empty(xhat.shape, xhat.dtype), np.full(n, 1 / n, xhat.dtype)
    for at in row_blocks(*dy.shape):
        dxhat = np.multiply(dy[at], gamma, out=dx[at])
        mean = dxhat @ average if centred else None
        dxhat -= xhat[at] * (np.einsum("ij,ij->i", dxhat, xhat[at]) / n)[:, None]
        if mean is not None:
            dxhat -= mean[:, None]
        dxhat *= rstd[at]
    return dx, dgamma
