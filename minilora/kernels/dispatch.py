"""The one place that chooses which implementation of an operation runs.

    y, saved = forward(x, ...)                    chooses, and notes in `saved` which implementation ran
    gradients = backward(dy, ..., saved, ...)     runs the backward pass of that implementation; chooses nothing

The choice depends on the backend and dtype of x, and on a condition of each implementation (`fits`: dtypes of the other arguments, size,
alignment). Half precision that no implementation takes is upcast before the operation, and the results are downcast (half.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import numpy as np

from minilora.kernels import cuda
from minilora.kernels.half import Upcast, downcast, is_half, upcast

PLAIN = os.environ.get("MINILORA_KERNELS") == "plain"  # run references only
REAL = ("float32", "float64")
ANY = (*REAL, "float16", "bfloat16")
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


class Saved(NamedTuple):
    """What forward leaves for backward: the implementation that ran, what it saved, x's dtype, and whether that was upcast."""

    by: Kernel
    value: Any
    dtype: Any
    upcast: bool


class Operation(NamedTuple):
    """An operation and its implementations in order of preference; the last is the reference."""

    name: str
    kernels: tuple[Kernel, ...]
    weight: tuple[int, int]  # the places of W among the arguments of forward, and of backward after dy; -1: there is none
    activations: tuple[int, ...]  # the gradients that have the dtype of activations; those of parameters have float32
    found: dict[Any, tuple[Kernel, ...]]  # the implementations for a type and dtype


TABLE: dict[str, Operation] = {}
observers: list[Callable[[Operation, Kernel, tuple[Any, ...]], None]] = []  # called at each choice (report.py)


def choose(op: Operation, args: tuple[Any, ...]) -> Kernel | None:
    """The first implementation that takes these arguments; None where they have to be upcast first."""
    x = args[0]
    key = (type(x), x.dtype) if op.weight[0] < 0 else (type(x), x.dtype, args[op.weight[0]].dtype)
    kernels = op.found.get(key)
    if kernels is None:
        kernels = op.found[key] = _candidates(op, args)
    for kernel in kernels:
        if kernel.where != "reference" and (PLAIN or (kernel.where == "cuda" and not cuda.ENABLED)):
            continue
        if kernel.fits is None or kernel.fits(*args):
            for observe in observers:
                observe(op, kernel, args)
            return kernel
    return None


def _candidates(op: Operation, args: tuple[Any, ...]) -> tuple[Kernel, ...]:
    x = args[0]
    if op.weight[0] >= 0 and is_half(args[op.weight[0]]) and not is_half(x):
        return ()  # a half-precision weight beside x in float32
    here = "numpy" if isinstance(x, (np.ndarray, np.generic)) else "cuda"
    fitting = [k for k in op.kernels if k.where == here and x.dtype.name in k.dtypes]
    reference = op.kernels[-1]
    return (*fitting, *([] if is_half(x) and x.dtype.name not in reference.dtypes else [reference]))


def operation(
    name: str,
    forward: Function,
    backward: Function,
    *kernels: Kernel,
    saves: str = "",
    keep: bool = False,
    activations: tuple[int, ...] = (0,),
    dtypes: tuple[str, ...] = REAL,
) -> tuple[Function, Function]:
    """Add an operation to TABLE, whose reference is forward and backward; returns the two functions that layers call.

    They take the arguments of the reference. What forward saved takes the place that it has in the reference's backward; it is the first
    after dy where the reference saves nothing.

    saves   the parameter of `backward` that takes what forward saved: "x" its first argument, "y" its result, else what it returns beside y
    keep    whether implementations compute less where nothing has to be saved: they take `keep`
    """
    reference = Kernel("reference", _saving(forward, saves, keep), backward, dtypes=dtypes)
    op = _add(name, forward, backward, (*kernels, reference), activations)
    place = _place(backward, saves) - 1 if saves else 0

    def run(*args: Any, keep: bool = True, **options: Any) -> tuple[Any, Saved | None]:
        kernel = choose(op, args)
        if takes_keep:
            options["keep"] = keep
        if kernel is None:
            y, saved = _upcast_forward(op, args, options)
        else:
            y, value = kernel.forward(*args, **options)
            saved = Saved(kernel, value, args[0].dtype, False)
        return y, saved if keep else None

    def run_backward(dy: Any, *args: Any, **options: Any) -> Any:
        kernel, value, dtype, was_upcast = args[place]
        args = (*args[:place], value, *args[place + 1 :]) if saves else args[1:]
        if was_upcast:
            gradients = kernel.backward(upcast(dy), *_upcast(args, op.weight[1]), **options)
            return _downcast(gradients, op.activations, dtype)
        if dy.dtype.itemsize == 2 and dy.dtype != dtype:  # y was downcast after this operation
            dy = upcast(dy)
        return kernel.backward(dy, *args, **options)

    takes_keep = keep
    return run, run_backward


