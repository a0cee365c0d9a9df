"""The directions that LoRA finds (LoRA, arXiv 2106.09685, sections 7.2 and 7.3)

    python -m examples.papers.subspace [--quick]        about 2 minutes

LoRA of two ranks and two seeds on the bundled model, trained on Python source. With A = U S V^T (A is (in, r), so U are directions of
the layer's input), the similarity of the first i directions of one adapter and the first j of another is

    phi(i, j) = ||U_i^T U'_j||_F^2 / min(i, j)        1: one subspace contains the other; about max(i, j) / in at random

The amplification compares dW = U S V^T of rank r with the part of W in the same directions:

    ||dW||_F / ||U^T W V||_F
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from examples.papers.shown import Claim, adapted, flags, write_results
from minilora.lora import lora_layers
from minilora.runs.run_file import open_model

SMALL, LARGE = 8, 64


def directions(A: np.ndarray) -> np.ndarray:
    """The left singular vectors of A (in, r), by decreasing singular value."""
    return np.linalg.svd(A, full_matrices=False)[0]


def similarity(U: np.ndarray, V: np.ndarray) -> np.ndarray:
    """phi(i, j) for all i and j: (columns of U, columns of V)."""
    squares = (U.T @ V) ** 2
    i, j = np.ogrid[1 : U.shape[1] + 1, 1 : V.shape[1] + 1]
    return squares.cumsum(0).cumsum(1) / np.minimum(i, j)


def amplification(W: np.ndarray, dW: np.ndarray, r: int) -> float:
    U, _, Vt = np.linalg.svd(dW)
    return float(np.linalg.norm(dW) / np.linalg.norm(U[:, :r].T @ W @ Vt[:r].T))


def main() -> None:
    args = flags(__doc__)
    steps = 10 if args.quick else 120
    A: dict[str, dict[str, np.ndarray]] = {}
    amplified: dict[int, dict[str, float]] = {}
    for name, r, seed in (("small", SMALL, 0), ("large", LARGE, 0), ("another", LARGE, 1)):
        with adapted(r=r, seed=seed, steps=steps, bias="none", modules_to_save=[]) as (folder, _):
            layers = dict(lora_layers(open_model(folder, "numpy")))
        A[name] = {path: layer.lora_A.data.astype("float64") for path, layer in layers.items()}
        if name != "another":
            amplified[r] = {path: amplification(layer.weight.data, layer.delta(), r) for path, layer in layers.items()}
    paths = list(A["small"])
    phi = {path: similarity(directions(A["small"][path]), directions(A["large"][path])) for path in paths}
    seeds = {path: similarity(directions(A["large"][path]), directions(A["another"][path])) for path in paths}
    rng = np.random.default_rng(0)
    chance = similarity(*(directions(rng.normal(size=A["large"][paths[0]].shape)) for _ in range(2)))
    first, last = (statistics.median(p[i, i] for p in phi.values()) for i in (0, SMALL - 1))
    within = statistics.median(p[0, -1] for p in phi.values())
    across = statistics.median(p[3, 3] for p in seeds.values())
    factors = {r: statistics.median(of.values()) for r, of in amplified.items()}
    example = max(phi, key=lambda path: phi[path][0, 0])
    claims = [
        Claim(
            f"the first direction of r = {SMALL} is also found at r = {LARGE} (figure 3)",
            "phi above 0.5 for the first",
            f"phi(1, 1) {first:.2f}, phi(1, {LARGE}) {within:.2f} (median of {len(paths)} layers; {LARGE / 128:.2f} at random)",
            first > 0.5,
        ),
        Claim(
            "the others overlap less",
            "phi falls with the number of directions",
            f"phi({SMALL}, {SMALL}) {last:.2f}",
            last < first,
        ),
        Claim(
            "two seeds find common directions, random matrices do not (figure 4)",
            "yes",
            f"phi(4, 4) of two seeds {across:.2f}, of random matrices {chance[3, 3]:.2f}",
            across > 3 * chance[3, 3],
        ),
        Claim(
            "dW amplifies directions that W does not emphasise, less so at a large rank (table 7)",
            "21.5 at r = 4, 1.9 at r = 64",
            f"{factors[SMALL]:.1f} at r = {SMALL}, {factors[LARGE]:.1f} at r = {LARGE}",
            factors[SMALL] > factors[LARGE] and factors[SMALL] > 1,
        ),
    ]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 3, width_ratios=[1.6, 1, 1])
        images = (
            (f"{example}: r = {SMALL} and r = {LARGE}", phi[example][:, :16]),
            ("r = 64, two seeds", seeds[example][:8, :8]),
            ("two random matrices", chance[:8, :8]),
        )
        for axes, (title, values) in zip(panels, images, strict=True):
            rows, columns = values.shape
            image = axes.imshow(values, vmin=0, vmax=1, origin="lower", extent=(0.5, columns + 0.5, 0.5, rows + 0.5), aspect="auto")
            axes.set_title(title, fontsize=10)
            axes.set(xlabel="j", ylabel="i")
        figure.colorbar(image, ax=panels, label="phi(i, j)")

    figures = {
        "phi_diagonal": {path: np.diag(p).tolist() for path, p in phi.items()},
        "phi_of_two_seeds": {path: np.diag(p)[:8].tolist() for path, p in seeds.items()},
        "amplification": amplified,
        "steps": steps,
    }
    write_results("subspace", args.out, claims, figures, draw, (11, 3.6))


if __name__ == "__main__":
    main()
