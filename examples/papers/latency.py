"""What an adapter costs at inference: LoRA nothing once it is merged, a bottleneck always (LoRA, arXiv 2106.09685, table 1)

    python -m examples.papers.latency [--quick]         about 6 minutes

GPT-2 small with random weights on one thread: one forward pass of a batch, as the paper times it. The models take turns; told are
ratios to the base model within a turn, and their median.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import minilora as ml
from examples.papers.shown import BLUE, Claim, flags, tell

SIZES = {"1 x 128 tokens": (1, 128), "4 x 256 tokens": (4, 256)}  # sequences, and the length of each


def models() -> dict[str, Any]:
    """Replicas of one model: they share its weights."""
    base = ml.GPT2(ml.GPT2Config(), rng=0)
    told = {"base": base, "LoRA, merged": base.replica(), "LoRA, beside the weights": base.replica(), "bottleneck / 16": base.replica()}
    for name in list(told)[1:3]:
        ml.inject(told[name], ml.LoraConfig(r=8), rng=0)
    ml.merge(told["LoRA, merged"])
    ml.inject(told["bottleneck / 16"], ml.BottleneckConfig(reduction_factor=16), rng=0)
    return told


def main() -> None:
    args = flags(__doc__)
    rounds = 2 if args.quick else 25
    told = models()
    ratios: dict[str, dict[str, list[float]]] = {size: {name: [] for name in told} for size in SIZES}
    with threadpool_limits(1, "blas"), tqdm(total=rounds * len(SIZES) * len(told)) as bar:
        for size, (n, length) in SIZES.items():
            ids = np.random.default_rng(0).integers(0, 50257, n * length)
            offsets = np.arange(n + 1) * length
            for model in told.values():
                model.forward(ids, keep=False, offsets=offsets)
            for turn in range(rounds):
                seconds = {}
                for name in list(told)[:: 1 if turn % 2 else -1]:
                    begun = time.perf_counter()
                    told[name].forward(ids, keep=False, offsets=offsets)
                    seconds[name] = time.perf_counter() - begun
                    bar.update()
                for name, value in seconds.items():
                    ratios[size][name].append(value / seconds["base"])
    middle = {size: {name: statistics.median(values) for name, values in of.items()} for size, of in ratios.items()}
    short, long = middle.values()
    claims = [
        Claim(
            "a merged LoRA adds no latency",
            "none, by construction",
            f"{short['LoRA, merged']:.2f} of the base's time at 1 x 128, {long['LoRA, merged']:.2f} at 4 x 256",
            max(short["LoRA, merged"], long["LoRA, merged"]) < 1.03,
        ),
        Claim(
            "bottleneck adapters add latency where a batch is small",
            "+20.7 % and +30.3 % at 1 x 128",
            f"{short['bottleneck / 16'] - 1:+.1%} at 1 x 128",
            short["bottleneck / 16"] > 1.03,
        ),
        Claim(
            "in a large batch they add little",
            "+2.2 % and +3.0 % at 32 x 512",
            f"{long['bottleneck / 16'] - 1:+.1%} at 4 x 256",
            long["bottleneck / 16"] < 1.05,
        ),
    ]

    def draw(figure: Any) -> None:
        for axes, (size, of) in zip(figure.subplots(1, 2, sharey=True), middle.items(), strict=True):
            axes.barh(list(of), [value - 1 for value in of.values()], color=BLUE, alpha=0.7)
            for y, (name, value) in enumerate(of.items()):
                low, high = np.quantile(ratios[size][name], [0.25, 0.75]) - 1
                axes.plot([low, high], [y, y], color="black")
                axes.annotate(f"{value - 1:+.1%}", (max(high, 0), y), xytext=(5, -3), textcoords="offset points", fontsize=9)
            axes.set(title=size, xlabel="time beyond the base model's")
            axes.margins(x=0.3)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    tell("latency", args.out, claims, {"ratios": ratios}, draw, (9, 3))


if __name__ == "__main__":
    main()
