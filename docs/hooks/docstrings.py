"""The docstrings of the house are plain text: outside of indented blocks, what Markdown would read as markup is escaped."""

from __future__ import annotations

import re
from typing import Any

import griffe


class PlainText(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = "\n".join(map(_escape, obj.docstring.value.splitlines()))


def _escape(line: str) -> str:
    """Outside of `code`, escape the characters of Markdown. A line indented by four is code already."""
    if line.startswith("    "):
        return line
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<\[\]$])", r"\\\1", part) for part in parts)
