"""Initialisers that read data: they run the model, with layers that watch in place of those to adapt.

EVA (arXiv 2410.07170): A is initialised with the directions in which a layer's inputs vary most, and ranks go where they explain most.

    C = sum_t (x_t - mean)(x_t - mean)^T = V diag(S^2) V^T,   A = V_r,   B = 0        explained by direction i: S_i^2 / sum_j S_j^2

All directions of all layers are ranked by what they explain. As many of the best are taken as the ranks add up to, at most rho r in one
layer; a layer without any is not adapted. PEFT finds V by an incremental SVD that stops when it has converged; here C is summed over
everything that train_step runs on, and V is exact.

LoRA-GA (arXiv 2407.05000): initialised so that the first step goes where full fine-tuning would go.

    G = dW of a first batch = U S V^T,   A from r columns of U,   B from r other rows of diag(S) V^T,   and s A B is subtracted from W

Only here is x^T dy formed for every adapted layer: it takes as much memory as their weights.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp, to_numpy
from minilora.layers import Layer, Linear
from minilora.lora.layer import check_float32
from minilora.quantization.residual import Offset, dense

DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


class Watched(Linear):
    """A Linear with the parameters of another one, which counts its backward passes."""

    def __init__(self, base: Linear) -> None:
        self.weight, self.bias, self.calls = base.weight, base.bias, 0

    def backward(self, dy: Any, saved: Any, need_dx: bool = True) -> Any:
        self.calls += 1
        return super().backward(dy, saved, need_dx)


@contextmanager
def watching(model: Layer, targets: dict[str, Any], kind: Callable[[Any], Any]) -> Iterator[dict[str, Any]]:
    """{path: kind(layer)} for the layers of `targets`, each in place of its layer inside the `with`. Clears all gradients.

    Raises ValueError for another layer than a Linear, and for half-precision weights.
    """
    for path, layer in targets.items():
        if not isinstance(layer, Linear):
            raise ValueError(f"initialisers that read data are for linear layers; {path} is of type {type(layer).__name__}.")
        check_float32(layer.weight.data, "an initialiser that reads data")
    watchers = {path: kind(layer) for path, layer in targets.items()}
    trained = [(p, p.trainable) for _, p in model.parameters()]
    try:
        for path, watcher in watchers.items():
            model.replace(path, watcher)
        yield watchers
    finally:
        for path, layer in targets.items():
            model.replace(path, layer)
        for p, trainable in trained:
            p.grad, p.trainable = None, trainable


class Inputs(Watched):
    """A Linear that sums x^T x and x over its inputs."""

    every_row = True
    tokens = 0
    squares: Array = 0
    sums: Array = 0

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> tuple[Array, Any]:
        z = dense(x)
        self.tokens += z.shape[0]
        self.squares = self.squares + z.T @ z
        self.sums = self.sums + z.sum(axis=0)
        return super().forward(x, keep, need_dx)

    def directions(self, path: str, r: int) -> tuple[Array, np.ndarray]:
        """V (in, all) with the most important columns first, and S^2."""
        if min(self.tokens - 1, self.in_features) < r:
            raise ValueError(f"eva: train_step has shown {path} {self.tokens} tokens; rank {r} needs at least {r + 1}.")
        C = self.squares - self.sums[:, None] * (self.sums / self.tokens)
        values, V = get_xp(C).linalg.eigh(C)
        return V[:, ::-1], to_numpy(values[::-1]).clip(0)


def eva(
    model: Layer,
    targets: dict[str, Any],
    config: Any,
    train_step: Callable[[], Any],
    *,
    rho: float = 2.0,
    whiten: bool = False,
    adjust_scaling_factors: bool = True,
) -> tuple[Any, dict[str, Any]]:
    """The configuration with the ranks that were found, and an initialiser for each layer that has any.

    rho                      the largest rank of a layer, relative to the configured one; 1 leaves the ranks unchanged
    whiten                   divide each direction by the root of its singular value
    adjust_scaling_factors   scale alpha with a layer's rank, so that alpha / r is unchanged
    Raises ValueError when rho is below 1, or when a layer saw too few tokens for its rank.
    """
    if not rho >= 1:
        raise ValueError(f"eva: rho is {rho}; it must be at least 1.")
    with watching(model, targets, Inputs) as watchers:
        train_step()
    requested = {path: config.rank_of(path) for path in targets}
    found = {path: watcher.directions(path, requested[path]) for path, watcher in watchers.items()}
    shares = [(share, path) for path, (_, S2) in found.items() for share in (S2 / S2.sum())[: round(rho * requested[path])]]
    best = sorted(shares, key=lambda item: -item[0])[: sum(requested.values())]
    taken = Counter(path for _, path in best)
    ranks = {path: taken[path] for path in targets if path in taken}

    def initial(layer: Any, rng: np.random.Generator, path: str) -> tuple[Array, Array]:
        (V, S2), r = found[path], layer.r
        xp = get_xp(V)
        A = V[:, :r] / xp.asarray(S2[:r] ** 0.25, dtype=V.dtype) if whiten else V[:, :r]
        return A, xp.zeros((r, layer.out_features), dtype=V.dtype)

    if ranks != requested:
        alphas = {path: config.alpha_of(path) * (r / requested[path] if adjust_scaling_factors else 1) for path, r in ranks.items()}
        config = config.only(
            ranks,
            rank_pattern={path: r for path, r in ranks.items() if r != config.r},
            alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
        )
    return config, {path: partial(initial, path=path) for path in ranks}


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
