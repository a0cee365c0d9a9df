"""PartialConfig and BottleneckConfig: what `inject` reads for the methods that are not LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from minilora.layers import GELU, Activation, ReLU, SiLU, Tanh

KINDS = ("bias", "norm", "head")
NON_LINEARITIES: dict[str, Callable[[], Activation]] = {
    "relu": ReLU,
    "gelu": GELU,
    "gelu_new": partial(GELU, "tanh"),
    "silu": SiLU,
    "tanh": Tanh,
}


@dataclass
class PartialConfig:
    """Train some of the model's own parameters as they are, and freeze the rest.

    train            of "bias" (every bias: BitFit, arXiv 2106.10199), "norm" (every layer norm) and "head" (the output head).
                     The head of a classifier is always trained, since it is new
    modules_to_save  names of modules that are trained whole as well, as in LoraConfig

    Raises ValueError when a value has no meaning.
    """

    peft_type: ClassVar[str] = "PARTIAL"  # in adapter_config.json; not one of PEFT's

    train: Sequence[str] = ("head",)
    modules_to_save: Sequence[str] | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        for field in ("train", "modules_to_save"):
            value = getattr(self, field)
            if isinstance(value, str) or not all(isinstance(item, str) and item for item in value or ()):
                raise ValueError(f"{name}: {field} is {value!r}; it must be a list of names.")
        self.train = list(self.train)
        self.modules_to_save = list(self.modules_to_save or ()) or None
        for kind in self.train:
            if kind not in KINDS:
                raise ValueError(f"{name}: train names {kind!r}; choose from {', '.join(KINDS)}, or name it in modules_to_save.")


@dataclass
class BottleneckConfig(PartialConfig):
    """Bottleneck adapters after the projections into the residual stream (arXiv 1902.00751), beside the layer norms and the head.

    reduction_factor  the bottleneck of a layer with n outputs has n / reduction_factor features, at least 1
    non_linearity     "relu", "gelu", "gelu_new" (GELU by tanh), "silu" or "tanh"
    init_std          of the normal distribution, cut off at two of them, that both matrices are drawn from: small, so that
                      the adapted layer begins next to the one it follows. 1e-2 in the paper (section 3.6), 1e-3 in its code
    target_modules    names, or an expression, as in LoraConfig; None is those of PROJECTIONS that the model has
    train             as in PartialConfig; the paper trains the layer norms
    """

    peft_type: ClassVar[str] = "BOTTLENECK"

    train: Sequence[str] = ("norm",)
    reduction_factor: float = 16
    non_linearity: str = "gelu"
    init_std: float = 1e-2
    target_modules: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("reduction_factor", 1), ("init_std", 0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < math.inf:
                raise ValueError(f"BottleneckConfig: {name} must be a number of at least {least}, got {value!r}.")
        if self.non_linearity not in NON_LINEARITIES:
            raise ValueError(f"BottleneckConfig: non_linearity is {self.non_linearity!r}; choose {', '.join(NON_LINEARITIES)}.")
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            self.target_modules = list(self.target_modules)

    def size(self, features: int) -> int:
        """The width of the bottleneck after a layer of so many outputs."""
        return max(1, round(features / self.reduction_factor))


METHODS: dict[str, Callable[..., Any]] = {
    "bottleneck": BottleneckConfig,
    "bitfit": partial(PartialConfig, train=["bias"]),
    "layer-norm": partial(PartialConfig, train=["norm"]),
    "head": partial(PartialConfig, train=["head"]),
}


def method_name(config: Any) -> str:
    """The method of a configuration, in words."""
    if not isinstance(config, PartialConfig):
        return "VeRA" if config.peft_type == "VERA" else "DoRA" if config.use_dora else "LoRA"
    whole = [{"bias": "biases", "norm": "layer norms", "head": "the head"}[kind] for kind in config.train]
    whole += config.modules_to_save or []
    if isinstance(config, BottleneckConfig):
        return f"bottleneck adapters, reduction {config.reduction_factor:g}" + (f", with {', '.join(whole)}" if whole else "")
    return " and ".join(whole) or "the head"
