"""Compare a backward pass with central finite differences, in float64.

    L(x, parameters) = sum(c * y),  c a random cotangent       dL/dp ~ (L(p + h v) - L(p - h v)) / 2h

A plain sum of y would test nothing where it is a constant (softmax, layer norm); hence c. Works on any object with the
contract of `layers/base.py`: forward(x) -> (y, saved), backward(dy, saved) -> dx, parameters() -> (path, p) with p.data, p.grad.
"""

import copy
import traceback
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from inspect import signature
from types import SimpleNamespace
from typing import Any

import numpy as np

from minilora.backend import Array, backend_name, get_xp, to_backend, to_numpy
from minilora.checking.causes import Known, cause, gelus, not_finite, unusable
from minilora.checking.differences import Derivative, derivative, relative_error
from minilora.checking.report import Broken, Entry
from minilora.layers import Layer, reseed

_SEED = 0x6772616463  # with the caller's: no `default_rng(seed)`, from which x or a weight may come, draws the same numbers

# Relative to the largest gradient, each times the size of its array. A gradient that is exactly zero (the bias of a key) leaves only
# rounding, which is 1e-12 of that.
_FLOOR = 1e-3

_ROUNDING = 4.0  # the error of L is at most about this times eps sum|c y|; measured: 1.7 at most in the catalogue

_ALL = "(all, one direction)"
_INF = float("inf")


def parameters_of(layer: Any) -> list[tuple[str, Any]]:
    """(path, parameter) of a layer; none if it has no method of this name."""
    return list(layer.parameters()) if hasattr(layer, "parameters") else []


@contextmanager
def unchanged(layer: Any) -> Iterator[None]:
    """Afterwards every parameter has the arrays that it has now."""
    kept = [(p, name, getattr(p, name)) for _, p in parameters_of(layer) for name in ("data", "grad", "home") if hasattr(p, name)]
    try:
        yield
    finally:
        for p, name, value in kept:
            setattr(p, name, value)


