"""Forward and backward lines of the source, and which forward lines each backward line undoes.

A backward line undoes the forward line that its trailing comment quotes, and the one whose function or layer it calls backward. Without
either it undoes the line that reads the array whose gradient it forms. Where nothing fits, every line that computes something new, and not
the same as forward again, undoes all of forward.
"""

import ast
import re
from difflib import SequenceMatcher
from inspect import getsourcelines
from keyword import kwlist
from textwrap import dedent
from typing import Any, NamedTuple

_NAME = re.compile(r"[A-Za-z_]\w*")
_TARGET = re.compile(r"(\w+)(?:\[.*?\])?(?:: \w+)? [-+*]?= ")
_PASSIVE = re.compile(r"check_|raise |.*(self\.load\(|empty_like|zeros)|(?!.*([-+*/@]|\w\())")


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
    (tree,), rows, found = ast.parse(text).body, [row.partition("  #") for row in text.split("\n")], []
    for node in sorted((n for n in ast.walk(tree) if isinstance(n, ast.stmt)), key=lambda n: n.lineno)[1:]:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # the docstring
            continue
        body = getattr(node, "body", None)
        own = rows[node.lineno - 1 : body[0].lineno - 1 if body else node.end_lineno]
        code, comment = (" ".join(part.strip() for part in parts if part) for parts in ([r[0] for r in own], [r[2] for r in own]))
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
    if any(result):
        return result
    all_of_it, again = [i for i, line in enumerate(forward) if line.counts], {line.text for line in forward}
    return [all_of_it if line.counts and line.text not in again else [] for line in backward]


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
