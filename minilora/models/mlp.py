"""A multi-layer perceptron: dense layers with a non-linearity between them."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from minilora.backend import Rng, generator
from minilora.layers import Layer, Linear, ReLU, Sequential


class MLP(Sequential):
    """x (T, sizes[0]) -> y (T, sizes[-1]).   `MLP([2, 32, 32, 1], Tanh)` has three dense layers, layers.0, layers.2, layers.4."""

    def __init__(self, sizes: Sequence[int], activation: Callable[[], Layer] = ReLU, *, rng: Rng = None, dtype: Any = "float32") -> None:
        if len(sizes) < 2:
            raise ValueError(f"MLP: sizes {list(sizes)} must name at least an input and an output size.")
        rng = generator(rng)
        layers = [layer for m, n in pairwise(sizes) for layer in (activation(), Linear(m, n, rng=rng, dtype=dtype))]
        super().__init__(*layers[1:])
