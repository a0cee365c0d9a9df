"""Fine-tuning BERT on few samples: three remedies for failed runs (arXiv 2006.05987)

    python -m examples.papers.few_sample [--quick]      about 10 minutes

Full fine-tuning of MiniLM on 100 questions of six classes, five seeds each: three epochs (standard); pooler and top block
re-initialised; ten times as many epochs; both; and standard without Adam's bias correction. Evaluated on 1,000 other texts. Needs two
packages with the model and the texts (tests/assets.py). `minilora study --rows few-sample` runs the same study on your own data.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from examples.papers.shown import BLUE, GREEN, GREY, RED, Claim, flags, real_texts, write_results
from minilora.runs.recipe import Recipe
from minilora.runs.study import rows_named, study

# the paper's table for MNLI with 1,000 examples: mean and standard deviation of 20 runs of BERT-large
CLAIMED = {"standard": (52.2, 4.2), "re-init": (66.4, 0.6), "longer": (67.5, 1.1), "both": (68.8, 0.5)}


def main() -> None:
    args = flags(__doc__)
    train, valid, seeds = (48, 64, 2) if args.quick else (100, 1000, 5)
    with tempfile.TemporaryDirectory() as temporary:
        from tests import assets

        data = real_texts("questions", Path(temporary) / "data", train, valid)
        recipe = Recipe(
            model=str(assets.minilm()), data=str(data), task="classify", lr=1e-4, batch_size=16, warmup=0.1, window=128, backend="numpy"
        )
        table = {line.row: line for line in study(recipe, rows_named(["few-sample"]), seeds, Path(temporary) / "study")}

    def measured(*rows: str) -> str:
        return "questions: " + ", ".join(f"{row} {table[row].mean:.3f} ± {table[row].std:.3f}" for row in rows)

    def better(row: str) -> bool:
        return table[row].mean > table["standard"].mean

    published = {row: f"{mean} ± {std}" for row, (mean, std) in CLAIMED.items()}
    standard = f"MNLI-1k: {published['standard']}, "
    uncorrected, corrected = table["uncorrected"], table["standard"]
    steadier = table["longer"].std < corrected.std
    best = table["both"].mean >= max(line.mean for line in table.values())
    claims = [
        Claim("longer training is better", standard + f"longer {published['longer']}", measured("standard", "longer"), better("longer")),
        Claim("longer training is steadier", standard + f"longer {published['longer']}", measured("standard", "longer"), steadier),
        Claim(
            "re-initialised top layers are better",
            standard + f"re-init {published['re-init']}",
            measured("standard", "re-init"),
            better("re-init"),
        ),
        Claim("both together are best", f"MNLI-1k: {published['both']}", measured("both", "longer", "re-init"), best),
        Claim(
            "runs fail without bias correction",
            "many of 50 runs on RTE do (section 4)",
            f"questions: {uncorrected.failed} of {uncorrected.runs} failed, with it {corrected.failed}",
            uncorrected.failed > corrected.failed,
        ),
    ]

    def draw(figure: Any) -> None:
        colours = (GREY, BLUE, RED, GREEN, "black")
        axes = figure.subplots()
        for y, (line, colour) in enumerate(zip(table.values(), colours, strict=True)):
            axes.plot([line.worst, line.best], [y, y], color=colour, alpha=0.4, linewidth=6, solid_capstyle="round")
            axes.errorbar(line.mean, y, xerr=line.std, fmt="o", color=colour, capsize=4)
        axes.set_yticks(range(len(table)), list(table))
        axes.invert_yaxis()
        axes.set(xlabel="held-out accuracy: mean and s.d.; bars from worst to best", title=f"{train} questions, {seeds} seeds")

    write_results("few_sample", args.out, claims, {"questions": {row: vars(line) for row, line in table.items()}}, draw, (7, 3.6))


if __name__ == "__main__":
    main()
