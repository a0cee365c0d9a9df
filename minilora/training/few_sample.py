"""Fine-tuning on few examples: the cures of "Revisiting Few-sample BERT Fine-tuning" (Zhang et al., arXiv 2006.05987).

1. Adam with its bias correction (section 4): AdamW has it; bias_correction=False shows what happened without.
2. The pooler and the top blocks begin anew (section 5): `reinitialise`.
3. More steps (section 6): `epochs` or `steps` of the recipe.

Beside them, weights pulled towards where they began (L2-SP, arXiv 1802.01483, section 3; the paper's section 7 compares): `PulledAdamW`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minilora.backend import Array, Rng, as_like, generator
from minilora.data.datasets import Example
from minilora.layers import Embedding, Layer, LayerNorm, Linear, RMSNorm
from minilora.optim.flat import Parameters
from minilora.optim.optimizers import AdamW

_STD = 0.02  # of BERT's initial values


def reinitialise(model: Layer, blocks: int, *, rng: Rng = None) -> int:
    """Draw the pooler (where there is one) and the top `blocks` blocks anew. Returns how many numbers were drawn or set.

    Dense weights N(0, 0.02^2), biases 0, norms 1 and 0. The arrays are new ones: other models that share the old keep them.
    The blocks are the longest list of layers in the model. Raises ValueError when it has not so many.
    """
    stacks = [value for _, layer in model.modules() for value in vars(layer).values() if isinstance(value, list)]
    stack = max(stacks, key=len, default=[])
    if not 0 <= blocks <= len(stack):
        raise ValueError(f"reinitialise: the model has {len(stack)} blocks; {blocks} of them cannot begin anew.")
    tops = stack[len(stack) - blocks :] + [layer for path, layer in model.modules() if path.endswith("pooler")]
    rng = generator(rng)
    return sum(draw(layer, rng) for top in tops for _, layer in top.modules())


def draw(layer: Layer, rng: np.random.Generator) -> int:
    """Initial values of BERT for one layer's own parameters. Returns how many numbers that are."""
    values: dict[str, Any] = {}
    if isinstance(layer, (Linear, Embedding)):
        values["weight"] = rng.normal(0, _STD, layer.weight.data.shape)
    elif isinstance(layer, (LayerNorm, RMSNorm)):
        values["weight"] = np.ones(layer.weight.data.shape)
    if getattr(layer, "bias", None) is not None:
        values["bias"] = np.zeros(layer.bias.data.shape)  # type: ignore[attr-defined]
    for name, value in values.items():
        p = getattr(layer, name)
        p.data = as_like(value.astype(p.data.dtype), p.data)
    return sum(value.size for value in values.values())


def few(examples: Sequence[Example], size: int, labels: Sequence[str], seed: int = 0) -> list[Example]:
    """At most `size` of the examples, drawn without replacement; those of a smaller size are among those of a larger one.

    Raises ValueError when a class is left without an example.
    """
    chosen = [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))[:size]]
    seen = {int(example.labels[0]) for example in chosen}
    if absent := [name for i, name in enumerate(labels) if i not in seen]:
        raise ValueError(
            f"among the {size} examples drawn there is none of class {absent[0]!r}; choose a larger train_size, or another seed."
        )
    return chosen


class PulledAdamW(AdamW):
    """AdamW, and before each step  w <- w - lr pull (w - w_0),  w_0 the weights it was made with: decay towards them, not towards 0."""

    def __init__(self, params: Parameters, lr: float, pull: float, **options: Any) -> None:
        super().__init__(params, lr, **options)
        if not pull >= 0:
            raise ValueError(f"PulledAdamW: pull must be at least 0, got {pull}.")
        self.pull = pull
        self.start: Array = self.flat.data.copy()

    def step(self) -> None:
        w = self.flat.data
        w -= (self.lr * self.pull * self.rates) * (w - self.start)
        super().step()
