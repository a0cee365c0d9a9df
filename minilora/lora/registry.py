"""The tables of methods and initialisers: a new one is a file and a line here. docs/methods.md says which to choose.

The tables name what is elsewhere as "module:name". It is loaded when a configuration needs it, so that reading LoRA needs none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

METHODS = {  # peft_type: the configuration, which says what it adapts and trains (`Config` in injection.py)
    "LORA": "minilora.lora.config:LoraConfig",
    "VERA": "minilora.lora.variants.vera:VeraConfig",
    "BOTTLENECK": "minilora.adapters.bottleneck:BottleneckConfig",
    "PARTIAL": "minilora.adapters.partial:PartialConfig",
}

VARIANTS = {  # field of LoraConfig that selects the variant ("" without any): {type of layer: the class that adapts it}
    "": {"Linear": "minilora.lora.layer:LoRALinear", "Embedding": "minilora.lora.variants.embedding:LoRAEmbedding"},
    "use_dora": {"Linear": "minilora.lora.variants.dora:DoRALinear"},
}

INITIALISERS = {  # init_lora_weights: f(layer, generator, **options) -> (A, B)
    True: "minilora.lora.init.initial:kaiming",
    False: "minilora.lora.init.initial:both_uniform",
    "gaussian": "minilora.lora.init.initial:gaussian",
    "normal": "minilora.lora.init.initial:normal",
    "pissa": "minilora.lora.init.pissa:pissa",
    "olora": "minilora.lora.init.olora:olora",
    "loftq": "minilora.lora.init.loftq:loftq",
    "orthogonal": "minilora.lora.init.orthogonal:orthogonal",
}

DATA_INITIALISERS = {  # init_lora_weights: f(model, targets, config, train_step, **options) -> (config, {path: an initialiser as above})
    "eva": "minilora.lora.init.eva:eva",
    "lora_ga": "minilora.lora.init.lora_ga:lora_ga",
}


def load(where: Any) -> Any:
    """What "module:name" names; anything but a string is returned unchanged."""
    if not isinstance(where, str):
        return where
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


def config_classes() -> dict[str, Any]:
    """{peft_type: class of its configuration}."""
    return {peft_type: load(where) for peft_type, where in METHODS.items()}
