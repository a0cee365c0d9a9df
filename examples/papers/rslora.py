"""The scale of LoRA over ranks: alpha / r against alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)

    python -m examples.papers.rslora [--quick]          about 6 minutes

The bundled model is trained on Python source with r = 1 to 128. All ranks use one learning rate, the best of a grid for r = 8 and
alpha / r. alpha is chosen so that both scales agree at r = 8: only the rank differs.
"""

from __future__ import annotations

import math
import statistics

from examples.papers.shown import BLUE, RED, Claim, bits_after, flags, write_results

ALPHA, AGREE = 32.0, 8
FROZEN = {"bias": "none", "modules_to_save": []}


def main() -> None:
    args = flags(__doc__)
    ranks, seeds, steps = ([8, 64], 1, 10) if args.quick else ([1, 2, 8, 32, 128], 2, 120)
    after: dict[str, dict[int, float]] = {"alpha / r": {}, "alpha / sqrt r": {}}
    for r in ranks:
        for name, rs in zip(after, (False, True), strict=True):
            alpha = ALPHA / math.sqrt(AGREE) if rs else ALPHA
            if rs and r == AGREE:
                after[name][r] = after["alpha / r"][r]  # the same run
                continue
            runs = [bits_after(r=r, lora_alpha=alpha, use_rslora=rs, seed=seed, steps=steps, **FROZEN) for seed in range(seeds)]
            after[name][r] = statistics.median(runs)
    plain, stable, top = after["alpha / r"], after["alpha / sqrt r"], ranks[-1]
    gain, gain_rs = plain[AGREE] - plain[top], stable[AGREE] - stable[top]
    claims = [
        Claim(
            "with alpha / r a larger rank brings almost no gain (figure 1)",
            "one perplexity for all ranks from 4 to 2048",
            f"{plain[AGREE]:.3f} bits per byte at r = {AGREE}, {plain[top]:.3f} at r = {top}",
            gain < 0.01,
        ),
        Claim(
            "with alpha / sqrt r a larger rank is better",
            "perplexity falls with the rank",
            f"{stable[AGREE]:.3f} at r = {AGREE}, {stable[top]:.3f} at r = {top}",
            gain_rs > 0.01,
        ),
    ]

    def draw(figure: object) -> None:
        axes = figure.subplots()  # type: ignore[attr-defined]
        for (name, values), colour in zip(after.items(), (RED, BLUE), strict=True):
            axes.plot(list(values), list(values.values()), "o-", color=colour, label=f"scale {name}")
        axes.set(xscale="log", xlabel="rank r", ylabel="held-out bits per byte after training")
        axes.set_xticks(ranks, list(map(str, ranks)))
        axes.legend(frameon=False)

    write_results("rslora", args.out, claims, {"after": after, "seeds": seeds, "steps": steps}, draw, (6, 4))


if __name__ == "__main__":
    main()
