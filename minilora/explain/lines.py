"""Forward and backward lines of the source, and which forward lines each backward line undoes.

A backward line undoes the forward line that its trailing comment quotes, and the one whose function or layer it calls backward. Without
either it undoes the line that reads the array whose gradient it forms. Where nothing fits, lines are paired in mirrored order.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from difflib import SequenceMatcher
from inspect import getsourcefile, getsourcelines
from textwrap import dedent
from typing import Any, NamedTuple


class Line(NamedTuple):
    """A statement: its line in the file, its text, the comment behind it, and the names in it; `target`: what it assigns."""

    number: int
    text: str
    comment: str
    names: frozenset[str]
    target: str
    counts: bool  # whether it computes something: not a check, a condition or a bare return


def lines_of(function: Any) -> list[Line]:
    """The statements of a function; none where there is no source."""
    try:
        source, first = getsourcelines(function)
    except (TypeError, OSError):
        return []
    text = dedent("".join(source))
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}
    tree = ast.parse(text).body[0]
    return list(_statements(getattr(tree, "body", []), text.split("\n"), comments, first)) if isinstance(tree, ast.FunctionDef) else []


def file_of(function: Any) -> str:
    """"minilora/functional/linear.py:10", or "" where there is no source."""
    try:
        return f"{re.sub(r'.*/(?=minilora/)', '', (getsourcefile(function) or '').replace(chr(92), '/'))}:{getsourcelines(function)[1]}"
    except (TypeError, OSError):
        return ""


def _statements(body: list[Any], source: list[str], comments: dict[int, str], first: int, depth: int = 0) -> Iterator[Line]:
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # the docstring
            continue
        inner = getattr(node, "body", None)
        last = inner[0].lineno - 1 if inner and inner[0].lineno > node.lineno else node.end_lineno
        rows = range(node.lineno, last + 1)
        code = [re.sub(rf"\s*#\s*{re.escape(comments[i])}$", "", source[i - 1]).strip() if i in comments else source[i - 1].strip() for i in rows]
        heads = [node.test] if isinstance(node, ast.If) else [node.target, node.iter] if isinstance(node, ast.For) else [node]
        names = {n.id if isinstance(n, ast.Name) else n.attr for h in heads for n in ast.walk(h) if isinstance(n, (ast.Name, ast.Attribute))}
        goal = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        goal = goal.value if isinstance(goal, ast.Subscript) else goal
        value = getattr(node, "value", None)
        moves = not any(isinstance(n, (ast.BinOp, ast.Call)) for n in ast.walk(value)) if value is not None else True
        passive = inner or (moves and not isinstance(node, ast.AugAssign)) or re.match(r"check_|xp\b.*=|raise |.*(self\.load\(|empty_like|zeros)", code[0])
        comment = " ".join(comments[i] for i in rows if i in comments)
        text = "    " * depth + " ".join(c for c in code if c)
        yield Line(first + node.lineno - 1, text, comment, frozenset(names), goal.id if isinstance(goal, ast.Name) else "", not passive)
        for part in (inner, getattr(node, "orelse", None)):
            yield from _statements(part or [], source, comments, first, depth + 1)


def undone(forward: list[Line], backward: list[Line]) -> list[list[int]]:
    """For each backward line the indices of the forward lines that it undoes."""
    result: list[list[int]] = []
    last: list[int] = []
    for line in backward:
        quoted, called = _quoted(line.comment, forward), _called(line, forward)
        own = sorted({*quoted, *called}) or (_reads(line, forward) if line.counts else [])
        result.append(own or (last if line.counts and line.target.startswith("d") else []))
        last = quoted or called or last
    if not any(result):
        free = [i for i, line in enumerate(forward) if line.counts]
        again = {line.text for line in forward}  # computed again, not undone
        left = [k for k, line in enumerate(backward) if line.counts and line.text not in again]
        mirrored = len(left) == len(free) and not any(backward[k].text.startswith("return") for k in left)
        for k, i in zip(left, reversed(free) if mirrored else [0] * len(left), strict=True):
            result[k] = [i] if mirrored else free
    return result


def _quoted(comment: str, forward: list[Line]) -> list[int]:
    """The forward line that a comment quotes, exactly or in most of its names."""
    quote = comment.split(":")[0]  # what follows a colon is a remark
    if "=" not in quote:
        return []
    bare, quoted = re.sub(r"\s", "", quote), _words(quote)

    def likeness(line: Line) -> float:
        if bare in (text := re.sub(r"\s", "", line.text)):
            return 3.0
        shared = len(quoted & _words(line.text)) / len(quoted) if quoted else 0
        return shared + (line.target == quote.split()[0]) + 0.1 * SequenceMatcher(None, bare, text).ratio()

    best = max(range(len(forward)), key=lambda i: (likeness(forward[i]), -i), default=-1)
    return [best] if best >= 0 and likeness(forward[best]) >= 0.6 else []


def _called(line: Line, forward: list[Line]) -> list[int]:
    """The forward lines that call what a line calls backward: f for f_backward, layer.forward for layer.backward."""
    calls = {name.removesuffix("backward") for name in re.findall(r"((?:\w+\.)*\w*backward)(?=\w*\()", line.text)}
    texts = {(f"{call}forward" if call.endswith(".") else call.removesuffix("_")) + "(" for call in calls if call not in ("self.", "")}
    return [i for i, f in enumerate(forward) if any(re.search(rf"(?<![\w.]){re.escape(text)}", f.text) for text in texts)]


def _reads(line: Line, forward: list[Line]) -> list[int]:
    """For a line that forms dx: the forward line that reads x, and shares the most other names with it."""
    name = line.target[1:]
    if not line.target.startswith("d") or not name:
        return []
    readers = [i for i, f in enumerate(forward) if f.counts and name in f.names and (f.target != name or f.text.count(name) > 1)]
    return sorted(readers, key=lambda i: -len(forward[i].names & line.names))[:1]


def _words(text: str) -> set[str]:
    return {w for w in re.findall(r"[A-Za-z]+", text.replace("_", " ")) if w not in ("self", "T", "xp")}
