"""The pictures of a run and of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilora.formats.atomic import write_file


def have_matplotlib() -> bool:
    """Is the `plot` extra installed?"""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def plot_run(path: str | Path, records: list[dict[str, Any]], before: float, after: float, title: str, unit: str, scale: float) -> None:
    """The training loss over steps, divided by `scale` into `unit`, with the held-out figure before and after as levels.

    The learning rate stands below.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [r["step"] for r in records]
    losses = [r["loss"] / scale for r in records]
    window = max(1, len(losses) // 20)
    smooth = [sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1]) for i in range(len(losses))]

    figure = Figure(figsize=(7, 5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    top.plot(steps, losses, color="#9ecae1", linewidth=1, label="training, each step")
    top.plot(steps, smooth, color="#08519c", linewidth=2, label=f"training, mean of {window + 1} steps")
    top.axhline(before, color="#d95f02", linestyle="--", label=f"held out before: {before:.3f}")
    top.axhline(after, color="#1b7837", linestyle="-", label=f"held out after: {after:.3f}")
    top.set_ylabel(unit)
    top.set_title(title)
    top.legend(frameon=False)
    bottom.plot(steps, [r["lr"] for r in records], color="#555555")
    bottom.set_ylabel("learning rate")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("step")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=120))


def plot_study(path: str | Path, table: list[Any], records: list[dict[str, Any]], unit: str, floor: float | None) -> None:
    """Every run as a dot, a row for each treatment, with mean and standard deviation; beside it the mean over trained parameters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.5 + 0.5 * len(table)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
    colours = [f"C{i % 10}" for i in range(len(table))]
    for place, (line, colour) in enumerate(zip(table, colours, strict=True)):
        own = [r for r in records if r["row"] == line.row and r["value"] is not None]
        spread = [0.25 * (i / max(1, len(own) - 1) - 0.5) for i in range(len(own))]
        for r, off in zip(own, spread, strict=True):
            left.plot(r["value"], place + off, "x" if r["failed"] else "o", color=colour, alpha=0.5, markersize=5)
        if own:
            left.errorbar(
                line.mean, place, xerr=line.std if line.std == line.std else None, fmt="|", color="black", capsize=3, markersize=14
            )
            right.errorbar(line.trained, line.mean, yerr=line.std if line.std == line.std else None, fmt="o", color=colour, capsize=3)
            right.annotate(line.row, (line.trained, line.mean), xytext=(4, 4), textcoords="offset points", fontsize=8)
    if floor is not None:
        left.axvline(floor, color="#888888", linestyle=":", label="to be beaten")
        left.legend(frameon=False, fontsize=8)
    left.set_yticks(range(len(table)), [line.row for line in table])
    left.invert_yaxis()
    left.set_xlabel(unit)
    right.set(xscale="log", xlabel="trained parameters", ylabel=unit)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=120))
