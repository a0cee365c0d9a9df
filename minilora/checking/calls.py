"""What a trace notes of one call, and what can be known of functions and arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from inspect import Parameter as Argument
from inspect import getsourcefile, getsourcelines, signature, unwrap
from typing import Any

from minilora.backend import Array
from minilora.checking.flops import Flops

Function = Callable[..., Any]


@dataclass(eq=False)
class Call:
    """One call of a layer or an operation, and its backward call if there was one.

    place             dotted path of the layer, as `model.parameters()` has it; of an operation "path/operation"; "" is the model itself
    name              the layer's class, or the operation
    function          the Python functions that ran, also `backward_function`; `where` finds their file and line
    layer             the layer; None for an operation
    during            "forward", or "backward" for what is called in the backward pass: recomputed layers, and products
    args, y, saved    of forward, args by name; dy, need and grads (by name) of backward. Without `arrays`, arrays are None here
    shapes            of all of them, by name
    gradients         the names of what backward returns, in order
    implementation    of an operation: "reference", "numpy" or "cuda"; "" for a layer
    order             of the backward call among all of them; None if there was none
    foreign, changed  backward was handed what another call saved; what was saved was written to before
    kept, bytes_saved the arrays that the pass keeps, and that no call inside this one or before it saved; their bytes
    flops             of an operation
    run, inputs       (forward, backward) as called, and the arguments of each, in order and by name
    """

    place: str
    name: str
    function: Function
    backward_function: Function | None
    layer: Any
    parent: Call | None
    run: tuple[Any, Any]
    gradients: list[str] = field(default_factory=lambda: ["dx"])
    during: str = "forward"
    children: list[Call] = field(default_factory=list)
    args: dict[str, Any] = field(default_factory=dict)
    y: Any = None
    saved: Any = None
    dy: Any = None
    need: Any = None
    grads: dict[str, Any] | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    implementation: str = ""
    order: int | None = None
    foreign: bool = False
    changed: bool = False
    sums: list[float] = field(default_factory=list)
    kept: list[Array] = field(default_factory=list)
    bytes_saved: int = 0
    flops: Flops = field(default_factory=Flops)
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    @property
    def is_operation(self) -> bool:
        return self.layer is None

    def below(self) -> Iterator[Call]:
        """All calls inside this one and then itself, the innermost first."""
        for child in self.children:
            yield from child.below()
        yield self


def owner(array: Array) -> Array:
    """The array that owns the memory of a view."""
    while hasattr(below := getattr(array, "base", None), "nbytes"):
        array = below
    return array


def arrays_in(saved: Any) -> Iterator[Array]:
    """Every array of what a call saved. A function, as recomputation leaves it, holds what it closes over."""
    if isinstance(saved, (tuple, list, dict)):
        for value in saved.values() if isinstance(saved, dict) else saved:
            yield from arrays_in(value)
    elif hasattr(saved, "nbytes") and getattr(saved, "ndim", False):
        yield saved
    elif callable(saved):
        yield from arrays_in([cell.cell_contents for cell in getattr(saved, "__closure__", None) or ()])


def shapes(named: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in named.items() if hasattr(value, "shape")}


def gradient_names(name: str, forward: Any, backward: Any) -> list[str]:
    """The names of what an operation's backward returns, in order: those of its `need`, else that of its first argument."""
    parameters = signature(backward or forward).parameters
    if "need" in parameters:
        return list(parameters["need"].default)
    return {"embedding": ["dE"], "column_norms": ["dA", "dB"]}.get(name) or [f"d{next(iter(signature(forward).parameters))}"]


def bare(function: Any) -> Any:
    """The function itself, below partials and wrappers."""
    while isinstance(function, partial):
        function = function.func
    return function if function is None else unwrap(function)


@cache
def _names(function: Any) -> list[str]:
    kinds = (Argument.POSITIONAL_ONLY, Argument.POSITIONAL_OR_KEYWORD)
    return [name for name, argument in signature(function).parameters.items() if argument.kind in kinds]


def names_of(function: Any) -> list[str]:
    """The names of a function's arguments, without self."""
    is_method = hasattr(function, "__func__")
    return _names(function.__func__ if is_method else function)[is_method:] if function is not None else []


def bind(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """{name: argument} of a call, those that are given."""
    return dict(zip(names_of(function), args, strict=False)) | options


def where(function: Any) -> str:
    """file:line of a function, "" where there is no source."""
    try:
        return f"{getsourcefile(function)}:{getsourcelines(function)[1]}"
    except (TypeError, OSError):
        return ""
