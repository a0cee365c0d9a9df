"""The pictures of a run and of a study."""

from pathlib import Path
from typing import Any

from minilora.formats.atomic import write_file
from minilora.runs import Say


def have_matplotlib(say: Say) -> bool:
    """Whether the `plot` extra is installed; says so if not."""
    try:
        import matplotlib  # noqa: F401  (to see whether it is there)
    except ImportError:
        say("no picture: matplotlib is not installed (pip install 'minilora[plot]')")
        return False
    return True


def plot_run(path: str | Path, records: list[dict[str, Any]], before: float, after: float, title: str, unit: str, nats: float) -> None:
    """The training loss over steps, the held-out loss before and after, and the learning rate. unit: of `nats` nats each."""
    figure, (top, bottom) = _figure((7, 5), 2, 1, sharex=True, height_ratios=[4, 1])
    steps = [r["step"] for r in records]
    losses = [r["loss"] / nats for r in records]
    window = max(1, len(losses) // 20)
    recent = [losses[max(0, i - window) : i + 1] for i in range(len(losses))]
    top.plot(steps, losses, color="#9ecae1", linewidth=1, label="training, each step")
    top.plot(steps, [sum(x) / len(x) for x in recent], color="#08519c", linewidth=2, label=f"training, mean of {window + 1} steps")
    for when, loss, colour, style in (("before", before, "#d95f02", "--"), ("after", after, "#1b7837", "-")):
        top.axhline(loss / nats, color=colour, linestyle=style, label=f"held out {when}: {loss / nats:.3f}")
    top.set(ylabel=unit, title=title)
    top.legend(frameon=False)
    bottom.plot(steps, [r["lr"] for r in records], color="#555555")
    bottom.set(ylabel="learning rate", xlabel="step", ylim=(0, None))
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=120))


def plot_study(path: str | Path, table: list[Any], records: list[dict[str, Any]], unit: str, floor: float | None) -> None:
    """Left: every run as a dot, one row for each treatment, with mean and standard deviation. Right: the mean over trained parameters."""
    figure, (left, right) = _figure((10, 1.5 + 0.5 * len(table)), 1, 2, width_ratios=[1.4, 1])
    for place, line in enumerate(table):
        colour, own = f"C{place % 10}", [r for r in records if r["row"] == line.row and r["value"] is not None]
        spread = [0.25 * (i / max(1, len(own) - 1) - 0.5) for i in range(len(own))]
        for r, off in zip(own, spread, strict=True):
            left.plot(r["value"], place + off, "x" if r["failed"] else "o", color=colour, alpha=0.5, markersize=5)
        if own:
            std = line.std if line.std == line.std else None
            left.errorbar(line.mean, place, xerr=std, fmt="|", color="black", capsize=3, markersize=14)
            right.errorbar(line.trained, line.mean, yerr=std, fmt="o", color=colour, capsize=3)
            right.annotate(line.row, (line.trained, line.mean), xytext=(4, 4), textcoords="offset points", fontsize=8)
    if floor is not None:
        left.axvline(floor, color="#888888", linestyle=":", label="to be beaten")
        left.legend(frameon=False, fontsize=8)
    left.set_yticks(range(len(table)), [line.row for line in table])
    left.invert_yaxis()
    left.set_xlabel(unit)
    right.set(xscale="log", xlabel="trained parameters", ylabel=unit)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    write_file(path, lambda temporary: figure.savefig(temporary, dpi=120))


def _figure(size: tuple[float, float], rows: int, columns: int, **options: Any) -> tuple[Any, Any]:
    """(figure, its axes), drawn without pyplot, which would choose a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, **options)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes
