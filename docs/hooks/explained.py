"""The interactive pages of `minilora explain --html`: a step of the bundled model, a block, and every operation."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from minilora.kernels import TABLE

THERE = importlib.util.find_spec("minilora.explain") is not None
BLOCK = "transformer.h.0"
OPERATIONS = [*TABLE, "embedding", "take_rows"] if THERE else []
NAMES = ["step", "block", *OPERATIONS] if THERE else []  # each is explained/NAME.html


@cache
def pages() -> tuple[tuple[str, str], ...]:
    """(name, HTML) of every page."""
    return tuple(_pages())


def _pages() -> Iterator[tuple[str, str]]:
    if not THERE:
        return
    from minilora.explain.explain import explain

    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            file = Path(folder) / f"{name}.html"
            place = {"step": "lora", "block": BLOCK}.get(name, name)
            explain(place, step=name == "step", html=file)
            yield name, file.read_text(encoding="utf-8")


def links() -> str:
    """What the page "A step, explained" offers."""
    if not THERE:
        return "These pages are made by `minilora explain`, which this version does not have yet."
    lines = [
        "- [**A whole step**](/explained/step.html): from the text to the gradient of one number, and to the step that changes it.",
        "- [**A block**](/explained/block.html): two residual adds, and where the gradient divides.",
        "- One operation each, with the lines of its source in both directions: ",
    ]
    return "\n".join(lines) + ", ".join(f"[`{name}`](/explained/{name}.html)" for name in OPERATIONS) + "."
