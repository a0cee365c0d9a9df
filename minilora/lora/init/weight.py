"""Initialisers that read the weight. With PiSSA and OLoRA its largest part is trained; the rest is frozen: s A B is subtracted from W.

PiSSA (arXiv 2404.02948):   W = U S V^T,   A = U_r sqrt(S_r / s),          B = sqrt(S_r / s) V_r^T
OLoRA (arXiv 2406.01775):   W^T = Q R,     A = (first r rows of R)^T,      B = (first r columns of Q)^T

With LoftQ (arXiv 2310.08659, algorithm 1) the weight is quantized, and A B is what that loses:

    repeat:  Q = NF4(W - s A B),   s A B = the best rank-r approximation of W - Q

Q becomes the layer's weight: it is frozen, saved as the base, and used while the adapter is off.
"""

from typing import Any

import numpy as np

from minilora.backend import Array, Matrix, backend_name, get_xp, to_backend
from minilora.lora.factorization import check_rank, factorize
from minilora.lora.layer import check_float32
from minilora.quantization.nf4 import NF4
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
    check_rank(W, r)
    qr = get_xp(W).linalg.qr
    Q, _ = qr(W @ to_backend(rng.standard_normal((W.shape[1], r)), backend_name(W), W.dtype))
    for _ in range(niter):
        Q, _ = qr(W @ qr(W.T @ Q)[0])
    A, B = factorize(Q.T @ W, r)
    return Q @ A, B


def olora(layer: Any, rng: np.random.Generator) -> tuple[Array, Array]:
    """A and B of `layer`; sets layer.offset. Raises ValueError for r beyond min(in, out), or half-precision weights."""
    check_float32(layer.weight.data, "init_lora_weights='olora'")
    W, r = dense(layer.weight.data), layer.r
    check_rank(W, r)
    Q, R = get_xp(W).linalg.qr(W.T)
    A, B = R[:r].T, Q[:, :r].T
    layer.offset = Offset(A, B, layer.scaling)
    return A, B


def loftq(layer: Any, rng: np.random.Generator, *, loftq_bits: int = 4, loftq_iter: int = 1) -> tuple[Array, Array]:
    """A and B of `layer`, whose weight becomes NF4. PEFT leaves out the scaling s here, and double quantization of Q.

    Raises ValueError for other than 4 bits, less than one round, a quantized or half-precision weight, or r beyond min(in, out).
    """
    W, s = layer.weight.data, layer.scaling
    if loftq_bits != 4 or loftq_iter < 1:
        raise ValueError(f"loftq: loftq_bits={loftq_bits}, loftq_iter={loftq_iter}; supported: 4 bits, at least one iteration.")
    if isinstance(W, Matrix):
        raise ValueError("loftq: the weight is quantized already; load the model without.")
    check_float32(W, "init_lora_weights='loftq'")
    rest = W
    for _ in range(loftq_iter):
        Q = NF4.of(rest)
        A, B = factorize((W - Q.dense()) / s, layer.r)
        rest = W - s * (A @ B)
    layer.weight.data = Q
    return A, B
