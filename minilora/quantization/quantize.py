"""What the frozen weights of a model are kept in: NF4 for its linear layers, or half precision for all of its matrices."""

from typing import Any

import numpy as np

from minilora.backend import Matrix
from minilora.kernels.half import HALF
from minilora.layers import Layer, Linear
from minilora.quantization.nf4 import NF4

KINDS = ("nf4",)
LARGEST = 65504.0  # float16's last number


def check_kind(kind: str) -> None:
    """Raise ValueError for a kind of quantization that there is not."""
    if kind in HALF:
        raise ValueError(f"quantize={kind!r} is no longer supported; use dtype={kind!r}, for frozen weights and activations.")
    if kind not in KINDS:
        raise ValueError(f"quantize is {kind!r}; choose {', '.join(map(repr, KINDS))}, or '' for none.")


def quantize_model(model: Layer, kind: str = "nf4") -> list[str]:
    """Quantize the weight of every Linear ("nf4") and freeze it, but for the output head's. Returns the paths of the layers.

    Before `inject` or after it: adapters are left as they are. Weights that are quantized already stay. Raises ValueError for an unknown
    kind.
    """
    check_kind(kind)
    done, head = [], getattr(model, "output_head", None) or "-"  # "pre_classifier" and "classifier.out_proj" belong to a "classifier"
    for path, layer in model.modules():
        is_head = path.partition(".")[0].endswith(head)
        if isinstance(layer, Linear) and not is_head and not isinstance(layer.weight.data, Matrix):
            layer.weight.trainable = False
            layer.weight.data = NF4.of(layer.weight.data)
            done.append(path)
    return done


def half_dtype(kind: str) -> Any:
    """The dtype. Raises ValueError for an unknown kind, ImportError where bfloat16 needs a package that is not installed."""
    if kind not in HALF:
        raise ValueError(f"unknown kind {kind!r} of half precision; choose {' or '.join(HALF)}.")
    if kind == "float16":
        return np.dtype(np.float16)
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError("bfloat16 needs ml_dtypes: pip install 'minilora[bf16]'") from None
    return np.dtype(ml_dtypes.bfloat16)


def bfloat16_or_none() -> Any:
    """bfloat16, where ml_dtypes is installed."""
    try:
        return half_dtype("bfloat16")
    except ImportError:
        return None


def to_half_precision(model: Layer, kind: str) -> None:
    """Convert every matrix of the model to "float16" or "bfloat16", vectors (biases, weights of norms) to float32, and freeze all.

    The tables of embeddings are among the matrices, so that activations are of half precision from the first; kernels/half.py says how they
    are computed with. Raises ValueError for an unknown kind, quantized weights, or numbers beyond float16's; ImportError as `half_dtype`.
    """
    dtype = half_dtype(kind)
    for path, p in model.parameters():
        if isinstance(p.data, Matrix):
            raise ValueError(f"{path} is quantized, and stays so; load the model with dtype='float32'.")
        if p.data.ndim == 2 and kind == "float16" and max(p.data.max(), -p.data.min()) > LARGEST:
            raise ValueError(f"{path} has numbers beyond float16's {LARGEST:.0f}; choose bfloat16.")
    for _, p in model.parameters():
        p.trainable = False
        p.data = p.data.astype(dtype if p.data.ndim == 2 else "float32", copy=False)
