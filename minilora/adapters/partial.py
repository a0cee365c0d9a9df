"""PartialConfig: train some of the model's own parameters, and freeze the rest."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from minilora.layers import Layer, LayerNorm, RMSNorm
from minilora.lora.targets import CLASSIFIERS, biases, check_names, find_modules

KINDS = {"bias": "biases", "norm": "layer norms", "head": "the head"}


@dataclass
class PartialConfig:
    """Partial tuning, for `inject`: no layer is replaced.

    train            of "bias" (every bias: BitFit, arXiv 2106.10199), "norm" (every layer norm) and "head" (the output head).
                     The head of a classifier is always trained, since it is new
    modules_to_save  names of modules that are fully trained as well, as in LoraConfig

    Raises ValueError for an invalid value.
    """

    peft_type: ClassVar[str] = "PARTIAL"  # in adapter_config.json; not one of PEFT's

    train: Sequence[str] = ("head",)
    modules_to_save: Sequence[str] | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        self.train = check_names(name, "train", self.train)
        self.modules_to_save = check_names(name, "modules_to_save", self.modules_to_save or ()) or None
        for kind in self.train:
            if kind not in KINDS:
                raise ValueError(f"{name}: train names {kind!r}; choose from {', '.join(KINDS)}, or name it in modules_to_save.")

    def targets(self, model: Layer, strict: bool = True) -> dict[str, Any]:
        return {}

    def adapters(self, model: Layer, targets: dict[str, Any], rng: Any, train_step: Callable[[], Any] | None) -> tuple[Any, dict[str, Any]]:
        return self, {}

    def trained(self, model: Layer, adapted: Collection[str], strict: bool = True) -> set[str]:
        """The paths of the model's own parameters that are trained. Raises ValueError when a name, or one of `train`, matches nothing."""
        modules = dict(model.modules())
        head = getattr(model, "output_head", None)
        full = list(find_modules(model, self.modules_to_save or ()))
        if "head" in self.train or (head in modules and head.endswith(CLASSIFIERS)):
            if head not in modules:
                why = "names no output head" if head is None else f"has no head of its own: {head} shares its weight with the embedding"
                raise ValueError(f"train: this model {why}; name what to train in modules_to_save.")
            full += find_modules(model, [head])  # by the ends of names, as in PEFT: DistilBERT's "pre_classifier" too
        if "norm" in self.train:
            full += (norms := [path for path, layer in modules.items() if isinstance(layer, (LayerNorm, RMSNorm))])
            if not norms:
                raise ValueError("train: this model has no layer norm.")
        paths = {f"{path}.{name}" for path in full for name, _ in modules[path].parameters()}
        if "bias" not in self.train:
            return paths
        if not (found := biases(model)):
            raise ValueError("train: this model has no bias.")
        return paths | found

    @property
    def method(self) -> str:
        """The name of the method, for people."""
        return " and ".join(self._full()) or "the head"

    def _full(self) -> list[str]:
        return [*(KINDS[kind] for kind in self.train), *(self.modules_to_save or ())]
