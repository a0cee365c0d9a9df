"""`minilora explain`: everything about one place of a model, as a dictionary; terminal.py and page.py show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilora.checking.trace import Call
from minilora.explain.code import arrays, code, doc, file_of, functions
from minilora.explain.composite import composed
from minilora.explain.costs import counted, predicted, saved_formula
from minilora.explain.docstring import sizes_of
from minilora.explain.page import write_page
from minilora.explain.passes import TEXT, Passes, find, passes
from minilora.explain.step import explain_step
from minilora.explain.terminal import show
from minilora.explain.worked import check, choices, grid_of, worked
from minilora.runs import Say, silent


def explain(
    place: str = "lora",
    model: str | Path = "pydoc",
    text: str = TEXT,
    token: int | None = None,
    feature: int | None = None,
    step: bool = False,
    html: str | Path | None = None,
    say: Say = silent,
) -> dict[str, Any]:
    """Explain a layer, an operation, "lora", a block or, with step=True, the way from the text to one changed number of an adapter.

    place: a path in the model, the end of one, or a name of minilora.kernels.TABLE. token, feature: the coordinate that is worked out; by
    default that of the largest gradient. html: a new file for the same as a page. Returns everything as a dictionary. Raises ValueError,
    with what there is, for a place, token or feature that is not there, and for a text that the model does not take.
    """
    run = passes(model, text)
    result = {"model": str(model), "note": run.note, "text": text, "tokens": run.pieces, "ids": run.ids.tolist(), "loss": run.loss}
    result |= (explain_step if step else _explain)(run, place, token, feature, html is not None)
    if html is not None:
        write_page(result, html)
    show(result, say)
    return result


def _explain(run: Passes, name: str, token: int | None, feature: int | None, page: bool) -> dict[str, Any]:
    place, exact = find(name, run)
    at = run.exact.index(exact) if exact in run.exact else -1  # -1: an example
    call = run.calls[at] if at >= 0 else exact
    whole = call.parent if call.is_operation and call.parent is not None and at >= 0 else call
    inside = [c for c in whole.children if c.during == "forward"]
    single = [c for c in inside if c.is_operation] if len(inside) == 1 else []
    if call.is_operation and not single:
        whole = call  # one operation of several in its layer
    op = call if call.is_operation else single[0] if single else None
    subject = exact if op is None or at < 0 else run.exact[run.calls.index(op)]
    i, j = check(place, subject, token, feature)
    docs, numbers = doc(op or call), worked if op else composed
    sizes = sizes_of(docs.letters, (op or call).shapes) | (op.flops.sizes if op else {})
    full = [c for c in run.full if c.place == whole.place and c.is_operation == whole.is_operation and at >= 0][:1]
    why = "nothing here or below is trained" if functions(call)[1] else "it has no backward function"
    result: dict[str, Any] = {
        "place": place,
        "name": call.name,
        "about": (type(call.layer).__doc__ or "").split("\n")[0] if call.layer is not None else "",
        "operation": op.name if op else "",
        "implementation": op.implementation if op else "",
        "layer": file_of(functions(whole)[0]) if op and whole.layer is not None else "",
        "example": at < 0,
        "equation": docs.equation,
        "gradient": docs.gradient,
        "source": docs.source,
        "sizes": {letter: size for letter, size in sizes.items() if size},
        "letters": "P: pairs of a query and a key that are multiplied, h: features of all query heads" if "P" in sizes else "",
        **arrays(op or call),
        "no_backward": "" if call.order is not None or call.grads else why,
        "code": [c for c in [code(op or call)] if c["forward"]],
        "token": i,
        "feature": j,
        "grid": list(grid_of(subject)),
        "worked": numbers(subject, i, j),
        "costs": {"LoRA": _costs(whole, op)},
    }
    for other in full:
        result["costs"]["fully trained"] = _costs(other, other.children[0] if single else op and other, run.base)
    if op is None:
        result["children"] = [_child(c, whole.place) for c in inside]
    if page and result["worked"]:
        result |= choices(subject, i, j, numbers)
    return result


def _costs(call: Call, op: Call | None, base: set[int] | None = None) -> dict[str, Any]:
    """What was counted, with its formulas, and the parameters that are trained here: those of `base`, or those that are trainable."""
    every = list(call.layer.parameters()) if call.layer is not None else []
    trained = sum(p.data.size for _, p in every if (p.trainable if base is None else id(p) in base))
    formulas = {"adam": "12 a parameter"}
    if op is not None:
        saved = saved_formula([a for c in call.below() for a in c.kept], doc(op), sizes_of(doc(op).letters, op.shapes))
        formulas |= predicted(op) | {"saved": saved}
    return counted(call) | {"trained": trained, "adam": 12 * trained, "formulas": formulas}


def _child(call: Call, place: str) -> dict[str, Any]:
    return {"place": call.place.removeprefix(place).lstrip("./"), "name": call.name, "backward": call.order} | counted(call)
