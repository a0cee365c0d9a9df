"""LoRA, full fine-tuning, bottleneck adapters, biases, layer norms, the head alone: accuracy over trained parameters
(LoRA, arXiv 2106.09685, tables 2 and 16; adapters, 1902.00751, section 3 and figure 4)

    python -m examples.papers.methods [--quick]         20 to 30 minutes
    python -m examples.papers.methods --choose          the search behind RATES, on texts that are used for nothing else

MiniLM is trained for six epochs on 200 film snippets (2 classes) and 200 questions (6 classes), and evaluated on 1,000 others;
five seeds each. "On par": at most two standard errors of the difference below. Needs two packages with the model and the texts
(tests/assets.py). `minilora study --rows methods` runs the same study on your own data.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from examples.papers.shown import BLUE, GREEN, GREY, RED, Claim, flags, real_texts, write_results
from minilora.runs.recipe import Recipe
from minilora.runs.study import Summary, study

TRAIN, VALID, EPOCHS = 200, 1000, 6
ROWS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "LoRA, r = 1": {"method": "lora", "r": 1},
    "LoRA, r = 8": {"method": "lora", "r": 8},
    "bottleneck / 64": {"method": "bottleneck", "reduction_factor": 64},
    "bottleneck / 16": {"method": "bottleneck", "reduction_factor": 16},
    "biases": {"method": "bitfit"},
    "layer norms": {"method": "layer-norm"},
    "head alone": {"method": "head"},
}
STYLES = dict(zip(ROWS, zip([RED, BLUE, BLUE, GREEN, GREEN, GREY, GREY, GREY], "Dv^v^osX", strict=True), strict=True))
GRID = {
    "full": [5e-5, 1e-4, 2e-4],
    "lora": [5e-4, 1e-3, 2e-3],
    "bottleneck": [5e-4, 1e-3, 2e-3],
    "bitfit": [1e-3, 3e-3, 1e-2],
    "layer-norm": [1e-3, 3e-3, 1e-2],
    "head": [3e-3, 1e-2, 3e-2],
}
RATES: dict[str, dict[str, float]] = {
    "films": {"full": 1e-4, "lora": 1e-3, "bottleneck": 1e-3, "bitfit": 3e-3, "layer-norm": 1e-2, "head": 1e-2},
    "questions": {"full": 1e-4, "lora": 1e-3, "bottleneck": 2e-3, "bitfit": 1e-2, "layer-norm": 1e-2, "head": 3e-2},
}


def run(data: Path, rows: dict[str, dict[str, Any]], seeds: int, folder: Path, epochs: float = EPOCHS) -> list[Summary]:
    from tests import assets

    recipe = Recipe(model=str(assets.minilm()), data=str(data), task="classify", epochs=epochs, window=128, backend="numpy")
    return study(recipe, rows, seeds, folder)


def choose(folder: Path, seeds: int = 1) -> None:
    """Print the best learning rate of each method, on the texts for choosing."""
    for name in RATES:
        data = real_texts(name, folder / "data", TRAIN, 500, choose=True)
        rows = {f"{method} {lr:g}": {"method": method, "lr": lr} for method, rates in GRID.items() for lr in rates}
        table = {line.row: line.mean for line in run(data, rows, seeds, folder / name)}
        best = {method: max(rates, key=lambda lr: table[f"{method} {lr:g}"]) for method, rates in GRID.items()}
        print(f'    "{name}": {best},')


def main() -> None:
    args = flags(__doc__, choose={"action": "store_true", "help": "search GRID and print the best learning rates"})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.choose:
            return choose(folder)
        tables = {}
        for name, rates in RATES.items():
            train, valid, seeds, epochs = (32, 64, 2, 1) if args.quick else (TRAIN, VALID, 5, EPOCHS)
            data = real_texts(name, folder / "data", train, valid)
            rows = {row: {**fields, "lr": rates[fields["method"]]} for row, fields in ROWS.items()}
            tables[name] = {line.row: line for line in run(data, rows, seeds, folder / name, epochs)}
    report(tables, args.out)


def report(tables: dict[str, dict[str, Summary]], out: Path) -> None:
    """Compare the claims with the measurements. On par: at most two standard errors of the difference below."""

    def both(*rows: str) -> str:
        lines = (" against ".join(f"{t[row].mean:.3f} ± {t[row].std:.3f}" for row in rows) for t in tables.values())
        return "; ".join(f"{name} {line}" for name, line in zip(tables, lines, strict=True))

    def on_par(row: str, other: str) -> bool:
        pairs = [(t[row], t[other]) for t in tables.values()]
        return all(a.mean > b.mean - 2 * math.sqrt(a.std**2 / a.runs + b.std**2 / b.runs) for a, b in pairs)

    def differences(row: str, other: str) -> list[float]:
        return [t[row].mean - t[other].mean for t in tables.values()]

    any_table = tables["films"]
    share = any_table["bottleneck / 16"].trained / any_table["full"].trained
    claims = [
        Claim(
            "LoRA is on par with full fine-tuning (LoRA, table 2)",
            "GLUE 87.2 against 86.4, 0.3 M of 125 M trained",
            both("LoRA, r = 8", "full"),
            on_par("LoRA, r = 8", "full"),
        ),
        Claim(
            "with few labels LoRA is better than full fine-tuning (LoRA, table 16: MNLI with 100 labels)",
            "63.8 against 60.2",
            both("LoRA, r = 8", "full"),
            min(differences("LoRA, r = 8", "full")) > 0,
        ),
        Claim(
            "bottleneck adapters are on par with full fine-tuning, with 3.6 % of its parameters (adapters, table 1)",
            "GLUE 80.0 against 80.4",
            f"{both('bottleneck / 16', 'full')}; {share:.1%} trained",
            on_par("bottleneck / 16", "full"),
        ),
        Claim(
            "layer norms alone lose 3 to 4 points (adapters, figure 4)",
            "3 to 4 points",
            both("layer norms", "full"),
            max(differences("layer norms", "full")) < -0.02,
        ),
        Claim(
            "biases alone are on par with full fine-tuning on small data (BitFit, arXiv 2106.10199)",
            "stated",
            both("biases", "full"),
            on_par("biases", "full"),
        ),
    ]

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, 2)
        for axes, (name, table) in zip(panels, tables.items(), strict=True):
            for row, line in table.items():
                colour, marker = STYLES[row]
                axes.errorbar(line.trained, line.mean, line.std, fmt=marker, color=colour, capsize=3, markersize=8, label=row)
            axes.set(xscale="log", xlabel="trained parameters", ylabel="held-out accuracy", title=f"{TRAIN} {name}: mean and s.d.")
        panels[1].legend(frameon=False, loc="lower right")

    write_results("methods", out, claims, {n: {r: vars(line) for r, line in t.items()} for n, t in tables.items()}, draw, (12, 4.8))


if __name__ == "__main__":
    main()
