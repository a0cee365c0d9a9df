"""What LoRA learns and what it forgets ("LoRA Learns Less and Forgets Less", arXiv 2405.09673)

    python -m examples.papers.forgetting [--quick]      about 5 minutes

The bundled model, pretrained on the English of Python's help, is fine-tuned on Python source. Two losses, before and after: held-out
source (learning) and help that was held out of pretraining (forgetting). LoRA of several ranks, full fine-tuning, biases and layer
norms alone; each method at its own learning rate, and full fine-tuning also at a lower one.
"""

from __future__ import annotations

import math
from pydoc_data.topics import topics

import numpy as np

from examples.papers.shown import BLUE, GREEN, RED, Claim, adapted, flags, write_results
from minilora.data.batches import held_out_windows
from minilora.formats.checkpoint import load_model
from minilora.runs.run_file import open_model
from minilora.training.evaluate import evaluate

METHODS = {
    "full": {"method": "full"},
    "full, a quarter of the rate": {"method": "full", "lr": 5e-4},
    **{f"LoRA, r = {r}": {"r": r} for r in (1, 8, 32)},
    "bottleneck": {"method": "bottleneck"},
    "layer norms": {"method": "layer-norm"},
    "biases": {"method": "bitfit"},
}


def held_out_help() -> np.ndarray:
    """The text that examples/07_pretrain_the_bundled_model.py holds out."""
    text = np.frombuffer("\n\n\n".join(topics[key] for key in sorted(topics)).encode(), dtype=np.uint8)
    return text[: len(text) // 20]


def main() -> None:
    args = flags(__doc__)
    steps = 5 if args.quick else 120
    old = list(held_out_windows(held_out_help(), 256, 4))[: 2 if args.quick else None]

    def on_help(model: object) -> float:
        return evaluate(model, old, 2)[0] / math.log(2)  # type: ignore[arg-type]

    help_before = on_help(load_model("pydoc", "numpy"))
    points = {}
    for name, fields in METHODS.items():
        with adapted(steps=steps, **fields) as (folder, results):
            before, after = results["before"]["bits_per_byte"], results["after"]["bits_per_byte"]
            points[name] = {
                "trained": results["trainable_parameters"],
                "learned": before - after,
                "forgotten": on_help(open_model(folder, "numpy")) - help_before,
            }
    full, lora = points["full"], points["LoRA, r = 8"]
    gentle = points["full, a quarter of the rate"]
    claims = [
        Claim("LoRA learns less than full fine-tuning", "stated", _pair(lora, full, "learned"), lora["learned"] < full["learned"]),
        Claim("LoRA forgets less", "stated", _pair(lora, full, "forgotten"), lora["forgotten"] < full["forgotten"]),
        Claim(
            "what is forgotten grows with what is learned, for all methods",
            "one frontier",
            f"rank correlation {_rank_correlation(points):.2f} over {len(points)} runs",
            _rank_correlation(points) > 0.7,
        ),
        Claim(
            "full fine-tuning forgets more than LoRA at equal learning",
            "mostly",
            f"full at a quarter of its rate: learned {gentle['learned']:.3f}, forgot {gentle['forgotten']:.3f}; "
            f"LoRA r = 8: {lora['learned']:.3f}, {lora['forgotten']:.3f}",
            gentle["forgotten"] / gentle["learned"] > lora["forgotten"] / lora["learned"],
        ),
    ]

    def draw(figure: object) -> None:
        axes = figure.subplots()  # type: ignore[attr-defined]
        for name, p in points.items():
            colour = RED if name.startswith("full") else BLUE if name.startswith("LoRA") else GREEN
            axes.plot(p["learned"], p["forgotten"], "o", color=colour, markersize=8)
            below = name in ("biases", "LoRA, r = 8")  # avoids overlapping labels
            point, offset = (p["learned"], p["forgotten"]), (6, -14 if below else -1)
            axes.annotate(name, point, xytext=offset, textcoords="offset points", fontsize=9)
        axes.set(xlabel="learned: fewer bits per byte on Python source", ylabel="forgotten: more bits per byte on Python's help")
        axes.margins(x=0.25, y=0.1)
        axes.axhline(0, color="black", linewidth=0.5)

    write_results("forgetting", args.out, claims, {"points": points, "help_before": help_before, "steps": steps}, draw, (7, 4.5))


def _pair(lora: dict, full: dict, what: str) -> str:
    return f"LoRA r = 8 {lora[what]:.3f} bits per byte, full {full[what]:.3f}"


def _rank_correlation(points: dict) -> float:
    """Spearman's rank correlation of learned and forgotten."""
    ranks = [np.argsort(np.argsort([p[what] for p in points.values()])) for what in ("learned", "forgotten")]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
