"""`minilora explain`: everything about one place of a model, as a dictionary, which terminal.py shows."""

from pathlib import Path
from typing import Any

from minilora.checking.trace import Call
from minilora.explain.code import arrays, code, doc, file_of, functions
from minilora.explain.costs import costs, counted
from minilora.explain.docstring import sizes_of
from minilora.explain.passes import TEXT, Passes, find, passes
from minilora.explain.step import explain_step
from minilora.explain.terminal import COSTS, show
from minilora.explain.worked import check, choices, composed, grid_of, worked
from minilora.formats import extra
from minilora.formats.atomic import to_json, write_text
from minilora.lora import lora_layers
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
    result = {"step": step, "model": str(model), "note": run.note, "text": text}
    result |= {"tokens": run.pieces, "ids": run.ids.tolist(), "loss": run.loss}
    result |= (explain_step if step else _explain)(run, place, token, feature, html is not None)
    if html is not None:
        write_page(result, html)
    show(result, say)
    return result


def write_page(result: dict[str, Any], file: str | Path) -> None:
    """Write the explanation as one HTML page that needs no network. Raises FileExistsError if the file is there; ImportError."""
    jinja2 = extra("jinja2", "html", "--html")
    if Path(file).exists():
        raise FileExistsError(f"{file} is in use; name another file, or remove it first.")
    loader = jinja2.PackageLoader("minilora.explain", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    choices = {at: [{k: v for k, v in e.items() if k != "terms"} for e in entries] for at, entries in result.get("choices", {}).items()}
    data = to_json({"choices": choices}).replace("<", "\\u003c")  # a script ends at "</script>"
    write_text(file, environment.get_template("explain.html.j2").render(r=result, labels=COSTS, data=data))


def _explain(run: Passes, name: str, token: int | None, feature: int | None, page: bool) -> dict[str, Any]:
    place, call = find(name, run)
    example = call not in run.float32
    whole, op = (call, call) if example else _parts(call)
    shown = op or call
    as_run = run.float32.get(shown, shown)
    i, j = check(place, shown, token, feature)
    docs, source, numbers = doc(shown), code(shown), worked if op else composed
    sizes = sizes_of(docs.letters, shown.shapes) | as_run.flops.sizes
    why = "nothing here or below is trained" if functions(call)[1] else "it has no backward function"
    result: dict[str, Any] = {
        "place": place,
        "name": call.name,
        "about": (type(call.layer).__doc__ or "").split("\n")[0].rstrip(".:") if call.layer is not None else "",
        "operation": op.name if op else "",
        "implementation": as_run.implementation,
        "layer": file_of(functions(whole)[0]) if op and whole.layer is not None else "",
        "example": example,
        "equation": docs.equation,
        "gradient": docs.gradient,
        "source": docs.source,
        "sizes": {letter: size for letter, size in sizes.items() if size},
        "letters": "P: pairs of a query and a key that are multiplied, h: features of all query heads" if "P" in sizes else "",
        **arrays(shown),
        "no_backward": "" if call.order is not None or call.grads else why,
        "code": [source] if source["forward"] else [],
        "token": i,
        "feature": j,
        "grid": list(grid_of(shown)),
        "worked": numbers(shown, i, j),
        "costs": _costs(run, whole, op),
    }
    if op is None:
        result["children"] = _children(run.float32[whole])
    if page and result["worked"]:
        result |= choices(shown, i, j, numbers)
    return result


def _parts(call: Call) -> tuple[Call, Call | None]:
    """What is counted, and the operation that is shown: a layer that calls a single operation is shown by it. None: of a composite."""
    layer = call.parent if call.is_operation and call.parent is not None else call
    inside = [c for c in layer.children if c.during == "forward"]
    if len(inside) == 1 and inside[0].is_operation:
        return layer, inside[0]
    return call, call if call.is_operation else None


def _costs(run: Passes, whole: Call, op: Call | None) -> dict[str, Any]:
    """With the adapters, and fully trained; of an example as it is."""
    if whole not in run.float32:
        return {"example": costs(whole, op)}
    adapted = "LoRA" if lora_layers(run.model) else "adapter"
    found = {adapted: costs(run.float32[whole], run.float32[op] if op else None)}
    if same := [c for c in run.full if c.place == whole.place and c.is_operation == whole.is_operation]:
        found["fully trained"] = costs(*_parts(same[0]), run.base)
    return found


def _children(call: Call) -> list[dict[str, Any]]:
    """What a composite calls, in order, with what it costs. "backward": 1 for the first whose backward is called."""
    children = [c for c in call.children if c.during == "forward"]
    orders = sorted(c.order for c in children if c.order is not None)
    return [
        {
            "place": c.place.removeprefix(call.place).lstrip("./"),
            "name": c.name,
            "backward": None if c.order is None else orders.index(c.order) + 1,
            **counted(c),
        }
        for c in children
    ]
