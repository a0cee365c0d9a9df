"""LoRA's family of methods: a new one is one file here, and one line in a table below. docs/methods.md says which to choose.

The tables name what is elsewhere as "module:name"; it is loaded when a configuration asks for it, so that reading LoRA needs none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from minilora.layers.base import Layer

LAYERS = {  # (kind of layer, what asks for it: a field of the configuration, or its peft_type): the layer that takes the place
    ("Linear", "LORA"): "minilora.lora.layer:LoRALinear",
    ("Linear", "use_dora"): "minilora.family.dora:DoRALinear",
}


def adapter_of(layer: Layer, config: Any) -> Any:
    """The class that `config` puts in the place of `layer`. Raises ValueError when it asks for two, or for one that is not there."""
    asked = [field for field in dict.fromkeys(what for _, what in LAYERS) if getattr(config, field, False)] or [config.peft_type]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} exclude each other; choose one.")
    for kind in type(layer).__mro__:
        if (kind.__name__, asked[0]) in LAYERS:
            return _load(LAYERS[kind.__name__, asked[0]])
    raise ValueError(f"{asked[0]} has no way to adapt a layer of type {type(layer).__name__}.")


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
