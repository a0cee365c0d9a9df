"""What the theme leaves out for screen readers. docs/js/access.js has the rest."""

from __future__ import annotations

from typing import Any


def on_post_page(output: str, **_: Any) -> str:
    """Name the search dialog."""
    return output.replace('role="dialog">', 'role="dialog" aria-label="Search">')
