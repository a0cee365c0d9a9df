"""A notebook of the course as Markdown: its text, its code, and the output that it was saved with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cells(path: Path) -> str:
    """The notebook at `path` as one page."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts = [part for cell in notebook["cells"] for part in _cell(cell, path.stem)]
    title, *text = [line for line in parts[0].splitlines() if not line.startswith("[![Open In Colab]")]
    files = f"[The script](../{path.stem}.py) · [the notebook]({path.name}), with these outputs"
    parts[0] = "\n".join([title, "", files, *text])
    return "\n\n".join(parts) + "\n"


def _cell(cell: dict[str, Any], name: str) -> Iterator[str]:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield text
    elif cell["cell_type"] == "code" and "install" not in cell["metadata"].get("tags", []):
        yield f"````python\n{text}\n````"
        for output in cell["outputs"]:
            yield from _output(output, name)


def _output(output: dict[str, Any], name: str) -> Iterator[str]:
    """What a cell printed, and the picture that it shows."""
    if output["output_type"] == "stream":
        yield f"````text\n{''.join(output['text']).rstrip()}\n````"
    png = output.get("data", {}).get("image/png")
    if png:
        yield f"![The picture of {name}](data:image/png;base64,{''.join(png.split())})"
