"""New initial values for the top of a model ("Revisiting Few-sample BERT Fine-tuning", arXiv 2006.05987, section 5)."""

import numpy as np

from minilora.backend import Rng, as_like, generator
from minilora.layers import Layer, LayerNorm, Parameter, RMSNorm

_STD = 0.02  # of BERT's initial weights


def reinitialise(model: Layer, blocks: int, *, rng: Rng = None) -> None:
    """Reinitialise the pooler (where there is one) and the top `blocks` blocks.

    Dense weights N(0, 0.02^2), biases 0, norms 1 and 0. The arrays are new: models that share the old ones keep them.
    The blocks are the longest list of layers in the model. Raises ValueError when it has fewer.
    """
    stacks = [value for _, layer in model.modules() for value in vars(layer).values() if isinstance(value, list)]
    stack = max(stacks, key=len, default=[])
    if not 0 <= blocks <= len(stack):
        raise ValueError(f"reinitialise: the model has {len(stack)} blocks, not {blocks}.")
    tops = stack[len(stack) - blocks :] + [layer for path, layer in model.modules() if path.endswith("pooler")]
    rng = generator(rng)
    for top in tops:
        for _, layer in top.modules():
            draw(layer, rng)


def draw(layer: Layer, rng: np.random.Generator) -> None:
    """BERT's initial values for the parameters of one layer, without those of its sublayers."""
    for name, p in vars(layer).items():
        if isinstance(p, Parameter):
            if name == "bias":
                value = np.zeros(p.data.shape)
            elif isinstance(layer, (LayerNorm, RMSNorm)):
                value = np.ones(p.data.shape) - getattr(layer, "offset", 0)
            else:
                value = rng.normal(0, _STD, p.data.shape)
            p.data = as_like(value.astype(p.data.dtype), p.data)
