"""Forward and backward lines of the source, and which forward lines each backward line undoes.

A backward line undoes the forward line that its trailing comment quotes, and the one whose function or layer it calls backward. Without
either it undoes the line that reads the array whose gradient it forms. Where nothing fits, lines are paired in mirrored order.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from difflib import SequenceMatcher
from inspect import getsourcelines
from keyword import kwlist
from textwrap import dedent
from typing import Any, NamedTuple

_NAME = re.compile(r"[A-Za-z_]\w*")
_TARGET = re.compile(r"(\w+)(?:\[.*?\])?(?:: \w+)? [-+*]?= ")
_PASSIVE = re.compile(r"check_|xp\b.*=|raise |.*(self\.load\(|empty_like|zeros)|(?!.*([-+*/@]|\w\())")


class Line(NamedTuple):
    """A statement, or the head of a compound one. counts: whether it computes something, and is no check or allocation."""

    number: int
    text: str
    comment: str
    names: frozenset[str]
    target: str
    counts: bool


def lines_of(function: Any) -> list[Line]:
    """The statements of a function; none where there is no source."""
    try:
        source, first = getsourcelines(function)
    except (TypeError, OSError):
        return []
    text = dedent("".join(source))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {t.start[0]: (t.start[1], t.string.lstrip("# ")) for t in tokens if t.type == tokenize.COMMENT}
    (tree,), rows, found = ast.parse(text).body, text.split("\n"), []
    for node in sorted((n for n in ast.walk(tree) if isinstance(n, ast.stmt)), key=lambda n: n.lineno)[1:]:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # the docstring
            continue
        body = getattr(node, "body", None)
        span = range(node.lineno, (body[0].lineno if body else (node.end_lineno or node.lineno) + 1))
        code = " ".join(rows[i - 1][: comments[i][0] if i in comments else None].strip() for i in span)
        comment = " ".join(comments[i][1] for i in span if i in comments)
        names = frozenset(_NAME.findall(code)) - set(kwlist)
        target = _TARGET.match(code)
        counts = not body and not _PASSIVE.match(code)
        found.append(Line(first + node.lineno - 1, " " * (node.col_offset - 4) + code, comment, names, target[1] if target else "", counts))
    return found


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
    """The forward lines that call what a line calls backward: f for f_backward, layer.forward for layer.backward or layers[i].backward."""
    text = re.sub(r"(\w+?)s?\[[^\]]*\]\.", r"\1.", line.text.replace("self.", ""))
    calls = {name.removesuffix("backward") for name in re.findall(r"((?:\w+\.)*\w*backward)(?=\w*\()", text)} - {""}
    starts = [(f"{call}forward" if call.endswith(".") else call.removesuffix("_")) + "(" for call in calls]
    return [i for i, f in enumerate(forward) if any(re.search(rf"(?<![\w.]){re.escape(t)}", f.text.replace("self.", "")) for t in starts)]


def _reads(line: Line, forward: list[Line]) -> list[int]:
    """For a line that forms dx: the forward line that reads x, and shares the most other names with it."""
    name = line.target[1:]
    if not line.target.startswith("d") or not name:
        return []
    readers = [i for i, f in enumerate(forward) if f.counts and name in f.names and (f.target != name or f.text.count(name) > 1)]
    return sorted(readers, key=lambda i: -len(forward[i].names & line.names))[:1]


def _words(text: str) -> set[str]:
    return {w for w in re.findall(r"[A-Za-z]+", text.replace("_", " ")) if w not in ("self", "T", "xp")}
