"""The best low-rank product: W ~ A B by truncated singular value decomposition."""

from __future__ import annotations

import math

import numpy as np

from minilora.backend import Array, get_xp


def factorize(dW: Array, r: int, x: Array | None = None) -> tuple[Array, Array]:
    """A (m, r) and B (r, n) whose product is the best rank-r approximation of dW (m, n), which has rank up to min(m, n).

    Without x, best in the Frobenius norm ||dW - A B|| (Eckart, Young 1936): with dW = U S V^T,

        A = U_r sqrt(S_r),   B = sqrt(S_r) V_r^T,   error^2 = the sum of the discarded S_i^2.

    With inputs x (T, m), best in the outputs of the layer, ||x dW - x A B||: whiten first. With x^T x / T = L^T L,
    factorise L dW and undo L: A = L^-1 U_r sqrt(S_r). x must have full column rank.

    Raises ValueError unless 1 <= r <= min(m, n).
    """
    if dW.ndim != 2 or not 1 <= r <= min(dW.shape):
        raise ValueError(f"factorize: rank {r} does not fit a matrix of shape {dW.shape}.")
    xp = get_xp(dW, x)
    L = None  # with L^T L = x^T x / T; upper triangular
    if x is not None:
        if x.ndim != 2 or x.shape[1] != dW.shape[0] or x.shape[0] < x.shape[1]:
            raise ValueError(f"factorize: x has shape {x.shape}; expected (tokens, {dW.shape[0]}) with at least {dW.shape[0]} tokens.")
        L = _cholesky(x.T @ x / x.shape[0])
    U, S, Vt = xp.linalg.svd(dW if L is None else L @ dW, full_matrices=False)
    root = xp.sqrt(S[:r])
    A, B = U[:, :r] * root, root[:, None] * Vt[:r]
    return (A if L is None else xp.linalg.solve(L, A)), B


def _cholesky(C: Array) -> Array:
    """Upper triangular L with L^T L = C. Raises ValueError when C is singular: NumPy raises LinAlgError, CuPy nothing."""
    xp = get_xp(C)
    try:
        L = xp.linalg.cholesky(C).T
    except np.linalg.LinAlgError:
        L = C * math.nan
    if not bool(xp.isfinite(L).all()):
        raise ValueError("factorize: the columns of x are not linearly independent; pass more, or more varied, inputs.")
    return L
