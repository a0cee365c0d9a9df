"""Blame: which call of a model computes a wrong gradient.

One pass is recorded (trace.py). Then each call's vector-Jacobian product is checked on its own, with the inputs that it had and a random
cotangent: the derivative along a random direction takes a few evaluations of that call alone. Children come before parents, so the first
call that is wrong while everything it calls is right has the mistake in its own lines: an operation its formula, a layer its wiring.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array
from minilora.checking.calls import Call, Function, names_of, needed_of, where
from minilora.checking.causes import Known, cause, known_of, unusable
from minilora.checking.check import Check, parameters_of, unchanged
from minilora.checking.report import Entry, Fault, wrong
from minilora.checking.trace import Calls, exchanged, layers_of, trace
from minilora.kernels import dispatch
from minilora.layers import Layer, Parameter

_EXACTLY = 60  # coordinates of a wrong gradient that are computed
_RANDOM_TOL = 1e-6


def blame(check: Check, entries: list[Entry], seen: list[Entry] | None = None) -> list[Fault]:
    """The calls that are themselves wrong. entries: those of `check`. seen: is extended by the entries of every other call."""
    calls, bad = recorded(check), wrong(entries, check.tol)
    broken = any(not e.coordinates for e in bad)  # a promise, or no gradient to compare
    found = _wrong_calls(calls, check, entries, broken, seen)
    if list(found) == calls[:1] and not broken:  # what is added, or written to, shows in no call on its own
        found = _wrong_calls(calls, check, entries, True)
    guilty = [call for call in found if found[call]]
    if calls.failed is not None and guilty in ([], calls[:1]):  # an exception in a call that has no gradients yet
        guilty, found[calls.failed] = [calls.failed], bad or [Entry("forward", "raised an exception")]
    faults: dict[tuple[str, str], Fault] = {}
    for call in [call for call in guilty if call.order is not None] or guilty:  # an exception may have kept the others from running
        fault = fault_of(call, found[call])
        first = faults.setdefault((fault.source, fault.gradient), fault)
        if first is not fault:
            first.places.append(fault.place)
    if not faults and bad:
        return [Fault([""], type(check.layer).__name__, bad[0].name, bad[0].remark, "")]
    return list(faults.values())


def recorded(check: Check) -> Calls:
    """The calls of one pass; up to the call that fails, if one does."""
    with trace(check.layer, arrays=True) as calls, suppress(Exception):  # the check has found it too
        y, saved = check.forward()
        check.layer.backward(check.draw(y.shape), saved)
    return calls


def _wrong_calls(
    calls: Calls, check: Check, entries: list[Entry], promises: bool, seen: list[Entry] | None = None
) -> dict[Call, list[Entry]]:
    """What is wrong with each wrong call; [] if something inside it is."""
    found: dict[Call, list[Entry]] = {}
    for call in calls[0].below() if calls else ():
        if any(child in found for child in call.children):
            found[call] = []
            continue
        its = entries if call is calls[0] else judged(call, check.tol, promises)
        if bad := wrong(its, check.tol):
            found[call] = bad
        if seen is not None and call is not calls[0]:
            seen += [replace(e, name=f"{call.place}: {e.name}") for e in its]
    return found


def judged(call: Call, tol: float, promises: bool = False) -> list[Entry]:
    """The entries of a call taken on its own: of directions, or of coordinates where one is wrong. [] if it has no gradients."""
    part = part_of(call)
    if part is None:
        return []
    with unchanged(part):
        check = Check(part, part.x, max(tol, _RANDOM_TOL), 0, _EXACTLY, {})
        if not check.checked:
            return []
        directions = [[name] for name in check.checked] if call.is_operation else [list(check.checked)]
        found = check.entries(directions, promises and not call.is_operation)
        if wrong(found, tol):
            exact = Check(part, part.x, tol, 0, _EXACTLY, {}).entries(promises=False)
            found = exact if wrong(exact, tol) else found
    for entry in found:
        entry.name = part.names.get(entry.name, entry.name)
    return found


def fault_of(call: Call, entries: list[Entry]) -> Fault:
    first = min(entries, key=lambda e: (not e.remark, e.name.startswith("(")))
    cause = wiring(call) or ("" if call.is_operation else handed(call))
    source = where(call.backward_function or call.function)
    return Fault([call.place], call.name, "" if cause else first.name, cause or first.remark, source, first.error)


def handed(call: Call) -> str:
    """Which gradient a layer hands to a layer inside it is wrong, and how; "" if none is, or nothing ran backward.

    What each layer inside returned is moved: the derivative along it is what its backward has to be handed.
    """
    part = part_of(call)
    if part is None:
        return ""
    with unchanged(part), ExitStack() as stack:
        check = Check(part, part.x, _RANDOM_TOL, 0, _EXACTLY, {})
        root = recorded(check)[0]
        inner = [c for c in root.children if not c.is_operation and c.layer is not call.layer and c.dy is not None]
        inner = [c for c in inner if sum(c.layer is other.layer for other in inner) == 1]  # to move one call moves every call of its layer
        passed = {f"the gradient through {c.place}": (c.grads or {}).get("dx") for c in inner}
        known = Known(root.dy, terms={words: dx for words, dx in passed.items() if dx is not None})
        gradients = [(f"hands {c.place}.backward a dy", c.place, c.dy) for c in sorted(inner, key=lambda c: c.order or 0)]
        if inner and "dx" in check.checked and hasattr(dx := (root.grads or {}).get("dx"), "shape"):
            gradients.append(("returns a dx", "dx", dx))
        for child in inner:
            moved = check.checked[child.place] = SimpleNamespace(data=np.zeros(child.y.shape))
            attribute = child.name.partition(".")[2] or "forward"
            stack.enter_context(exchanged(child.layer, attribute, _moving(child.run[0], moved)))
        check.c, check.rounding = root.dy, 1e-15 * float(abs(root.y).sum()) if inner else 0.0
        for what, name, g in gradients:
            check.analytic = {name: g}
            if check.direction([name]).verdict(_RANDOM_TOL) == "WRONG":
                at, numeric, _ = check.numeric(name)
                how = unusable(g, check.checked[name].data.shape, numeric, at, check.c) or cause(g, numeric, at, _RANDOM_TOL, known)
                how = how or ("" if name == "dx" else "is not the gradient of what it returned")
                return how and f"{what} {'of which' if how[0].isdigit() else 'that'} {how}"
    return ""


def _moving(forward: Function, by: Any) -> Function:
    """A forward whose result is moved by an array."""

    def moved(*args: Any, **options: Any) -> tuple[Array, Any]:
        y, saved = forward(*args, **options)
        return y + by.data, saved

    return moved


def wiring(call: Call) -> str:
    """How a layer misuses what it calls, "" if it does not."""
    for child in call.children:
        if "." in child.name:  # another pair of the layer itself
            continue
        what = child.name if child.is_operation else f"{child.place.removeprefix(call.place).strip('.')}.backward"
        if child.order is None:
            ran = any(c.order is not None for c in call.children if c.layer is child.layer)  # recomputed
            trains = not child.is_operation and child.saved is not None and getattr(child.layer, "trainable", True)
            if trains and not ran and call.order is not None:
                return f"never calls {what}"
        elif child.is_operation:
            if name := foreign(child):
                return f"hands {what}_backward another {name} than {what} had"
        elif child.foreign:
            return f"hands {what} what another call saved"
        elif child.changed:
            return f"changes what {child.place or child.name} saved before it calls {what}"
        elif child.args.get("need_dx", True) and child.need is False:
            return f"calls {what} with need_dx=False, and forward with need_dx=True"
    return ""


def foreign(call: Call) -> str:
    """The name of an argument that an operation's backward got, and that is not what its forward had; "" if there is none."""
    given, names = call.inputs[1][0][1:], names_of(getattr(F, f"{call.name}_backward", call.backward_function))[1:]
    if given and isinstance(given[0], dispatch.Saved) and len(names) > 1 and names[0] in call.args:
        given = given[1:]  # where the reference saves nothing, what was saved comes first
    elif call.name in dispatch.TABLE and isinstance(call.saved, dispatch.Saved) and not any(isinstance(a, dispatch.Saved) for a in given):
        return "saved"
    for name, a in zip(names, given, strict=False):
        had = call.args.get(name, a)
        is_saved = isinstance(a, dispatch.Saved) and (len(names) == 1 or name not in call.args)
        is_number = isinstance(had, float) or hasattr(had, "nbytes") or hasattr(a, "nbytes")
        if a is not None and a is not had and is_number and not is_saved and not np.array_equal(a, had):
            return name
    return ""


