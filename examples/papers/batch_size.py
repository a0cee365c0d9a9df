"""LoRA and large batches ("LoRA Without Regret", 2025)

    python -m examples.papers.batch_size [--quick]      about 12 minutes

The bundled model reads the same number of windows of Python source in batches of 4, 16 and 64: fewer steps where batches are larger. Full
fine-tuning and LoRA of two ranks each have the best of their own grid of rates. The paper: LoRA tolerates large batches less than full
fine-tuning, and a higher rank does not help.
"""

from __future__ import annotations

from examples.papers.shown import BLUE, GREY, RED, SMALL, Claim, bits_after, flags, write_results

METHODS = {  # the rates around the best of learning_rate.py, each twice the one before
    "full": ({"method": "full"}, (1e-3, 2e-3, 4e-3, 8e-3)),
    "LoRA, r = 8": ({"r": 8}, (4e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "LoRA, r = 64": ({"r": 64}, (4e-3, 8e-3, 1.6e-2, 3.2e-2)),
}


def main() -> None:
    args = flags(__doc__)
    windows, batches = (8, (2, 4)) if args.quick else (768, (4, 16, 64))
    SMALL.pop("batch_size", None)
    by_rate = {
        name: {
            b: {lr: bits_after(lr=lr, batch_size=b, steps=windows // b, **fields) for lr in (rates[1:2] if args.quick else rates)}
            for b in batches
        }
        for name, (fields, rates) in METHODS.items()
    }
    after = {name: {b: min(bits.values()) for b, bits in by_batch.items()} for name, by_batch in by_rate.items()}
    gap = {name: {b: values[b] - after["full"][b] for b in batches} for name, values in after.items() if name != "full"}
    first, last = batches[0], batches[-1]
    low, high = gap["LoRA, r = 8"], gap["LoRA, r = 64"]
    claims = [
        Claim(
            "LoRA loses more than full fine-tuning where batches are large",
            "the gap in loss grows with the batch",
            f"r = 8: {low[first]:+.3f} bits per byte at batch {first}, {low[last]:+.3f} at {last}",
            low[last] > low[first],
        ),
        Claim(
            "a higher rank does not help with it",
            "the gap is the same at all ranks",
            f"r = 64: {high[first]:+.3f} at batch {first}, {high[last]:+.3f} at {last}",
            high[last] - high[first] >= 0.5 * (low[last] - low[first]),
        ),
    ]

    def draw(figure: object) -> None:
        axes = figure.subplots()  # type: ignore[attr-defined]
        for (name, values), colour in zip(after.items(), (GREY, BLUE, RED), strict=True):
            axes.plot(list(values), list(values.values()), "o-", color=colour, label=name)
        axes.set(xscale="log", xlabel="windows a batch", ylabel="held-out bits per byte, best rate")
        axes.set_xticks(batches, [str(b) for b in batches])
        axes.minorticks_off()
        axes.legend(frameon=False)

    write_results("batch_size", args.out, claims, {"by_rate": by_rate, "windows": windows}, draw, (6, 4))


if __name__ == "__main__":
    main()
