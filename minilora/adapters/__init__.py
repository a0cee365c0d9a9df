"""The other ways to adapt a model that the seed's papers compare LoRA with: bottleneck adapters, biases, layer norms, the head alone."""

from minilora.adapters.bottleneck import BottleneckLinear
from minilora.adapters.config import METHODS, BottleneckConfig, PartialConfig, method_name
from minilora.adapters.injection import bottlenecks, inject

__all__ = ["METHODS", "BottleneckConfig", "BottleneckLinear", "PartialConfig", "bottlenecks", "inject", "method_name"]
