"""What the theme leaves out for screen readers. docs/js/access.js has the rest."""

from __future__ import annotations

import re
from typing import Any


def on_post_page(output: str, **_: Any) -> str:
    """Name the search dialog; the sublists of a table of contents are no landmarks, as their names may be those of sections of the site."""
    output = output.replace('role="dialog">', 'role="dialog" aria-label="Search">')
    return re.sub(r'<nav class="md-nav" aria-label="[^"]*">', '<nav class="md-nav" role="none">', output)
