"""The other ways to adapt a model that the seed's papers compare LoRA with, and working with adapters: several, summed, extracted."""

from minilora.adapters.bottleneck import BottleneckLinear
from minilora.adapters.config import METHODS, BottleneckConfig, PartialConfig, method_name
from minilora.adapters.extraction import Extracted, extract, input_roots, largest_changes
from minilora.adapters.injection import bottlenecks, inject
from minilora.adapters.several import PerSequence, mixed
from minilora.adapters.sums import combine
