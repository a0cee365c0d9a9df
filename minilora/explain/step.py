"""`minilora explain --step`: from the token ids to one changed number of one adapter."""

from typing import Any

import numpy as np

from minilora.checking.trace import Call, trace
from minilora.explain.code import arrays, code
from minilora.explain.costs import counted
from minilora.explain.passes import Passes, find
from minilora.explain.worked import central, check, choices, worked
from minilora.layers import Layer
from minilora.lora import lora_layers
from minilora.optim.optimizers import AdamW

LR = 1e-3


def explain_step(run: Passes, name: str, token: int | None, feature: int | None, page: bool) -> dict[str, Any]:
    """The step that changes one number of lora_A at a place; "lora" is the lowest adapter: every backward call comes before its own.

    Raises ValueError for a model without a trained LoRALinear, and for a place that is none.
    """
    layers = dict(lora_layers(run.model))
    formed = ((c.place.removesuffix("/lora_linear"), c) for c in run.calls if (c.grads or {}).get("dA") is not None)
    ops = {path: c for path, c in formed if path in layers}
    if not ops:
        raise ValueError("this model trains no LoRALinear, so there is no step to explain; name a place without --step.")
    place = find(next(iter(ops)) if name == "lora" else name, run)[0].partition("/")[0]
    if place not in ops:
        raise ValueError(f"{place} has no LoRA for a step to change; the nearest are {', '.join(list(ops)[:3])}.")
    op, p = ops[place], layers[place].lora_A
    i, j = check(place, op, token, feature)
    at = tuple(next(e for e in worked(op, i, j) if e["name"] == "dA")["index"])
    by_loss, before, way = central(run.calls[0], p.data, at), float(p.data[at]), _way(run, op)
    optimizer = AdamW(run.model.parameters(), lr=LR)
    run.model.loss_backward(run.model.loss(run.ids, run.labels)[1])
    with trace(Layer(), arrays=True) as calls:
        optimizer.step()
    first = sum(q.data.size for q in optimizer.flat.parameters[: optimizer.flat.parameters.index(p)])  # where A begins in w

    def numbers(call: Call, i: int, j: int) -> list[dict[str, Any]]:
        """du and dA, and the step of that number of A."""
        entries = [e for e in worked(call, i, j) if e["name"] in ("du", "dA")]
        return entries + worked(calls[0], 0, first + int(np.ravel_multi_index(entries[-1]["index"], p.data.shape)))

    entries = numbers(op, i, j)
    entries[1]["finite_difference_of_loss"] = by_loss
    loss_after = float(run.model.loss(run.ids, run.labels, keep=False)[0])
    found: dict[str, Any] = {"place": place, "parameter": f"{place}.lora_A", "index": list(at), "lr": LR}
    found |= {"way": way, "worked": entries, "token": i, "feature": j, "code": [code(op)], **arrays(op)}
    found |= {"before": before, "after": float(p.data[at]), "loss_after": loss_after}
    return found | (choices(op, i, j, numbers) if page else {})


def _way(run: Passes, op: Call) -> list[dict[str, Any]]:
    """The backward calls from the loss down to an operation, in order: those that the layers around it call."""
    around: list[Any] = [op]
    while around[-1] is not None:
        around.append(around[-1].parent)
    done = [c for c in run.calls if c.parent in around[1:] and (c.grads or c.order is not None) and (c.order or 0) <= (op.order or 0)]
    return [
        {
            "place": c.place.lstrip("/") or "the model",
            "name": c.name,
            "dy": list(c.shapes.get("dy", ())),
            "norm_dy": None if c.dy is None else float(np.linalg.norm(c.dy)),
            "gradients": [g for g in c.gradients if g in c.shapes],
            **counted(c),
        }
        for c in sorted(done, key=lambda c: -1 if c.order is None else c.order)
    ]
