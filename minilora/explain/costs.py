"""FLOPs and saved bytes of a call: as formulas in T, m, n, r, and as counted while it ran."""

from __future__ import annotations

import math
from typing import Any

from minilora.backend import Array
from minilora.checking.flops import _ACTIVATIONS, FORMULAS, value
from minilora.checking.trace import Call, arrays_in, owner
from minilora.explain.docstring import Doc

KINDS = ("forward", "dx", "dW", "skipped")


def counted(call: Call) -> dict[str, int]:
    """FLOPs of a call and of what it calls, by KINDS, and the bytes of what they saved."""
    found = {kind: sum(getattr(c.flops, kind) for c in call.below()) for kind in KINDS}
    return found | {"saved": sum(c.bytes_saved for c in call.below())}


def predicted(call: Call) -> dict[str, str]:
    """{kind: formula} of an operation's FLOPs. What an implementation adds to the reference is there in numbers."""
    done, parts = {name for name in call.gradients if name in call.shapes}, {kind: [] for kind in KINDS}  # type: ignore[var-annotated]
    for key, formula in FORMULAS.get(call.name, {}).items():
        first = next((g for g in key.split() if g in done), "")
        parts["forward" if key == "forward" else "skipped" if not first else "dx" if first in _ACTIVATIONS else "dW"].append(formula)
    found = {}
    for kind, formulas in parts.items():
        rest = getattr(call.flops, kind) - sum(value(f, call.flops.sizes) for f in formulas)
        found[kind] = " + ".join([*formulas, *([str(rest)] if rest else [])])
    return {kind: formula for kind, formula in found.items() if formula}


def kept(calls: list[Call]) -> dict[int, list[Array]]:
    """{id of a call: the arrays that it saved first}, of a whole pass; parameters are not counted."""
    parameters = {id(owner(p.data)) for c in calls if c.layer is not None and hasattr(c.layer, "parameters") for _, p in c.layer.parameters()}
    found: dict[int, list[Array]] = {}
    for root in (c for c in calls if c.parent is None):
        held = {id(owner(a)): owner(a) for a in arrays_in(root.saved)}
        for call in root.below():
            mine = {id(owner(a)): a for a in arrays_in(call.saved)}
            found[id(call)] = [a for i, a in mine.items() if held.pop(i, None) is not None and i not in parameters]
    return found


def saved_terms(arrays: list[Array], doc: Doc, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Of each array its name, its axes in letters, and its bytes: bytes of a number times the product of the axes."""
    terms = []
    for array in arrays:
        whole = owner(array)
        names = [name for name, axes in doc.letters.items() if _shape(axes, sizes) == whole.shape]
        said = f" {doc.saved} ".replace(",", " ")
        name = min(names, key=lambda n: (said.find(f" {n} ") % 10**6, n != "x"), default="")  # -1, not said, comes last
        axes = doc.letters[name] if name else " ".join(map(str, whole.shape))
        terms.append({"name": name, "formula": f"{whole.itemsize} {axes}".removesuffix(" 1"), "bytes": whole.nbytes})
    return terms


def _shape(axes: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(int(a) if a.isdigit() else sizes.get(a, -1) for a in axes.split())


def bytes_of(formula: str, sizes: dict[str, int]) -> int:
    """The value of "4 T m"."""
    return math.prod(_shape(formula, sizes))
