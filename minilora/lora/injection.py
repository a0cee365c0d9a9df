"""Put any adapter into any tree of layers, fold it into the weights, and switch it off: inject, merge, unmerge, disabled."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from minilora.backend import Array, Rng, backend_name, generator, to_backend
from minilora.kernels.half import upcast
from minilora.layers.base import Layer, Parameter
from minilora.lora.layer import Adapted


class Config(Protocol):
    """What `inject` needs of a configuration: LoraConfig, VeraConfig, BottleneckConfig, PartialConfig, or another one."""

    def targets(self, model: Layer, strict: bool = True) -> dict[str, Any]:
        """{path: layer} to replace. Raises ValueError when a name matches nothing."""

    def trained(self, model: Layer, adapted: Collection[str], strict: bool = True) -> set[str]:
        """The paths of the model's own parameters that are trained, where the layers at the paths `adapted` are replaced."""

    def adapters(self, model: Layer, targets: dict[str, Any], rng: Any, train_step: Callable[[], Any] | None) -> tuple[Any, dict[str, Any]]:
        """The configuration, with what was found from data, and {path: the layer that replaces the target}."""


@dataclass
class Adaptation:
    """What `inject` did to a model, which keeps it as its attribute `adaptation`."""

    config: Any = None
    base_values: dict[str, Array] = field(default_factory=dict)  # {path: array}: the model's own trained parameters, before training


def adaptation(model: Layer) -> Adaptation:
    """What `inject` did to the model; an empty Adaptation if nothing."""
    return getattr(model, "adaptation", None) or Adaptation()


def lora_layers(model: Layer) -> list[tuple[str, Any]]:
    """(path, layer) of every Adapted layer in the model."""
    return [(path, layer) for path, layer in model.modules() if isinstance(layer, Adapted)]


def adapter_parameters(model: Layer) -> dict[str, Parameter]:
    """{path: parameter} that the adapters in the model train."""
    return {f"{path}.{name}": getattr(layer, name) for path, layer in lora_layers(model) for name in layer.trains}


def inject(model: Layer, config: Config, *, rng: Rng = None, strict: bool = True, train_step: Callable[[], Any] | None = None) -> list[str]:
    """Freeze the model and replace each target of the configuration by a layer that adapts it. Returns the paths of these layers.

    The model may be any tree of layers. Trainable afterwards: what the adapters add, and the model's own parameters that `config` names.
    `adaptation(model)` then holds the configuration, and the values of these parameters before training.

    rng          an integer or a generator, for the initial values
    strict       False for an adapter that was trained elsewhere, whose tensors tell what is there: some names may then match nothing, and
                 ranks may be beyond min(in, out), as in PEFT
    train_step   runs the model on data, forward and backward, for initialisers that read data ("eva", "lora_ga")

    Raises ValueError, before anything is changed, when a name or a pattern matches nothing (with the nearest names), when a rank does not
    fit, or when the model has been adapted already.
    """
    if adaptation(model).config is not None or lora_layers(model):
        what = "LoRA layers" if lora_layers(model) else "been adapted"
        raise ValueError(f"inject: this model has {what} already; load the base model again.")
    own = {path for path, _ in model.parameters()}
    targets = config.targets(model, strict)
    trained = config.trained(model, targets, strict)
    if both := next((path for path in targets if f"{path}.weight" in trained), None):
        raise ValueError(f"inject: {both} is to be adapted and to be fully trained; name it in one place.")
    if not targets and not trained:
        raise ValueError("inject: nothing is left to train; name something in train or modules_to_save.")

    values = [(p, p.trainable, p.data) for _, p in model.parameters()]
    try:
        config, adapters = config.adapters(model, targets, generator(rng), train_step)
    except BaseException:
        for p, trainable, data in values:
            p.trainable, p.data = trainable, data
        raise
    trained = config.trained(model, adapters, strict=False)
    for path, layer in adapters.items():
        model.replace(path, layer)
    for path, p in model.parameters():
        p.trainable = path in trained or path not in own
        if p.trainable:
            p.data = upcast(p.data)  # float32 where it is of half precision
    base_values = {path: p.data.copy() for path, p in model.parameters() if path in trained}
    model.adaptation = Adaptation(config, base_values)  # type: ignore[attr-defined]  # the model may be any Layer
    return list(adapters)


def merge(model: Layer) -> dict[str, float]:
    """Fold every adapter into its layer. Returns {path: largest change of a weight}; a 0 is an adapter that never moved."""
    return {path: layer.merge() for path, layer in _adapters(model, "merge")}


def unmerge(model: Layer) -> None:
    """Undo `merge`, exactly, since the weights were not touched."""
    for _, layer in _adapters(model, "unmerge"):
        layer.merged = None


@contextmanager
def disabled(model: Layer) -> Iterator[Layer]:
    """`with disabled(model):` runs the base model, merged or not, to the bit; afterwards everything is as before.

    The model's own trained parameters (biases, modules_to_save) have their values before training, too.
    """
    base_values = adaptation(model).base_values
    layers: list[Any] = [layer for _, layer in model.modules() if hasattr(layer, "enabled")]
    if not layers and not base_values:
        _adapters(model, "disabled")
    before = [layer.enabled for layer in layers]
    own = [(p, p.data, base_values[path]) for path, p in model.parameters() if path in base_values]
    try:
        for layer in layers:
            layer.enabled = False
        for p, now, then in own:
            p.data = to_backend(then, backend_name(now), now.dtype)
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
        for p, now, _ in own:
            p.data = now


def _adapters(model: Layer, verb: str) -> list[tuple[str, Any]]:
    if not (layers := lora_layers(model)):
        raise ValueError(f"{verb}: this model has no LoRA layers; call inject or load_adapter first.")
    return layers
