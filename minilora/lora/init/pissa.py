"""PiSSA: initialise with the principal part of the weight (arXiv 2404.02948).

    W = U S V^T,   A = U_r sqrt(S_r / s),   B = sqrt(S_r / s) V_r^T,   and s A B is subtracted from W

The directions in which W is largest are trained; the rest is frozen.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.backend import Array, get_xp, to_backend
from minilora.lora.adapted import check_float32
from minilora.lora.factorization import factorize
from minilora.quantization.residual import Offset, dense


def pissa(layer: Any, rng: np.random.Generator, *, niter: int | None = None) -> tuple[Array, Array]:
    """A and B of `layer`; sets layer.offset. niter: the number of subspace iterations, in place of a full decomposition.

    "pissa_niter_4" is much cheaper for a large weight, and about as good. Raises ValueError for r beyond min(in, out), or half-precision
    weights.
    """
    check_float32(layer.weight.data, "init_lora_weights='pissa'")
    W, s = dense(layer.weight.data), layer.scaling
    A, B = factorize(W / s, layer.r) if niter is None else approximate(W / s, layer.r, niter, rng)
    layer.offset = Offset(A, B, s)
    return A, B


def approximate(W: Array, r: int, niter: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """`factorize` within the subspace that niter rounds of W W^T find from a random one (arXiv 0909.4061, algorithm 4.4)."""
    if not 1 <= r <= min(W.shape):
        raise ValueError(f"pissa: rank {r} does not fit a matrix of shape {W.shape}.")
    xp = get_xp(W)
    Q, _ = xp.linalg.qr(W @ to_backend(rng.standard_normal((W.shape[1], r)), "numpy" if xp is np else "cupy", W.dtype))
    for _ in range(niter):
        Q, _ = xp.linalg.qr(W @ xp.linalg.qr(W.T @ Q)[0])
    A, B = factorize(Q.T @ W, r)
    return Q @ A, B
