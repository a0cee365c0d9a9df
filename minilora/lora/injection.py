"""Put LoRA into a tree of layers, and take its effect in and out: inject, merge, unmerge, disabled."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from minilora.backend import Rng, backend_name, generator, to_backend
from minilora.layers.base import Layer
from minilora.layers.embedding import Embedding
from minilora.layers.linear import Linear
from minilora.lora.adapted import adapter_parameters, check_whole, lora_layers, train_only
from minilora.lora.config import CLASSIFIERS, LoraConfig, fits
from minilora.lora.registry import adapter_of, starts


def inject(
    model: Layer, config: LoraConfig, *, rng: Rng = None, strict: bool = True, train_step: Callable[[], Any] | None = None
) -> list[str]:
    """Freeze the model and replace each targeted layer by one that adapts it. Returns the paths of the adapted layers.

    The model may be any tree of layers. What is trainable afterwards: what the adapters add, the biases that
    `config.bias` names, and the modules of `config.saved_modules`.

    Raises ValueError, before anything is changed, when a name or a pattern matches nothing (with the nearest names), when a
    rank does not fit, or when the model has adapters already. strict=False is for an adapter that was trained elsewhere, whose
    tensors tell what is there: some names may then match nothing and ranks may be beyond min(in, out), as PEFT has it.
    train_step runs the model on data, forward and backward, for the initial values that come from data ("eva", "lora_ga").
    """
    if lora_layers(model):
        raise ValueError("inject: this model has LoRA layers already; load the base model again.")
    targets = find_targets(model, config, strict)
    whole = find_modules(model, config, strict)
    for path in targets:
        if inside := [name for name in whole if f"{path}.".startswith(f"{name}.")]:
            raise ValueError(f"inject: {path} is to be adapted and, in modules_to_save, to be trained whole ({inside[0]}); name one.")
    if strict:
        _check_ranks_and_patterns(targets, config)
    rng, kinds = generator(rng), {path: adapter_of(layer, config) for path, layer in targets.items()}
    before = [(p, p.trainable, p.data) for _, p in model.parameters()]
    try:
        config, inits = starts(model, targets, config, train_step)
        adapted = {path: kinds[path].of(targets[path], config, path, init, rng=rng) for path, init in inits.items()}
    except BaseException:
        for p, trainable, data in before:
            p.trainable, p.data = trainable, data
        raise

    model.freeze()
    for path, layer in adapted.items():
        replace_module(model, path, layer)
    train_only(model, trained_paths(model, config))
    own = adapter_parameters(model)
    model.base_values = {path: p.data.copy() for path, p in model.parameters() if p.trainable and path not in own}
    model.lora_config = config  # what save_adapter writes down
    return list(adapted)


def trained_paths(model: Layer, config: LoraConfig) -> set[str]:
    """The paths of all parameters that `config` trains in a model it was injected into."""
    layers = dict(lora_layers(model))
    biased = [path for path, _ in model.parameters() if path.rpartition(".")[2] == "bias"]
    trained = set(adapter_parameters(model))
    if config.bias != "none":
        trained |= {path for path in biased if config.bias == "all" or path.removesuffix(".bias") in layers}
    for path, module in find_modules(model, config, strict=False).items():
        trained |= {f"{path}.{name}" for name, _ in module.parameters()}
    return trained


def find_targets(model: Layer, config: LoraConfig, strict: bool = True) -> dict[str, Any]:
    """{path: Linear or Embedding} that the config names, by PEFT's rules. Raises ValueError when a name matches none, or something else."""
    modules = _modules(model)
    linears = {path: layer for path, layer in modules.items() if isinstance(layer, Linear)}
    names, head = config.target_modules, getattr(model, "output_head", None)
    if names == "all-linear":
        if head is not None and head.endswith(CLASSIFIERS) and config.task_type != "SEQ_CLS":
            head = None  # to PEFT, a classifier's head is one only if the task says so
        named = [path for path in linears if path != head]
    elif isinstance(names, str):
        named = [path for path in modules if re.fullmatch(names, path)]
        if not any(isinstance(modules[path], (Linear, Embedding)) for path in named):
            raise ValueError(f"target_modules: no linear layer matches {names!r}; there are {_examples(linears)}.")
    else:
        unknown = [name for name in names if not any(_ends_with(path, name) for path in modules)]
        if unknown and (strict or len(unknown) == len(names)):
            raise ValueError(f"target_modules: no linear layer is called {unknown[0]!r}; {_nearest(unknown[0], linears)}.")
        named = [path for path in modules if path in names or (_is_named(path, names) and _in_layers(path, config))]

    excluded = _excluded(modules, config, strict)
    found = {path: modules[path] for path in named if path not in excluded and not _is_whole(path, config.saved_modules)}
    if not found:
        raise ValueError("target_modules: no linear layer is left to adapt after exclude_modules, modules_to_save and layers_to_transform.")
    for path, layer in sorted(found.items()):
        if not isinstance(layer, (Linear, Embedding)):
            kind = "shares its weight with the embedding" if layer is None else f"is not linear, but {type(layer).__name__}"
            raise ValueError(f"target_modules: {path} {kind}; only a Linear or an Embedding with a weight of its own can be adapted.")
    return found


