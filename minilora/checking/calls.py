"""What a trace notes of one call, and what can be known of functions and arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
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
    """One call of a layer or an operation, and its backward call if there was one. Without `arrays`, arrays are None here."""

    place: str  # dotted path of the layer, as `model.parameters()` has it, "" for the model itself; of an operation "path/operation"
    name: str  # the layer's class, or the operation
    layer: Any  # None for an operation
    run: tuple[Any, Any]  # (forward, backward) as called
    function: Function  # the Python functions that ran; `where` finds their file and line
    backward_function: Function | None
    gradients: list[str]  # the names of what backward returns, in order
    parent: Call | None = None
    children: list[Call] = field(default_factory=list)
    during: str = "forward"  # or "backward", for what is called in the backward pass: recomputed layers, and products
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)  # of forward and of backward: in order, by name
    args: dict[str, Any] = field(default_factory=dict)  # of forward, all by name
    y: Any = None
    saved: Any = None
    dy: Any = None
    need: Any = None  # of backward: the gradients that are needed, of a layer need_dx
    grads: dict[str, Any] | None = None  # what backward returned, by name
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of all these arrays, by name
    implementation: str = ""  # of an operation: "reference", "numpy" or "cuda"
    order: int | None = None  # of the backward call among all of them; None if there was none
    foreign: bool = False  # backward was handed what another call saved
    changed: bool = False  # what was saved was written to before backward
    sums: list[float] = field(default_factory=list)  # of the arrays that a layer saved
    kept: list[Array] = field(default_factory=list)  # arrays that the pass keeps, and that no call inside this one or before it saved
    flops: Flops = field(default_factory=Flops)  # of an operation

    @property
    def is_operation(self) -> bool:
        return self.layer is None

    @property
    def bytes_saved(self) -> int:
        return sum(a.nbytes for a in self.kept)

    def again(self, changed: dict[str, Any]) -> Any:
        """The result of forward once more, with some of its arguments changed, by name."""
        args, options = self.inputs[0]
        values = self.args | changed
        return self.run[0](*(values[name] for name, _ in zip(self.args, args, strict=False)), **{name: values[name] for name in options})

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


def needed_of(args: tuple[Any, ...], options: dict[str, Any]) -> Collection[str] | None:
    """The set among the arguments of an operation: the gradients that are needed. None: all."""
    return next((a for a in (*args, *options.values()) if isinstance(a, (set, frozenset))), None)


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
    if hasattr(function, "__func__"):  # a method: remembering it would keep its layer
        return _names(function.__func__)[1:]
    return _names(function) if function else []


def bind(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """{name: argument} of a call, those that are given."""
    return dict(zip(names_of(function), args, strict=False)) | options


def where(function: Any) -> str:
    """file:line of a function, "" where there is no source."""
    try:
        return f"{getsourcefile(function)}:{getsourcelines(function)[1]}"
    except (TypeError, OSError):
        return ""
