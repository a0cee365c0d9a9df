"""A trace: every call of one pass, forward and backward, of a model's layers and of the operations that they call.

    with trace(model) as calls:
        y, saved = model.forward(ids)
        model.backward(dy, saved)

Inside the `with`, the methods of the model's layers and the functions of `kernels` are exchanged for ones that note the call. Outside of
it nothing is exchanged, so that a trace costs nothing where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

from minilora import functional as F
from minilora import kernels as K
from minilora.checking.calls import Call, Function, arrays_in, bare, bind, gradient_names, owner, shapes
from minilora.checking.calls import names_of as names_of
from minilora.checking.calls import where as where
from minilora.checking.flops import backward_flops, forward_flops
from minilora.kernels import dispatch
from minilora.layers import Layer
from minilora.lora.variants import dora, embedding, vera

METHODS = (("forward", "backward"), ("loss", "loss_backward"), ("embed", "embed_backward"))
OPERATIONS: dict[Any, str] = {  # what layers call, by module; each may have a `..._backward` beside it
    K: " ".join([*dispatch.TABLE, "take_rows embedding"]),
    dora: "column_norms dora_linear",
    vera: "vera_linear",
    embedding: "lora_embedding",
}


class Calls(list[Call]):
    """In the order in which they begin. `failed`: the innermost one that had begun when an exception was raised, if one was."""

    failed: Call | None = None


@contextmanager
def trace(model: Any, arrays: bool = False) -> Iterator[Calls]:
    """The calls of `model` and its layers inside the `with`. model: any object with the contract of layers/base.py.

    arrays: keep arguments, results and gradients, copied, as an array may be written to later; parameters are not copied.
    """
    recorder = Recorder(model, arrays)
    layers, seen_of = list(layers_of(model)), dict[Any, Any]()
    with ExitStack() as stack:

        def exchange(owner: Any, names: tuple[str, str], pair: Any, seen: Any) -> None:
            for name, function, other in zip(names, pair, seen, strict=True):
                if function is not None:
                    stack.enter_context(exchanged(owner, name, other))

        for path, layer in layers:
            for names in METHODS if isinstance(layer, Layer) else METHODS[:1]:
                pair = [getattr(layer, name, None) for name in names]
                if all(map(callable, pair)):
                    exchange(layer, names, pair, recorder.methods(path, layer, *pair))
        for module, operations in OPERATIONS.items():
            for name in operations.split():
                pair = [getattr(module, name), getattr(module, f"{name}_backward", None)]
                seen = recorder.functions(name, *pair)
                seen_of |= zip(pair, seen, strict=True)
                exchange(module, (name, f"{name}_backward"), pair, seen)
        for _, layer in layers:
            if callable(f := getattr(layer, "f", None)):  # layers that hold their functions: activations, and pairs under test
                pair = [f, getattr(layer, "f_backward", None)]
                made = recorder.functions(getattr(f, "__name__", "f"), *pair)
                exchange(layer, ("f", "f_backward"), pair, [seen_of.get(g, new) for g, new in zip(pair, made, strict=True)])
        dispatch.observers.append(recorder.chosen)
        stack.callback(dispatch.observers.remove, recorder.chosen)
        yield recorder.calls


@contextmanager
def exchanged(owner: Any, name: str, value: Any) -> Iterator[None]:
    """owner.name = value inside the `with`."""
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


def layers_of(model: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, layer) of a model and everything below it that has forward and backward, each once."""
    if hasattr(model, "modules"):
        yield from {id(layer): (path, layer) for path, layer in reversed(list(model.modules(path)))}.values()
        return
    if hasattr(model, "__dict__"):
        yield path, model
        for name, value in list(vars(model).items()):
            values = {f"{name}.{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            for key, child in values.items():
                if callable(getattr(child, "forward", None)) and callable(getattr(child, "backward", None)):
                    yield from layers_of(child, f"{path}.{key}".strip("."))


class Recorder:
    """Notes calls. `stack`: those that have begun, (call, whether it is in backward)."""

    def __init__(self, model: Any, arrays: bool) -> None:
        self.arrays, self.calls, self.count = arrays, Calls(), 0
        self.stack: list[tuple[Call, bool]] = []
        self.parameters = {id(owner(p.data)) for _, p in getattr(model, "parameters", tuple)()}

    # -- what takes the place of methods and functions ------------------------------------------------------------------

    def methods(self, path: str, layer: Any, forward: Any, backward: Any) -> tuple[Function, Function]:
        """The two methods of a layer, seen."""
        name = type(layer).__name__ + ("" if forward.__name__ in ("forward", "<lambda>") else f".{forward.__name__}")

        def seen_forward(*args: Any, **options: Any) -> Any:
            return self.forward(Call(path, name, forward, backward, layer, self.parent(), (forward, backward)), args, options)

        def seen_backward(*args: Any, **options: Any) -> Any:
            mine = [c for c in reversed(self.calls) if c.layer is layer and c.run[0] == forward]
            saved = args[min(len(args), 2) - 1] if args else options.get("saved")
            call = self.found(mine, saved)
            if call is not None:
                call.foreign, call.changed = call.saved is not saved, call.sums != self.sums(call.saved)
            return self.backward(call, backward, args, options)

        return seen_forward, seen_backward

    def functions(self, name: str, forward: Any, backward: Any) -> tuple[Function, Function]:
        """The two functions of an operation, seen."""
        table = dispatch.TABLE[name].kernels[-1].forward if name in dispatch.TABLE else forward
        sources = getattr(F, name, bare(table)), getattr(F, f"{name}_backward", bare(backward))
        gradients = gradient_names(name, *sources)

        @wraps(forward)
        def seen_forward(*args: Any, **options: Any) -> Any:
            parent = self.parent()
            place = f"{parent.place if parent else ''}/{name}"
            return self.forward(Call(place, name, *sources, None, parent, (forward, backward), gradients), args, options)

        @wraps(backward or forward)
        def seen_backward(dy: Any, *args: Any, **options: Any) -> Any:
            kept = next((a for a in args if isinstance(a, dispatch.Saved)), self)
            mine = [c for c in reversed(self.calls) if c.name == name and c.is_operation]
            here = [c for c in mine if c.parent is self.parent() and c.shapes.get("y") in (None, getattr(dy, "shape", None))]
            return self.backward(self.found([c for c in mine if c.saved is kept] or here, kept), backward, (dy, *args), options)

        return seen_forward, seen_backward

    @staticmethod
    def found(calls: list[Call], saved: Any) -> Call | None:
        """The call that left `saved`, else the last whose backward was not called yet."""
        return next((c for c in calls if c.saved is saved), None) or next((c for c in calls if c.order is None), None)

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

    def forward(self, call: Call, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        call.during = "backward" if any(backward for _, backward in self.stack) else "forward"
        if call.parent is not None:
            call.parent.children.append(call)
        self.calls.append(call)
        named = bind(call.function, args, options)
        call.args, call.shapes = self.kept(named), shapes(named)
        result = self.noted(call, False, args, options)
        more = result[1:] if isinstance(result, tuple) else ()
        y, call.saved = (result[0], more[0] if len(more) == 1 else more) if more else (result, None)
        call.y = self.kept(y)
        call.shapes |= shapes({"y": y})
        if call.is_operation:
            call.flops = forward_flops(call.name, named, call.implementation)
            if more and call.run[1] is None:  # a loss: its gradients are computed with it
                self.note_gradients(call, more)
            elif call.parent is not None and call.during != call.parent.during:  # a product in the backward pass of a layer
                own = [] if call.parent.is_operation else [p.data.shape for _, p in call.parent.layer.parameters()]
                cost, is_dW = call.flops.forward, getattr(y, "shape", None) in own
                call.flops = replace(call.flops, forward=0, skipped=0, dx=0 if is_dW else cost, dW=cost if is_dW else 0)
        call.sums = self.sums(call.saved)
        if not self.stack:
            self.account(call)
        return result

    def backward(self, call: Call | None, run: Function, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if call is None:
            return run(*args, **options)
        call.order, self.count = self.count, self.count + 1
        call.dy = self.kept(args[0]) if len(args) > 1 else None
        sets = (a for a in (*args, *options.values()) if isinstance(a, (set, frozenset)))
        call.need = next(sets, None) if call.is_operation else bind(run, args, options).get("need_dx")
        call.shapes |= shapes({"dy": args[0] if args else None})
        result = self.noted(call, True, args, options)
        self.note_gradients(call, result if isinstance(result, tuple) else (result,))
        return result

    def note_gradients(self, call: Call, values: tuple[Any, ...]) -> None:
        grads = dict(zip(call.gradients, values, strict=False))
        call.grads = self.kept(grads)
        call.shapes |= shapes(grads)
        call.flops = backward_flops(call.name, call.flops, {name for name, g in grads.items() if g is not None})

    def noted(self, call: Call, backward: bool, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The result of the call, which is on the stack meanwhile."""
        if self.arrays:
            call.inputs = [*call.inputs[:1], (self.kept(args), self.kept(options))]
        self.stack.append((call, backward))
        try:
            return call.run[backward](*args, **options)
        except Exception:
            self.calls.failed = self.calls.failed or call
            raise
        finally:
            self.stack.pop()

    def kept(self, value: Any) -> Any:
        """A copy of what is to be kept of a value: everything, or without its arrays."""
        if isinstance(value, dict):
            return {k: self.kept(v) for k, v in value.items()}
        if type(value) is tuple:
            return tuple(map(self.kept, value))
        if not hasattr(value, "nbytes"):
            return value
        return None if not self.arrays else value if id(owner(value)) in self.parameters else value.copy()

    def sums(self, saved: Any) -> list[float]:
        """Of what a call saved, to see later whether it is as it was."""
        return [float(a.sum()) for a in arrays_in(saved)] if self.arrays else []

    def account(self, root: Call) -> None:
        """Attribute each array that the pass keeps to the first, innermost call that saved it."""
        held = {id(owner(a)): owner(a) for a in arrays_in(root.saved)}
        for call in root.below():
            mine = {id(owner(a)) for a in arrays_in(call.saved)} & held.keys()
            call.kept = [a for a in map(held.pop, mine) if id(a) not in self.parameters]
            call.bytes_saved = sum(a.nbytes for a in call.kept)
