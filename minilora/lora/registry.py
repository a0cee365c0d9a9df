"""The tables of methods and initialisers: a new one is a file and a line here. docs/methods.md says which to choose.

The tables name what is elsewhere as "module:name". It is loaded when a configuration needs it, so that reading LoRA needs none of it.
"""

import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
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
    "pissa": "minilora.lora.init.weight:pissa",
    "olora": "minilora.lora.init.weight:olora",
    "loftq": "minilora.lora.init.weight:loftq",
    "orthogonal": "minilora.lora.init.initial:orthogonal",
}

DATA_INITIALISERS = {  # init_lora_weights: f(model, targets, config, train_step, **options) -> (config, {path: an initialiser as above})
    "eva": "minilora.lora.init.data:eva",
    "lora_ga": "minilora.lora.init.data:lora_ga",
}

Initialiser = Callable[[Any, Any], tuple[Any, Any]]  # (layer, generator) -> A (in, r) and B (r, out)


def load(where: Any) -> Any:
    """What "module:name" names; anything but a string is returned unchanged."""
    if not isinstance(where, str):
        return where
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)


def initialiser(init: Any, **options: Any) -> Initialiser:
    """The initialiser that a value of init_lora_weights names; a function is one itself. Raises ValueError for an unknown name."""
    if callable(init):
        return init
    if init == "seed":
        raise ValueError("init_lora_weights='seed' has a new name: 'normal'.")
    name = init
    if match := re.fullmatch(r"pissa_niter_(\d+)", str(init)):
        name, options["niter"] = "pissa", int(match[1])
    if name not in INITIALISERS:
        known = ", ".join(map(repr, [*INITIALISERS, *DATA_INITIALISERS]))
        raise ValueError(f"init_lora_weights is {init!r}; choose one of {known}.")
    return partial(load(INITIALISERS[name]), **options)


def check_initialiser(init: Any, options: dict[str, dict[str, Any] | None]) -> None:
    """Raise ValueError for an unknown init_lora_weights, and for options {"<name>_config": {...}} that it does not have."""
    function = load(DATA_INITIALISERS[init]) if init in DATA_INITIALISERS else initialiser(init)
    known = [key for key, p in signature(function).parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
    for field, values in options.items():
        if values and field != f"{init}_config":
            raise ValueError(f"{field} goes with init_lora_weights={field.removesuffix('_config')!r}, not with {init!r}.")
        if unknown := set(values or ()) - set(known):
            raise ValueError(f"{field}: there is no option {min(unknown)!r}; known: {', '.join(known)}.")
