"""LoRA+: B learns faster than A (arXiv 2402.12354).

    A <- A - lr dA,   B <- B - lambda lr dB

In a wide layer, steps of A and B have similar effects only with lambda well above 1; the paper found about 16 best.
"""

from __future__ import annotations

import math
from typing import Any

from minilora.backend import get_xp
from minilora.layers import Embedding, Layer, LayerNorm, RMSNorm
from minilora.optim.optimizers import Optimizer


def create_loraplus_optimizer(
    model: Layer,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **options: Any,
) -> Any:
    """An optimizer_cls of the model's trainable parameters, with the learning rates of PEFT's function of the same name:

        lr loraplus_lr_ratio     lora_B, and every vector: biases, gains, DoRA's magnitudes
        loraplus_lr_embedding    the adapter of an embedding
        lr                       the rest: lora_A, and fully trained matrices

    Biases and the gains of layer norms have no weight decay. `options` go to optimizer_cls. All are kept as factors of lr and of
    weight_decay, so that schedules, which set lr, act on all three. Raises ValueError for a ratio that is not a positive number.
    """
    if not 0 < loraplus_lr_ratio < math.inf:
        raise ValueError(f"LoRA+: loraplus_lr_ratio must be a positive number, got {loraplus_lr_ratio}.")
    optimizer: Any = optimizer_cls(model.parameters(), lr, weight_decay=loraplus_weight_decay, **options)  # type: ignore[call-arg]
    owners, flat = dict(model.modules()), optimizer.flat
    optimizer.rates, optimizer.decays = (get_xp(flat.data).ones_like(flat.data) for _ in range(2))
    start = 0
    for path, p in zip(flat.paths, flat.parameters, strict=True):
        owner, _, name = path.rpartition(".")
        part = slice(start, start := start + p.data.size)
        if isinstance(owners[owner], Embedding) and name != "weight":
            optimizer.rates[part] = loraplus_lr_embedding / lr
        elif name == "lora_B" or p.data.ndim == 1:
            optimizer.rates[part] = loraplus_lr_ratio
        if name == "bias" or isinstance(owners[owner], (LayerNorm, RMSNorm)):
            optimizer.decays[part] = 0
    return optimizer
