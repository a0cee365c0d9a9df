"""Pictures for the pages, drawn when the site is built: SVG in the colours of the page, so that they serve both themes."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from minilora import functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
TEXT = "#010203"  # stands for the colour of the text
BLUE, ORANGE, GREEN, RED = "#3b8fd4", "#d98a1f", "#2f9e77", "#d9603b"  # readable on white and on dark grey


def svg(draw: Callable[[Any], None], alt: str, size: tuple[float, float] = (6.5, 3.6)) -> str:
    """The picture that draw(axes) makes, as HTML. `alt` says in words what it shows."""
    colours = {f"{name}.color": TEXT for name in ("text", "xtick", "ytick")} | {"axes.edgecolor": TEXT, "axes.labelcolor": TEXT}
    quiet = {"svg.fonttype": "none", "svg.hashsalt": "minilora", "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(colours | quiet):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    picture = re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.DOTALL).replace(TEXT, "currentColor")
    picture = re.sub(r"<metadata>.*?</metadata>\s*", "", picture, flags=re.DOTALL)
    return picture.replace("<svg ", f'<svg class="chart" role="img" aria-label="{alt}" ', 1)


def results(name: str) -> dict[str, Any]:
    """The figures of a script in examples/papers, as it wrote them."""
    path = ROOT / "examples" / "papers" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["figures"]


def table(head: list[str], rows: list[list[Any]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def activation(name: str) -> str:
    """An activation and its derivative, as the functions of the package compute them."""
    x = np.linspace(-4, 4, 401)
    y = getattr(F, name)(x)
    derivative = getattr(F, f"{name}_backward")(np.ones_like(x), y if name == "tanh" else x)
    if name == "relu":
        derivative[x == 0] = np.nan  # a gap at the kink

    def draw(axes: Any) -> None:
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.plot(x, y, color=BLUE, linewidth=2, label="y")
        axes.plot(x, derivative, color=ORANGE, linewidth=2, linestyle="--", label="dy/dx")
        axes.set(xlabel="x", ylim=(-1.2, 2.2), xlim=(-4, 4))
        axes.legend(frameon=False)

    return svg(draw, f"{name} and its derivative for x from -4 to 4.", (5, 2.8))