class Check:
    """The copy under test, its input and parameters in float64, and the analytic gradients."""

    def __init__(self, layer: Any, x: Array, tol: float, seed: int, max_coordinates: int, options: dict[str, Any]) -> None:
        dtype: Any = getattr(x, "dtype", None)
        if getattr(dtype, "kind", None) not in ("f", "i", "u"):
            raise ValueError(f"gradcheck: x is of {dtype or type(x).__name__}; give an array of floating numbers, or of integers.")
        if max_coordinates < 1:
            raise ValueError(f"gradcheck: max_coordinates is {max_coordinates}; it must be at least 1.")
        self.rng = np.random.default_rng([_SEED, seed])
        self.tol, self.max_coordinates, self.options = tol, max_coordinates, options
        try:
            self.layer = copy.deepcopy(layer, {id(p): p for _, p in parameters_of(layer)})
        except TypeError as error:
            raise ValueError(f"gradcheck: no copy can be made of the layer ({error}).") from None
        self.params = dict({id(p): (path, p) for path, p in parameters_of(self.layer)}.values())  # each once, even where it is shared
        self.home = backend_name(next(iter(self.params.values())).data if self.params else x)
        for p in self.params.values():
            p.grad, p.data = None, p.data if hasattr(layer, "of") else p.data.copy()  # a part of a model has copies already
            if hasattr(p, "home"):
                p.home = None
            if p.data.dtype.kind not in "iub":  # frozen indices or masks keep their dtype
                p.data = to_backend(p.data, self.home, "float64")
            if _trainable(p) and not p.data.any():
                p.data = p.data + self.draw(p.data.shape) * 0.1
        self.floating = dtype.kind == "f"
        if self.floating:  # with gaps between the values in memory: a backward that assumes contiguous input fails
            x = to_backend(x, backend_name(x), "float64")
            x = get_xp(x).stack([x, x], axis=-1)[..., 0]
        self.input: Any = SimpleNamespace(data=x, grad=None)
        checked = {"dx": self.input} if self.floating and getattr(layer, "need_dx", True) else {}
        checked |= {path: p for path, p in self.params.items() if _trainable(p)}
        self.checked = {name: p for name, p in checked.items() if p.data.size}
        self.before = {"": digest(self.x), **{path: digest(p.data) for path, p in self.params.items()}}
        self.kinks: dict[str, np.ndarray] = {}  # coordinates that were left out
        self.c: Any = None

    def entries(self, directions: Iterable[Collection[str]] | None = None, promises: bool = True) -> list[Entry]:
        """All of them: by coordinate, or of one direction through each of the sets `directions` of arrays; and the broken promises.

        An exception ends the check, and is the last entry.
        """
        entries: list[Entry] = []
        try:
            self.analyse()
            entries += self.comparisons() if directions is None else map(self.direction, directions)
            wrong = {e.name for e in entries if e.verdict(self.tol) != "ok"}  # one entry each is enough
            entries += [e for e in self.contract() if e.name not in wrong] if promises else []
        except Broken as broken:
            entries += broken.args
        return entries

    @property
    def x(self) -> Array:
        return self.input.data

    def draw(self, shape: tuple[int, ...]) -> Array:
        """Standard normal numbers, from the host's generator, on the layer's backend."""
        return to_backend(np.asarray(self.rng.standard_normal(shape)), self.home)

    # -- calls, and the analytic gradients ----------------------------------------------------------------------------

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """The result of the layer's method. An exception becomes an entry: a wrong layer may fail in any way."""
        try:
            return getattr(self.layer, method)(*args, **options)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            place = "" if at.filename == __file__ else f" ({at.filename}:{at.lineno})"
            raise Broken(Entry(method, f"raised {type(error).__name__}: {error}{place}")) from error

    def forward(self, **options: Any) -> tuple[Array, Any]:
        if isinstance(self.layer, Layer):
            reseed(self.layer, 0)  # every forward draws the same dropout masks
        result = self.call("forward", self.x, **self.options, **options)
        if not isinstance(result, tuple) or len(result) != 2:
            raise Broken(Entry("forward", f"returned {type(result).__name__} instead of the pair (y, saved)"))
        y, saved = result
        if getattr(y, "dtype", None) != np.float64:
            kind = getattr(y, "dtype", type(y).__name__)
            remark = f"returned y of {kind}; a check needs an array of float64, as x and the parameters are"
            raise Broken(Entry("forward", remark, precision=_INF))
        return y, saved

    def backward(self, saved: Any, **options: Any) -> Array | None:
        """dx. The gradients of the parameters start from none."""
        self.zero_grad()
        return self.call("backward", self.c.copy(), saved, **options)

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None

    def gradients(self, saved: Any) -> dict[str, Any]:
        """{name: analytic gradient} of everything that is checked, copied."""
        self.input.grad = self.backward(saved)
        return {name: p.grad.copy() if hasattr(p.grad, "copy") else p.grad for name, p in self.checked.items()}

    def analyse(self) -> None:
        """The analytic gradients, with another call in between: it would overwrite state that is kept in the layer."""
        y, saved = self.forward()
        if bad := not_finite(y):
            raise Broken(Entry("y", f"{bad}; nothing can be compared", precision=_INF))
        self.c = self.draw(y.shape)
        if not relative_error(to_numpy(self.forward()[0]), to_numpy(y), 0) < 1e-9:
            raise Broken(Entry("forward", "returns another y for the same x: it draws random numbers, or keeps state"))
        self.alone = self.gradients(self.forward()[1])
        self.moved({name: p.data for name, p in self.checked.items()}, -0.1)
        self.analytic = self.gradients(saved)
        sizes = [float(abs(g).max()) * self.scale(name) for name, g in self.analytic.items() if getattr(g, "size", 0)]
        self.largest = max((size for size in sizes if np.isfinite(size)), default=0.0)
        self.rounding = _ROUNDING * float(np.finfo(np.float64).eps) * float(abs(self.c * y).sum())

    # -- finite differences -------------------------------------------------------------------------------------------

    def scale(self, name: str) -> float:
        """The typical size of an array's elements: steps are in proportion to it."""
        value = self.checked[name].data
        return float((value * value).mean()) ** 0.5 or 1.0

    def moved(self, direction: dict[str, Array], t: float) -> Array:
        """y with every named array moved by t times its direction."""
        before = {name: self.checked[name].data for name in direction}
        for name, v in direction.items():
            self.checked[name].data = before[name] + t * v
        y, _ = self.forward()
        for name, old in before.items():
            self.checked[name].data = old
        return y

    def derivative(self, direction: dict[str, Array]) -> Derivative:
        """That of L along a direction."""
        return derivative(lambda t: self.moved(direction, t), self.c, self.rounding)

    def numeric(self, name: str) -> tuple[np.ndarray, np.ndarray, float]:
        """Coordinates without those at a kink, the derivatives there, and the norm of their errors.

        At most `max_coordinates`: half where the analytic gradient is largest, half at random.
        """
        value, scale, g = self.checked[name].data, self.scale(name), self.analytic[name]
        at = np.arange(value.size)
        if len(at) > self.max_coordinates:
            at = self.rng.permutation(value.size)
            if getattr(g, "size", None) == value.size:
                largest = np.argsort(-abs(to_numpy(g).ravel().astype(float)), kind="stable")[: self.max_coordinates // 2]
                at = np.concatenate([largest, at[~np.isin(at, largest)]])
            at = np.sort(at[: self.max_coordinates])
        found = []
        for i in at:
            one = np.zeros(value.size)
            one[i] = scale
            found.append(self.derivative({name: to_backend(one.reshape(value.shape), self.home)}))
        values, errors, kinks = (np.array(column) for column in zip(*found, strict=True))
        self.kinks[name] = at[kinks]
        return at[~kinks], values[~kinks] / scale, float(np.linalg.norm(errors[~kinks] / scale))

    # -- comparisons --------------------------------------------------------------------------------------------------

    def comparisons(self) -> Iterator[Entry]:
        numeric = {name: self.numeric(name) for name in self.checked}
        norms = [float(np.linalg.norm(n)) * self.scale(name) for name, (_, n, _) in numeric.items()]
        self.largest = max((n for n in norms if np.isfinite(n)), default=0.0)
        entries = [self.compare(name, *found) for name, found in numeric.items()]
        yield from entries
        if entries and all(e.coordinates for e in entries):
            yield self.direction(self.checked, _ALL)

    def floor(self, name: str) -> float:
        """The norm below which a gradient counts as zero."""
        return _FLOOR * self.largest / self.scale(name)

    def compare(self, name: str, at: np.ndarray, n: np.ndarray, noise: float) -> Entry:
        """The entry of one gradient, with `coordinates` 0 where nothing could be compared."""
        g, shape = self.analytic[name], tuple(self.checked[name].data.shape)
        if not len(at):
            return Entry(name, "every coordinate has a kink here; choose another x", precision=_INF)
        if not np.isfinite(n).all():
            return Entry(name, "y is NaN or infinite within a step from here; choose another x", precision=_INF)
        if g is None:
            if name != "dx" and not n.any():
                return Entry(name, "no gradient was written; y does not depend on it", 0.0, len(at))
            return Entry(name, "backward returned None" if name == "dx" else "no gradient was written")
        if remark := unusable(g, shape, n, at, self.c):
            return Entry(name, remark)
        g, floor = to_numpy(g), self.floor(name)
        a = g.ravel()[at]
        size = max(float(np.linalg.norm(a)), float(np.linalg.norm(n)), floor)
        entry = Entry(name, "", relative_error(a, n, floor), len(at), noise / size if size else _INF)
        skipped = len(self.kinks[name])
        if entry.verdict(self.tol) == "WRONG":
            knows = getattr(self.layer, "known", None)  # of an object that knows more
            known = knows(name, self.c) if knows else Known()
            if name == "dx" and not knows:
                known = Known(to_numpy(self.c), others=gelus(self.c, self.x) if self.c.shape == self.x.shape else {})
            known.factors = {"1 / tokens": 1 / len(self.c) if self.c.ndim else 1.0} | known.factors
            known.alone, known.again = self.alone[name], self.gradients(self.forward()[1])[name]
            entry.remark = cause(g, n, at, max(0.01 * self.tol, entry.precision), known)
        elif not size:
            entry.remark = "every gradient is zero here; choose another x"
        elif skipped:
            entry.remark = f"left out {skipped} of {skipped + len(at)}: at a kink, or y varies too fast there"
        return entry

    def direction(self, names: Collection[str], called: str = "") -> Entry:
        """One random direction through these arrays at once: it also covers the coordinates that were not sampled."""
        called = called or ", ".join(names if len(names) == 1 else [_ALL])
        for _ in range(5):
            direction = {}
            for name in names:  # in proportion to the array's size, and zero where a kink was found
                v = self.scale(name) * self.rng.standard_normal(self.checked[name].data.shape)
                v.reshape(-1)[self.kinks.get(name, [])] = 0
                direction[name] = to_backend(v, self.home)
            n, noise, kink = self.derivative(direction)
            if not kink and np.isfinite(n):
                break
        else:
            return Entry(called, "a kink in each of five directions; choose another x", precision=_INF)
        grads = {name: g for name in names if (g := self.analytic[name]) is not None}
        for name, g in grads.items():
            if remark := "has another shape" if getattr(g, "shape", None) != self.checked[name].data.shape else not_finite(g):
                return Entry(name, remark)
        a = sum(float((g * direction[name]).sum()) for name, g in grads.items())
        norm = float(np.sqrt(sum(float((g * g).sum()) * self.scale(name) ** 2 for name, g in grads.items())))
        size = max(norm, abs(n))
        return Entry(called, "", abs(a - n) / size if size else 0.0, 1, noise / size if size else _INF)

    # -- the promises that are not numbers ----------------------------------------------------------------------------

    def contract(self) -> Iterator[Entry]:
        """An entry for each broken promise."""
        c = self.c.copy()
        self.zero_grad()
        for dy in (c, self.c.copy()):
            self.call("backward", dy, self.forward()[1])
        if digest(c) != digest(self.c):
            yield Entry("dy", "backward wrote into its argument")
        if digest(self.x) != self.before[""]:
            yield Entry("x", "was written to")
        for path, p in self.params.items():
            if digest(p.data) != self.before[path]:
                yield Entry(path, "the parameter itself was written to")
            if not _trainable(p):
                if p.grad is not None:
                    yield Entry(path, "is frozen but has a gradient")
            elif not self.matches(path, 2):
                yield Entry(path, f"two backward passes do not add up{': += is missing' if self.matches(path, 1) else ''}")
        added = [path for path, p in self.params.items() if _trainable(p) and self.matches(path, 2)]
        takes = {method: "need_dx" in signature(getattr(self.layer, method)).parameters for method in ("forward", "backward")}
        passes = [{}, {"need_dx": False}][: 1 + takes["forward"]] if takes["backward"] else []
        for times, options in enumerate(passes, 3):  # they add to the two before
            dx = self.call("backward", self.c.copy(), self.forward(**options)[1], need_dx=False)
            if dx is not None:
                yield Entry("dx", "need_dx=False still computes dx")
            changed = [path for path in added if not self.matches(path, times)]
            for path in changed:
                how = "does not add to this gradient: += is missing" if self.matches(path, 1) else "changes this gradient"
                yield Entry(path, f"need_dx=False {how}")
            if changed or dx is not None:
                return

    def matches(self, path: str, factor: float) -> bool:
        """Whether this gradient is now `factor` times the analytic one; also True if that one was reported as missing or misshapen."""
        g: Any = self.params[path].grad
        one: Any = self.analytic.get(path)
        if getattr(one, "shape", None) != self.params[path].data.shape:
            return True
        return getattr(g, "shape", None) == one.shape and relative_error(to_numpy(g), factor * to_numpy(one), self.floor(path)) < 1e-9


def _trainable(p: Any) -> bool:
    return getattr(p, "trainable", True)


def digest(a: Array) -> bytes:
    """Equal for equal arrays alone: they need not be kept to see whether one was written to."""
    return sha256(np.ascontiguousarray(to_numpy(a)).data).digest()
