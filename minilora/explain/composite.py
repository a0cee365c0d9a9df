"""One number of a layer that is made of layers: the sums in its two directions, and gradients beside finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.checking.trace import Call
from minilora.explain.worked import central, worked


def composed(call: Call, i: int, j: int) -> list[dict[str, Any]]:
    """Each sum at [i, j], with the names of what is added; dx, and the gradient of the first trained parameter below."""
    x = call.inputs[0][0][0]
    known, found = {"x": x, "dy": call.dy}, []  # {name: array}, the sums first
    for child in (c for c in call.children if c.name != "Dropout"):  # which is off, and passes on what it gets
        if child.name == "add" and child.y.shape == call.y.shape:
            terms = (next((name for name, array in known.items() if np.array_equal(array, term)), "?") for term in child.inputs[0][0])
            name = " + ".join(terms)
            known = {name: child.y, **known}
            found.append(worked(child, i, j)[0] | {"name": name, "formula": f"{name}  at [{i},{j}]"})
        path = child.place.removeprefix(call.place).lstrip("./")
        part = path.rpartition(".")[2]
        part = path if part in known else part
        known.setdefault(part, child.y)
        if child.grads and child.grads.get("dx") is not None:
            known[f"{part}.dx"] = child.grads["dx"]
    gradients = [("dx", x, (call.grads or {}).get("dx"))]
    if call.order is not None:
        gradients += [(f"d {path}", p.data, p.grad) for path, p in call.layer.parameters() if p.grad is not None][:1]
    for name, array, gradient in gradients:
        if gradient is not None:
            at = tuple(k % n for k, n in zip((i, j)[-array.ndim :], array.shape, strict=True))
            entry = {"name": name, "index": list(at), "value": float(gradient[at]), "formula": f"{name}[{','.join(map(str, at))}]"}
            found.append(entry | {"finite_difference": central(call, array, at)})
    return found
