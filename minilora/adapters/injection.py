"""`inject` for every configuration: it puts adapters into a tree of layers, or makes some of its own parameters trainable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minilora import lora
from minilora.adapters.bottleneck import BottleneckLinear
from minilora.adapters.config import NON_LINEARITIES, BottleneckConfig, PartialConfig
from minilora.backend import Rng, generator
from minilora.layers import Layer, LayerNorm, Linear, RMSNorm
from minilora.lora.adapted import train_only
from minilora.lora.config import CLASSIFIERS, LoraConfig
from minilora.lora.injection import find_modules, find_targets, replace_module

# What projects into the residual stream, twice a block: in BERT, in GPT-2, and both in Llama.
PROJECTIONS = ("output.dense", "c_proj", "o_proj", "down_proj")


def inject(
    model: Layer,
    config: LoraConfig | PartialConfig,
    *,
    rng: Rng = None,
    strict: bool = True,
    train_step: Callable[[], Any] | None = None,
) -> list[str]:
    """Adapt the model as the configuration says: LoraConfig, BottleneckConfig or PartialConfig. Returns the paths of the adapted layers.

    The model is frozen first. Trainable afterwards, for a BottleneckConfig: the bottlenecks put after each target; for both: what `train`
    and `modules_to_save` name. For a LoraConfig, for `strict` and `train_step`, see `lora.inject`.
    Raises ValueError, before anything is changed, when a name matches nothing or the model has been adapted already.
    """
    if isinstance(model.lora_config, PartialConfig) or (model.lora_config is not None and not isinstance(config, LoraConfig)):
        kind = "LoRA layers" if isinstance(model.lora_config, LoraConfig) else "been adapted"
        raise ValueError(f"inject: this model has {kind} already; load the base model again.")
    if isinstance(config, LoraConfig):
        return lora.inject(model, config, rng=rng, strict=strict, train_step=train_step)

    own = {path for path, _ in model.parameters()}
    trained = trained_paths(model, config)
    targets = find_projections(model, config, strict) if isinstance(config, BottleneckConfig) else {}
    for path in targets:
        if f"{path}.weight" in trained:
            raise ValueError(f"inject: {path} is to be adapted and to be trained whole; name one.")
    if not targets and not trained:
        raise ValueError("inject: nothing is left to train; name something in train or modules_to_save.")

    model.freeze()
    rng = generator(rng)
    if isinstance(config, BottleneckConfig):
        for path, layer in targets.items():
            act = NON_LINEARITIES[config.non_linearity]()
            replace_module(model, path, BottleneckLinear(layer, config.size(layer.out_features), act, config.init_std, rng=rng))
    train_only(model, trained | {path for path, _ in model.parameters() if path not in own})
    model.base_values = {path: p.data.copy() for path, p in model.parameters() if path in trained}
    model.lora_config = config
    return list(targets)


def trained_paths(model: Layer, config: PartialConfig) -> set[str]:
    """The paths of the model's own parameters that the configuration trains. Raises ValueError when a name matches nothing."""
    modules = dict(model.modules())
    head = getattr(model, "output_head", None)
    whole = list(find_modules(model, LoraConfig(modules_to_save=config.modules_to_save)))
    if "head" in config.train or (head in modules and head.endswith(CLASSIFIERS)):
        if head not in modules:
            why = "names no output head" if head is None else f"has no head of its own: {head} shares its weight with the embedding"
            raise ValueError(f"train: this model {why}; name what to train in modules_to_save.")
        whole.append(head)
    if "norm" in config.train:
        norms = [path for path, layer in modules.items() if isinstance(layer, (LayerNorm, RMSNorm))]
        if not norms:
            raise ValueError("train: this model has no layer norm.")
        whole += norms
    trained = {f"{path}.{name}" for path in whole for name, _ in modules[path].parameters()}
    if "bias" in config.train:
        biases = {path for path, _ in model.parameters() if path.rpartition(".")[2] == "bias"}
        if not biases:
            raise ValueError("train: this model has no bias.")
        trained |= biases
    return trained


def find_projections(model: Layer, config: BottleneckConfig, strict: bool = True) -> dict[str, Linear]:
    """{path: Linear} that a bottleneck is put after. Raises ValueError when a name matches no Linear."""
    names = config.target_modules
    if names is None:
        names = [name for name in PROJECTIONS if any(f".{path}".endswith(f".{name}") for path, _ in model.modules())]
        if not names:
            raise ValueError(f"target_modules: nothing here is called {' or '.join(PROJECTIONS)}; name the layers to adapt.")
    task = "SEQ_CLS" if getattr(model, "output_head", "").endswith(CLASSIFIERS) else None  # then "all-linear" leaves the head out
    found = find_targets(model, LoraConfig(target_modules=names, modules_to_save=config.modules_to_save, task_type=task), strict)
    if odd := sorted(path for path, layer in found.items() if not isinstance(layer, Linear)):
        raise ValueError(f"target_modules: {odd[0]} is not linear, but {type(found[odd[0]]).__name__}; a bottleneck follows a Linear.")
    return found


def bottlenecks(model: Layer) -> list[tuple[str, BottleneckLinear]]:
    """(path, layer) of every BottleneckLinear in the model."""
    return [(path, layer) for path, layer in model.modules() if isinstance(layer, BottleneckLinear)]
