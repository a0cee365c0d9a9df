"""Quantize the frozen weights of a model."""

from __future__ import annotations

from minilora.backend import Matrix
from minilora.layers import Layer, Linear
from minilora.quantization.half import KINDS
from minilora.quantization.nf4 import NF4

PACK = {"nf4": NF4.of}  # kind: the function that quantizes an array


def check_kind(kind: str) -> None:
    """Raise ValueError for a kind of quantization that there is not."""
    if kind in KINDS:
        raise ValueError(f"quantize={kind!r} is no longer supported; use dtype={kind!r}, for frozen weights and activations.")
    if kind not in PACK:
        raise ValueError(f"quantize is {kind!r}; choose {', '.join(map(repr, PACK))}, or '' for none.")


def quantize_model(model: Layer, kind: str = "nf4") -> list[str]:
    """Quantize the weight of every Linear ("nf4") and freeze it, but for the output head's. Returns the paths of the layers.

    Before `inject` or after it: adapters are left as they are. Weights that are quantized already stay. Raises ValueError for an unknown
    kind.
    """
    check_kind(kind)
    done = []
    for path, layer in model.modules():
        if isinstance(layer, Linear) and path != getattr(model, "output_head", None) and not isinstance(layer.weight.data, Matrix):
            layer.weight.trainable = False
            layer.weight.data = PACK[kind](layer.weight.data)
            done.append(path)
    return done
