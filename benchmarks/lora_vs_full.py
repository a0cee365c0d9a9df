"""The LoRA paper's comparison at small scale: the share of full fine-tuning's improvement that LoRA reaches in the same steps.

    python -m benchmarks.lora_vs_full [--steps 120] [--seeds 1]

Both methods run the main job (the bundled model, Python source) over the same grid of learning rates. The best rates are compared:
gap closed = (before - after LoRA) / (before - after full). Prints a table, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from minilora.runs.finetune import finetune
from minilora.runs.recipe import Recipe

RATES = [1e-3, 1.4e-3, 2e-3, 2.8e-3, 4e-3, 5.6e-3, 8e-3, 1.1e-2, 1.6e-2]


def run(method: str, lr: float, seed: int, **options: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(method=method, lr=lr, seed=seed, sample_bytes=0, backend="numpy", **options)
        return finetune(recipe, Path(folder) / "run", say=lambda line: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--rates", type=float, nargs="*", default=RATES, help="grid of learning rates for both methods")
    args = parser.parse_args()

    best: dict[str, tuple[float, float]] = {}
    results = {}
    for method in ("full", "lora"):
        for lr in args.rates:
            runs = [run(method, lr, seed, steps=args.steps, r=args.r) for seed in range(args.seeds)]
            after = statistics.median(r["after"]["bits_per_byte"] for r in runs)
            before, share = runs[0]["before"]["bits_per_byte"], runs[0]["trainable_share"]
            seconds = statistics.median(r["seconds"] for r in runs)
            results[f"{method} {lr:g}"] = after
            print(f"{method:5} lr {lr:<7g} {share:6.1%} trained   {before:.4f} -> {after:.4f} bits per byte   {seconds:5.1f} s", flush=True)
            if method not in best or after < best[method][1]:
                best[method] = (lr, after)
    closed = (before - best["lora"][1]) / (before - best["full"][1])
    (full_lr, full), (lora_lr, lora) = best["full"], best["lora"]
    print(f"best: full {full:.4f} at {full_lr:g}, LoRA {lora:.4f} at {lora_lr:g}: {closed:.1%} of the gap closed")
    print(
        json.dumps(
            {
                "benchmark": "lora_vs_full",
                "steps": args.steps,
                "r": args.r,
                "before": before,
                "best": best,
                "gap_closed": closed,
                "all": results,
            }
        )
    )


if __name__ == "__main__":
    main()
