"""One number of a layer that is made of layers: the sums in its two directions, and gradients beside finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.checking.trace import Call
from minilora.explain.worked import central


def composed(call: Call, i: int, j: int) -> list[dict[str, Any]]:
    """Each sum at [i, j], with the names of what is added; dx, and the gradient of the first trained parameter below."""
    x, at = call.inputs[0][0][0], (i, j)
    sums: dict[str, Any] = {}
    known, found = {"x": x, "dy": call.dy}, []
    for child in call.children:
        if child.name == "add" and child.y.shape == (call.y.shape if call.y.ndim else None):
            terms = child.inputs[0][0]
            name = " + ".join(next((n for n, a in {**sums, **known}.items() if np.array_equal(a, t)), "?") for t in terms)
            numbers = " + ".join(f"({t[at]:.4g})" if t[at] < 0 else f"{t[at]:.4g}" for t in terms)
            sums[name] = child.y
            found.append(_entry(name, at, child.y) | {"formula": f"{name}  at [{i},{j}]", "numbers": numbers})
        part = child.place.rpartition(".")[2].rpartition("/")[2]
        known.setdefault(part, child.y)
        if child.grads and child.grads.get("dx") is not None:
            known[f"{part}.dx"] = child.grads["dx"]
    if call.grads and call.grads.get("dx") is not None:
        found.append(_entry("dx", at, call.grads["dx"]) | {"finite_difference": central(call, x, at)})
    path, p = next(((path, p) for path, p in call.layer.parameters() if p.grad is not None and call.order is not None), ("", None))
    if p is not None:
        at = tuple(min(k, n - 1) for k, n in zip((i, j), p.data.shape, strict=False))
        found.append(_entry(f"d {path}", at, p.grad) | {"finite_difference": central(call, p.data, at)})
    return found


def _entry(name: str, at: tuple[int, ...], array: Any) -> dict[str, Any]:
    return {"name": name, "index": list(at), "value": float(array[at]), "formula": f"{name}[{','.join(map(str, at))}]"}
