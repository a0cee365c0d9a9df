"""The other methods that the papers compare LoRA with, and work with finished adapters: several at once, sums, extraction."""

import functools
from collections.abc import Callable
from typing import Any

from minilora.adapters.bottleneck import BottleneckConfig, BottleneckLinear, bottlenecks
from minilora.adapters.extraction import Extracted, extract, input_roots, largest_changes
from minilora.adapters.partial import PartialConfig
from minilora.adapters.several import PerSequence, mixed
from minilora.adapters.sums import combine
from minilora.lora import inject

METHODS: dict[str, Callable[..., Any]] = {  # name in a recipe: the configuration
    "bottleneck": BottleneckConfig,
    "bitfit": functools.partial(PartialConfig, train=["bias"]),
    "layer-norm": functools.partial(PartialConfig, train=["norm"]),
    "head": functools.partial(PartialConfig, train=["head"]),
}
