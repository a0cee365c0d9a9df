"""`minilora explain`: everything about one place of a model, as a dictionary; terminal.py and page.py show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.checking.trace import Call, bare
from minilora.explain.costs import counted, kept, predicted, saved_terms
from minilora.explain.docstring import Doc, doc_of, sizes_of
from minilora.explain.lines import file_of, lines_of, undone
from minilora.explain.page import write_page
from minilora.explain.passes import TEXT, Passes, find, passes
from minilora.explain.step import explain_step
from minilora.explain.terminal import show
from minilora.explain.worked import check, central, grid_of, worked
from minilora.runs import Say, silent

ADD = Doc("y = a + b", "da = dy, db = dy: whoever calls it passes dy on to both terms.", {n: "T n" for n in "aby"}, "nothing", "")
GRID = 10  # of tokens and of features that a page offers


def explain(
    place: str = "lora",
    model: str = "pydoc",
    text: str = TEXT,
    token: int | None = None,
    feature: int | None = None,
    step: bool = False,
    html: str | Path | None = None,
    say: Say = silent,
) -> dict[str, Any]:
    """Explain a layer, an operation, "lora", a block or, with step=True, the way from the text to one changed number of an adapter.

    place: a path in the model, the end of one, or a name of minilora.kernels.TABLE. token, feature: the coordinate that is worked out; by
    default the one with the largest gradient. html: a file for the same as a page. Returns everything as a dictionary. Raises ValueError,
    with what there is, for a place, token or feature that is not there, and for a text that the model does not take.
    """
    run = passes(model, text)
    result = explain_step(run, place, token, feature) if step else _explain(run, place, token, feature, html is not None)
    result = {"model": str(model), "note": run.note, "text": text, "tokens": run.pieces, "loss": run.loss} | result
    show(result, say)
    if html is not None:
        write_page(result, html)
        say(f"page        {html}")
    return result


def _explain(run: Passes, name: str, token: int | None, feature: int | None, grid: bool) -> dict[str, Any]:
    place, exact = find(name, run)
    at = run.exact.index(exact) if exact in run.exact else -1
    call = run.calls[at] if at >= 0 else exact
    layer = call if not call.is_operation else call.parent
    only = [c for c in layer.children if c.during == "forward"] if layer is not None else []
    single = len(only) == 1 and only[0].is_operation
    op = call if call.is_operation else only[0] if single else None
    subject = exact if op is None or op is call else run.exact[run.calls.index(op)]
    i, j = check(place, subject, token, feature)
    docs = doc(op or call)
    sizes = sizes_of(docs.letters, call.shapes if op is None else op.shapes) | (op.flops.sizes if op else {})
    numbers = worked if op else _composite
    result: dict[str, Any] = {
        "place": place,
        "name": call.name,
        "about": "" if call.layer is None else (type(call.layer).__doc__ or "").split("\n")[0],
        "operation": op.name if op else None,
        "implementation": op.implementation if op else "",
        "example": at < 0,
        "equation": docs.equation,
        "gradient": docs.gradient,
        "saved_note": docs.saved,
        "source": docs.source,
        "sizes": {letter: size for letter, size in sizes.items() if size},
        "forward": _named(op or call, docs, forward=True),
        "backward": _named(op or call, docs, forward=False),
        "no_backward": "" if call.order is not None or call.grads else "nothing here or below is trained" if functions(call)[1] else "it has no backward function",
        "layer": file_of(functions(layer)[0]) if op is not None and layer is not None and layer.layer is not None and at >= 0 else "",
        "code": [code(op or call)] if code(op or call)["forward"] else [],
        "token": i,
        "feature": j,
        "grid": list(grid_of(subject)),
        "worked": numbers(subject, i, j),
    }
    whole = layer if single and layer is not None and at >= 0 else call
    arrays = kept(run.calls)
    result["saved"] = [t | {"by": c.name} for c in whole.below() for t in saved_terms(arrays.get(id(c), []), docs, sizes)]
    result["costs"] = {"LoRA": _costs(whole)} | {"fully trained": _costs(c, run.base) for c in _same(whole, run.full) if at >= 0}
    if op is None:
        result["children"] = [_child(c, call.place) for c in call.children if c.during == "forward"]
    if grid and result["worked"]:
        offered = [sorted({at, *np.linspace(0, n - 1, min(n, GRID)).astype(int).tolist()}) for at, n in zip((i, j), grid_of(subject), strict=True)]
        result["tokens_offered"], result["features_offered"] = offered
        result["choices"] = {f"{t},{f}": numbers(subject, t, f) for t in offered[0] for f in offered[1]}
    return result


def functions(call: Call) -> tuple[Any, Any]:
    """The forward and backward functions to read: of an operation the reference, whose mathematics every kernel has."""
    own = [getattr(f, "__func__", f) for f in (call.run if call.layer is not None else (call.function, call.backward_function))]
    names = (call.name, f"{call.name}_backward")
    return tuple(bare(getattr(F, n, f)) for n, f in zip(names, own, strict=True)) if call.is_operation else tuple(own)  # type: ignore[return-value]


def doc(call: Call) -> Doc:
    if call.name == "add":
        return ADD
    found = doc_of(*functions(call)) if call.is_operation else doc_of(type(call.layer))
    letters = {name: {2: "T n", 1: "n"}.get(len(shape), "") for name, shape in call.shapes.items()}
    return found if any(n in found.letters for n in call.args) or not call.is_operation else found._replace(letters=letters)


def code(call: Call) -> dict[str, Any]:
    """The lines of both directions, each backward line with the forward lines that it undoes."""
    forward, backward = (lines_of(f) if f is not None else [] for f in functions(call))
    pairs = undone(forward, backward)
    return {
        "name": call.name,
        "files": [file_of(f) for f in functions(call) if f is not None],
        "forward": [{"line": x.number, "code": x.text, "names": sorted(x.names | {x.target} - {""})} for x in forward],
        "backward": [
            {"line": x.number, "code": x.text, "names": sorted(x.names | {x.target} - {""}), "undoes": [forward[k].number for k in undoes]}
            for x, undoes in zip(backward, pairs, strict=True)
        ],
    }


def _named(call: Call, docs: Doc, forward: bool) -> list[dict[str, Any]]:
    """Name, axes in letters, and shape of each array that goes in and comes out."""
    names = [*(n for n in call.shapes if n in call.args), "y"] if forward else ["dy", *call.gradients]
    axes = {n: docs.letters.get(n if forward else {"dy": "y"}.get(n, n[1:]), "") for n in names}
    return [
        {"name": n, "axes": axes[n].replace(" ", ", "), "shape": list(call.shapes[n]), "result": n == "y" if forward else n != "dy"}
        for n in names
        if n in call.shapes
    ]


def _composite(call: Call, i: int, j: int) -> list[dict[str, Any]]:
    """Of a layer made of layers: the sums in both directions; dx, and the gradient of the first trained parameter below, by difference."""
    found, at, args = [], (i, j), call.inputs[0][0]
    sums: dict[str, Any] = {}
    known = {"x": args[0], "dy": call.dy}
    for child in call.children:
        name = child.place.rpartition(".")[2].rpartition("/")[2]
        if child.name == "add" and np.shape(child.y) == grid_of(call):
            terms = [next((n for n, a in {**sums, **known}.items() if np.array_equal(a, x)), "?") for x in child.inputs[0][0]]
            name, shown = " + ".join(terms), " + ".join(f"({x[at]:.4g})" if x[at] < 0 else f"{x[at]:.4g}" for x in child.inputs[0][0])
            found.append({"name": name, "index": list(at), "value": float(child.y[at]), "formula": f"{name}  at [{i},{j}]", "numbers": shown})
            sums[name] = child.y
        known |= {f"{name}.dx": child.grads["dx"]} if child.grads and child.grads.get("dx") is not None and child.order is not None else {}
        known.setdefault(name, child.y)
    if call.grads and call.grads.get("dx") is not None:
        found.append({"name": "dx", "index": list(at), "value": float(call.grads["dx"][at]), "finite_difference": central(call, args[0], at)})
    for path, p in call.layer.parameters():
        if p.grad is not None and call.order is not None:
            at = tuple(min(k, n - 1) for k, n in zip((i, j), p.data.shape, strict=False))
            found.append({"name": f"d {path}", "index": list(at), "value": float(p.grad[at]), "finite_difference": central(call, p.data, at)})
            break
    return found


def _costs(call: Call, base: set[int] | None = None) -> dict[str, Any]:
    """What was counted, with the parameters that are trained here: those of `base`, or those that are trainable."""
    every = list(call.layer.parameters()) if call.layer is not None else []
    trained = sum(p.data.size for _, p in every if (id(p) in base if base is not None else p.trainable))
    own = next((c for c in [call, *call.children] if c.is_operation and len(call.children) < 2), None)
    return counted(call) | {"trained": trained, "adam": 12 * trained, "formulas": predicted(own) if own else {}}


def _same(call: Call, calls: list[Call]) -> list[Call]:
    """The call of the same place in another pass."""
    return [c for c in calls if c.place == call.place and c.is_operation == call.is_operation and c.during == "forward"][:1]


def _child(call: Call, place: str) -> dict[str, Any]:
    names: Callable[[str], str] = lambda p: p.removeprefix(place).lstrip("./")
    return {"place": names(call.place), "name": call.name, "y": list(call.shapes.get("y", ())), "backward": call.order} | counted(call)
