"""EVA: A is initialised with the directions in which a layer's inputs vary most, and ranks go where they explain most (arXiv 2410.07170).

    C = sum_t (x_t - mean)(x_t - mean)^T = V diag(S^2) V^T,   A = V_r,   B = 0        explained by direction i: S_i^2 / sum_j S_j^2

All directions of all layers are ranked by what they explain. As many of the best are taken as the ranks add up to, at most rho r in one
layer; a layer without any is not adapted. PEFT finds V by an incremental SVD that stops when it has converged; here C is summed over
everything that train_step runs on, and V is exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from minilora.backend import Array, get_xp, to_numpy
from minilora.layers import Layer
from minilora.lora.init.watch import Watched, watching
from minilora.quantization.residual import dense


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
