"""The one place that chooses which implementation of an operation runs.

    y, saved = forward(x, ...)                    chooses, and notes in `saved` which implementation ran
    gradients = backward(dy, ..., saved, ...)     runs the backward pass of that implementation; chooses nothing

The choice depends on the backend and dtype of x, and on a condition of each implementation (`fits`: dtypes of the other arguments, size,
alignment). Half precision that no implementation takes is upcast before the operation, and the results are downcast (half.py).
"""

import os
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import numpy as np

from minilora import functional as F
from minilora.kernels import cuda
from minilora.kernels.half import HALF, downcast, is_half, upcast

PLAIN = os.environ.get("MINILORA_KERNELS") == "plain"  # run references only
REAL = ("float32", "float64")
ANY = (*REAL, *HALF)
Function = Callable[..., Any]


class Kernel(NamedTuple):
    """One implementation of an operation: `forward` returns (y, what its own `backward` reads).

    gain         what it gains over the reference
    dtypes       of x, the first argument
    fits, when   a further condition on the arguments of forward, and the same in words
    """

    where: str  # "reference", "numpy" or "cuda"
    forward: Function
    backward: Function | None = None
    gain: str = ""
    dtypes: tuple[str, ...] = REAL
    fits: Callable[..., bool] | None = None
    when: str = ""


class Operation(NamedTuple):
    """An operation and its implementations in order of preference; the last is the reference."""

    name: str
    kernels: tuple[Kernel, ...]
    weight: int  # the place of W among the arguments of forward; -1: there is none
    activations: tuple[int, ...]  # the gradients that have the dtype of activations; those of parameters have float32
    found: dict[Any, tuple[Kernel, ...]]  # the implementations for a type and the dtypes of x and W


class Saved(NamedTuple):
    """What forward leaves for backward: the implementation that ran, what it saved, x's dtype, and whether that was upcast."""

    by: Kernel
    value: Any
    dtype: Any
    upcast: bool


TABLE: dict[str, Operation] = {}
observers: list[Callable[[Operation, Kernel, tuple[Any, ...]], None]] = []  # called at each choice (report.py)


def choose(op: Operation, args: tuple[Any, ...]) -> tuple[Kernel, tuple[Any, ...], bool]:
    """The first implementation that takes these arguments, the arguments, and whether they had to be upcast for it."""
    x = args[0]
    key = type(x), x.dtype.num, None if op.weight < 0 else args[op.weight].dtype.num  # a number: dtypes are slow to hash
    kernels = op.found.get(key)
    if kernels is None:
        kernels = op.found[key] = _candidates(op, x, None if op.weight < 0 else args[op.weight].dtype)
    for kernel in kernels:
        if (PLAIN and kernel.where != "reference") or (kernel.where == "cuda" and not cuda.ENABLED):
            continue
        if kernel.fits is None or kernel.fits(*args):
            for observe in observers:
                observe(op, kernel, args)
            return kernel, args, False
    return *choose(op, upcast(args))[:2], True


def _candidates(op: Operation, x: Any, weight: Any) -> tuple[Kernel, ...]:
    """The implementations for the backend and dtype of x, with a weight of a dtype."""
    here, dtype = "numpy" if isinstance(x, (np.ndarray, np.generic)) else "cuda", x.dtype
    half = dtype.name in HALF
    if weight is not None and weight.name in HALF and not half:
        return ()
    *kernels, reference = op.kernels
    fitting = [k for k in kernels if k.where == here and dtype.name in k.dtypes]
    return (*fitting, *([] if half and dtype.name not in reference.dtypes else [reference]))


def kernel(where: str, module: Any, gain: str, **conditions: Any) -> Callable[[str], Kernel]:
    """The functions `name` and `name`_backward of a module, as an implementation of the operation of that name."""
    return lambda name: Kernel(where, getattr(module, name), getattr(module, f"{name}_backward", None), gain, **conditions)