def function(
    name: str, reference: Function, *kernels: Kernel, activations: tuple[int, ...] = (1,), dtypes: tuple[str, ...] = REAL
) -> Function:
    """As `operation`, for what has no backward: a loss, which returns its gradients beside it, or a step of an optimizer."""
    op = _add(name, reference, None, (*kernels, Kernel("reference", reference, dtypes=dtypes)), activations)

    def run(*args: Any, **options: Any) -> Any:
        kernel = choose(op, args)
        if kernel is not None:
            return kernel.forward(*args, **options)
        upcast_args = _upcast(args, op.weight[0])
        return _downcast(choose(op, upcast_args).forward(*upcast_args, **options), op.activations, args[0].dtype)  # type: ignore[union-attr]

    return run


def _add(name: str, forward: Function, backward: Function | None, kernels: tuple[Kernel, ...], activations: tuple[int, ...]) -> Operation:
    weight = _place(forward, "W"), -1 if backward is None else max(_place(backward, "W") - 1, -1)
    TABLE[name] = Operation(name, kernels, weight, activations, {})
    return TABLE[name]


def _place(f: Function, parameter: str) -> int:
    names = list(signature(f).parameters)
    return names.index(parameter) if parameter in names else -1


def _saving(forward: Function, saves: str, keep: bool) -> Function:
    """The reference as implementations are: it returns (y, what its backward reads)."""
    if keep and "keep" not in signature(forward).parameters:
        saving = _saving(forward, saves, False)
        return lambda *args, keep=True, **options: saving(*args, **options)
    if not saves:
        return lambda *args, **options: (forward(*args, **options), None)
    if saves == "x":
        return lambda *args, **options: (forward(*args, **options), args[0])
    if saves == "y":
        return lambda *args, **options: ((y := forward(*args, **options)), y)
    return forward


# -- half precision that no implementation takes ------------------------------------------------------------------------------


def _upcast_forward(op: Operation, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Saved]:
    """The operation in float32; y is of x's dtype, but of float32 beside a weight of float32."""
    dtype, at = args[0].dtype, op.weight[0]
    upcast_args = _upcast(args, at)
    kernel = choose(op, upcast_args)
    assert kernel is not None
    y, value = kernel.forward(*upcast_args, **options)
    with np.errstate(over="ignore"):  # beyond float16 there is infinity; training checks for it
        if at < 0 or is_half(args[at]):
            y = y.astype(dtype, copy=False)
        return y, Saved(kernel, downcast(value, dtype), dtype, True)


def _upcast(args: tuple[Any, ...], weight: int) -> tuple[Any, ...]:
    """The arguments in float32. The weight is upcast in chunks, when a product reads it."""
    return tuple(Upcast(x) if i == weight and is_half(x) else upcast(x) for i, x in enumerate(args))


def _downcast(results: Any, which: tuple[int, ...], dtype: Any) -> Any:
    with np.errstate(over="ignore"):
        if not isinstance(results, tuple):
            return results.astype(dtype, copy=False)
        return tuple(g.astype(dtype, copy=False) if i in which and g is not None else g for i, g in enumerate(results))
