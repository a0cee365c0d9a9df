"""One HTML page about a run, or about two runs side by side (page.py)."""
