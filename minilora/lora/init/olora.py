"""OLoRA: begin with orthonormal columns (arXiv 2406.01775).

W^T = Q R,   A = (first r rows of R)^T,   B = (first r columns of Q)^T,   and s A B is taken off W
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.quantization.residual import Offset, dense


def olora(layer: Any, rng: np.random.Generator) -> tuple[Array, Array]:
    """A and B of `layer`, and layer.start. Raises ValueError where r is beyond min(in, out)."""
    W = dense(layer.weight.data)
    if layer.r > min(W.shape):
        raise ValueError(f"olora: rank {layer.r} does not fit a matrix of shape {W.shape}.")
    Q, R = get_xp(W).linalg.qr(W.T)
    A, B = R[: layer.r].T, Q[:, : layer.r].T
    layer.start = Offset(A, B, layer.scaling)
    return A, B
