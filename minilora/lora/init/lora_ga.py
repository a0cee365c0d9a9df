"""LoRA-GA: initialise so that the first step goes where full fine-tuning would go (arXiv 2407.05000).

    G = dW of a first batch = U S V^T,   A from r columns of U,   B from r other rows of diag(S) V^T,   and s A B is subtracted from W

Only here is x^T dy formed for every adapted layer: it takes as much memory as their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp
from minilora.layers import Layer
from minilora.lora.init.watch import Watched, watching
from minilora.quantization.residual import Offset, dense

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


def lora_ga(
    model: Layer,
    targets: dict[str, Any],
    config: Any,
    train_step: Callable[[], Any],
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    stable_gamma: float = 16,
) -> tuple[Any, dict[str, Any]]:
    """The configuration, and an initialiser for every target, from the mean gradient of the backward passes of train_step.

    direction   which of the first 2 r singular vectors A and B get: "ArB2r" the first and the second r, "A2rBr" the reverse,
                "ArBr" A the second, fourth, ..., B the first, third, ..., "random" the same r for both
    scale       "stable": B times out^(1/4) / sqrt(stable_gamma). "weight_svd": B so that its largest singular value is W's.
                "gd_scale": both divided by the scaling. "unit": as they are
    Raises ValueError for an unknown value, when train_step runs no backward, or when 2 r is beyond min(in, out).
    """
    for name, value, known in (("direction", direction, DIRECTIONS), ("scale", scale, SCALES)):
        if value not in known:
            raise ValueError(f"lora_ga: {name} is {value!r}; choose {', '.join(known)}.")
    with watching(model, targets, Watched) as watchers:
        model.freeze()
        for watcher in watchers.values():
            watcher.weight.trainable = True
        train_step()
        if idle := next((path for path, watcher in watchers.items() if watcher.weight.grad is None), None):
            raise ValueError(f"lora_ga: train_step has left no gradient for {idle}; it must run the model forward and backward.")
        gradients = {path: dense(watcher.weight.grad) / watcher.calls for path, watcher in watchers.items()}
    return config, {
        path: partial(_initial, G=G, path=path, direction=direction, scale=scale, gamma=stable_gamma) for path, G in gradients.items()
    }


def _initial(layer: Any, rng: np.random.Generator, G: Array, path: str, direction: str, scale: str, gamma: float) -> tuple[Array, Array]:
    r, s, xp = layer.r, layer.scaling, get_xp(G)
    if 2 * r > min(G.shape):
        raise ValueError(f"lora_ga: rank {r} needs {2 * r} singular vectors, {path} has a gradient of {G.shape[0]} x {G.shape[1]}.")
    U, S, Vt = xp.linalg.svd(G, full_matrices=False)
    if direction == "random":
        of_A = of_B = xp.asarray(rng.permutation(2 * r)[:r])
    else:
        first, second, even, odd = slice(r), slice(r, 2 * r), slice(0, 2 * r, 2), slice(1, 2 * r, 2)
        of_A, of_B = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (odd, even)}[direction]
    A, B = U[:, of_A], S[of_B][:, None] * Vt[of_B]
    if scale == "stable":
        B = B * (layer.out_features**0.25 / gamma**0.5)
    elif scale == "weight_svd":
        B = B * (xp.linalg.svd(dense(layer.weight.data), compute_uv=False)[0] / S[of_B][0])
    elif scale == "gd_scale":
        A, B = A / s, B / s
    layer.offset = Offset(A, B, s)
    return A, B
