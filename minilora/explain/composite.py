"""One number of a layer that is made of layers: the sums in its two directions, and gradients beside finite differences."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np

from minilora.checking.trace import Call
from minilora.explain.worked import central


def composed(call: Call, i: int, j: int) -> list[dict[str, Any]]:
    """Each sum at [i, j], with the names of what is added; dx, and the gradient of the first trained parameter below."""
    x = call.inputs[0][0][0]
    sums: dict[str, Any] = {}
    known, found = {"x": x, "dy": call.dy}, []
    for child in call.children:
        if child.name == "add" and child.y.shape == (call.y.shape if call.y.ndim else None):
            terms = child.inputs[0][0]
            name = " + ".join(next((n for n, a in {**sums, **known}.items() if np.array_equal(a, t)), "?") for t in terms)
            sums[name], entry = child.y, _entry(name, i, j, child.y)
            at = tuple(entry["index"])
            numbers = " + ".join(f"({t[at]:.4g})" if t[at] < 0 else f"{t[at]:.4g}" for t in terms)
            found.append(entry | {"formula": f"{name}  at [{i},{j}]", "numbers": numbers})
        part = child.place.rpartition(".")[2].rpartition("/")[2]
        known.setdefault(part, child.y)
        if child.grads and child.grads.get("dx") is not None:
            known[f"{part}.dx"] = child.grads["dx"]
    trained = ((f"d {path}", p.data, p.grad) for path, p in call.layer.parameters() if p.grad is not None and call.order is not None)
    dx = [("dx", x, call.grads["dx"])] if call.grads and call.grads.get("dx") is not None else []
    for name, array, gradient in [*dx, *islice(trained, 1)]:
        entry = _entry(name, i, j, gradient)
        found.append(entry | {"finite_difference": central(call, array, tuple(entry["index"]))})
    return found


def _entry(name: str, i: int, j: int, array: Any) -> dict[str, Any]:
    """Of the number at [i, j], within the size of each axis."""
    at = tuple(k % n for k, n in zip((i, j)[-array.ndim :], array.shape, strict=True))
    return {"name": name, "index": list(at), "value": float(array[at]), "formula": f"{name}[{','.join(map(str, at))}]"}