def find_modules(model: Layer, config: LoraConfig, strict: bool = True) -> dict[str, Layer]:
    """{path: layer} of the modules that are trained whole: those whose path ends with a name, at a dot or not, as PEFT has it.

    Raises ValueError when a name matches none, and for what shares its weight: where a head is tied to the embedding, PEFT
    trains a copy of either and leaves the other as it was.
    """
    modules, names = _modules(model), config.saved_modules
    classifier = config.task_type == "SEQ_CLS"
    if classifier and not any(path.endswith(CLASSIFIERS) for path in modules):
        raise ValueError("task_type='SEQ_CLS' trains the head whole, but no module is called 'classifier' or 'score'.")
    for name in names if strict else ():
        if not any(path.endswith(name) for path in modules) and not (classifier and name in CLASSIFIERS):
            raise ValueError(f"modules_to_save: no module is called {name!r}; {_nearest(name, modules)}.")
    tied = None in modules.values()
    found = {}
    for path, layer in modules.items():
        if path.endswith(tuple(names)):
            if layer is None or (tied and _has_vocabulary(model, layer)):
                raise ValueError(f"modules_to_save: {path} cannot be trained whole, since embedding and head share their weight.")
            check_whole(path, layer)
            found[path] = layer
    return found


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
    """`with disabled(model):` the base model answers, merged or not, to the bit; afterwards all is as it was.

    Biases and modules that are trained whole are back at what they were when the adapter was injected, too.
    """
    layers: list[Any] = [layer for _, layer in model.modules() if hasattr(layer, "enabled")]  # of LoRA, or of another kind
    if not layers and not model.base_values:
        _adapters(model, "disabled")
    before = [layer.enabled for layer in layers]
    whole = [(p, p.data, model.base_values[path]) for path, p in model.parameters() if path in model.base_values]
    try:
        for layer in layers:
            layer.enabled = False
        for p, now, then in whole:
            p.data = to_backend(then, backend_name(now), now.dtype)
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
        for p, now, _ in whole:
            p.data = now


def _adapters(model: Layer, verb: str) -> list[tuple[str, Any]]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{verb}: this model has no LoRA layers; call inject or load_adapter first.")
    return layers


def _modules(model: Layer) -> dict[str, Layer | None]:
    """{path: layer} of everything below the model; a head that is the embedding's own weight has a path, but is no layer."""
    modules: dict[str, Layer | None] = {path: layer for path, layer in model.modules() if path}
    head = getattr(model, "output_head", None)
    return modules if head is None or head in modules else {**modules, head: None}


def _has_vocabulary(model: Layer, layer: Layer) -> bool:
    """Is the table of the token embeddings here, or below?"""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return any(isinstance(part, Embedding) and part.weight.data.shape[0] == size for _, part in layer.modules())


def _check_ranks_and_patterns(targets: dict[str, Any], config: LoraConfig) -> None:
    for path, layer in targets.items():
        r, (m, n) = config.rank_of(path), layer.weight.data.shape
        if r > min(m, n) and config.peft_type == "LORA":
            advice = "; task_type='SEQ_CLS' trains a classifier's head whole" if path.endswith(CLASSIFIERS) else ""
            raise ValueError(f"inject: rank {r} is beyond {path}, which is {m} x {n}{advice}.")
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(fits(key, path) for path in targets):
                raise ValueError(f"{field}: {key!r} matches none of the adapted layers; {_nearest(key, targets)}.")


def _excluded(paths: Iterable[str], config: LoraConfig, strict: bool) -> set[str]:
    """The paths that exclude_modules names."""
    names = config.exclude_modules
    if not names:
        return set()
    if isinstance(names, str):
        excluded = {path for path in paths if re.fullmatch(names, path)}
        unused = [] if excluded else [names]
    else:
        excluded = {path for path in paths if _is_named(path, names)}
        unused = [name for name in names if not any(_ends_with(path, name) for path in excluded)]
    if unused and strict:
        raise ValueError(f"exclude_modules: {unused[0]!r} matches no module, so there is nothing to exclude.")
    return excluded


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _is_named(path: str, names: Sequence[str]) -> bool:
    return any(_ends_with(path, name) for name in names)


def _is_whole(path: str, names: Sequence[str]) -> bool:
    """Is the path, or something it lies in, called by one of `names`? (Here PEFT reads them as expressions, and asks for a dot.)"""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in names)


def _in_layers(path: str, config: LoraConfig) -> bool:
    """Is the number of the path's block one of layers_to_transform? It is the first after layers_pattern, or after any two names."""
    if not config.layers_to_transform:
        return True
    given = config.layers_pattern or ()
    patterns = [rf"(?:^|.*?\.){p}" for p in ([given] if isinstance(given, str) else given)] or [r".*?\.[^.]*"]
    for pattern in patterns:
        if number := re.match(rf"{pattern}\.(?P<number>\d+)\.", path):
            return int(number["number"]) in config.layers_to_transform  # type: ignore[operator]  # a list since __post_init__
    return False


def _nearest(name: str, paths: Mapping[str, Layer | None]) -> str:
    short = sorted({part for path in paths for part in (path, path.rpartition(".")[2])})
    near = difflib.get_close_matches(name, short, n=3, cutoff=0.4)
    return f"did you mean {', '.join(map(repr, near))}?" if near else f"there are {_examples(paths)}"


def _examples(paths: Mapping[str, Layer | None]) -> str:
    names = sorted({path.rpartition(".")[2] for path in paths})
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
