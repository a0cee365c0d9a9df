"""From a value of init_lora_weights to the initial A and B of each layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from typing import Any

from minilora.layers.base import Layer
from minilora.layers.linear import Linear
from minilora.lora.adapted import check_float32
from minilora.lora.registry import DATA_INITIALISERS, INITIALISERS, load

Initialiser = Callable[[Any, Any], tuple[Any, Any]]  # (layer, generator) -> A (in, r) and B (r, out)


def initialiser(init: Any, **options: Any) -> Initialiser:
    """The initialiser that a value of init_lora_weights names; a function is one itself.

    "pissa_niter_4" is "pissa" with the option niter=4. Raises ValueError for an unknown name.
    """
    if callable(init):
        return init
    if init == "seed":
        raise ValueError("init_lora_weights='seed' has a new name: 'normal'.")
    name, _, niter = init.partition("_niter_") if isinstance(init, str) else (init, "", "")
    if name not in INITIALISERS or (niter and name != "pissa") or not (niter or "0").isdecimal():
        known = ", ".join(map(repr, [*INITIALISERS, *DATA_INITIALISERS]))
        raise ValueError(f"init_lora_weights is {init!r}; choose one of {known}.")
    if niter:
        options["niter"] = int(niter)
    return partial(load(INITIALISERS[name]), **options)


def check_initialiser(init: Any, options: dict[str, dict[str, Any] | None]) -> None:
    """Raise ValueError for an unknown init_lora_weights, for options of another one, and for options that it does not have.

    options   {"<name>_config": the options of the initialiser of this name}
    """
    function = load(DATA_INITIALISERS[init]) if init in DATA_INITIALISERS else initialiser(init)
    for field, values in options.items():
        if not values:
            continue
        if field != f"{init}_config":
            raise ValueError(f"{field} goes with init_lora_weights={field.removesuffix('_config')!r}, not with {init!r}.")
        known = [key for key, p in signature(function).parameters.items() if p.kind is Parameter.KEYWORD_ONLY]
        if unknown := next((key for key in values if key not in known), None):
            raise ValueError(f"{field}: there is no option {unknown!r}; known: {', '.join(known)}.")


def initialisers(
    model: Layer, targets: dict[str, Any], config: Any, train_step: Callable[[], Any] | None
) -> tuple[Any, dict[str, Initialiser]]:
    """(configuration, {path: initialiser}). An initialiser that reads data may change ranks, and leave targets out."""
    init = config.init_lora_weights
    options = getattr(config, f"{init}_config", None) or {}
    if init not in DATA_INITIALISERS:
        return config, dict.fromkeys(targets, initialiser(init, **options))
    if train_step is None:
        raise ValueError(f"init_lora_weights={init!r} reads data: pass a train_step to inject, which runs the model on some.")
    for path, layer in targets.items():
        if not isinstance(layer, Linear):
            raise ValueError(f"init_lora_weights={init!r} is for linear layers; {path} is of type {type(layer).__name__}.")
        check_float32(layer.weight.data, f"init_lora_weights={init!r}")
    return load(DATA_INITIALISERS[init])(model, targets, config, train_step, **options)
