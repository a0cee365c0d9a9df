"""Put the frozen weights of a model into fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from minilora.family.half import KINDS, Half
from minilora.family.nf4 import NF4
from minilora.family.packed import is_packed
from minilora.layers import Layer, Linear

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
