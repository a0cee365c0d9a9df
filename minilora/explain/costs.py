"""FLOPs and saved bytes of a call: as formulas in T, m, n, r, and as counted while it ran."""

from __future__ import annotations

import math
from typing import Any

from minilora.backend import Array
from minilora.checking.flops import _ACTIVATIONS, FORMULAS, value
from minilora.checking.trace import Call
from minilora.explain.docstring import Doc

KINDS = ("forward", "dx", "dW", "skipped")


def counted(call: Call) -> dict[str, int]:
    """FLOPs of a call and of what it calls, by KINDS, and the bytes of what they saved."""
    found = {kind: sum(getattr(c.flops, kind) for c in call.below()) for kind in KINDS}
    return found | {"saved": sum(c.bytes_saved for c in call.below())}


def predicted(call: Call) -> dict[str, str]:
    """{kind: formula} of an operation's FLOPs. What its implementation does beyond the reference is there as a number."""
    formed = {name for name in call.gradients if name in call.shapes}
    terms: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}  # {kind: {letters: factor}}
    for key, formula in FORMULAS.get(call.name, {}).items():
        first = next((g for g in key.split() if g in formed), "")
        kind = "forward" if key == "forward" else "skipped" if not first else "dx" if first in _ACTIVATIONS else "dW"
        for factor, _, letters in (term.partition(" ") for term in formula.split(" + ")):
            terms[kind][letters] = terms[kind].get(letters, 0) + int(factor)
    found = {kind: " + ".join(f"{factor} {letters}" for letters, factor in each.items()) for kind, each in terms.items()}
    for kind, formula in found.items():
        rest = getattr(call.flops, kind) - (value(formula, call.flops.sizes) if formula else 0)
        found[kind] = f"{formula} {'+' if rest > 0 else '-'} {abs(rest)}" if rest else formula
    return {kind: formula for kind, formula in found.items() if formula}


def saved_formula(arrays: list[Array], doc: Doc, sizes: dict[str, int]) -> str:
    """The bytes of arrays, such as "4 T m (x) + 4 T r (u)": of a number times the axes, in letters where the docstring has them."""
    said, terms = f" {doc.saved} ".replace(",", " "), []
    for array in arrays:
        names = [name for name, axes in doc.letters.items() if shape_of(axes, sizes) == array.shape]
        name = min(names, key=lambda n: (said.find(f" {n} ") % 10**6, n != "x"), default="")  # -1, not said, comes last
        axes = doc.letters[name] if name else " ".join(str(n) for n in array.shape if n != 1)
        terms.append(f"{array.itemsize} {axes.removesuffix(' 1')}" + (f" ({name})" if name else ""))
    return " + ".join(terms)


def shape_of(axes: str, sizes: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(a) if a.isdigit() else sizes.get(a, -1) for a in axes.split())


def bytes_of(formula: str, sizes: dict[str, int]) -> int:
    """The value of a `saved_formula`."""
    return sum(math.prod(shape_of(term.partition(" (")[0], sizes)) for term in formula.split(" + ") if term)
