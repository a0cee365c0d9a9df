"""LoRA's family of methods: a new one is one file here, and one line in a table below. docs/methods.md says which to choose.

The tables name what is elsewhere as "module:name"; it is loaded when a configuration asks for it, so that reading LoRA needs none of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any

from minilora.kernels.half import is_half
from minilora.layers.base import Layer
from minilora.layers.linear import Linear
from minilora.lora.adapted import INSTEAD

Start = Callable[[Any, Any], tuple[Any, Any]]  # of a layer and a generator: the A and B that it begins with

LAYERS = {  # (kind of layer, what asks for it: a field of the configuration, or its peft_type): the layer that takes the place
    ("Linear", "LORA"): "minilora.lora.layer:LoRALinear",
    ("Linear", "use_dora"): "minilora.lora.variants.dora:DoRALinear",
    ("Embedding", "LORA"): "minilora.lora.variants.embedding:LoRAEmbedding",
    ("Linear", "VERA"): "minilora.lora.variants.vera:VeRALinear",
}

STARTS = {  # init_lora_weights: a Start, which may take more by name (niter of "pissa_niter_4", what loftq_config holds)
    True: "minilora.lora.init.initial:kaiming",
    False: "minilora.lora.init.initial:both_uniform",
    "gaussian": "minilora.lora.init.initial:gaussian",
    "seed": "minilora.lora.init.initial:seed",
    "pissa": "minilora.lora.init.pissa:pissa",
    "olora": "minilora.lora.init.olora:olora",
    "loftq": "minilora.lora.init.loftq:loftq",
    "orthogonal": "minilora.lora.init.orthogonal:orthogonal",
}
STARTS_FROM_DATA = {  # init_lora_weights: a function of the model, the targets, the configuration and a step of training
    "eva": "minilora.lora.init.eva:eva",
    "lora_ga": "minilora.lora.init.lora_ga:lora_ga",
}


def start_of(init: Any, **options: Any) -> Start:
    """The Start that a value of init_lora_weights names. Raises ValueError when there is none, or not with these options."""
    if callable(init):
        return init
    name, _, niter = init.partition("_niter_") if isinstance(init, str) else (init, "", "")
    if name not in STARTS or (niter and name != "pissa") or not (niter or "0").isdecimal():
        known = ", ".join(map(repr, [*STARTS, *STARTS_FROM_DATA]))
        raise ValueError(f"init_lora_weights is {init!r}; choose one of {known}.")
    if niter:
        options["niter"] = int(niter)
    return partial(_load(STARTS[name]), **options)


def check_start(config: Any) -> None:
    """Raise ValueError for an init_lora_weights that is not there, for options of another, and for options that it has not."""
    init = config.init_lora_weights
    function = _load(STARTS_FROM_DATA[init]) if init in STARTS_FROM_DATA else start_of(init)
    for name, value in vars(config).items():
        if name.endswith("_config") and value:
            if name != f"{init}_config":
                raise ValueError(f"{name} goes with init_lora_weights={name.removesuffix('_config')!r}, not with {init!r}.")
            known = [key for key, p in signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
            if unknown := next((key for key in value if key not in known), None):
                raise ValueError(f"{name}: there is no option {unknown!r}; known: {', '.join(known)}.")


def starts(model: Layer, targets: dict[str, Any], config: Any, train_step: Callable[[], Any] | None) -> tuple[Any, dict[str, Any]]:
    """(configuration, {path: value for the layer's init}); a start from data may change ranks, and leave targets out."""
    if hasattr(config, "starts"):  # a type of its own
        return config, config.starts(targets)
    init = config.init_lora_weights
    options = getattr(config, f"{init}_config", None) or {}
    if init not in (True, False, "gaussian"):
        for path, layer in targets.items():
            if not isinstance(layer, Linear):
                raise ValueError(f"init_lora_weights={init!r} is for linear layers; {path} is of type {type(layer).__name__}.")
            if init not in ("seed", "orthogonal") and not callable(init):
                _check_wide(layer, f"init_lora_weights={init!r}")
    if init not in STARTS_FROM_DATA:
        return config, dict.fromkeys(targets, start_of(init, **options))
    if train_step is None:
        raise ValueError(f"init_lora_weights={init!r} looks at data: give inject a train_step, which runs the model on some.")
    return _load(STARTS_FROM_DATA[init])(model, targets, config, train_step, **options)


def adapter_of(layer: Layer, config: Any) -> Any:
    """The class that `config` puts in the place of `layer`. Raises ValueError when it asks for two, or for one that is not there."""
    asked = [field for field in dict.fromkeys(what for _, what in LAYERS) if getattr(config, field, False)] or [config.peft_type]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} exclude each other; choose one.")
    for kind in type(layer).__mro__:
        if (kind.__name__, asked[0]) in LAYERS:
            if (kind.__name__, asked[0]) != ("Linear", "LORA"):
                _check_wide(layer, f"{asked[0]} on a layer of type {kind.__name__}")
            return _load(LAYERS[kind.__name__, asked[0]])
    raise ValueError(f"{asked[0]} has no way to adapt a layer of type {type(layer).__name__}.")


def config_classes() -> dict[str, Any]:
    """{peft_type: class of its configuration}."""
    return {what: _load(where).config_class for (kind, what), where in LAYERS.items() if kind == "Linear" and what.isupper()}


def _check_wide(layer: Any, what: str) -> None:
    """Raise ValueError where a method reads the weight itself, and that has 16 bits."""
    if is_half(layer.weight.data):
        raise ValueError(f"{what} needs weights of float32, these are of {layer.weight.data.dtype}; {INSTEAD}")


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
