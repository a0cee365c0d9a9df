"""One coordinate of every array of a call: its formula with numbers, and its finite difference.

Of a layer that is made of layers: the sums in its two directions, and gradients beside finite differences.
"""

import re
from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np

from minilora.backend import Array
from minilora.checking.trace import Call
from minilora.explain.code import functions
from minilora.explain.formulas import GIVEN, formulas
from minilora.explain.work import read, work

STEP = 1e-5
OFFERED = (16, 10)  # tokens and features to choose from in a page
Numbers = Callable[[Call, int, int], list[dict[str, Any]]]


def grid_of(call: Call) -> tuple[int, int]:
    """How many tokens and features there are to choose from: the shape of y, else of the first argument that is a matrix."""
    shapes = [getattr(a, "shape", ()) for a in (call.y, *arguments(call).values())]
    return next((s for s in shapes if len(s) == 2), None) or next(((1, *s) for s in shapes if len(s) == 1), (1, 1))


def check(place: str, call: Call, token: int | None, feature: int | None) -> tuple[int, int]:
    """The coordinate; by default where dy is largest. Raises ValueError for one out of range."""
    for name, value, count in zip(("token", "feature"), (token, feature), grid_of(call), strict=True):
        if value is not None and not 0 <= value < count:
            raise ValueError(f"{place} has no {name} {value}; choose one from 0 to {count - 1}.")
    dy, (rows, _) = cotangent(call), grid_of(call)
    if dy is None or dy.ndim != 2:
        return (rows - 1 if token is None else token), feature or 0
    size = abs(dy if feature is None else dy[:, [feature]])
    i = int(size.max(axis=1).argmax()) if token is None else token
    return i, int(size[i].argmax()) if feature is None else feature


def choices(call: Call, i: int, j: int, numbers: Numbers) -> dict[str, Any]:
    """What a page offers: tokens, features, and the numbers of each pair, by "token,feature"."""
    both = zip((i, j), grid_of(call), OFFERED, strict=True)
    tokens, features = offered = [sorted({at, *np.linspace(0, n - 1, min(n, most)).astype(int).tolist()}) for at, n, most in both]
    return {"offered": offered, "choices": {f"{t},{f}": numbers(call, t, f) for t in tokens for f in features}}


def cotangent(call: Call) -> Array | None:
    """dy; where an operation has no backward of its own, that of the layer whose result it is."""
    is_loss, parent = call.run[1] is None and call.grads, call.parent
    if call.dy is None and not is_loss and parent is not None and np.array_equal(parent.y, call.y):
        return parent.dy
    return call.dy


def worked(call: Call, i: int, j: int) -> list[dict[str, Any]]:
    """For each line of the operation's formulas: name, value, the formula with names and with numbers, and how it compares."""
    dy = cotangent(call)
    arrays = {**arguments(call), "y": call.y, **(call.grads or {}), **({} if dy is None else {"dy": dy})}
    env: dict[str, Any] = {"i": i, "j": j, **arrays}
    env |= GIVEN[call.name](env, i, j) if call.name in GIVEN else {}
    left_out = "|".join(n for n, value in env.items() if value is None) or "-"  # a bias, a mask
    found = []
    for line in formulas().get(call.name, []):
        formula, _, remark = re.sub(rf" [*+] ({left_out})\b(\[[^\]]*\])?", "", line).partition("  # ")
        if " := " in formula:
            name, expression = formula.split(" := ")
            if all(env.get(n) is not None for n in re.findall(r"(?<!\.)\b([A-Za-z]\w*)\b(?!\()", expression)):
                env[name] = work(expression, env)[0]
            continue
        name, expression = formula.split(" = ", 1)
        array, _, letters = name.rstrip("]").partition("[")
        if any(env.get(n) is None for n in [*re.findall(r"(\w+)\[", expression), *({array} & {*call.gradients})]):
            continue  # without a gradient of y, or of what is frozen
        for letter, size in zip(letters.split(",") if letters else (), np.shape(env.get(array, 0)), strict=False):
            env.setdefault(letter, j % size)
        index = tuple(env[letter] for letter in letters.split(",")) if letters else ()
        value, numbers, terms = work(expression, env)
        entry = {"name": array, "index": list(index), "value": float(value), "numbers": numbers, "terms": terms, "remark": remark}
        entry["formula"] = _indexed(f"{name} = {read(expression)}", env)
        entry["array"] = None if env.get(array) is None else float(env[array][index])
        if array.startswith("d") and array in call.gradients:
            entry["finite_difference"] = central(call, arguments(call)[array[1:]], index)
        if not letters:
            env[array] = value
        found.append(entry)
    return found


def arguments(call: Call) -> dict[str, Any]:
    """{name: value} of what a call was given, and the defaults of the rest."""
    parameters, (args, options) = signature(functions(call)[0]).parameters, call.inputs[0]
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return defaults | dict(zip(parameters, args, strict=False)) | options


def central(call: Call, x: Array, index: tuple[int, ...]) -> float:
    """The central difference of sum(dy y), or of a loss, by one number of an array that the call reads and that is restored."""
    dy, (args, options) = cotangent(call), call.inputs[0]
    kept, h, results = x[index], STEP * max(1.0, abs(float(x[index]))), []
    try:
        for value in (kept + h, kept - h):
            x[index] = value
            result = call.run[0](*args, **options)
            results.append(np.array(result[0] if isinstance(result, tuple) else result))
    finally:
        x[index] = kept
    change = results[0] - results[1]
    return float((change if dy is None else dy * change).sum() / (2 * h))


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


def _indexed(formula: str, env: dict[str, Any]) -> str:
    """The formula with numbers for its indices, but for those of sums."""
    numbers = {n: str(v) for n, v in env.items() if isinstance(v, int) and n not in re.findall(r"Σ_(\w)", formula)}
    return re.sub(r"(?<=[\[,])\w+(?=[\],])|(?<=== )\w+", lambda m: numbers.get(m[0], m[0]), formula)
