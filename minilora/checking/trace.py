"""A trace: every call of one pass, forward and backward, of a model's layers and of the operations that they call.

    with trace(model) as calls:
        y, saved = model.forward(ids)
        model.backward(dy, saved)

Inside the `with`, the methods of the model's layers and the functions of `kernels` are exchanged for ones that note the call. Outside of
it nothing is exchanged, so that a trace costs nothing where there is none.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import count
from typing import Any

from minilora import functional as F
from minilora import kernels as K
from minilora.checking.calls import Call, Function, arrays_in, bare, bind, gradient_names, needed_of, owner, shapes
from minilora.checking.calls import where as where
from minilora.checking.flops import Flops, forward_flops
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
    with ExitStack() as stack:
        for owner, attributes, *what in list(pairs_of(model)):
            pair = [getattr(owner, attribute, None) for attribute in attributes]
            for attribute, function, seen in zip(attributes, pair, recorder.seen(*what, *pair), strict=True):
                if function is not None:
                    stack.enter_context(exchanged(owner, attribute, seen))
        dispatch.observers.append(recorder.chosen)
        stack.callback(dispatch.observers.remove, recorder.chosen)
        yield recorder.calls


def pairs_of(model: Any) -> Iterator[tuple[Any, tuple[str, str], str, str, Any]]:
    """Each forward and backward to note: their owner and its attributes; name, path and layer of a call, no layer for an operation."""
    layers, names = list(layers_of(model)), dict[Any, str]()
    for path, layer in layers:
        for methods in METHODS if isinstance(layer, Layer) else METHODS[:1]:
            if all(callable(getattr(layer, method, None)) for method in methods):
                yield layer, methods, type(layer).__name__ + f".{methods[0]}".removesuffix(".forward"), path, layer
    for module, operations in OPERATIONS.items():
        for name in operations.split():
            names[getattr(module, name)] = name
            yield module, (name, f"{name}_backward"), name, "", None
    for _, layer in layers:
        if callable(f := getattr(layer, "f", None)):  # layers that hold their functions: activations, and pairs under test
            yield layer, ("f", "f_backward"), names.get(f, getattr(f, "__name__", "f")), "", None


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
        found = dict[int, tuple[str, Any]]()
        for place, layer in model.modules(path):
            found.setdefault(id(layer), (place, layer))
        yield from found.values()
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
        self.arrays, self.calls, self.orders = arrays, Calls(), count()
        self.stack: list[tuple[Call, bool]] = []
        self.parameters = {id(owner(p.data)) for _, p in getattr(model, "parameters", tuple)()}

    def seen(self, name: str, path: str, layer: Any, forward: Any, backward: Any) -> tuple[Function, Function]:
        """What takes the place of two functions, and notes each call of them."""
        source, gradients = (forward, backward), ["dx"]
        if layer is None:
            reference = dispatch.TABLE[name].kernels[-1].forward if name in dispatch.TABLE else forward
            source = getattr(F, name, bare(reference)), getattr(F, f"{name}_backward", bare(backward))
            gradients = gradient_names(name, *source)
        calls: list[Call] = []

        @wraps(forward)
        def seen_forward(*args: Any, **options: Any) -> Any:
            calls.append(Call(path, name, layer, (forward, backward), *source, gradients))
            return self.forward(calls[-1], args, options)

        @wraps(backward or forward)
        def seen_backward(*args: Any, **options: Any) -> Any:
            call = self.undone(calls, (*args, *options.values()))
            return self.backward(call, args, options) if call else backward(*args, **options)

        return seen_forward, seen_backward

    def undone(self, calls: list[Call], given: tuple[Any, ...]) -> Call | None:
        """The call that a backward with these arguments undoes: the one that saved one of them, else its caller's last without backward.

        An operation may be called twice there, with results of different shapes.
        """
        by_saved = (c for c in reversed(calls) if c.saved is not None and any(a is c.saved for a in given))
        without = (c for c in reversed(calls) if c.order is None and c.parent is self.parent())
        dy = getattr(given[0], "shape", None) if given else None
        without = (c for c in without if not c.is_operation or c.shapes.get("y", dy) == dy)
        return next(by_saved, None) or next(without, None)

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
        call.parent = parent = self.parent()
        call.during = "backward" if any(backward for _, backward in self.stack) else "forward"
        if call.is_operation:
            call.place = f"{parent.place if parent else ''}/{call.name}"
        if parent is not None:
            parent.children.append(call)
        self.calls.append(call)
        inputs, named = (self.kept(args), self.kept(options)), bind(call.function, args, options)
        call.inputs, call.args, call.shapes = [inputs], bind(call.function, *inputs), shapes(named)
        result = self.run(call, False, args, options)
        y, *more = result if isinstance(result, tuple) else (result,)
        call.saved = None if not more else more[0] if len(more) == 1 else tuple(more)
        call.y = self.kept(y)
        call.shapes |= shapes({"y": y})
        if call.is_operation:
            call.flops = forward_flops(call.name, named, call.implementation)
            if more and call.run[1] is None:  # a loss: its gradients are computed with it
                self.note_gradients(call, more)
            elif parent is not None and call.during != parent.during:  # a product in the backward pass of a layer
                own = [] if parent.is_operation else [p.data.shape for _, p in parent.layer.parameters()]
                cost, is_dW = call.flops.forward, getattr(y, "shape", None) in own
                call.flops = Flops(dx=0 if is_dW else cost, dW=cost if is_dW else 0, sizes=call.flops.sizes)
        else:
            call.sums = self.sums(call.saved)
        if not self.stack:
            self.account(call)
        return result

    def backward(self, call: Call, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        call.order = next(self.orders)
        call.inputs[1:] = [(self.kept(args), self.kept(options))]
        call.dy = call.inputs[1][0][0] if len(args) > 1 else None
        call.shapes |= shapes({"dy": args[0] if args else None})
        if call.is_operation:
            call.need = needed_of(args, options)
        else:
            call.need = bind(call.run[1], args, options).get("need_dx")
            call.foreign = all(a is not call.saved for a in (*args, *options.values()))
            call.changed = call.sums != self.sums(call.saved)
        result = self.run(call, True, args, options)
        self.note_gradients(call, result if isinstance(result, tuple) else (result,))
        return result

    def note_gradients(self, call: Call, values: Iterable[Any]) -> None:
        grads = dict(zip(call.gradients, values, strict=False))
        call.grads = self.kept(grads)
        call.shapes |= shapes(grads)
        call.flops = call.flops.formed({name for name, g in grads.items() if g is not None})

    def run(self, call: Call, backward: bool, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The result of the call, which is on the stack meanwhile."""
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
