"""What a docstring says: the equation, the gradient, named shapes, what is saved, and the source."""

import re
from inspect import cleandoc, getmodule
from typing import Any, NamedTuple

_AXES = r"(?:[A-Za-z1](?: /? ?[A-Za-z2])?,? ?)*"
_SHAPE = re.compile(rf"((?:\w+(?:, | and ))*\w+)\s+\(({_AXES})\)")
_GRADIENT = re.compile(r"(?:^ *|,   |[A-Z][^.]*: )(d\w+ += )")  # at the start of a line, after the equation, or in a sentence
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
    text, gradient, module = (cleandoc(getattr(of, "__doc__", None) or "") for of in (forward, backward, getmodule(forward)))
    equation, *rest = text.split("\n\n")
    if "=" not in equation and rest and "=" in rest[0]:
        equation += "\n" + rest[0]
    if not gradient:
        gradient = "\n".join(line for line in text.split("\n") if _GRADIENT.search(line))
        if gradient and gradient in equation and (both := _GRADIENT.search(gradient)):  # both in one line
            equation, gradient = equation.partition(gradient)[0] + gradient[: both.start()], gradient[both.start(1) :]
    said = re.search(r"\b[Ss]aved[: ].*?(?=\.\s|\.$|\Z)", text, re.DOTALL)
    return Doc(
        equation.strip().rstrip(","),
        gradient.strip(),
        _letters(text),
        " ".join(said[0].split()) if said else "",
        next(("; ".join(found) for each in (module, text) if (found := _SOURCE.findall(each))), ""),
    )


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