def operation(
    name: str,
    *kernels: Callable[[str], Kernel],
    saves: str = "",
    activations: tuple[int, ...] = (0,),
    dtypes: tuple[str, ...] = REAL,
) -> tuple[Function, Function]:
    """Add an operation to TABLE, whose reference has its name in functional/; returns the two functions that layers call.

    They take the arguments of the reference. What forward saved takes the place that it has in the reference's backward; it is the first
    after dy where the reference saves nothing.

    saves   the parameter of `backward` that takes what forward saved: "x" its first argument, "y" its result, else what it returns beside y
    """
    forward, backward = getattr(F, name), getattr(F, f"{name}_backward")
    own = [kernel(name) for kernel in kernels]
    takes_keep = any("keep" in signature(kernel.forward).parameters for kernel in own)  # and computes less without
    drops_keep = takes_keep and "keep" not in signature(forward).parameters
    returns_saved = saves not in ("", "x", "y")

    def reference(*args: Any, **options: Any) -> tuple[Any, Any]:
        if drops_keep:
            options.pop("keep", None)
        result = forward(*args, **options)
        return result if returns_saved else (result, args[0] if saves == "x" else result if saves == "y" else None)

    run_reference = forward if returns_saved and not drops_keep else reference
    op = _add(name, forward, own, Kernel("reference", run_reference, backward, dtypes=dtypes), activations)
    place = _place(backward, saves) - 1 if saves else 0

    def run(*args: Any, keep: bool = True, **options: Any) -> tuple[Any, Saved | None]:
        kernel, inputs, was_upcast = choose(op, args)
        if takes_keep:
            options["keep"] = keep
        y, value = kernel.forward(*inputs, **options)
        if was_upcast:
            with np.errstate(over="ignore"):  # beyond float16 there is infinity; training checks for it
                value = downcast(value, args[0].dtype)
                if op.weight < 0 or is_half(args[op.weight]):  # beside a weight of float32, y is of float32
                    y = y.astype(args[0].dtype, copy=False)
        return y, Saved(kernel, value, args[0].dtype, was_upcast) if keep else None

    def run_backward(dy: Any, *args: Any, **options: Any) -> Any:
        kernel, value, dtype, was_upcast = args[place]
        args = (*args[:place], value, *args[place + 1 :]) if saves else args[1:]
        if was_upcast:
            return _downcast(kernel.backward(upcast(dy), *upcast(args), **options), op.activations, dtype)
        if dy.dtype.itemsize == 2 and dy.dtype != dtype:  # y was downcast after this operation
            dy = upcast(dy)
        return kernel.backward(dy, *args, **options)

    return run, run_backward


def function(
    name: str, reference: Function, *kernels: Callable[[str], Kernel], activations: tuple[int, ...] = (1,), dtypes: tuple[str, ...] = REAL
) -> Function:
    """As `operation`, for what has no backward: a loss, which returns its gradients beside it, or a step of an optimizer."""
    op = _add(name, reference, [kernel(name) for kernel in kernels], Kernel("reference", reference, dtypes=dtypes), activations)

    def run(*args: Any, **options: Any) -> Any:
        kernel, inputs, was_upcast = choose(op, args)
        results = kernel.forward(*inputs, **options)
        return _downcast(results, op.activations, args[0].dtype) if was_upcast else results

    return run


def _add(name: str, forward: Function, kernels: list[Kernel], reference: Kernel, activations: Any) -> Operation:
    TABLE[name] = Operation(name, (*kernels, reference), _place(forward, "W"), activations, {})
    return TABLE[name]


def _place(f: Function, parameter: str) -> int:
    names = list(signature(f).parameters)
    return names.index(parameter) if parameter in names else -1


def _downcast(results: Any, which: tuple[int, ...], dtype: Any) -> Any:
    """The results in x's dtype, or those of a tuple that `which` names."""
    with np.errstate(over="ignore"):
        if not isinstance(results, tuple):
            return results.astype(dtype, copy=False)
        return tuple(g.astype(dtype, copy=False) if i in which and g is not None else g for i, g in enumerate(results))
