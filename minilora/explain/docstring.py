"""What a docstring says: the equation, the gradient, named shapes, what is saved, and the source."""

from __future__ import annotations

import re
from inspect import cleandoc, getmodule
from typing import Any, NamedTuple

_AXES = r"(?:[A-Za-z1](?: /? ?[A-Za-z2])?,? ?)*"
_SHAPE = re.compile(rf"((?:\w+(?:, | and ))*\w+)\s+\(({_AXES})\)")
_GRADIENT = re.compile(r"d\w+(\[\w+\])?\s*[=:]")
_SOURCE = re.compile(r"(?:[A-Z][\w ]*, )?arXiv [\d.]+(?:, [^();\n]*?(?:section|algorithm|equation)s? [\d.]+)?")


class Doc(NamedTuple):
    """Of an operation or a layer. letters: {name: its axes, such as "T m"}; y is what it returns."""

    equation: str
    gradient: str
    letters: dict[str, str]
    saved: str
    source: str


def doc_of(forward: Any, backward: Any = None) -> Doc:
    """Of a function and its backward; of a class, by the nearest base class with an equation. A loss states its gradients itself."""
    if isinstance(forward, type):
        forward = next((c for c in forward.__mro__ if " = " in (c.__doc__ or "")), forward)
    text, back = (cleandoc(f.__doc__ or "") if f is not None else "" for f in (forward, backward))
    first, *rest = text.split("\n\n")
    if "=" not in first and rest:
        first = "\n".join([first, *(p for p in rest[:1] if "=" in p)])
    gradient = back or "\n".join(line for line in text.split("\n") if _GRADIENT.match(line.strip()))
    if not gradient and (found := _GRADIENT.search(first)):  # a loss that states both in one line
        gradient, first = first[found.start() :], first[: found.start()]
    if not gradient and (sentence := re.search(r"[A-Z][^.]*\bd\w+ = [^.]*\.", text)):
        gradient = sentence[0]
    saved = re.search(r"\b[Ss]aved[: ].*?(?=\.\s|\.$|\Z)", text, re.DOTALL)
    source = _source(getattr(forward, "__name__", ""), [text, back, getattr(getmodule(forward), "__doc__", None) or ""])
    return Doc(first.strip().rstrip(","), gradient.strip(), _letters(text), " ".join(saved[0].split()) if saved else "", source)


def _letters(text: str) -> dict[str, str]:
    """{name: axes} of "x (T, m), q and k (T, H d) -> y (T, n)"."""
    found: dict[str, str] = {}
    for names, axes in _SHAPE.findall(text.replace("->", " ")):
        for name in re.split(r", | and ", names):
            found.setdefault(name, " ".join(a.strip().replace(" ", "·").replace("·/·", "/") for a in axes.split(",") if a.strip()))
    if (result := re.search(r"->\s*(\w+)\s+\(", text)) and result[1] in found:
        found["y"] = found[result[1]]
    return found


def sizes_of(letters: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """{letter: size} where the docstring's axes and the actual shapes agree in number."""
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        axes = letters.get(name, "").split()
        if len(axes) == len(shape):
            sizes |= {a: n for a, n in zip(axes, shape, strict=True) if a.isalpha() and a not in sizes}
    return sizes


def _source(name: str, texts: list[str]) -> str:
    """The citations behind most words of the name, of all in the texts."""
    parts, found = name.lower().split("_"), dict[str, int]()
    for text in texts:
        for match in _SOURCE.finditer(text):
            before = re.findall(r"[a-z]{3,}", f"{re.split(r'[).;]', text[: match.start()])[-1]} {match[0].partition('arXiv')[0]}".lower())
            found.setdefault(match[0], sum(any(p.startswith(w) or w.startswith(p) for w in before) for p in parts))
    return "; ".join(source for source, score in found.items() if score == max(found.values()))
