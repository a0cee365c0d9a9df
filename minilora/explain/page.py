"""The explanation as one HTML page that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilora.explain.terminal import COSTS
from minilora.formats import extra
from minilora.formats.atomic import to_json, write_text


def write_page(result: dict[str, Any], file: str | Path) -> None:
    """Write the page. Raises FileExistsError for a file that is there, ImportError without jinja2."""
    jinja2 = extra("jinja2", "html", "--html")
    if Path(file).exists():
        raise FileExistsError(f"{file} is in use; name another file, or remove it first.")
    loader = jinja2.PackageLoader("minilora.explain", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    choices = {at: [{k: v for k, v in e.items() if k != "terms"} for e in entries] for at, entries in result.get("choices", {}).items()}
    data = to_json({"choices": choices}).replace("<", "\\u003c")  # a script ends at "</script>"
    write_text(file, environment.get_template("explain.html.j2").render(r=result, labels=COSTS, data=data))
