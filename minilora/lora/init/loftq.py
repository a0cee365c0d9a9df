"""LoftQ: quantize W, and initialise A B with what that loses (arXiv 2310.08659, algorithm 1).

    repeat:  Q = NF4(W - s A B),   s A B = the best rank-r approximation of W - Q

Q becomes the layer's weight: it is frozen, saved as the base, and used while the adapter is off.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.backend import Array, Matrix
from minilora.lora.factorization import factorize
from minilora.lora.layer import check_float32
from minilora.quantization.nf4 import NF4


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
