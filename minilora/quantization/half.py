"""Half precision for a whole model: float16 and bfloat16 (kernels/half.py says how they are computed with)."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.backend import Matrix
from minilora.layers import Layer

KINDS = ("float16", "bfloat16")
LARGEST = 65504.0  # float16's last number


def dtype_of(kind: str) -> Any:
    """The dtype. Raises ValueError for an unknown kind, ImportError where bfloat16 needs a package that is not installed."""
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} of half precision; choose {' or '.join(KINDS)}.")
    if kind == "float16":
        return np.dtype(np.float16)
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError("bfloat16 needs ml_dtypes: pip install 'minilora[bf16]'") from None
    return np.dtype(ml_dtypes.bfloat16)


def to_half_precision(model: Layer, kind: str) -> None:
    """Convert every matrix of the model to "float16" or "bfloat16", vectors (biases, weights of norms) to float32, and freeze all.

    The tables of embeddings are among the matrices, so that activations are of half precision from the first. Raises ValueError for an
    unknown kind, quantized weights, or numbers beyond float16's; ImportError where bfloat16 needs a package that is not installed.
    """
    dtype = dtype_of(kind)
    for path, p in model.parameters():
        if isinstance(p.data, Matrix):
            raise ValueError(f"{path} is quantized, and stays so; load the model with dtype='float32'.")
        if p.data.ndim == 2 and kind == "float16" and max(p.data.max(), -p.data.min()) > LARGEST:
            raise ValueError(f"{path} has numbers beyond float16's {LARGEST:.0f}; choose bfloat16.")
    for _, p in model.parameters():
        p.trainable = False
        p.data = p.data.astype(dtype if p.data.ndim == 2 else "float32", copy=False)
