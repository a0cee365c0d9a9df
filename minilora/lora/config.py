"""LoraConfig: which layers to adapt, and how. Field names, defaults and meaning are those of PEFT's LoraConfig."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

INITS = (True, False, "gaussian", "seed")


@dataclass
class LoraConfig:
    """What `inject` reads.

    r                   rank of A B, at least 1 and at most min(in, out) of every adapted layer
    lora_alpha          the update is scaled by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)
    target_modules      module names (whole, or the last parts of a dotted path), one regular expression that must match
                        the whole path, or "all-linear": every Linear except the output head
    exclude_modules     names or a regular expression, as in target_modules; they win
    layers_to_transform numbers of the blocks to adapt, an integer or a list; None is all. Applies to names, not to an expression
    rank_pattern        {name or expression: r} for exceptions from r; alpha_pattern likewise
    lora_dropout        probability of dropping what the low-rank branch reads, in training
    use_rslora          scale by lora_alpha / sqrt(r) (arXiv 2312.03732)
    init_lora_weights   True: A Kaiming-uniform(a = sqrt 5), B zero. "gaussian": A ~ N(0, 1 / r^2), B zero. False: both
                        Kaiming-uniform. "seed": both N(0, 1), as in the sample this project began with
    bias                "none", "all" or "lora_only": which biases are trained too
    modules_to_save     names of modules that are trained whole and saved with the adapter

    Raises ValueError when a value has no meaning. Fields of PEFT that are not listed here do not exist: nothing is ignored.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"LoraConfig: the rank r must be an integer of at least 1, got {r!r}.")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, (int, float)) or not alpha > 0:
                raise ValueError(f"LoraConfig: lora_alpha must be a positive number, got {alpha!r}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoraConfig: lora_dropout is {self.lora_dropout}; it must be at least 0 and below 1.")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"LoraConfig: bias is {self.bias!r}; choose 'none', 'all' or 'lora_only'.")
        if self.init_lora_weights not in INITS:
            raise ValueError(f"LoraConfig: init_lora_weights is {self.init_lora_weights!r}; choose one of {', '.join(map(repr, INITS))}.")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "all-linear":
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"LoraConfig: {name}={value!r} is not a regular expression ({error}).") from None
            elif value is not None and not isinstance(value, str):
                setattr(self, name, list(value))
        if not self.target_modules:
            raise ValueError("LoraConfig: target_modules is empty; name at least one module, or 'all-linear'.")
        if self.modules_to_save is not None:
            self.modules_to_save = list(self.modules_to_save)

    def rank_of(self, path: str) -> int:
        """r, or the exception that rank_pattern makes for this path."""
        return _pattern(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """lora_alpha, or the exception that alpha_pattern makes for this path."""
        return _pattern(self.alpha_pattern, path, self.lora_alpha)


def _pattern(pattern: dict, path: str, default):  # type: ignore[no-untyped-def]
    """The value of the first key that matches the path or the end of it, at a dot (PEFT's rule)."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
