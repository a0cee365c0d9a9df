"""Where runs fail without Adam's bias correction (arXiv 2006.05987, section 4)

    python -m examples.papers.bias_correction [--quick]  about 30 minutes

Full fine-tuning of MiniLM on 100 questions of six classes, 20 seeds of each setting, with and without bias correction: rates from the usual
one to 30 times as high, batches of 4 and 16, with a warm-up of a tenth of the steps and without. A run has failed when it diverged, or is
no better than predicting the most frequent class. Without correction the first steps are up to 6.6 times as long.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from examples.papers.shown import GREY, RED, Claim, flags, real_texts, write_results
from minilora.runs.recipe import Recipe
from minilora.runs.study import study

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SHAPES = {"batch 16, warm-up": (16, 0.1), "batch 16": (16, 0.0), "batch 4, warm-up": (4, 0.1), "batch 4": (4, 0.0)}


def main() -> None:
    args = flags(__doc__)
    train, valid, seeds = (48, 64, 2) if args.quick else (100, 500, 20)
    rates, shapes = (RATES[:1], dict([*SHAPES.items()][:1])) if args.quick else (RATES, SHAPES)
    failed: dict[str, dict[float, tuple[int, int]]] = {}
    means: dict[str, dict[float, tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        from tests import assets

        data = real_texts("questions", Path(temporary) / "data", train, valid)
        for name, (batch, warmup) in shapes.items():
            recipe = Recipe(
                model=str(assets.minilm()), data=str(data), task="classify", method="full", batch_size=batch, warmup=warmup, window=64
            )
            rows = {f"{lr:g}{' uncorrected' * off}": {"lr": lr, "bias_correction": not off} for lr in rates for off in (False, True)}
            table = {line.row: line for line in study(recipe, rows, seeds, Path(temporary) / name.replace(", ", "-").replace(" ", "-"))}
            failed[name] = {lr: (table[f"{lr:g}"].failed, table[f"{lr:g} uncorrected"].failed) for lr in rates}
            means[name] = {lr: (table[f"{lr:g}"].mean, table[f"{lr:g} uncorrected"].mean) for lr in rates}
    worst = max(((name, lr) for name in failed for lr in rates), key=lambda at: failed[at[0]][at[1]][1] - failed[at[0]][at[1]][0])
    corrected, uncorrected = failed[worst[0]][worst[1]]
    claims = [
        Claim(
            "runs fail without bias correction that do not fail with it",
            "many of 50 runs on RTE do, of BERT-large",
            f"most where {worst[0]}, rate {worst[1]:g}: {uncorrected} of {seeds} failed, with correction {corrected}",
            uncorrected >= corrected + max(1, seeds // 10),
        )
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(failed), sharey=True, squeeze=False)[0]
        for axis, (name, values) in zip(axes, failed.items(), strict=True):
            axis.plot(list(values), [with_ for with_, _ in values.values()], "o-", color=GREY, label="with correction")
            axis.plot(list(values), [without for _, without in values.values()], "o-", color=RED, label="without")
            axis.set(xscale="log", title=name, xlabel="learning rate", ylim=(-0.5, seeds + 0.5))
        axes[0].set_ylabel(f"failed runs of {seeds}")
        axes[0].legend(frameon=False)

    figures = {"failed": failed, "means": means, "seeds": seeds}
    write_results("bias_correction", args.out, claims, figures, draw, (9, 3))


if __name__ == "__main__":
    main()
