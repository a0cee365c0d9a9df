"""FLOPs: 2 for each multiplication and addition of a matrix product. What is done element by element, or by row, is not counted.

FORMULAS says what an operation costs, in terms of the sizes of its arguments. Arrays that count the products which run agree with it
exactly, for everything in the catalogue (tests/test_trace.py).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora.functional.attention import _sequences
from minilora.kernels import grouped
from minilora.quantization.residual import Residual

# The sizes of arguments. h: the features of all query heads; P: pairs of a query and a key that are multiplied
SIZES = {"x": "T m", "W": "m n", "A": "m r", "B": "r n", "ids": "T", "q": "R h"}

# What forward costs, and each gradient; one that several gradients read is formed once ("dx dA": if one of these is needed)
_LORA = {"forward": "2 T m n + 2 T m r + 2 T r n", "dx dA": "2 T r n", "dx": "2 T m n + 2 T m r", "dA": "2 T m r", "dB": "2 T r n"}
FORMULAS: dict[str, dict[str, str]] = {
    "linear": {"forward": "2 T m n", "dx": "2 T m n", "dW": "2 T m n"},
    "lora_linear": {**_LORA, "dW": "2 T m n"},
    "lora_embedding": {"forward": "2 T r n", "dA": "2 T r n", "dB": "2 T r n"},
    "column_norms": {"forward": "2 m n r + 2 m r r + 2 n r r", "dA": "2 m n r + 2 n r r + 2 m r r"},
    "attention": {"forward": "4 P h", "dv": "2 P h", "dq dk": "2 P h", "dq": "2 P h", "dk": "2 P h"},
    "linear_cross_entropy": {"forward": "2 T m n", "dx": "2 T m n", "dW": "4 T m n"},
}
_ACTIVATIONS = {"dx", "dq", "dk", "dv", "dg", "du"}


@dataclass
class Flops:
    """FLOPs of a call: forward; dx, the gradients of activations; dW, those of parameters; skipped, those that are not formed.

    `costs`: by the keys of FORMULAS, what is added where it is formed, and where it is skipped. `sizes`: the values of their letters.
    """

    forward: int = 0
    dx: int = 0
    dW: int = 0
    skipped: int = 0
    costs: dict[str, tuple[int, int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.forward + self.dx + self.dW

    def formed(self, gradients: Collection[str]) -> Flops:
        """The same after a backward that formed these gradients."""
        counts = dict.fromkeys(("forward", "dx", "dW", "skipped"), 0)
        for key, costs in self.costs.items():
            kind = kind_of(key, gradients)
            counts[kind] += costs[kind == "skipped"]
        return Flops(counts["forward"], counts["dx"], counts["dW"], counts["skipped"], self.costs, self.sizes)


def kind_of(key: str, gradients: Collection[str]) -> str:
    """What a key of FORMULAS counts as, in a call that forms these gradients: "forward", "dx", "dW" or "skipped"."""
    if key == "forward":
        return key
    first = next((g for g in key.split() if g in gradients), None)
    return "skipped" if first is None else "dx" if first in _ACTIVATIONS else "dW"


def value(formula: str, sizes: dict[str, int]) -> int:
    """The value of a sum of products, such as "2 T m n + 2 T r n"."""
    return sum(math.prod(int(s) if s.isdigit() else sizes[s] for s in term.split()) for term in formula.split(" + "))


def forward_flops(name: str, args: dict[str, Any], implementation: str) -> Flops:
    """Those of a call with these arguments, all gradients skipped so far."""
    sizes = sizes_of(name, args, implementation) if name in FORMULAS else {}
    costs = {}
    for key, formula in FORMULAS.get(name, {}).items():
        formed = formula
        if isinstance(args.get("W"), Residual):  # W - L R: products with it are operations of their own
            formed = " + ".join(t for t in formula.split(" + ") if not {"m", "n"} <= set(t.split())) or "0"
        elif key == "forward" and name == "lora_linear" and implementation == "numpy" and args.get("b") is not None:
            formed += " + 2 T n"  # the bias is a row of B there
        costs[key] = value(formed, sizes), value(formula, sizes)
    if sizes.get("again"):
        costs["dq dk dv"] = (value("2 again h", sizes),) * 2  # the scores of long sequences are computed again
    return Flops(costs=costs, sizes=sizes).formed(())


def sizes_of(name: str, args: dict[str, Any], implementation: str = "reference") -> dict[str, int]:
    """{letter: size} of the arguments of a call; see SIZES."""
    sizes: dict[str, int] = {}
    for arg, letters in SIZES.items():
        shape = getattr(args.get(arg), "shape", ())
        sizes |= dict(zip(letters.split(), (int(n) for n in shape), strict=False))
    if name == "attention":
        k, offsets, rows = args["k"], args.get("offsets"), args.get("rows")
        sizes |= {"P": sum(int((a.stop - a.start) * (b.stop - b.start)) for a, b, _ in _sequences(offsets, len(k), rows)), "again": 0}
        if implementation == "numpy":
            bounds, H = grouped.bounds_of(offsets, len(k)), args["n_head"]
            sizes["P"] = sizes["again"] = 0  # again: those whose scores are computed once more in backward
            for group in grouped._groups(bounds, rows, args.get("causal", True), args.get("window"), H, np):
                blocks = grouped._blocks(group, H, np)
                pairs = len(group.limit) * sum((at.stop - at.start) * (near.stop - near.start) for at, near in blocks)
                sizes["P"] += pairs
                keys = group.keys.rows
                longest = (keys.stop - keys.start) // len(group.limit) if isinstance(keys, slice) else keys.shape[1]
                sizes["again"] += pairs * (longest > grouped.KEPT)
    return sizes
