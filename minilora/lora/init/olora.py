"""OLoRA: initialise with orthonormal columns (arXiv 2406.01775).

W^T = Q R,   A = (first r rows of R)^T,   B = (first r columns of Q)^T,   and s A B is subtracted from W
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.lora.adapted import check_float32
from minilora.quantization.residual import Offset, dense


def olora(layer: Any, rng: np.random.Generator) -> tuple[Array, Array]:
    """A and B of `layer`; sets layer.offset. Raises ValueError for r beyond min(in, out), or half-precision weights."""
    check_float32(layer.weight.data, "init_lora_weights='olora'")
    W = dense(layer.weight.data)
    if layer.r > min(W.shape):
        raise ValueError(f"olora: rank {layer.r} does not fit a matrix of shape {W.shape}.")
    Q, R = get_xp(W).linalg.qr(W.T)
    A, B = R[: layer.r].T, Q[:, : layer.r].T
    layer.offset = Offset(A, B, layer.scaling)
    return A, B
