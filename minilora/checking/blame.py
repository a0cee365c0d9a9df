"""Blame: which call of a model computes a wrong gradient.

One pass is recorded (trace.py). Then each call's vector-Jacobian product is checked on its own, with the inputs that it had and a random
cotangent: the derivative along a random direction takes a few evaluations of that call alone. Children come before parents, so the first
call that is wrong while everything it calls is right has the mistake in its own lines: an operation its formula, a layer its wiring.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array
from minilora.checking.calls import Call, names_of, needed_of, where
from minilora.checking.causes import Known, cause, known_of, unusable
from minilora.checking.check import Check, parameters_of, unchanged
from minilora.checking.report import Broken, Entry, Fault, wrong
from minilora.checking.trace import Calls, exchanged, trace
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
    """Which gradient a layer hands to a layer inside it is wrong, and how; "" if none is, or nothing ran backward."""
    part, dx = part_of(call), None
    if part is None:
        return ""
    with unchanged(part):
        check = Check(part, part.x, _RANDOM_TOL, 0, _EXACTLY, {})
        with suppress(Broken), trace(call.layer, arrays=True) as calls:
            y, saved = check.forward()
            check.c, check.rounding = check.draw(y.shape), 1e-15 * float(abs(y).sum())
            dx = check.backward(saved)
        inner = [c for c in calls if c.parent is None and not c.is_operation and c.layer is not call.layer and c.dy is not None]
        passed = {f"the gradient through {c.place}": (c.grads or {}).get("dx") for c in inner}
        known = Known(check.c, terms={words: dx for words, dx in passed.items() if dx is not None})

        def how(name: str, g: Any) -> str:
            """How the gradient g of the array `name` is wrong, as a clause; "" if it is right."""
            check.analytic = {name: g}
            if check.direction([name]).verdict(_RANDOM_TOL) != "WRONG":
                return ""
            at, numeric, _ = check.numeric(name)
            remark = unusable(g, check.checked[name].data.shape, numeric, at, check.c) or cause(g, numeric, at, _RANDOM_TOL, known)
            return f"{'of which' if remark[:1].isdigit() else 'that'} {remark or 'is not the gradient of what it returned'}"

        for child in sorted(inner, key=lambda c: c.order or 0):
            check.checked[child.place] = moved = SimpleNamespace(data=np.zeros(child.y.shape))

            def forward(*args: Any, run: Any = child.run[0], moved: Any = moved, **options: Any) -> Any:
                y, saved = run(*args, **options)
                return y + moved.data, saved

            with exchanged(child.layer, "forward", forward):
                if clause := how(child.place, child.dy):
                    return f"hands {child.place}.backward a dy {clause}"
        if inner and "dx" in check.checked and hasattr(dx, "shape") and (clause := how("dx", dx)):
            return f"returns a dx {clause}"
    return ""


def wiring(call: Call) -> str:
    """How a layer misuses what it calls, "" if it does not."""
    for child in call.children:
        if "." in child.name:  # another pair of the layer itself
            continue
        what = child.name if child.is_operation else f"{child.place.removeprefix(call.place).strip('.')}.backward"
        if child.order is None:
            ran = any(c.order is not None for c in call.children if c.layer is child.layer)  # recomputed
            gives = not child.is_operation and not ran and child.saved is not None and child.layer.trainable
            if gives and call.order is not None:
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
        if a is None or is_saved or (isinstance(had, float) and a == had):
            continue
        if isinstance(had, float) or hasattr(had, "nbytes") != hasattr(a, "nbytes"):
            return name
        if hasattr(a, "nbytes") and had is not a and not (a.shape == had.shape and np.array_equal(a, had)):
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
        self.key = next(iter(call.args))
        self.x = call.args[self.key]
        self.need_dx = call.args.get("need_dx", True)

    def parameters(self) -> Iterator[tuple[str, Any]]:
        return iter(parameters_of(self.of.layer))

    def modules(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        yield prefix, self
        yield from getattr(self.of.layer, "modules", lambda prefix: ())(prefix)

    def forward(self, x: Array) -> Any:  # type: ignore[override]
        return self.of.again({self.key: x})

    def backward(self, dy: Array, saved: Any, need_dx: bool | None = None) -> Any:
        takes = "need_dx" in names_of(self.of.run[1])
        need_dx = need_dx if self.need_dx else False
        dx = self.of.run[1](dy, saved, **({} if need_dx is None or not takes else {"need_dx": need_dx}))
        return None if need_dx is False and not takes else dx

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

    def parameters(self) -> Iterator[tuple[str, Any]]:
        return iter(self.tensors.items())

    def modules(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        yield prefix, self

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
