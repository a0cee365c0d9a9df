"""The picture of a run."""

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
