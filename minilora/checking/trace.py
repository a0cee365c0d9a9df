"""A trace: every call of one pass, forward and backward, of a model's layers and of the operations that they call.

    with trace(model) as calls:
        y, saved = model.forward(ids)
        model.backward(dy, saved)

Inside the `with`, the methods of the model's layers and the functions of `kernels` are exchanged for ones that note the call. Outside of
it nothing is exchanged, so that a trace costs nothing where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial, wraps
from inspect import Parameter as Argument
from inspect import Signature, getsourcefile, getsourcelines, signature, unwrap
from typing import Any

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array
from minilora.checking.flops import Flops, backward_flops, forward_flops
from minilora.kernels import dispatch
from minilora.layers import Dropout, Layer
from minilora.lora.variants import dora, embedding, vera

METHODS = (("forward", "backward"), ("loss", "loss_backward"), ("embed", "embed_backward"))
FUNCTIONS: dict[Any, str] = {  # the operations that layers call, by module; each may have a `..._backward` beside it
    K: " ".join([*dispatch.TABLE, "take_rows embedding"]),
    dora: "column_norms dora_linear",
    vera: "vera_linear",
    embedding: "lora_embedding",
}


@dataclass(eq=False)
class Call:
    """One call of a layer or an operation, and its backward call if there was one.

    place             dotted path of the layer, as `model.parameters()` has it; of an operation "path/operation"; "" is the model itself
    name              the layer's class, or the operation
    function          the Python functions that ran; `source` finds their lines
    args, y, saved    of forward, by name; dy, need and grads (by name, "dx" among them) of backward. Without `arrays`, arrays are None here
    shapes            of all of them, by name
    implementation    of an operation: "reference", "numpy" or "cuda"; "" for a layer
    during            "forward", or "backward" for what is called in the backward pass: recomputed layers, and products
    bytes_saved       of the arrays that the pass keeps and this call was the first, innermost one to save
    flops             of an operation
    """

    place: str
    name: str
    function: Callable[..., Any]
    backward_function: Callable[..., Any] | None
    layer: Any
    parent: Call | None
    during: str = "forward"
    children: list[Call] = field(default_factory=list)
    args: dict[str, Any] = field(default_factory=dict)
    y: Any = None
    saved: Any = None
    dy: Any = None
    need: Any = None
    grads: dict[str, Any] | None = None
    backward_saved: Any = None
    backward_parent: Call | None = None
    order: int | None = None  # of the backward call among all of them
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    implementation: str = ""
    bytes_saved: int = 0
    flops: Flops = field(default_factory=Flops)
    gradients: list[str] = field(default_factory=lambda: ["dx"])  # the names of what backward returns
    masks: list[tuple[Dropout, int]] = field(default_factory=list)  # the number of the next mask of each dropout below, before the call

    @property
    def is_operation(self) -> bool:
        return self.layer is None

    @property
    def source(self) -> str:
        """file:line of the function."""
        return where(self.function)

    def below(self) -> Iterator[Call]:
        """This call and all calls in it, the innermost first."""
        for child in self.children:
            yield from child.below()
        yield self


def where(function: Callable[..., Any]) -> str:
    """file:line of a function, "" where there is no source."""
    try:
        return f"{getsourcefile(function)}:{getsourcelines(function)[1]}"
    except (TypeError, OSError):
        return ""


@contextmanager
def trace(model: Any, arrays: bool = False) -> Iterator[list[Call]]:
    """The list of the calls of `model` and its layers inside the `with`, in the order in which they begin.

    model: any object with the contract of layers/base.py. arrays: keep the arguments, results and gradients, copied, as an array may be
    written to later; parameters are not copied.
    """
    recorder = Recorder(model, arrays)
    with ExitStack() as stack:
        for path, layer in layers_of(model):
            for names in METHODS if isinstance(layer, Layer) or layer is model else METHODS[:1]:
                if all(callable(getattr(layer, name, None)) for name in names):
                    pair = [getattr(layer, name) for name in names]
                    for name, seen in zip(names, recorder.methods(path, layer, *pair), strict=True):
                        stack.enter_context(exchanged(layer, name, seen))
        seen_of = {}
        for module, operations in FUNCTIONS.items():
            for name in operations.split():
                pair = [getattr(module, name), getattr(module, f"{name}_backward", None)]
                for function, seen in zip(pair, recorder.functions(name, *pair), strict=True):
                    if function is not None:
                        seen_of[function] = seen
                        stack.enter_context(exchanged(module, name if function is pair[0] else f"{name}_backward", seen))
        for _, layer in layers_of(model):
            if callable(f := getattr(layer, "f", None)):  # layers that hold their functions: activations, and pairs under test
                f_backward = getattr(layer, "f_backward", None)
                f_seen, f_backward_seen = recorder.functions(getattr(f, "__name__", "f"), f, f_backward)
                stack.enter_context(exchanged(layer, "f", seen_of.get(f, f_seen)))
                if f_backward is not None:
                    stack.enter_context(exchanged(layer, "f_backward", seen_of.get(f_backward, f_backward_seen)))
        observe = recorder.chosen
        dispatch.observers.append(observe)
        try:
            yield recorder.calls
        finally:
            dispatch.observers.remove(observe)
            recorder.finish()


@contextmanager
def exchanged(owner: Any, name: str, value: Any) -> Iterator[None]:
    """owner.name = value inside the `with`."""
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


def layers_of(model: Any) -> Iterator[tuple[str, Any]]:
    """(path, layer) of a model and everything below it that has forward and backward, each once."""
    seen: set[int] = set()

    def walk(path: str, thing: Any) -> Iterator[tuple[str, Any]]:
        if hasattr(thing, "modules"):
            yield from thing.modules()
            return
        yield path, thing
        for name, value in list(getattr(thing, "__dict__", {}).items()):
            values = {f"{name}.{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            for key, child in values.items():
                if callable(getattr(child, "forward", None)) and callable(getattr(child, "backward", None)):
                    yield from ((f"{path}.{p}".strip("."), c) for p, c in walk(key, child))

    for path, layer in walk("", model):
        if id(layer) not in seen and hasattr(layer, "__dict__"):
            seen.add(id(layer))
            yield path, layer


class Recorder:
    """Notes calls. `stack`: those that have begun, (call, whether it is in backward)."""

    def __init__(self, model: Any, arrays: bool) -> None:
        self.arrays, self.calls = arrays, list[Call]()
        self.stack: list[tuple[Call, bool]] = []
        self.failed: list[tuple[Call, bool]] = []  # what had begun when an exception was raised
        self.count = 0
        parameters = [p.data for _, p in model.parameters()]
        self.parameters = {id(base(a)): a for a in parameters}

    # -- what takes the place of methods and functions ------------------------------------------------------------------

    def methods(self, path: str, layer: Any, forward: Any, backward: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The two methods of a layer, seen."""
        dropouts = [m for _, m in layer.modules() if hasattr(m, "calls")] if hasattr(layer, "modules") else []
        name = type(layer).__name__ + ("" if forward.__name__ == "forward" else f".{forward.__name__}")

        def seen_forward(*args: Any, **options: Any) -> Any:
            call = Call(path, name, forward, backward, layer, self.parent())
            call.masks = [(dropout, dropout.calls) for dropout in dropouts]
            return self.forward(call, forward, args, options)

        def seen_backward(*args: Any, **options: Any) -> Any:
            saved = args[-1] if len(args) == 1 else args[1] if len(args) > 1 else options.get("saved")
            mine = [c for c in self.calls if c.layer is layer and c.function == forward]
            call = next((c for c in reversed(mine) if c.saved is saved), None) or next((c for c in reversed(mine) if c.order is None), None)
            return self.backward(call, backward, args, options)

        return seen_forward, seen_backward

    def functions(self, name: str, forward: Any, backward: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The two functions of an operation, seen."""

        source, source_backward = source_of(name, forward), source_of(f"{name}_backward", backward)
        gradients = gradient_names(name, source, source_backward)

        @wraps(forward)
        def seen_forward(*args: Any, **options: Any) -> Any:
            parent = self.parent()
            call = Call(f"{parent.place if parent else ''}/{name}", name, source, source_backward, None, parent, gradients=gradients)
            return self.forward(call, forward, args, options)

        @wraps(backward or forward)
        def seen_backward(dy: Any, *args: Any, **options: Any) -> Any:
            kept = next((a for a in args if isinstance(a, dispatch.Saved)), None)
            parent, rows = self.parent(), getattr(dy, "shape", None)
            mine = [c for c in self.calls if c.name == name and c.is_operation]
            free = (c for c in reversed(mine) if c.order is None and c.parent is parent and (rows is None or c.shapes.get("y") == rows))
            call = next((c for c in mine if kept is not None and c.saved is kept), None) or next(free, None)
            return self.backward(call, backward, (dy, *args), options)

        return seen_forward, seen_backward

    # -- notes ----------------------------------------------------------------------------------------------------------

    def parent(self) -> Call | None:
        return self.stack[-1][0] if self.stack else None

    def chosen(self, op: dispatch.Operation, kernel: dispatch.Kernel, args: tuple[Any, ...]) -> None:
        """dispatch's choice for the operation that has begun."""
        call = self.parent()
        if call is not None and call.is_operation and call.name == op.name:
            call.implementation = kernel.where
            if kernel.where != "reference":
                call.function, call.backward_function = bare(kernel.forward), bare(kernel.backward)

    def forward(self, call: Call, run: Callable[..., Any], args: Any, options: dict[str, Any]) -> Any:
        call.during = "backward" if any(backward for _, backward in self.stack) else "forward"
        if call.parent is not None:
            call.parent.children.append(call)
        self.calls.append(call)
        named = bind(call.function if call.is_operation else run, args, options)  # before an implementation is chosen
        call.args, call.shapes = self.kept(named), shapes(named)
        result = self.run(call, False, run, args, options)
        pair = isinstance(result, tuple) and len(result) >= 2
        y, call.saved = (result[0], result[1]) if pair else (result, None)
        if call.is_operation:
            call.flops = forward_flops(call.name, named, call.implementation)
            if pair and call.backward_function is None:  # a loss: its gradients are computed with it
                grads = dict(zip(call.gradients, result[1:], strict=False))
                call.dy, call.grads = 1.0, self.kept(grads)
                call.flops = backward_flops(call.name, call.flops, {name for name, g in grads.items() if g is not None})
            elif call.parent is not None and call.during != call.parent.during:  # a product in the backward pass of a layer
                own = [] if call.parent.is_operation else [p.data.shape for _, p in call.parent.layer.parameters()]
                cost, is_dW = call.flops.forward, getattr(y, "shape", None) in own
                call.flops = replace(call.flops, forward=0, skipped=0, dx=0 if is_dW else cost, dW=cost if is_dW else 0)
        call.y = self.kept(y)
        call.shapes |= shapes({"y": y})
        if not self.stack:
            self.account(call)
        return result

    def backward(self, call: Call | None, run: Callable[..., Any], args: Any, options: dict[str, Any]) -> Any:
        if call is None:
            return run(*args, **options)
        dy = args[0] if len(args) > 1 or call.is_operation else None
        call.dy, call.order, call.backward_parent = self.kept(dy), self.count, self.parent()
        call.backward_saved = args[1] if len(args) > 1 and not call.is_operation else None
        call.need = bind(run, args, options).get("need_dx") if not call.is_operation else _need(args, options)
        self.count += 1
        call.shapes |= shapes({"dy": dy})
        result = self.run(call, True, run, args, options)
        grads = dict(zip(call.gradients, result if isinstance(result, tuple) else (result,), strict=False))
        call.grads = self.kept(grads)
        call.shapes |= shapes(grads)
        if call.is_operation:
            done = {name for name, g in grads.items() if g is not None}
            call.flops = backward_flops(call.name, call.flops, done)
        return result

    def run(self, call: Call, backward: bool, run: Callable[..., Any], args: Any, options: dict[str, Any]) -> Any:
        self.stack.append((call, backward))
        try:
            return run(*args, **options)
        except BaseException:
            self.failed = self.failed or list(self.stack)
            raise
        finally:
            self.stack.pop()

    def kept(self, value: Any) -> Any:
        """A copy of what is to be kept of a value: everything, or without its arrays."""
        if isinstance(value, dict):
            return {k: self.kept(v) for k, v in value.items()}
        if type(value) is tuple:
            return tuple(map(self.kept, value))
        if not hasattr(value, "dtype") or not hasattr(value, "ndim"):
            return value
        if not self.arrays:
            return None
        return value if id(base(value)) in self.parameters or not hasattr(value, "flags") else value.copy()

    def account(self, root: Call) -> None:
        """Attribute each array that the pass keeps to the first call that saved it."""
        held = {id(base(a)): base(a) for a in arrays_in(root.saved)}
        for call in root.below():
            mine = {id(base(a)) for a in arrays_in(call.saved)} & held.keys()
            call.bytes_saved = sum(held.pop(i).nbytes for i in mine if i not in self.parameters)

    def finish(self) -> None:
        if not self.arrays:
            for call in self.calls:
                call.saved = call.backward_saved = None


def base(array: Array) -> Array:
    """The array that owns the memory of a view."""
    while hasattr(owner := getattr(array, "base", None), "nbytes"):
        array = owner
    return array


def arrays_in(saved: Any) -> Iterator[Array]:
    """Every array of what a call saved. A function, as recomputation leaves it, holds what it closes over."""
    if isinstance(saved, dispatch.Kernel):
        return
    if isinstance(saved, (tuple, list)):
        for value in saved:
            yield from arrays_in(value)
    elif isinstance(saved, dict):
        yield from arrays_in(list(saved.values()))
    elif hasattr(saved, "nbytes") and getattr(saved, "ndim", 0):
        yield saved
    elif callable(saved):
        yield from arrays_in([cell.cell_contents for cell in getattr(saved, "__closure__", None) or ()])


def shapes(named: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in named.items() if hasattr(value, "shape")}


def gradient_names(name: str, forward: Any, backward: Any) -> list[str]:
    """The names of what an operation's backward returns, in order: those of its `need`, else that of its first argument."""
    parameters = signature_of(backward or forward).parameters
    if "need" in parameters:
        return list(parameters["need"].default)
    return {"embedding": ["dE"], "column_norms": ["dA", "dB"]}.get(name) or [f"d{next(iter(signature_of(forward).parameters))}"]


def _need(args: Any, options: dict[str, Any]) -> Any:
    """The names of gradients among the arguments of a backward function."""
    return options.get("need") or next((a for a in args if isinstance(a, (set, frozenset))), None)


def source_of(name: str, default: Any) -> Any:
    """The reference of this name, which is in functional/, or another function's source."""
    reference = dispatch.TABLE[name].kernels[-1].forward if name in dispatch.TABLE else None if default is None else bare(default)
    return getattr(F, name, None) or reference


def bare(function: Any) -> Any:
    """The function itself, below partials and wrappers."""
    while isinstance(function, partial):
        function = function.func
    return None if function is None else unwrap(function)


@cache
def _signature(function: Any) -> Signature:
    return signature(function)


def signature_of(function: Any) -> Signature:
    """The signature of a function; of a method with self."""
    return _signature(function.__func__ if hasattr(function, "__func__") else function)


def bind(function: Any, args: Any, options: dict[str, Any]) -> dict[str, Any]:
    """{name: argument} of a call; arguments that the signature does not have are left out."""
    names = [
        n for n, a in signature_of(function).parameters.items() if a.kind in (Argument.POSITIONAL_ONLY, Argument.POSITIONAL_OR_KEYWORD)
    ]
    names = names[1:] if hasattr(function, "__self__") else names
    return dict(zip((n for n in names if n not in ("self", "steps")), args, strict=False)) | options
