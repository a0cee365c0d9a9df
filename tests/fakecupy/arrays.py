"""A fake `cupy.ndarray`: a wrapper around a private NumPy array."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from fakecupy.counting import note
from fakecupy.graph import capturing, perform, refuse_product, waits


class Flags(NamedTuple):
    """The flags of CuPy arrays; CuPy has no `writeable`."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


class ndarray:
    """A CuPy array. Not a subclass of numpy.ndarray: implicit conversions by NumPy must fail, as they do on a GPU."""

    __slots__ = ("_host",)
    __array_ufunc__ = None  # so `numpy_array + this` calls this class, which refuses; NumPy scalars pass

    def __init__(self, host: np.ndarray) -> None:
        if not isinstance(host, np.ndarray):
            raise TypeError("the fake CuPy creates arrays with asarray, zeros, ..., not with ndarray(shape).")
        self._host = host
        if (graph := capturing()) is not None:
            graph.kept.append(host)

    # -- implicit conversions, which raise --------------------------------------------------------------------------

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct a NumPy array explicitly.")

    def __array_function__(self, function: Callable, *_: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} was called on a CuPy array; take the module from get_xp(x).")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"cupy.ndarray.{name} is not in the list of the fake CuPy; if CuPy has it, add it in tests/fakecupy/arrays.py."
        )

    # -- shapes and dtypes, which the host knows --------------------------------------------------------------------

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    T = property(lambda self: ndarray(self._host.T))
    data = property(lambda self: SimpleNamespace(ptr=self._host.ctypes.data))

    @property
    def flags(self) -> Flags:
        flags = self._host.flags
        return Flags(flags.c_contiguous, flags.f_contiguous, flags.owndata)

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[ndarray]:
        return (self[i] for i in range(len(self)))

    # -- operations that synchronise --------------------------------------------------------------------------------

    def get(self) -> np.ndarray:
        """A copy on the host."""
        waits()
        note(syncs=1, to_host=1, bytes=self.nbytes)
        return self._host.copy()

    def item(self, *args: int) -> Any:
        return self.get().item(*args)

    def tolist(self) -> Any:
        return self.get().tolist()

    def __float__(self) -> float:
        return float(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __bool__(self) -> bool:
        return bool(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get() if self.ndim else self.item(), spec)

    # -- indexing and copying ---------------------------------------------------------------------------------------

    def __getitem__(self, key: Any) -> ndarray:
        resolved, gathers, mask = self._resolve(key)
        note(launches=gathers, syncs=mask)
        if not gathers:
            return ndarray(self._host[resolved])  # an array even for one element, since the key contains an Ellipsis
        result = self._host[resolved].copy()
        if capturing() is not None:
            result = to_be_computed(lambda: self._host[self._resolve(key)[0]], result)
        return ndarray(result)

    def __setitem__(self, key: Any, value: Any) -> None:
        resolved, _, mask = self._resolve(key)
        note(launches=1, syncs=mask)
        value = operand(value)
        if capturing() is None:
            self._host[resolved] = value
        else:

            def run() -> None:
                self._host[self._resolve(key)[0]] = value

            perform(run)

    def _resolve(self, key: Any) -> tuple[tuple[Any, ...], bool, bool]:
        """(the key for NumPy, whether it has an index array, whether it has a mask).

        Index arrays wrap around silently, as in CuPy, which does not check them on the device. Plain integers are checked.
        """
        keys = key if isinstance(key, tuple) else (key,)
        taken = [0 if k is None or k is Ellipsis else k.ndim if is_mask(k) else 1 for k in keys]
        if any(map(is_mask, keys)):
            waits()
        resolved, axis = [], 0
        for k, axes in zip(keys, taken, strict=True):
            if isinstance(k, (np.ndarray, list, tuple)):
                raise TypeError(f"Unsupported type {type(k)} as an index of a CuPy array; move it with asarray.")
            if isinstance(k, ndarray) and k.dtype.kind not in "biu":
                raise IndexError(f"arrays used as indices must be of integer or boolean type, got {k.dtype}.")
            if isinstance(k, ndarray):
                k = k._host if is_mask(k) else k._host.astype(np.int64) % max(self.shape[axis], 1)
            resolved.append(k)
            axis += self.ndim - sum(taken) if k is Ellipsis else axes
        if not any(k is Ellipsis for k in keys):
            resolved.append(Ellipsis)
        return tuple(resolved), any(isinstance(k, ndarray) for k in keys), any(map(is_mask, keys))

    def set(self, host: np.ndarray) -> None:
        """Copy from the host."""
        waits()
        if not isinstance(host, np.ndarray) or host.shape != self.shape or host.dtype != self.dtype or not host.flags.c_contiguous:
            raise TypeError(f"set: expected a contiguous NumPy array of {self.shape} {self.dtype}.")
        note(to_device=1, bytes=host.nbytes)
        self._host[...] = host

    def fill(self, value: Any) -> None:
        self[...] = value

    def __copy__(self) -> ndarray:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> ndarray:
        return self.copy()


ndarray.__module__ = "cupy"


def is_mask(key: Any) -> bool:
    """Whether `key` is a boolean device array."""
    return isinstance(key, ndarray) and key.dtype == bool


def operand(value: Any) -> Any:
    """The operand for NumPy. Raises TypeError for anything but a CuPy array or a scalar."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, (bool, int, float, complex, np.generic)):
        return value
    raise TypeError(f"Unsupported type {type(value)}: operands are CuPy arrays and scalars; nothing is moved to the device implicitly.")


def argument(value: Any) -> Any:
    """Any other argument for NumPy: shapes, dtypes and lists of CuPy arrays are allowed, NumPy arrays are not."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(argument, value))
    return operand(value) if isinstance(value, (ndarray, np.ndarray)) else value


def device(result: Any) -> Any:
    """A NumPy result in CuPy's form: arrays, never scalars."""
    if isinstance(result, tuple):
        return tuple(map(device, result))
    return ndarray(np.asarray(result)) if isinstance(result, (np.ndarray, np.generic, bool)) else result


def offered(function: Callable, kind: str = "launch") -> Callable:
    """A NumPy function as CuPy offers it.

    Kinds: "launch"; "view", which launches only if it must copy; "sync", whose result has a size that only the device knows;
    "product", whose shape is recorded in the counts; "create", which needs no array argument; "empty", which launches nothing.
    There are no floating-point warnings, as on a GPU.
    """
    convert = operand if isinstance(function, np.ufunc) else argument
    name = function.__name__

    def call(*args: Any, out: ndarray | None = None, **kwargs: Any) -> Any:
        if missing := {"where", "initial", "min", "max"} & kwargs.keys():
            raise TypeError(f"CuPy's {name} has no argument {', '.join(missing)}.")
        if kind not in ("create", "empty") and not isinstance(args[0], ndarray):
            flat = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else [arg])]
            if not any(isinstance(a, ndarray) for a in flat):
                raise TypeError(f"cupy.{name} was called without a CuPy array.")
        inputs, options = [convert(a) for a in args], {key: argument(value) for key, value in kwargs.items()}
        if kind == "sync":
            waits()
        if kind == "product":
            refuse_product()

        def run(**target: Any) -> Any:
            with np.errstate(all="ignore"):
                return function(*inputs, **options, **target)

        if out is not None:
            note(launches=1)
            perform(lambda: run(out=out._host))
            return out
        result = run()
        launches = kind != "empty" and not (kind == "view" and np.may_share_memory(result, inputs[0]))
        if launches and capturing() is not None:
            result = to_be_computed(run, result)
        note(launches=launches, syncs=kind == "sync", products=[np.shape(result)] if kind == "product" else [])
        return device(result)

    return call


