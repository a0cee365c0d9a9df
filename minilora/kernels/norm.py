"""Twins of functional/norm.py in blocks of rows. Sums over a row are products with a vector, or `einsum`: both beat `mean` by far."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import cuda
from minilora.kernels.blocks import row_blocks
from minilora.kernels.half import NARROW, WIDE, in_float32, wide


@in_float32(NARROW, (NARROW, WIDE))
def layer_norm(x: Array, gamma: Array, beta: Array, eps: float = 1e-5) -> tuple[Array, tuple[Array, Array]]:
    """As functional.layer_norm."""
    if cuda.usable(x, real=(gamma, beta)) and _fit(x, gamma, beta):
        return _on_device(x, gamma, beta, eps)
    if get_xp(x, gamma, beta) is not np or x.ndim != 2:
        return F.layer_norm(x, gamma, beta, eps)
    y, xhat, rstd, average = _empty(x)
    for at in row_blocks(*x.shape):
        np.subtract(x[at], (x[at] @ average)[:, None], out=xhat[at])
        _scale(xhat[at], rstd[at], eps)
        np.multiply(xhat[at], gamma, out=y[at])
        y[at] += beta
    return y, (xhat, rstd)


@in_float32(NARROW, (NARROW, WIDE))
def rms_norm(x: Array, gamma: Array, eps: float = 1e-6) -> tuple[Array, tuple[Array, Array]]:
    """As functional.rms_norm."""
    if cuda.usable(x, real=(gamma,)) and _fit(x, gamma):
        return _on_device(x, gamma, None, eps)
    if get_xp(x, gamma) is not np or x.ndim != 2:
        return F.rms_norm(x, gamma, eps)
    y, xhat, rstd, _ = _empty(x)
    for at in row_blocks(*x.shape):
        xhat[at] = x[at]
        _scale(xhat[at], rstd[at], eps)
        np.multiply(xhat[at], gamma, out=y[at])
    return y, (xhat, rstd)


@in_float32(NARROW, WIDE, WIDE)
def layer_norm_backward(
    dy: Array, saved: tuple[Array, Array], gamma: Array, need: Collection[str] = ("dx", "dgamma", "dbeta")
) -> tuple[Array | None, Array | None, Array | None]:
    """As functional.layer_norm_backward."""
    xhat, rstd = saved
    if cuda.usable(dy, xhat, real=(gamma, rstd)):
        rest = _of_parameters(F.layer_norm_backward, dy, saved, gamma, {"dgamma", "dbeta"} & set(need))  # two sums over rows
        return _dx_on_device(dy, saved, gamma, True) if "dx" in need else None, *rest
    if get_xp(dy, xhat) is not np:
        return F.layer_norm_backward(dy, saved, gamma, need)
    dbeta = np.ones(len(dy), dy.dtype) @ dy if "dbeta" in need else None
    dgamma = np.einsum("ij,ij->j", dy, xhat) if "dgamma" in need else None
    if "dx" not in need:
        return None, dgamma, dbeta
    dx, _, _, average = _empty(xhat)
    for at in row_blocks(*dy.shape):
        dxhat = np.multiply(dy[at], gamma, out=dx[at])
        mean = dxhat @ average
        _project(dxhat, xhat[at])  #      dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat))
        dxhat -= mean[:, None]
        dxhat *= rstd[at]
    return dx, dgamma, dbeta


@in_float32(NARROW, WIDE)
def rms_norm_backward(
    dy: Array, saved: tuple[Array, Array], gamma: Array, need: Collection[str] = ("dx", "dgamma")
) -> tuple[Array | None, Array | None]:
    """As functional.rms_norm_backward."""
    xhat, rstd = saved
    if cuda.usable(dy, xhat, real=(gamma, rstd)):
        (dgamma,) = _of_parameters(F.rms_norm_backward, dy, saved, gamma, {"dgamma"} & set(need))
        return _dx_on_device(dy, saved, gamma, False) if "dx" in need else None, dgamma
    if get_xp(dy, xhat) is not np:
        return F.rms_norm_backward(dy, saved, gamma, need)
    dgamma = np.einsum("ij,ij->j", dy, xhat) if "dgamma" in need else None
    if "dx" not in need:
        return None, dgamma
    dx = np.empty_like(xhat)
    for at in row_blocks(*dy.shape):
        dxhat = np.multiply(dy[at], gamma, out=dx[at])
        _project(dxhat, xhat[at])
        dxhat *= rstd[at]
    return dx, dgamma


def _fit(x: Array, *of_features: Array) -> bool:
    """Do the shapes? Where they do not, the pair has the words."""
    return x.ndim == 2 and all(p.shape == (x.shape[1],) for p in of_features)


def _on_device(x: Array, gamma: Array, beta: Array | None, eps: float) -> tuple[Array, tuple[Array, Array]]:
    xp, n = get_xp(x), x.shape[1]
    x = xp.ascontiguousarray(x)
    y, xhat, rstd = xp.empty_like(x), xp.empty_like(x), xp.empty((len(x), 1), dtype=cuda.real_of(x))
    given = (x, gamma, cuda.NULL if beta is None else beta, cuda.real_of(x)(eps), np.int32(n))
    cuda.rowwise("norm", "norm_forward", len(x), n * x.itemsize // 16, *given, y, xhat, rstd)
    return y, (xhat, rstd)


def _of_parameters(pair: Any, dy: Array, saved: tuple[Array, Array], gamma: Array, need: set[str]) -> Any:
    """The gradients of parameters, by the pair: sums over rows, so that 16 bits are widened first."""
    if need:
        dy, saved = wide(dy), (wide(saved[0]), saved[1])
    return pair(dy, saved, gamma, need)[1:]


def _dx_on_device(dy: Array, saved: tuple[Array, Array], gamma: Array, centred: bool) -> Array:
    xp, n = get_xp(dy), dy.shape[1]
    dx = xp.empty_like(saved[0])
    given = (xp.ascontiguousarray(dy), *saved, gamma, np.int32(centred), np.int32(n))
    cuda.rowwise("norm", "norm_backward", len(dy), n * dx.itemsize // 16, *given, dx)
    return dx


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


def _project(dxhat: np.ndarray, xhat: np.ndarray) -> None:
    """dxhat -= xhat mean(dxhat xhat): what lay along xhat is taken off each row."""
    along = np.einsum("ij,ij->i", dxhat, xhat)
    along /= xhat.shape[1]
    dxhat -= xhat * along[:, None]
