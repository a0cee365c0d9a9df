"""Layer norm and RMS norm, over the features of each token."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from minilora.backend import Array, get_xp


def layer_norm(x: Array, gamma: Array, beta: Array, eps: float = 1e-5) -> tuple[Array, tuple[Array, Array]]:
    """y = gamma xhat + beta,   xhat = (x - mean) / sqrt(var + eps), mean and variance over the features (arXiv 1607.06450).

    Shapes: x (T, n), gamma (n,), beta (n,) -> y (T, n). Saved: xhat (T, n) and rstd (T, 1); recomputing both
    from x would cost two reductions over x.
    """
    xp = check_norm(x, gamma, beta)
    centred = x - x.mean(axis=1, keepdims=True)
    rstd = 1 / xp.sqrt((centred * centred).mean(axis=1, keepdims=True) + eps)
    xhat = centred * rstd
    return gamma * xhat + beta, (xhat, rstd)


def layer_norm_backward(
    dy: Array, saved: tuple[Array, Array], gamma: Array, need: Collection[str] = ("dx", "dgamma", "dbeta")
) -> tuple[Array | None, Array | None, Array | None]:
    """Gradients of y = gamma xhat + beta; dxhat = gamma dy.

        dbeta  = sum_t dy                                                        (n,)
        dgamma = sum_t dy xhat                                                   (n,)
        dx     = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat))              (T, n)

    The two means are what centring and scaling took away: dx sums to zero over the features and is orthogonal to xhat.
    """
    xhat, rstd = saved
    dbeta = dy.sum(axis=0) if "dbeta" in need else None  #            y = gamma * xhat + beta
    dgamma = (dy * xhat).sum(axis=0) if "dgamma" in need else None
    if "dx" not in need:
        return None, dgamma, dbeta
    dxhat = gamma * dy
    along = (dxhat * xhat).mean(axis=1, keepdims=True)  #             xhat = centred * rstd, rstd a function of centred
    dx = rstd * (dxhat - dxhat.mean(axis=1, keepdims=True) - xhat * along)  # centred = x - mean
    return dx, dgamma, dbeta


def rms_norm(x: Array, gamma: Array, eps: float = 1e-6) -> tuple[Array, tuple[Array, Array]]:
    """y = gamma xhat,   xhat = x / sqrt(mean(x^2) + eps) (arXiv 1910.07467). Shapes and saved as in `layer_norm`; no mean is taken off."""
    rstd = 1 / check_norm(x, gamma).sqrt((x * x).mean(axis=1, keepdims=True) + eps)
    xhat = x * rstd
    return gamma * xhat, (xhat, rstd)


def rms_norm_backward(
    dy: Array, saved: tuple[Array, Array], gamma: Array, need: Collection[str] = ("dx", "dgamma")
) -> tuple[Array | None, Array | None]:
    """dgamma = sum_t dy xhat,   dx = rstd (dxhat - xhat mean(dxhat xhat)),   dxhat = gamma dy."""
    xhat, rstd = saved
    dgamma = (dy * xhat).sum(axis=0) if "dgamma" in need else None  # y = gamma * xhat
    if "dx" not in need:
        return None, dgamma
    dxhat = gamma * dy
    dx = rstd * (dxhat - xhat * (dxhat * xhat).mean(axis=1, keepdims=True))  # xhat = x * rstd
    return dx, dgamma


def check_norm(x: Array, gamma: Array, beta: Array | None = None) -> Any:
    """The module of the arrays. Raises ValueError unless x (T, n), gamma (n,) and beta (n,) fit."""
    for name, p in (("gamma", gamma), ("beta", beta)):
        if p is not None and (x.ndim != 2 or p.shape != (x.shape[1],)):
            raise ValueError(f"norm: x has shape {x.shape}, {name} {p.shape}; x must be (tokens, n) and {name} (n,).")
    return get_xp(x, gamma, beta)
