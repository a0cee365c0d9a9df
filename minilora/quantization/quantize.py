"""Put the frozen weights of a model into fewer bits: those of linear layers (quantize_model), or all, and with them the activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from minilora.layers import Layer, Linear
from minilora.quantization.half import END, KINDS, Half, dtype_of
from minilora.quantization.nf4 import NF4
from minilora.quantization.packed import is_packed

PACK: dict[str, Callable[[Any], Any]] = {"nf4": NF4.of, **{kind: partial(Half.of, kind=kind) for kind in KINDS}}


def quantize_model(model: Layer, kind: str = "nf4") -> list[str]:
    """Pack the weight of every Linear ("nf4", "float16", "bfloat16") and freeze it, but for the output head's. Returns the layers' paths.

    Before `inject` or after it: adapters are left as they are. Weights that are packed already stay. Raises ValueError for an unknown
    kind, ImportError where bfloat16 needs what is not installed.
    """
    if kind not in PACK:
        raise ValueError(f"quantize is {kind!r}; choose {', '.join(map(repr, PACK))}.")
    done = []
    for path, layer in model.modules():
        if isinstance(layer, Linear) and path != getattr(model, "output_head", None) and not is_packed(layer.weight.data):
            layer.weight.trainable = False
            layer.weight.data = PACK[kind](layer.weight.data)
            done.append(path)
    return done


def narrow_model(model: Layer, kind: str) -> None:
    """Make every matrix of the model "float16" or "bfloat16", and freeze it; vectors (biases, and the weights of norms) become float32.

    The tables of embeddings are among the matrices, so that activations are of 16 bits from the first (kernels/half.py). Raises ValueError
    for an unknown kind, quantized weights, or numbers beyond float16's; ImportError where bfloat16 needs what is not installed.
    """
    dtype = dtype_of(kind)
    for path, p in model.parameters():
        if is_packed(p.data):
            raise ValueError(f"{path} is quantized, and stays so; load the model with dtype='float32'.")
        if p.data.ndim == 2 and kind == "float16" and max(p.data.max(), -p.data.min()) > END:
            raise ValueError(f"{path} has numbers beyond float16's 65504; choose bfloat16.")
    for _, p in model.parameters():
        p.trainable = False
        p.data = p.data.astype(dtype if p.data.ndim == 2 else "float32", copy=False)
