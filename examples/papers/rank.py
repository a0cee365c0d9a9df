"""The rank and the target matrices (LoRA, arXiv 2106.09685, sections 7.1 and 7.2)

    python -m examples.papers.rank [--quick]            about 8 minutes

The bundled model is trained on Python source for 120 steps, with LoRA of ranks 1 to 64 on all linear layers; then with about equal
numbers of trainable parameters on one kind of matrix or on all. Biases and layer norms, which the main job trains too, are frozen
here: they would hide the effect of the rank.
"""

from __future__ import annotations

import statistics

from examples.papers.shown import BLUE, GREEN, Claim, adapted, flags, write_results

# name: (matrices, rank). In a block of GPT-2, c_attn is 128 x 384, attn.c_proj 128 x 128, mlp.c_fc 128 x 512, mlp.c_proj 512 x 128
PLACES = {
    "queries, keys, values": (["c_attn"], 20),
    "attention": (["c_attn", "attn.c_proj"], 13),
    "feed-forward": (["c_fc", "mlp.c_proj"], 8),
    "all": ("all-linear", 5),
}
FROZEN = {"bias": "none", "modules_to_save": []}


def run(seeds: int, steps: int, **fields: object) -> tuple[int, list[float]]:
    """(trainable parameters, held-out bits per byte after the run of each seed)."""
    after = []
    for seed in range(seeds):
        with adapted(seed=seed, steps=steps, **FROZEN, **fields) as (_, results):
            after.append(results["after"]["bits_per_byte"])
    return results["trainable_parameters"], after


def main() -> None:
    args = flags(__doc__)
    ranks, seeds, steps = ([1, 8], 1, 10) if args.quick else ([1, 2, 4, 8, 16, 64], 2, 120)
    by_rank = {r: run(seeds, steps, r=r) for r in ranks}
    by_place = {name: run(seeds, steps, target_modules=where, r=r) for name, (where, r) in PLACES.items()}
    middle = {r: statistics.median(after) for r, (_, after) in by_rank.items()}
    place = {name: statistics.median(after) for name, (_, after) in by_place.items()}
    low, high, eight = ranks[0], ranks[-1], middle[8]
    best = min(place, key=place.__getitem__)
    claims = [
        Claim(
            "a rank of 1 is as good as one of 64 (table 6)",
            "73.4 % at r = 1, 73.5 % at r = 64 (WikiSQL)",
            f"{middle[low]:.3f} bits per byte at r = {low}, {middle[high]:.3f} at r = {high}",
            middle[low] - middle[high] < 0.01,
        ),
        Claim(
            "ranks above 8 bring no gain (table 6)",
            "73.8 % at r = 8, 73.5 % at r = 64",
            f"{eight:.3f} at r = 8, {middle[high]:.3f} at r = {high}",
            eight - middle[high] < 0.01,
        ),
        Claim(
            "a fixed budget is better spent on several kinds of matrices than on one (table 5)",
            "73.7 % on four kinds, 70.0 to 73.2 % on one",
            f"{place['all']:.3f} on all, {place['queries, keys, values']:.3f} on c_attn alone",
            place["all"] < place["queries, keys, values"],
        ),
        Claim(
            "attention alone underperforms the feed-forward layers at equal parameters (LoRA Without Regret, 2025)",
            "stated",
            f"attention {place['attention']:.3f}, feed-forward {place['feed-forward']:.3f}; best: {best}",
            place["feed-forward"] < place["attention"],
        ),
    ]

    def draw(figure: object) -> None:
        left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])  # type: ignore[attr-defined]
        for r, (_, after) in by_rank.items():
            left.plot([r] * len(after), after, "o", color=BLUE, alpha=0.4)
        left.plot(list(middle), list(middle.values()), color=BLUE)
        left.set(xscale="log", xlabel="rank r, on all linear layers", ylabel="held-out bits per byte after training")
        left.set_xticks(ranks, list(map(str, ranks)))
        for y, (name, (count, after)) in enumerate(by_place.items()):
            right.plot(after, [y] * len(after), "o", color=GREEN, alpha=0.4)
            right.plot([place[name]], [y], "|", color="black", markersize=16)
            right.annotate(f"{count:,} trained", (place[name], y), xytext=(0, 10), textcoords="offset points", fontsize=8, ha="center")
        right.set_yticks(range(len(by_place)), list(by_place))
        right.set(xlabel="held-out bits per byte", title="equal numbers of trainable parameters", ylim=(-0.5, len(by_place) - 0.3))

    write_results("rank", args.out, claims, {"by_rank": by_rank, "by_place": by_place, "seeds": seeds, "steps": steps}, draw, (10, 4))


if __name__ == "__main__":
    main()
