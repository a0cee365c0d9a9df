"""Scaling of time and memory of a training step with tokens (one sequence, or many of 256), rank, layers and vocabulary.

    python -m benchmarks.growth [--only tokens-one ...] [--rounds 3] [--threads 1]

The base is a GPT-2 of width 256 with 4 layers, 4 heads, 8192 tokens in the vocabulary, LoRA r 8 on all linear layers, and 1024 tokens
in sequences of 256; one of these changes at a time. Each point is measured in its own process: the median step, the peak memory, and
the part of the peak that the steps add to the loaded model. The exponent p of y ~ x^p is fitted to the upper half of the points.
In one sequence, the cost of attention grows with the square of its length. It is measured as the extra cost of one sequence over the
same number of tokens in sequences of 256.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import Failed, Worker, heading, options
from benchmarks.report import exponent

BASE = {"tokens": 1024, "window": 256, "rank": 8, "layers": 4, "vocabulary": 8192}
SERIES: dict[str, list[dict[str, int]]] = {
    "tokens-one": [{"tokens": n, "window": n} for n in (256, 512, 1024, 2048, 4096, 8192)],
    "tokens-many": [{"tokens": n} for n in (256, 512, 1024, 2048, 4096, 8192)],
    "rank": [{"rank": r} for r in (1, 4, 16, 64, 128, 256)],
    "layers": [{"layers": n} for n in (2, 4, 8, 16)],
    "vocabulary": [{"vocabulary": n} for n in (8192, 16384, 32768, 65536, 131072)],
}


def prepare(o: Namespace) -> None:
    import minilora as ml

    model = ml.GPT2(ml.GPT2Config(vocab_size=o.vocabulary, n_positions=8192, n_embd=256, n_layer=o.layers, n_head=4), rng=0)
    ml.save_model(model, o.folder / "model")


def ours(o: Namespace) -> Iterator[float]:
    import minilora as ml
    from benchmarks.ours import training
    from minilora.data.batches import random_windows

    model = ml.load_model(o.folder / "model", "numpy")
    ml.inject(model, ml.LoraConfig(r=o.rank), rng=0)
    text = np.random.default_rng(0).zipf(1.3, 200_000) % o.vocabulary
    return training(model, random_windows(text, o.window, o.tokens // o.window, np.random.default_rng(0)), o)


SIDES = {"ours": ours}


def point(args: Namespace, change: dict[str, int]) -> dict[str, Any]:
    """Seconds and bytes at one point of a series."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {**BASE, **change, "threads": args.threads, "folder": folder, "warmup": 1, "steps": 1}
        harness.prepare("growth", settings)
        worker = Worker("growth", "ours", settings)
        for _ in range(args.rounds):
            worker.round()
        worker.stop()
    m = worker.measured
    return {"seconds": statistics.median(m.seconds), "peak_memory_bytes": m.memory, "step_memory_bytes": max(1, m.memory - m.loaded)}


def main() -> int:
    args = options(__doc__, rounds=3, threads=1, only={"nargs": "+", "choices": list(SERIES), "default": list(SERIES)})
    print(__doc__.splitlines()[0])
    result: dict[str, Any] = {}
    for name in args.only:
        key = name.partition("-")[0]
        print(f"\n{name:>12}{'ms/step':>12}{'peak MB':>10}{'steps MB':>14}")
        points = []
        for change in SERIES[name]:
            try:
                points.append({key: change[key], **point(args, change)})
            except Failed as failed:
                print(f"benchmarks.growth: {name} {change[key]}: {failed}", file=sys.stderr)
                return 1
            p = points[-1]
            sizes = f"{p['peak_memory_bytes'] / 1e6:10,.0f}{p['step_memory_bytes'] / 1e6:14,.0f}"
            print(f"{p[key]:12}{1e3 * p['seconds']:12.1f}{sizes}", flush=True)
        fitted = {y: exponent([p[key] for p in points], [p[y] for p in points]) for y in list(points[0])[1:]}
        print("    exponent{seconds:12.2f}{peak_memory_bytes:10.2f}{step_memory_bytes:14.2f}".format(**fitted))
        result[name] = {"points": points, "exponents": fitted}
    if {"tokens-one", "tokens-many"} <= result.keys():
        one, many = (result[name]["points"][-1] for name in ("tokens-one", "tokens-many"))
        result["attention_share"] = {y: 1 - many[y] / one[y] for y in list(one)[1:]}
        print(f"\nattention across one sequence of {one['tokens']} tokens takes", end=" ")
        print("{seconds:.0%} of the time and {step_memory_bytes:.0%} of the memory of the steps".format(**result["attention_share"]))
    print(json.dumps({**heading("growth", args), "base": BASE, "series": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