_BINARY = (
    "add:add sub:subtract mul:multiply truediv:true_divide floordiv:floor_divide mod:remainder pow:power and:bitwise_and "
    "or:bitwise_or xor:bitwise_xor lshift:left_shift rshift:right_shift"
)
_OTHER = "eq:equal ne:not_equal lt:less le:less_equal gt:greater ge:greater_equal neg:negative pos:positive abs:absolute invert:invert"
METHODS = {
    "launch": "all any argmax argmin argsort copy cumsum flatten max mean min prod round std sum var",
    "view": "astype diagonal ravel reshape squeeze swapaxes transpose view",
    "sync": "nonzero",
    "product": "dot",
}


def to_be_computed(run: Callable[[], Any], result: Any) -> Any:
    """During graph capture: return arrays without the values, and add the computation of the values to the graph."""
    arrays = [np.array(x) for x in (result if isinstance(result, tuple) else (result,))]

    def again() -> None:
        fresh = run()
        for array, value in zip(arrays, fresh if isinstance(fresh, tuple) else (fresh,), strict=True):
            array[...] = value

    for array in arrays:
        array[...] = np.nan if array.dtype.kind in "fV" else 1
    perform(again)
    return tuple(arrays) if isinstance(result, tuple) else arrays[0]


def _asks_first(other: Any) -> bool:
    """Whether the other operand of a product handles it, by the rule of CuPy (NEP 13)."""
    return not isinstance(other, ndarray) and getattr(other, "__array_ufunc__", ...) is None


def _add_methods() -> None:
    """Add operators and methods to `ndarray`, all built from NumPy's."""

    def method(run: Callable) -> Callable:
        return lambda self, *args, **kwargs: run(self, *args, **kwargs)

    def reflected(run: Callable) -> Callable:
        return lambda self, other: run(other, self)

    def in_place(run: Callable) -> Callable:
        return lambda self, other: run(self, other, out=self)

    for name, ufunc in (pair.split(":") for pair in _BINARY.split()):
        run = offered(getattr(np, ufunc))
        setattr(ndarray, f"__{name}__", method(run))
        setattr(ndarray, f"__r{name}__", reflected(run))
        setattr(ndarray, f"__i{name}__", in_place(run))
    for name, ufunc in (pair.split(":") for pair in _OTHER.split()):
        setattr(ndarray, f"__{name}__", method(offered(getattr(np, ufunc))))
    multiply = offered(np.matmul, "product")
    ndarray.__rmatmul__ = reflected(multiply)
    ndarray.__matmul__ = lambda self, other: NotImplemented if _asks_first(other) else multiply(self, other)
    for kind, names in METHODS.items():
        for name in names.split():
            setattr(ndarray, name, method(offered(getattr(np.ndarray, name), kind)))


_add_methods()
