"""The explanation as one HTML page that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilora.explain.terminal import COSTS
from minilora.formats.atomic import to_json, write_text


def write_page(result: dict[str, Any], file: str | Path) -> None:
    """Write the page. Raises FileExistsError for a file that is there, ImportError without jinja2."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise ImportError("--html needs jinja2; install it with: pip install 'minilora[html]'") from None
    if Path(file).exists():
        raise FileExistsError(f"{file} is in use; name another file, or remove it first.")
    options: dict[str, Any] = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True}
    environment = Environment(loader=PackageLoader("minilora.explain", "."), **options)
    choices = {at: [{k: v for k, v in e.items() if k != "terms"} for e in entries] for at, entries in result.get("choices", {}).items()}
    data = to_json({"choices": choices}).replace("<", "\\u003c")  # a script ends at "</script>"
    write_text(file, environment.get_template("explain.html.j2").render(r=result, labels=COSTS, data=data))
