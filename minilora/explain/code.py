"""The source of a call in both directions, and what its docstring says."""

import re
from typing import Any

from minilora import functional as F
from minilora.checking.trace import Call, bare, where
from minilora.explain.docstring import Doc, doc_of
from minilora.explain.lines import Line, lines_of, undone

_AXES = dict.fromkeys("aby", "T n")
PYTHONS = {  # operations whose reference is Python's own operator
    "add": Doc("y = a + b", "da = dy, db = dy: whoever calls it passes dy on to both terms.", _AXES, "", ""),
    "multiply": Doc("y = a * b, element by element", "da = dy * b, db = dy * a: whoever calls it forms these products.", _AXES, "", ""),
}


def functions(call: Call) -> tuple[Any, Any]:
    """The forward and backward functions to read: of an operation the reference, whose mathematics every kernel shares."""
    if call.layer is not None:
        forward, backward = (getattr(f, "__func__", f) for f in call.run)
        return forward, backward
    return getattr(F, call.name, bare(call.function)), getattr(F, f"{call.name}_backward", bare(call.backward_function))


def file_of(function: Any) -> str:
    """The file, from the package on, and the line of a function."""
    return re.sub(r".*/(?=minilora/)", "", where(function).replace("\\", "/"))


def doc(call: Call) -> Doc:
    """Where a docstring names no axes, those of a matrix are T and n."""
    if call.name in PYTHONS:
        return PYTHONS[call.name]
    if call.layer is not None:
        return doc_of(type(call.layer))
    found = doc_of(*functions(call))
    letters = {name: ("", "n", "T n")[len(shape)] for name, shape in call.shapes.items() if len(shape) < 3}
    return found if found.letters.keys() & call.shapes.keys() else found._replace(letters=letters)


def arrays(call: Call) -> dict[str, list[dict[str, Any]]]:
    """Of each array that goes in and comes out, forward and backward: name, axes in letters, shape, and whether it comes out."""
    letters = doc(call).letters

    def described(name: str, like: str, result: bool) -> dict[str, Any]:
        """like: the array that has the same axes."""
        return {"name": name, "axes": letters.get(like, "").replace(" ", ", "), "shape": list(call.shapes[name]), "result": result}

    forward = [(name, name, False) for name in call.args] + [("y", "y", True)]
    backward = [("dy", "y", False)] + [(name, name[1:], True) for name in call.gradients]
    ways = {"forward": forward, "backward": backward}
    return {way: [described(*each) for each in of if each[0] in call.shapes] for way, of in ways.items()}


def code(call: Call) -> dict[str, Any]:
    """The lines of both directions, each backward line with the forward lines that it undoes."""
    found = [f for f in functions(call) if f is not None]
    forward, backward = (lines_of(f) for f in (*found, None)[:2])
    undoes = [[forward[k].number for k in each] for each in undone(forward, backward)]
    back = [_line(line) | {"undoes": each} for line, each in zip(backward, undoes, strict=True)]
    return {"files": [file_of(f) for f in found], "forward": [_line(line) for line in forward], "backward": back}


def _line(line: Line) -> dict[str, Any]:
    return {"line": line.number, "code": line.text, "names": sorted(line.names)}