def part_of(call: Call) -> Part | None:
    """The call on its own; None if it has no gradients."""
    if call.during == "backward" or call.name.endswith(".loss"):
        return None
    if not call.is_operation:
        has_gradients = bool(call.args) and call.y is not None and call.args.get("keep", True)
    elif call.run[1]:
        has_gradients = call.order is not None and not foreign(call)
    else:
        has_gradients = call.grads is not None
    part = (OperationPart if call.is_operation else Part)(call) if has_gradients else None
    return part if part is not None and getattr(part.x, "dtype", np.dtype(object)).kind in "fiu" else None


class Part(Layer):
    """A call of a layer on its own, with the contract of a layer. `names`: what its gradients are called in a report."""

    def __init__(self, call: Call) -> None:
        self.of, self.names = call, dict[str, str]()
        self.key, self.x = next(iter(call.args.items()))
        self.tensors = dict(parameters_of(call.layer))
        self.need_dx = call.args.get("need_dx", True)

    def parameters(self) -> Iterator[tuple[str, Any]]:
        return iter(self.tensors.items())

    def modules(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        yield prefix, self
        yield from layers_of(self.of.layer, prefix)

    def forward(self, x: Array) -> Any:  # type: ignore[override]
        return self.of.again({self.key: x})

    def backward(self, dy: Array, saved: Any, need_dx: bool = True) -> Any:
        need_dx, takes = need_dx and self.need_dx, "need_dx" in names_of(self.of.run[1])
        dx = self.of.run[1](dy, saved, **({"need_dx": False} if takes and not need_dx else {}))
        return dx if need_dx or takes else None

    def __deepcopy__(self, memo: Any) -> Part:
        return self


class OperationPart(Part):
    """A call of an operation on its own: the first argument with a gradient is x, the others are parameters."""

    def __init__(self, call: Call) -> None:
        self.of, self.need_dx = call, True
        needed = call.need if call.run[1] else needed_of(*call.inputs[0])
        arrays = {g[1:]: call.args.get(g[1:]) for g in call.gradients if needed is None or g in needed}
        arrays = {name: a for name, a in arrays.items() if getattr(getattr(a, "dtype", None), "kind", "") == "f"}
        self.key = next(iter(arrays), "")
        self.x = arrays.pop(self.key, None)
        self.tensors = {name: Parameter(a) for name, a in arrays.items()}
        self.names = {"dx": f"d{self.key}", **{name: f"d{name}" for name in arrays}}

    def forward(self, x: Array) -> Any:  # type: ignore[override]
        result = self.of.again({self.key: x, **{name: p.data for name, p in self.tensors.items()}})
        return (result[0], result[1:]) if isinstance(result, tuple) else (result, ())

    def backward(self, dy: Array, saved: Any) -> Any:  # type: ignore[override]
        if self.of.run[1] is None:
            grads = tuple(None if g is None else dy * g for g in saved)
        else:
            args, options = self.of.inputs[1]
            result = self.of.run[1](dy, *(saved[0] if a is self.of.saved and a is not None else a for a in args[1:]), **options)
            grads = result if isinstance(result, tuple) else (result,)
        named = {g: value for g, value in zip(self.of.gradients, grads, strict=False) if value is not None}
        if needless := [g for g in named if isinstance(self.of.need, set) and g not in self.of.need]:
            raise ValueError(f"{needless[0]} was formed, and is not needed")  # a promise of every backward
        for name, p in self.tensors.items():
            g = named.get(f"d{name}")
            p.grad = g if p.grad is None or g is None else p.grad + g
        return named.get(f"d{self.key}")

    def known(self, name: str, dy: Array) -> Known:
        """What may be wrong with a gradient."""
        return known_of(self.of.name, self.of.args, self.names[name], dy)
