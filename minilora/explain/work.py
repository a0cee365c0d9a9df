"""Works a formula out: its value, and how it reads with numbers. It walks the syntax tree; nothing is run as code."""

import ast
import math
import operator
import re
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.quantization.residual import dense

Env = dict[str, Any]
SHOWN = 4  # terms of a sum, the first that are not zero; --json has the value of every term
_OPERATORS: dict[Any, Any] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: operator.pow},
    **{ast.Gt: operator.gt, ast.Eq: operator.eq, ast.MatMult: operator.matmul},
}
_FUNCTIONS: dict[str, Any] = {
    **{"max": max, "exp": np.exp, "sqrt": np.sqrt, "tanh": np.tanh},
    "sigmoid": lambda x: 0.5 * (1 + np.tanh(0.5 * x)),
    "Phi": lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "phi": lambda x: np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi),
    # of whole arrays
    **{"len": len, "dense": dense, "softmax": F.softmax, "softmax_backward": F.softmax_backward},
    "rows": lambda x, ids: x[ids],
    "mean": lambda x: x.mean(axis=1, keepdims=True),
    "logsumexp": lambda x: x.max(axis=1) + np.log(np.exp(x - x.max(axis=1, keepdims=True)).sum(axis=1)),
}


def work(expression: str, env: Env) -> tuple[Any, str, list[float]]:
    """The value of an expression, with names and indices from env; how it reads with numbers; the values of the terms of its sums.

    Without indices it may be one of whole arrays, of which `.T` is the transpose.
    """
    terms: list[float] = []
    value, node = _work(ast.parse(expression, mode="eval").body, env, terms)
    return value, re.sub(r"^\(([^()]*)\)$", r"\1", read(ast.unparse(node))), terms  # a negative number alone needs no parentheses


def read(text: str) -> str:
    """Python's operators as a reader writes them."""
    text = re.sub(r" \* (?=[\d(])|(?<=[\d)]) \* ", "·", text).replace(" * ", " ")
    text = re.sub(r"(?<=\()\((-[\d.e-]+)\)(?=[,)])", r"\1", re.sub(r" ?\*\* ?", "^", text))
    return re.sub(
        r"sum\((.*?) for (\w) in \w+\)", lambda m: f"Σ_{m[2]} " + (f"({m[1]})" if re.match(r"[^()]* [+-] ", m[1]) else m[1]), text
    )


def _work(node: Any, env: Env, terms: list[float]) -> tuple[Any, Any]:
    """The value of a node, and the node with numbers in place of names."""
    kind = type(node).__name__
    if kind == "Constant":
        return node.value, node
    if kind == "Name":
        value = env[node.id]
        return value, node if np.ndim(value) else _number(value)
    if kind == "Attribute":
        return _work(node.value, env, terms)[0].T, node
    if kind == "Subscript":
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        value = float(env[node.value.id][tuple(int(_work(part, env, [])[0]) for part in parts)])
        return value, _number(value)
    if kind == "Call" and node.func.id == "sum":
        return _sum(node.args[0], env, terms)
    if kind == "Call":
        args = [_work(arg, env, terms) for arg in node.args]
        return _FUNCTIONS[node.func.id](*(v for v, _ in args)), ast.Call(node.func, [n for _, n in args], [])
    left, right, op = (node.left, node.comparators[0], node.ops[0]) if kind == "Compare" else (node.left, node.right, node.op)
    (a, x), (b, y) = _work(left, env, terms), _work(right, env, terms)
    value = _OPERATORS[type(op)](a, b)
    return value, _number(value) if kind == "Compare" else ast.BinOp(x, op, y)


def _sum(node: Any, env: Env, terms: list[float]) -> tuple[float, Any]:
    """Over the axis on which the letter of the sum is used first."""
    letter = node.generators[0].target.id
    used: Any = (n for n in ast.walk(node.elt) if isinstance(n, ast.Subscript))
    axes = ((env[n.value.id], ast.unparse(n.slice).strip("()").split(", ")) for n in used)
    count = next(array.shape[letters.index(letter)] for array, letters in axes if letter in letters)
    parts = [_work(node.elt, {**env, letter: k}, []) for k in range(count)]
    terms += [float(value) for value, _ in parts]
    first = [part for value, part in parts if value][:SHOWN] or [part for _, part in parts[:1]]
    shown = first[0]
    for part in [*first[1:], *([ast.Name(f"... {count - len(first)} more")] if count > len(first) else [])]:
        shown = ast.BinOp(shown, ast.Add(), part)
    return math.fsum(value for value, _ in parts), shown


def _number(value: float) -> ast.Name:
    """A number as it is shown, in the place of a name; a negative one in parentheses."""
    text = str(int(value)) if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"
    return ast.Name(f"({text})" if value < 0 else text)
