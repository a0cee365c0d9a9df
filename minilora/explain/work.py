"""Works a formula out: its value, and the formula with numbers in place of names. Reads the syntax tree; nothing is evaluated as code."""

from __future__ import annotations

import ast
import math
import operator
from typing import Any, NamedTuple

import numpy as np

SHOWN = 4  # terms of a sum, the first that are not zero; the JSON output has all of them
_BINARY: dict[type[Any], tuple[str, int, Any]] = {
    ast.Add: (" + ", 1, operator.add),
    ast.Sub: (" - ", 1, operator.sub),
    ast.Mult: ("·", 2, operator.mul),
    ast.Div: (" / ", 2, operator.truediv),
    ast.Pow: ("^", 4, operator.pow),
}
_FUNCTIONS: dict[str, Any] = {
    "max": max,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "tanh": math.tanh,
    "sigmoid": lambda x: 0.5 * (1 + math.tanh(0.5 * x)),
    "Phi": lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "phi": lambda x: math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi),
}


class Term(NamedTuple):
    """Of an expression: value, how it reads with names and with numbers, the binding strength of each, and the terms of a sum."""

    value: float
    names: str
    numbers: str
    rank: int = 9
    number_rank: int = 9
    terms: list[float] | None = None


def number(value: float) -> str:
    return f"{value:.4g}" if not float(value).is_integer() or abs(value) > 1e6 else str(int(value))


def work(expression: str, env: dict[str, Any]) -> Term:
    """The expression, with names and indices from env: numbers and arrays. An array that is None counts as 0 and is left out."""
    return _work(ast.parse(expression.strip(), mode="eval").body, env)


def index_of(target: ast.expr, env: dict[str, Any]) -> tuple[int, ...]:
    """The index of "y[i,j]" in numbers."""
    parts = target.slice.elts if isinstance(target.slice, ast.Tuple) else [target.slice]  # type: ignore[attr-defined]
    return tuple(int(_work(part, env).value) for part in parts)


def _work(node: Any, env: dict[str, Any]) -> Term:
    if isinstance(node, ast.Constant):
        return Term(node.value, str(node.value), str(node.value))
    if isinstance(node, ast.Name):
        value = env[node.id]
        return Term(value, node.id, number(value), 9, 9 if value >= 0 else 0)
    if isinstance(node, ast.Subscript):
        array, name, shown = env[node.value.id], node.value.id, ast.unparse(node.slice).strip("()").replace(" ", "")  # type: ignore[attr-defined]
        value = 0.0 if array is None else array[index_of(node, env)]
        return Term(float(value), f"{name}[{shown}]", number(value), 9, 9 if value >= 0 else 0)
    if isinstance(node, ast.Compare):
        a, b = _work(node.left, env), _work(node.comparators[0], env)
        sign, holds = (">", a.value > b.value) if isinstance(node.ops[0], ast.Gt) else ("==", a.value == b.value)
        return Term(float(holds), f"({a.names} {sign} {b.names})", str(int(holds)))
    if isinstance(node, ast.BinOp):
        return _binary(node, env)
    if node.func.id == "sum":
        return _sum(node.args[0], env)
    args = [_work(arg, env) for arg in node.args]
    names, numbers = (", ".join(getattr(a, kind) for a in args) for kind in ("names", "numbers"))
    return Term(float(_FUNCTIONS[node.func.id](*(a.value for a in args))), f"{node.func.id}({names})", f"{node.func.id}({numbers})")


def _binary(node: ast.BinOp, env: dict[str, Any]) -> Term:
    a, b = _work(node.left, env), _work(node.right, env)
    sign, rank, compute = _BINARY[type(node.op)]
    if isinstance(node.op, ast.Add) and isinstance(node.right, ast.Subscript) and env[node.right.value.id] is None:  # type: ignore[attr-defined]
        return a
    right = rank + (sign in (" - ", " / ", "^"))

    def joined(first: str, second: str, ranks: tuple[int, int], glue: str) -> str:
        return (f"({first})" if ranks[0] < rank else first) + glue + (f"({second})" if ranks[1] < right else second)

    names = joined(a.names, b.names, (a.rank, b.rank), " " if sign == "·" and not b.names[0].isdigit() else sign)
    numbers = joined(a.numbers, b.numbers, (a.number_rank, b.number_rank), sign)
    return Term(float(compute(a.value, b.value)), names, numbers, rank, rank, a.terms or b.terms)


def _sum(node: Any, env: dict[str, Any]) -> Term:
    letter = node.generators[0].target.id
    terms = [_work(node.elt, {**env, letter: k}) for k in range(_length(node.elt, letter, env))]
    first = [t for t in terms if t.value][:SHOWN] or terms[:1]
    shown = [f"({t.numbers})" if t.number_rank <= 1 else t.numbers for t in first]
    more = [f"... {len(terms) - len(first)} more"] if len(terms) > len(first) else []
    body = f"({terms[0].names})" if terms[0].rank == 1 else terms[0].names
    values = [t.value for t in terms]
    return Term(math.fsum(values), f"Σ_{letter} {body}", " + ".join(shown + more), 2, 1 if len(terms) > 1 else terms[0].number_rank, values)


def _length(element: Any, letter: str, env: dict[str, Any]) -> int:
    """The size of the axis on which a letter is used first."""
    for node in ast.walk(element):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            for axis, part in enumerate(parts):
                if isinstance(part, ast.Name) and part.id == letter and env[node.value.id] is not None:
                    return int(np.shape(env[node.value.id])[axis])
    raise KeyError(f"{letter} is no index of any array.")
