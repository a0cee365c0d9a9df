"""LoraConfig: which layers to adapt, and how. Field names, defaults and meaning are those of PEFT's LoraConfig."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from minilora.layers.base import Layer
from minilora.lora.registry import DATA_INITIALISERS, VARIANTS, check_initialiser, initialiser, load
from minilora.lora.targets import CLASSIFIERS, biases, check_names, find_modules, find_targets, fits, nearest


@dataclass
class LoraConfig:
    """LoRA, for `inject`.

    r                   rank of A B, at least 1 and at most min(in, out) of every adapted layer
    lora_alpha          the update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)
    target_modules      names, a regular expression, or "all-linear": see targets.py. A fully trained module is never adapted
    exclude_modules     names or a regular expression, as in target_modules; they win
    layers_to_transform number of the block to adapt, or a list of them; None is all. Only with a list of names, and a name that is a whole
                        path is adapted in any case
    layers_pattern      name of the list in which layers_to_transform counts ("h", "layers"); None is the first number in the path
    rank_pattern        {name or expression: r} for exceptions from r; alpha_pattern likewise. The first that fits counts
    lora_dropout        probability of dropping an input of the low-rank branch, in training
    use_rslora          scale by lora_alpha / sqrt(r) (arXiv 2312.03732)
    init_lora_weights   the initialiser of A and B, see registry.py and docs/methods.md. True: A Kaiming-uniform(a = sqrt 5), B zero
    eva_config, lora_ga_config, loftq_config   options by name of "eva", "lora_ga" and "loftq"
    use_dora            True: DoRA (arXiv 2402.09353), with the gradient of the paper and PEFT. "exact": with the full gradient
    bias                "none", "all" or "lora_only": which biases are trained too
    modules_to_save     names of modules that are fully trained and saved with the adapter: see targets.py
    task_type           None, "CAUSAL_LM", "SEQ_CLS" or "FEATURE_EXTRACTION". With "SEQ_CLS" the head of a classifier ("classifier" or
                        "score") is fully trained, as if named in modules_to_save. With None it is a Linear like any other
    fan_in_fan_out      accepted for compatibility with PEFT, without effect: each model knows the orientation of its file

    Raises ValueError for an invalid value. Fields of PEFT that are not listed here do not exist: nothing is ignored.
    """

    peft_type: ClassVar[str] = "LORA"
    not_in_file: ClassVar[tuple[str, ...]] = ()  # fields that PEFT's configuration of this type does not have
    choices: ClassVar[dict[str, tuple[Any, ...]]] = {
        "use_rslora": (True, False),
        "use_dora": (True, False, "exact"),
        "bias": ("none", "all", "lora_only"),
        "task_type": (None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"),
    }
    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    eva_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    use_dora: bool | str = False
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    task_type: str | None = None
    fan_in_fan_out: bool = False
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        who = type(self).__name__
        for r in (self.r, *self.rank_pattern.values()):
            if type(r) is not int or r < 1:
                raise ValueError(f"{who}: the rank r must be an integer of at least 1, got {r!r} (in r or rank_pattern).")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise ValueError(f"{who}: lora_alpha must be a positive number, got {alpha!r} (in lora_alpha or alpha_pattern).")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"{who}: lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1.")
        for name, choices in self.choices.items():
            if getattr(self, name) not in choices:
                *first, last = map(repr, choices)
                raise ValueError(f"{who}: {name} is {getattr(self, name)!r}; choose {', '.join(first)} or {last}.")
        check_initialiser(self.init_lora_weights, {name: value for name, value in vars(self).items() if name.endswith("_config")})
        self._check_names(who)

    def _check_names(self, who: str) -> None:
        """Turn what names layers into lists, and check names, expressions and what goes together."""
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = "all-linear"
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and (name == "modules_to_save" or not isinstance(value, str)):
                setattr(self, name, check_names(who, name, value))
        if isinstance(self.layers_to_transform, int):
            self.layers_to_transform = [self.layers_to_transform]
        if not self.target_modules:
            raise ValueError(f"{who}: target_modules is empty; name at least one module, or 'all-linear'.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(f"{who}: layers_to_transform needs a list of names in target_modules, which is {self.target_modules!r}.")
        if self.layers_to_transform is None and self.layers_pattern:
            raise ValueError(f"{who}: layers_pattern says where layers_to_transform counts, which is missing.")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_pattern"):
            value = getattr(self, name) or ()
            for expression in [value] if isinstance(value, str) else value:
                try:
                    re.compile(expression)
                except (re.error, TypeError, OverflowError, RecursionError) as error:
                    raise ValueError(f"{who}: {name}={expression!r} is not a regular expression ({error}).") from None

    def targets(self, model: Layer, strict: bool = True) -> dict[str, Any]:
        """{path: layer} to adapt. Raises ValueError as `find_targets`, for a rank that does not fit and a pattern that matches nothing."""
        found = find_targets(model, self, strict)
        for path, layer in found.items() if strict else ():
            r, (m, n) = self.rank_of(path), layer.weight.data.shape
            if r > min(m, n):
                advice = "; task_type='SEQ_CLS' fully trains a classifier's head" if path.endswith(CLASSIFIERS) else ""
                raise ValueError(f"inject: rank {r} is beyond {path}, which is {m} x {n}{advice}.")
        for name in ("rank_pattern", "alpha_pattern") if strict else ():
            if idle := [key for key in getattr(self, name) if not any(fits(key, path) for path in found)]:
                raise ValueError(f"{name}: {idle[0]!r} matches none of the adapted layers; {nearest(idle[0], found)}.")
        return found

    def full_modules(self, model: Layer, strict: bool = True) -> dict[str, Layer]:
        """{path: layer} of the fully trained modules. Raises ValueError as `find_modules`, and for a SEQ_CLS without a head."""
        heads = find_modules(model, CLASSIFIERS, strict=False) if self.task_type == "SEQ_CLS" else {}
        if self.task_type == "SEQ_CLS" and not heads:
            raise ValueError("task_type='SEQ_CLS' fully trains the head, but no module is called 'classifier' or 'score'.")
        return heads | find_modules(model, self.modules_to_save or (), strict)

    def trained(self, model: Layer, adapted: Collection[str], strict: bool = True) -> set[str]:
        """The paths of the model's own parameters that are trained, together with adapters at the paths `adapted`."""
        paths = {f"{path}.{name}" for path, module in self.full_modules(model, strict).items() for name, _ in module.parameters()}
        if self.bias == "none":
            return paths
        return paths | {path for path in biases(model) if self.bias == "all" or path.removesuffix(".bias") in adapted}

    def adapters(self, model: Layer, targets: dict[str, Any], rng: Any, train_step: Callable[[], Any] | None) -> tuple[Any, dict[str, Any]]:
        """This configuration, and {path: layer}. An initialiser that reads data may change ranks, and leave targets out."""
        classes = {path: self.layer_class(layer) for path, layer in targets.items()}
        init = self.init_lora_weights
        options = getattr(self, f"{init}_config", None) or {}
        config, inits = self, {}
        if init not in DATA_INITIALISERS:
            inits = dict.fromkeys(targets, initialiser(init, **options))
        elif train_step is None:
            raise ValueError(f"init_lora_weights={init!r} reads data: pass a train_step to inject, which runs the model on some.")
        else:
            config, inits = load(DATA_INITIALISERS[init])(model, targets, self, train_step, **options)
        return config, {path: classes[path].of(targets[path], config, path, init, rng=rng) for path, init in inits.items()}

    def layer_class(self, layer: Layer) -> Any:
        """The class that adapts `layer`. Raises ValueError when there is none for this type of layer."""
        classes = self.classes()
        for kind in type(layer).__mro__:
            if kind.__name__ in classes:
                return load(classes[kind.__name__])
        raise ValueError(f"{self.method} has no way to adapt a layer of type {type(layer).__name__}.")

    def classes(self) -> dict[str, Any]:
        """{type of layer: the class that adapts it, or "module:class"} of the variant that a field selects."""
        return next((VARIANTS[name] for name in VARIANTS if name and getattr(self, name)), VARIANTS[""])

    @property
    def saved_modules(self) -> list[str]:
        """modules_to_save, and the names of a classifier's head with task_type "SEQ_CLS"."""
        return list(dict.fromkeys([*(self.modules_to_save or ()), *(CLASSIFIERS if self.task_type == "SEQ_CLS" else ())]))

    @property
    def method(self) -> str:
        """The name of the method, for people."""
        return "DoRA" if self.use_dora else "LoRA"

    def only(self, paths: Iterable[str], **changes: Any) -> LoraConfig:
        """The same configuration for these layers alone, each named by its path."""
        return replace(self, target_modules=list(paths), exclude_modules=None, layers_to_transform=None, layers_pattern=None, **changes)

    def rank_of(self, path: str) -> int:
        """r, or the exception that rank_pattern makes for this path."""
        return next((r for key, r in self.rank_pattern.items() if fits(key, path)), self.r)

    def alpha_of(self, path: str) -> float:
        """lora_alpha, or the exception that alpha_pattern makes for this path."""
        return next((alpha for key, alpha in self.alpha_pattern.items() if fits(key, path)), self.lora_alpha)
