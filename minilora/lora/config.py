"""LoraConfig: which layers to adapt, and how. Field names, defaults and meaning are those of PEFT's LoraConfig."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from minilora.lora.registry import check_start

TASKS = (None, "CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
CLASSIFIERS = ("classifier", "score")  # what transformers calls the head of its sequence classifiers


@dataclass
class LoraConfig:
    """What `inject` reads.

    r                   rank of A B, at least 1 and at most min(in, out) of every adapted layer
    lora_alpha          the update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)
    target_modules      module names (whole, or the last parts of a dotted path), one regular expression that must match
                        the whole path, or "all-linear": every Linear except the output head. What is in modules_to_save is
                        never adapted
    exclude_modules     names or a regular expression, as in target_modules; they win
    layers_to_transform numbers of the blocks to adapt, an integer or a list; None is all. Only with a list of names, and
                        a name that is a whole path is adapted in any case
    layers_pattern      name of the list that layers_to_transform counts in ("h", "layers"); None is the first number in the path
    rank_pattern        {name or expression: r} for exceptions from r; alpha_pattern likewise. The first that fits counts
    lora_dropout        probability of dropping what the low-rank branch reads, in training
    use_rslora          scale by lora_alpha / sqrt(r) (arXiv 2312.03732)
    init_lora_weights   how A and B begin. True: A Kaiming-uniform(a = sqrt 5), B zero. Others are in family/ and docs/methods.md:
                        "gaussian", False, "seed", "pissa", "pissa_niter_4", "olora", "eva", "lora_ga", "loftq"
    eva_config, lora_ga_config, loftq_config   options by name of "eva", "lora_ga" and "loftq"
    use_dora            True: DoRA (arXiv 2402.09353), with the gradient that the paper and PEFT take. "exact": with the whole one
    bias                "none", "all" or "lora_only": which biases are trained too
    modules_to_save     names of modules that are trained whole and saved with the adapter: every module whose path ends with
                        one, be it in the middle of a word ("norm" is "input_layernorm" too)
    task_type           None, "CAUSAL_LM", "SEQ_CLS" or "FEATURE_EXTRACTION". With "SEQ_CLS" the head of a classifier
                        ("classifier" or "score") is trained whole, as if named in modules_to_save. With None it is a Linear
                        like any other: frozen, or adapted where target_modules names it or is "all-linear"
    fan_in_fan_out      taken for PEFT's sake and without effect: each model knows how its file keeps its weights

    Raises ValueError when a value has no meaning. Fields of PEFT that are not listed here do not exist: nothing is ignored.
    """

    peft_type: ClassVar[str] = "LORA"
    not_in_file: ClassVar[tuple[str, ...]] = ()  # fields that PEFT's configuration of this type has not
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
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"LoraConfig: the rank r must be an integer of at least 1, got {r!r} (in r or rank_pattern).")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise ValueError(f"LoraConfig: lora_alpha must be a positive number, got {alpha!r} (in lora_alpha or alpha_pattern).")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoraConfig: lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1.")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"LoraConfig: use_rslora is {self.use_rslora!r}; it must be true or false.")
        if self.use_dora not in (True, False, "exact"):
            raise ValueError(f"LoraConfig: use_dora is {self.use_dora!r}; choose True, False or 'exact'.")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"LoraConfig: bias is {self.bias!r}; choose 'none', 'all' or 'lora_only'.")
        if self.task_type not in TASKS:
            raise ValueError(f"LoraConfig: task_type is {self.task_type!r}; choose one of {', '.join(map(repr, TASKS))}.")
        check_start(self)
        self._check_names()
        self._check_layers()

    def _check_names(self) -> None:
        """Names become lists of names; expressions must be expressions."""
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = "all-linear"
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"LoraConfig: modules_to_save is {self.modules_to_save!r}; it must be a list of names.")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                value = sorted(value) if isinstance(value, (set, frozenset)) else list(value)
                if not all(isinstance(item, str) and item for item in value):
                    raise ValueError(f"LoraConfig: {name}={value!r} must hold names, and none of them empty.")
                setattr(self, name, value)
        if not self.target_modules:
            raise ValueError("LoraConfig: target_modules is empty; name at least one module, or 'all-linear'.")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, str) or name not in ("target_modules", "exclude_modules"):  # lists of these are plain names
                _check_expressions(name, [value] if isinstance(value, str) else value or ())

    def _check_layers(self) -> None:
        """layers_to_transform and layers_pattern have a meaning beside a list of names, and nowhere else."""
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"LoraConfig: {name} needs a list of names in target_modules, which is {self.target_modules!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("LoraConfig: layers_pattern says where layers_to_transform counts, which is not given.")
        layers = self.layers_to_transform
        if layers is not None:
            layers = [layers] if isinstance(layers, int) else list(layers)
            if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
                raise ValueError(f"LoraConfig: layers_to_transform is {layers!r}; it must hold numbers of blocks.")
            self.layers_to_transform = layers

    @property
    def saved_modules(self) -> list[str]:
        """modules_to_save, and the names of a classifier's head with task_type "SEQ_CLS"."""
        return list(dict.fromkeys([*(self.modules_to_save or ()), *(CLASSIFIERS if self.task_type == "SEQ_CLS" else ())]))

    def only(self, paths: Iterable[str], **changes: Any) -> LoraConfig:
        """The same for these layers alone, each named by its path."""
        return replace(self, target_modules=list(paths), exclude_modules=None, layers_to_transform=None, layers_pattern=None, **changes)

    def rank_of(self, path: str) -> int:
        """r, or the exception that rank_pattern makes for this path."""
        return next((r for key, r in self.rank_pattern.items() if fits(key, path)), self.r)

    def alpha_of(self, path: str) -> float:
        """lora_alpha, or the exception that alpha_pattern makes for this path."""
        return next((alpha for key, alpha in self.alpha_pattern.items() if fits(key, path)), self.lora_alpha)


def fits(key: str, path: str) -> bool:
    """Does a key of rank_pattern or alpha_pattern match the path, or the end of it at a dot? (PEFT's rule.)"""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _check_expressions(name: str, expressions: Iterable[str]) -> None:
    for expression in expressions:
        try:
            re.compile(expression)
        except (re.error, TypeError) as error:
            raise ValueError(f"LoraConfig: {name}={expression!r} is not a regular expression ({error}).") from None
