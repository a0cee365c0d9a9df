"""LoRA on frozen 4-bit weights against frozen float32 weights (QLoRA, arXiv 2305.14314; LoftQ, 2310.08659)

    python -m examples.papers.quantised [--quick]       about 3 minutes

The bundled model, with linear weights in float32 or in NF4 with double quantization, is trained on Python source. LoftQ also quantizes,
and initialises A B with an approximation of the quantization error.
"""

from __future__ import annotations

import statistics
from typing import Any

from examples.papers.shown import BLUE, GREEN, RED, Claim, adapted, flags, write_results
from minilora.formats.checkpoint import load_model
from minilora.quantization.nf4 import is_nf4

LOFTQ = "NF4, LoftQ's start"
BASES: dict[str, dict[str, Any]] = {"float32": {}, "NF4": {"quantize": "nf4"}, LOFTQ: {"init_lora_weights": "loftq"}}


def share() -> float:
    """Size of the quantized weights, as a share of their size in float32."""
    model = load_model("pydoc", "numpy", quantize="nf4")
    weights = [p.data for _, p in model.parameters() if is_nf4(p.data)]
    return sum(W.nbytes for W in weights) / sum(4 * W.size for W in weights)


def main() -> None:
    args = flags(__doc__)
    seeds, steps = (1, 5) if args.quick else (2, 120)
    before: dict[str, float] = {}
    after: dict[str, list[float]] = {}
    for name, fields in BASES.items():
        for seed in range(seeds):
            with adapted(seed=seed, steps=steps, **fields) as (_, results):
                before[name] = results["before"]["bits_per_byte"]
                after.setdefault(name, []).append(results["after"]["bits_per_byte"])
    middle = {name: statistics.mean(values) for name, values in after.items()}
    lost = before["NF4"] - before["float32"]
    claims = [
        Claim(
            "NF4 with double quantization takes 4.127 bits per weight (QLoRA, section 3)",
            f"{4.127 / 32:.3f} of float32",
            f"{share():.3f} of float32",
            share() < 0.14,
        ),
        Claim(
            "fine-tuning on NF4 is as good as at full precision (table 4)",
            "MMLU 53.1 against 53.0",
            f"{middle['NF4']:.3f} bits per byte, {middle['float32']:.3f} on float32; untrained {lost:+.3f}",
            middle["NF4"] - middle["float32"] < 0.01,
        ),
        Claim(
            "LoftQ's initialisation is better than LoRA's on quantized weights (section 4)",
            "stated",
            f"{middle[LOFTQ]:.3f} against {middle['NF4']:.3f}",
            middle[LOFTQ] < middle["NF4"],
        ),
    ]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for y, (name, colour) in enumerate(zip(BASES, (BLUE, RED, GREEN), strict=True)):
            axes.plot([before[name]], [y], "x", color=colour, markersize=9)
            axes.plot(after[name], [y] * seeds, "o", color=colour, markersize=8, alpha=0.6)
            axes.annotate(f"{before[name]:.3f}", (before[name], y), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
            axes.annotate(f"{middle[name]:.3f}", (middle[name], y), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
        axes.set_yticks(range(len(BASES)), list(BASES))
        axes.set(xlabel="held-out bits per byte: x before, o after", ylim=(-0.5, len(BASES) - 0.4))

    figures = {"before": before, "after": after, "share_of_float32": share(), "steps": steps}
    write_results("quantised", args.out, claims, figures, draw, (7, 2.8))


if __name__ == "__main__":
    main()
