"""Pictures for the pages, drawn when the site is built: SVG in the colours of the page, so that they serve both themes."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

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
