"""Put LoRA into a tree of layers, and take its effect in and out: inject, merge, unmerge, disabled."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from minilora.backend import Rng, generator
from minilora.layers.base import Layer
from minilora.layers.linear import Linear
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear, lora_layers


def inject(model: Layer, config: LoraConfig, *, rng: Rng = None) -> list[str]:
    """Freeze the model and replace each targeted Linear by a LoRALinear. Returns the paths of the adapted layers.

    The model may be any tree of layers. What is trainable afterwards: every lora_A and lora_B, the biases that
    `config.bias` names, and `config.modules_to_save`.

    Raises ValueError, before anything is changed, when a name matches nothing (with the nearest names), when a rank does
    not fit, or when the model has adapters already.
    """
    if lora_layers(model):
        raise ValueError("inject: this model has LoRA layers already; load the base model again.")
    targets = find_targets(model, config)
    saved_modules = find_modules(model, config.modules_to_save or ())
    for path, layer in targets.items():
        r = config.rank_of(path)
        if r > min(layer.in_features, layer.out_features):
            raise ValueError(f"inject: rank {r} is beyond {path}, which is {layer.in_features} x {layer.out_features}.")

    model.freeze()
    rng = generator(rng)
    for path, layer in targets.items():
        adapted = LoRALinear(
            layer, config.rank_of(path), config.alpha_of(path), config.lora_dropout, config.use_rslora, config.init_lora_weights, rng=rng
        )
        if config.bias == "lora_only" and adapted.bias is not None:
            adapted.bias.trainable = True
        replace_module(model, path, adapted)
    if config.bias == "all":
        for path, p in model.parameters():
            if path.rpartition(".")[2] == "bias":
                p.trainable = True
    for module in saved_modules.values():
        module.unfreeze()
    model.lora_config = config  # what save_adapter writes down
    return list(targets)


def find_targets(model: Layer, config: LoraConfig) -> dict[str, Linear]:
    """{path: Linear} that the config names. Raises ValueError when a name matches no Linear."""
    linears = {path: layer for path, layer in model.modules() if isinstance(layer, Linear) and path}
    names = config.target_modules
    if names == "all-linear":
        head = getattr(model, "output_head", None)  # as in PEFT, the layer that makes the logits is left out
        found = {path: layer for path, layer in linears.items() if path != head}
    elif isinstance(names, str):
        found = {path: layer for path, layer in linears.items() if re.fullmatch(names, path)}
        if not found:
            raise ValueError(f"target_modules: no linear layer matches {names!r}; there are {_examples(linears)}.")
    else:
        for name in names:
            if not any(_ends_with(path, name) for path in linears):
                raise ValueError(f"target_modules: no linear layer is called {name!r}; {_nearest(name, linears)}.")
        found = {path: layer for path, layer in linears.items() if any(_ends_with(path, name) for name in names)}
        found = {path: layer for path, layer in found.items() if _in_layers(path, config.layers_to_transform)}
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        found = {path: layer for path, layer in found.items() if not re.fullmatch(exclude, path)}
    elif exclude:
        found = {path: layer for path, layer in found.items() if not any(_ends_with(path, name) for name in exclude)}
    if not found:
        raise ValueError("target_modules: no linear layer is left to adapt after exclude_modules and layers_to_transform.")
    return found


def find_modules(model: Layer, names: Sequence[str]) -> dict[str, Layer]:
    """{path: layer} for whole modules by name. Raises ValueError when a name matches none."""
    modules = {path: layer for path, layer in model.modules() if path}
    for name in names:
        if not any(_ends_with(path, name) for path in modules):
            raise ValueError(f"modules_to_save: no module is called {name!r}; {_nearest(name, modules)}.")
    return {path: layer for path, layer in modules.items() if any(_ends_with(path, name) for name in names)}


def replace_module(model: Layer, path: str, new: Layer) -> None:
    """Set the layer at a dotted path ("h.0.attn.c_attn"; a number is a place in a list)."""
    *parents, name = path.split(".")
    owner = model
    for part in parents:
        owner = owner[int(part)] if isinstance(owner, list) else getattr(owner, part)
    if isinstance(owner, list):
        owner[int(name)] = new
    else:
        setattr(owner, name, new)


def merge(model: Layer) -> dict[str, float]:
    """Fold every adapter into its layer. Returns {path: largest change of a weight}; a 0 is an adapter that never moved."""
    return {path: layer.merge() for path, layer in _adapters(model, "merge")}


def unmerge(model: Layer) -> None:
    """Undo `merge`, exactly."""
    for _, layer in _adapters(model, "unmerge"):
        layer.unmerge()


@contextmanager
def disabled(model: Layer) -> Iterator[Layer]:
    """`with disabled(model):` the base model answers, merged or not, to the bit; afterwards all is as it was."""
    layers = [layer for _, layer in _adapters(model, "disabled")]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def _adapters(model: Layer, verb: str) -> list[tuple[str, LoRALinear]]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{verb}: this model has no LoRA layers; call inject or load_adapter first.")
    return layers


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _in_layers(path: str, layers: int | Sequence[int] | None) -> bool:
    """Is the first number in the path one of `layers`?"""
    if layers is None:
        return True
    number = re.search(r"(?:^|\.)(\d+)\.", path)
    return number is not None and int(number[1]) in ([layers] if isinstance(layers, int) else list(layers))


def _nearest(name: str, paths: dict[str, Linear] | dict[str, Layer]) -> str:
    short = sorted({part for path in paths for part in (path, path.rpartition(".")[2])})
    near = difflib.get_close_matches(name, short, n=3, cutoff=0.4)
    return f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {_examples(paths)}"


def _examples(paths: dict[str, Linear] | dict[str, Layer]) -> str:
    names = sorted({path.rpartition(".")[2] for path in paths})
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
