"""FLOPs and saved bytes of a call: as counted while it ran, and as formulas in terms of T, m, n, r."""

from collections import Counter
from typing import Any

from minilora.backend import Array
from minilora.checking.flops import FORMULAS, kind_of, value
from minilora.checking.trace import Call
from minilora.explain.code import doc
from minilora.explain.docstring import Doc, sizes_of

KINDS = ("forward", "dx", "dW", "skipped")


def costs(call: Call, op: Call | None, base: set[int] | None = None) -> dict[str, Any]:
    """What was counted, with its formulas, and the parameters that are trained here: those of `base`, or those that are trainable."""
    every = list(call.layer.parameters()) if call.layer is not None else []
    trained = sum(p.data.size for _, p in every if (p.trainable if base is None else id(p) in base))
    formulas = {"adam": "12 a parameter"}
    if op is not None:
        kept = [array for c in call.below() for array in c.kept]
        formulas |= predicted(op) | {"saved": saved_formula(kept, doc(op), sizes_of(doc(op).letters, op.shapes))}
    return counted(call) | {"trained": trained, "adam": 12 * trained, "formulas": formulas}


def counted(call: Call) -> dict[str, int]:
    """FLOPs of a call and of what it calls, by KINDS, and the bytes of what they saved."""
    found = {kind: sum(getattr(c.flops, kind) for c in call.below()) for kind in KINDS}
    return found | {"saved": sum(c.bytes_saved for c in call.below())}


def predicted(call: Call) -> dict[str, str]:
    """{kind: formula} of an operation's FLOPs. What its implementation does beyond the reference is there as a number."""
    formed = {name for name in call.gradients if name in call.shapes}
    factors = {kind: Counter[str]() for kind in KINDS}  # {kind: {letters: factor}}
    for key, formula in FORMULAS.get(call.name, {}).items():
        kind = kind_of(key, formed)
        for factor, _, letters in (term.partition(" ") for term in formula.split(" + ")):
            factors[kind][letters] += int(factor)
    found = {kind: " + ".join(f"{factor} {letters}" for letters, factor in each.items()) for kind, each in factors.items() if each}
    for kind, formula in found.items():
        if rest := getattr(call.flops, kind) - value(formula, call.flops.sizes):
            found[kind] = f"{formula} {'+' if rest > 0 else '-'} {abs(rest)}"
    return found


def saved_formula(arrays: list[Array], doc: Doc, sizes: dict[str, int]) -> str:
    """The bytes of arrays, such as "4 T m (x) + 4 T r (u)"; of one that the docstring does not name "4·13·128"."""
    said, terms = f" {doc.saved} ".replace(",", " "), []
    shapes = {name: tuple(int(a) if a.isdigit() else sizes.get(a, -1) for a in axes.split()) for name, axes in doc.letters.items()}
    for array in arrays:
        names = [name for name, shape in shapes.items() if shape == array.shape]
        if names:
            name = min(names, key=lambda n: (said.find(f" {n} ") % 10**6, n != "x"))  # -1, not said, comes last
            terms.append(f"{array.itemsize} {doc.letters[name].removesuffix(' 1')} ({name})")
            if len(names) > 1:
                shapes.pop(name)  # of two arrays of one shape each has its own name
        else:
            terms.append("·".join(str(n) for n in (array.itemsize, *array.shape) if n != 1))
    return " + ".join(terms)
