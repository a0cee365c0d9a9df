"""Finite differences for every gradient: `gradcheck(layer, x)`, and `catalogue` for all that the project has."""

from minilora.gradcheck.check import Entry, Report, gradcheck

__all__ = ["Entry", "Report", "gradcheck"]
