"""The best low-rank product: W ~ A B by truncated singular value decomposition."""

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
    check_rank(dW, r)
    xp = get_xp(dW, x)
    L = None if x is None else _whitening(x, dW.shape[0])
    U, S, Vt = xp.linalg.svd(dW if L is None else L @ dW, full_matrices=False)
    root = xp.sqrt(S[:r])
    A, B = U[:, :r] * root, root[:, None] * Vt[:r]
    return (A if L is None else xp.linalg.solve(L, A)), B


def check_rank(W: Array, r: int) -> None:
    """Raise ValueError unless W is a matrix with a product of rank r."""
    if W.ndim != 2 or not 1 <= r <= min(W.shape):
        raise ValueError(f"factorize: rank {r} does not fit a matrix of shape {W.shape}.")


def _whitening(x: Array, m: int) -> Array:
    """Upper triangular L with L^T L = x^T x / T, by x = Q R. Raises ValueError unless the columns of x are linearly independent."""
    if x.ndim != 2 or x.shape[1] != m or x.shape[0] < m:
        raise ValueError(f"factorize: x has shape {x.shape}; expected (tokens, {m}) with at least {m} tokens.")
    L = get_xp(x).linalg.qr(x / math.sqrt(x.shape[0]), mode="r")
    size = abs(L.diagonal())
    if not bool(size.min() > size.max() * m * np.finfo(L.dtype).eps):
        raise ValueError("factorize: the columns of x are not linearly independent; pass more, or more varied, inputs.")
    return L
