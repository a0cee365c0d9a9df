"""`minilora explain --step`: from the token ids to one changed number of one adapter."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora import kernels as K
from minilora.checking.trace import Call, trace
from minilora.explain.costs import counted
from minilora.explain.passes import Passes, find
from minilora.explain.worked import check, worked
from minilora.functional import AdamStep
from minilora.layers import Layer
from minilora.lora import lora_layers
from minilora.optim.optimizers import AdamW

LR = 1e-3


def explain_step(run: Passes, name: str, token: int | None, feature: int | None) -> dict[str, Any]:
    """The step that changes one number of the adapter at a place; "lora" is the lowest adapter, which every backward call precedes.

    Raises ValueError for a model without a LoRA layer, and for a place that is none.
    """
    adapters = [path for path, layer in lora_layers(run.model) if any(p.grad is not None for _, p in layer.parameters())]
    place = find(adapters[0] if name == "lora" and adapters else name, run)[0].partition("/")[0]
    if place not in adapters:
        what = f"the nearest are {', '.join(adapters[:3])}" if adapters else "this model has none that is trained"
        raise ValueError(f"{place} has no adapter for a step to change; {what}.")
    call = next(c for c in run.exact if c.place == place and c.layer is not None)
    op = next(c for c in call.children if c.is_operation and c.grads)
    i, j = check(place, op, token, feature)
    numbers = [e for e in worked(op, i, j) if e["name"] in ("du", "dA", "dB")]
    chosen = next((e for e in numbers if e["name"] == "dA" and e["value"]), numbers[-1] if numbers else None)
    if chosen is None:
        raise ValueError(f"{place} is a {call.name}, whose step is not worked out; name the place of a LoRALinear.")
    p, at = getattr(call.layer, f"lora_{chosen['name'][1:]}"), tuple(chosen["index"])
    chosen["finite_difference_of_loss"] = _by_loss(run, p.data, at)
    update = _update(p.data, p.grad, int(np.ravel_multi_index(at, p.data.shape)))
    before, after = float(p.data[at]), _step(run)
    return {
        "place": place,
        "step": True,
        "parameter": f"{place}.lora_{chosen['name'][1:]}",
        "index": list(at),
        "way": _way(run, call),
        "worked": [e for e in numbers if e["name"] == "du" and chosen["name"] == "dA"] + [chosen],
        "adamw": update,
        "before": before,
        "after": float(p.data[at]),
        "loss_after": after,
        "lr": LR,
    }


def _way(run: Passes, call: Call) -> list[dict[str, Any]]:
    """The backward calls from the loss down to one layer: what is called by the layers around it, in order."""
    around = [call]
    while around[-1].parent is not None:
        around.append(around[-1].parent)
    last = call.order if call.order is not None else 0
    rows = []
    for c in run.calls:
        exact = run.exact[run.calls.index(c)]
        loss = c.is_operation and c.order is None and bool(exact.grads)
        if not (loss or (c.order is not None and c.order <= last)) or not any(c.parent is run.calls[run.exact.index(a)] for a in around):
            continue
        size = float(np.sqrt((exact.dy**2).sum())) if exact.dy is not None else None
        row = {"place": c.place, "name": c.name, "order": -1 if c.order is None else c.order, "dy": list(c.shapes.get("dy", ()))}
        rows.append(row | {"norm_dy": size, "gradients": [g for g in c.gradients if g in c.shapes]} | counted(c))
    return sorted(rows, key=lambda row: row["order"])


def _by_loss(run: Passes, data: Any, at: tuple[int, ...], h: float = 1e-5) -> float:
    """The central difference of the loss of the whole model by one number."""
    kept, losses = data[at], []
    for value in (kept + h, kept - h):
        data[at] = value
        losses.append(float(run.model.loss(run.ids, run.labels, keep=False)[0]))
    data[at] = kept
    return (losses[0] - losses[1]) / (2 * h)


def _update(w: Any, g: Any, at: int) -> list[dict[str, Any]]:
    """AdamW's first step of one number, worked out."""
    zeros, step = np.zeros(w.size), AdamStep(LR, 0.0, 0.9, 0.999, 1 - 0.9, 1 - 0.999, 1e-8, True)
    with trace(Layer(), arrays=True) as calls:
        K.adamw(w.ravel().copy(), g.ravel().copy(), zeros, zeros.copy(), 1.0, 1.0, step)
    return worked(calls[0], 0, at)


def _step(run: Passes) -> float:
    """Take the step, of every adapter. Returns the loss after it."""
    optimizer = AdamW(run.model.parameters(), lr=LR)
    run.model.loss_backward(run.model.loss(run.ids, run.labels)[1])
    optimizer.step()
    return float(run.model.loss(run.ids, run.labels, keep=False)[0])
