"""The cost of adapters at inference: none for a merged LoRA, always some for a bottleneck (LoRA, arXiv 2106.09685, table 1)

    python -m examples.papers.latency [--quick]         about 6 minutes

GPT-2 small with random weights on one thread: one forward pass of a batch, as the paper measures it. The models alternate; reported
is the median of the ratios to the base model within a round.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import minilora as ml
from examples.papers.shown import BLUE, Claim, flags, write_results

SIZES = {"1 x 128 tokens": (1, 128), "4 x 256 tokens": (4, 256)}  # sequences, tokens per sequence


def models() -> dict[str, Any]:
    """Replicas of one model, which share its weights."""
    base = ml.GPT2(ml.GPT2Config(), rng=0)
    result = {"base": base, "LoRA, merged": base.replica(), "LoRA, beside the weights": base.replica(), "bottleneck / 16": base.replica()}
    for name in list(result)[1:3]:
        ml.inject(result[name], ml.LoraConfig(r=8), rng=0)
    ml.merge(result["LoRA, merged"])
    ml.inject(result["bottleneck / 16"], ml.BottleneckConfig(reduction_factor=16), rng=0)
    return result


def main() -> None:
    args = flags(__doc__)
    rounds = 2 if args.quick else 25
    compared = models()
    ratios: dict[str, dict[str, list[float]]] = {size: {name: [] for name in compared} for size in SIZES}
    with threadpool_limits(1, "blas"), tqdm(total=rounds * len(SIZES) * len(compared)) as bar:
        for size, (n, length) in SIZES.items():
            ids = np.random.default_rng(0).integers(0, 50257, n * length)
            offsets = np.arange(n + 1) * length
            for model in compared.values():
                model.forward(ids, keep=False, offsets=offsets)
            for i in range(rounds):
                seconds = {}
                for name in list(compared)[:: 1 if i % 2 else -1]:
                    start = time.perf_counter()
                    compared[name].forward(ids, keep=False, offsets=offsets)
                    seconds[name] = time.perf_counter() - start
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
            "bottleneck adapters add latency in small batches",
            "+20.7 % and +30.3 % at 1 x 128",
            f"{short['bottleneck / 16'] - 1:+.1%} at 1 x 128",
            short["bottleneck / 16"] > 1.03,
        ),
        Claim(
            "they add little in large batches",
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
            axes.set(title=size, xlabel="extra time relative to the base model")
            axes.margins(x=0.3)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    write_results("latency", args.out, claims, {"ratios": ratios}, draw, (9, 3))


if __name__ == "__main__":
    main()
