"""Compare a backward pass with central finite differences, in float64.

    L(x, parameters) = sum(c * y),  c a random cotangent       dL/dp ~ (L(p + h v) - L(p - h v)) / 2h

A plain sum of y would test nothing where it is a constant (softmax, layer norm); hence c. Works on any object with the
contract of `layers/base.py`: forward(x) -> (y, saved), backward(dy, saved) -> dx, parameters() -> (path, p) with p.data, p.grad.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Iterator
from inspect import signature
from typing import Any

import numpy as np

from minilora.backend import Array, backend_name, get_xp, to_backend
from minilora.checking.diagnose import diagnose, misshapen, not_finite
from minilora.checking.differences import Derivative, derivative
from minilora.checking.report import Broken, Entry, Report
from minilora.layers import Layer, reseed
from minilora.quantization.residual import dense

_SEED = 0x6772616463  # with the caller's: no `default_rng(seed)`, from which x or a weight may come, draws the same numbers

# Of the largest gradient, each times the size of what it belongs to. One that is exactly zero (the bias of a key) leaves only rounding,
# which is 1e-12 of that.
_FLOOR = 1e-3

_ROUNDING = 4.0  # the error of L is at most about this times eps sum|c y|; measured: 1.7 at most in the catalogue

_ALL = "(all, one direction)"


def gradcheck(layer: Any, x: Array, *, tol: float = 1e-7, seed: int = 0, max_coordinates: int = 200, **forward: Any) -> Report:
    """Check every gradient of `layer` at x against finite differences, in float64. Afterwards the layer is as it was.

    A copy of the layer is called. It has the layer's own parameters, to which functions made in __init__ may hold on; their arrays
    are exchanged for the check.

    x: what forward takes; floating (then dx is checked too) or integer ids. `forward` is passed on (offsets=...).
    Checked for dx and each trainable parameter: every coordinate if there are at most `max_coordinates`, else that many, half at
    random and half where the gradient is largest; then one random direction through x and all parameters together. The relative
    error is ||analytic - numeric|| over the larger of the two norms, both over the coordinates looked at.

    An entry is ok when its error is below `tol`, or below the precision of the finite differences where that is worse: rounding
    of y alone is 4 eps sum|c y| over the step and the norm of the gradient. Beyond 1e-4 a mistake would not be seen, and the entry
    is "inconclusive", not ok.

    Parameters that are all zero are moved away from zero first: with B = 0, LoRA's dA is zero whatever backward does.
    Also part of the contract, and reported by name when broken: gradients accumulate; x, dy and the parameters are not
    written to; frozen parameters get no gradient; the call's state is not kept in the layer; need_dx=False, for a method that
    takes it, changes nothing. What forward or backward raises is reported, too.
    """
    entries: list[Entry] = []
    kept = [(p, name, getattr(p, name)) for _, p in layer.parameters() for name in ("data", "grad", "home") if hasattr(p, name)]
    with np.errstate(all="ignore"):  # what is not finite is reported by name
        try:
            check = Check(layer, x, tol, seed, max_coordinates, forward)
            entries += check.gradients()
            wrong = {e.name for e in entries if e.verdict(tol) != "ok"}  # of these enough is said
            entries += [e for e in check.contract() if e.name not in wrong]
        except Broken as broken:
            entries.append(broken.entry)
        finally:
            for p, name, value in kept:
                setattr(p, name, value)
    return Report(getattr(layer, "name", type(layer).__name__), tol, entries)


class Check:
    """The copy under test, its inputs and parameters in float64, and the analytic gradients."""

    def __init__(self, layer: Any, x: Array, tol: float, seed: int, max_coordinates: int, options: dict[str, Any]) -> None:
        dtype: Any = getattr(x, "dtype", None)
        if getattr(dtype, "kind", None) not in ("f", "i", "u"):
            raise ValueError(f"gradcheck: x is of {dtype or type(x).__name__}; give an array of floating numbers, or of integers.")
        if max_coordinates < 1:
            raise ValueError(f"gradcheck: max_coordinates is {max_coordinates}; it must be at least 1.")
        self.rng = np.random.default_rng([_SEED, seed])
        self.tol, self.max_coordinates, self.options = tol, max_coordinates, options
        try:
            self.layer = copy.deepcopy(layer, {id(p): p for _, p in layer.parameters()})
        except TypeError as error:
            raise ValueError(f"gradcheck: no copy can be made of the layer ({error}).") from None
        self.params = dict({id(p): (path, p) for path, p in self.layer.parameters()}.values())  # each once, as where it is shared
        self.home = backend_name(next(iter(self.params.values())).data if self.params else x)
        for p in self.params.values():
            p.grad, p.data = None, p.data.copy()
            if hasattr(p, "home"):
                p.home = None
            if p.data.dtype.kind not in "iub":  # frozen indices or masks stay what they are
                p.data = to_backend(p.data, self.home, "float64")
            if _trainable(p) and not p.data.any():
                p.data = p.data + self.draw(p.data.shape) * 0.1
        self.floating = dtype.kind == "f"
        self.x = _strided(to_backend(x, backend_name(x), "float64")) if self.floating else x
        self.before = {"x": self.x.copy(), **{path: p.data.copy() for path, p in self.params.items()}}
        self.kinks: dict[str, np.ndarray] = {}  # coordinates that were left out
        self.analyse()

    def draw(self, shape: tuple[int, ...]) -> Array:
        """Standard normal numbers, from the host's generator, on the layer's backend."""
        return to_backend(np.asarray(self.rng.standard_normal(shape)), self.home)

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """What the layer's method returns. An exception becomes an entry: a wrong layer may fail in any way."""
        try:
            return getattr(self.layer, method)(*args, **options)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            place = "" if at.filename == __file__ else f" ({at.filename}:{at.lineno})"
            raise Broken(method, f"raised {type(error).__name__}: {error}{place}") from error

    def takes(self, method: str, option: str) -> bool:
        return option in signature(getattr(self.layer, method)).parameters

    def forward(self, **options: Any) -> tuple[Array, Any]:
        if isinstance(self.layer, Layer):
            reseed(self.layer, 0)  # every forward draws the same dropout masks
        result = self.call("forward", self.x, **self.options, **options)
        if not isinstance(result, tuple) or len(result) != 2:
            raise Broken("forward", f"returned {type(result).__name__} instead of the pair (y, saved)")
        y, saved = result
        if getattr(y, "dtype", None) != np.float64:
            kind = getattr(y, "dtype", type(y).__name__)
            raise Broken("forward", f"returned y of {kind}; a check needs an array of float64, as x and the parameters are", float("inf"))
        return y, saved

    def backward(self, saved: Any, **options: Any) -> Array | None:
        return self.call("backward", self.c.copy(), saved, **options)

    def analyse(self) -> None:
        """The analytic gradients, with another call in between: state kept in the layer would be overwritten by it."""
        y, saved = self.forward()
        if bad := not_finite(y):
            raise Broken("y", f"{bad}; nothing can be compared", float("inf"))
        self.c = self.draw(y.shape)
        if not _relative(_host(self.forward()[0]), _host(y), 0) < 1e-9:
            raise Broken("forward", "gives another y for the same x: it draws random numbers, or keeps state")
        self.alone = self.once()
        self.moved({name: self.value(name) for name in self.alone}, -0.1)
        self.zero_grad()
        self.analytic = self.collect(self.backward(saved))
        self.rounding = _ROUNDING * float(np.finfo(np.float64).eps) * float(abs(self.c * y).sum())

    def once(self) -> dict[str, Any]:
        """The analytic gradients of a backward right after its forward."""
        self.zero_grad()
        return self.collect(self.backward(self.forward()[1]))

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None

    def collect(self, dx: Any) -> dict[str, Any]:
        """{name: gradient} of dx and every trainable parameter, copied."""
        grads = {"dx": dx} if self.floating else {}
        grads.update({path: p.grad for path, p in self.params.items() if _trainable(p)})
        return {name: g.copy() if hasattr(g, "copy") else g for name, g in grads.items() if self.value(name).size}

    def value(self, name: str) -> Array:
        return self.x if name == "dx" else self.params[name].data

    def assign(self, name: str, value: Array) -> None:
        if name == "dx":
            self.x = value
        else:
            self.params[name].data = value

    def scale(self, name: str) -> float:
        """The typical size of an array's elements: steps are taken in proportion to it."""
        value = self.value(name)
        return float((value * value).mean()) ** 0.5 or 1.0

    def moved(self, direction: dict[str, Array], t: float) -> Array:
        """y with every named array moved t times its direction."""
        before = {name: self.value(name) for name in direction}
        for name, v in direction.items():
            self.assign(name, before[name] + t * v)
        y, _ = self.forward()
        for name, old in before.items():
            self.assign(name, old)
        return y

    def derivative(self, direction: dict[str, Array]) -> Derivative:
        """That of L along a direction."""
        return derivative(lambda t: self.moved(direction, t), self.c, self.rounding)

    def coordinates(self, name: str) -> np.ndarray:
        """All, or `max_coordinates` of them: half at random, half where the analytic gradient is largest."""
        size, most, g = self.value(name).size, self.max_coordinates, self.analytic[name]
        if size <= most:
            return np.arange(size)
        at = self.rng.permutation(size)
        if getattr(g, "size", None) == size:
            largest = np.argsort(-abs(_host(g).ravel()), kind="stable")[: most // 2]
            at = np.concatenate([largest, at[~np.isin(at, largest)]])
        return np.sort(at[:most])

    def numeric(self, name: str) -> tuple[np.ndarray, np.ndarray, float]:
        """The coordinates looked at, without those at a kink; the derivatives there, and the norm of their errors."""
        shape, scale = self.value(name).shape, self.scale(name)
        at = self.coordinates(name)
        found = []
        for i in at:
            one = np.zeros(self.value(name).size)
            one[i] = scale
            found.append(self.derivative({name: to_backend(one.reshape(shape), self.home)}))
        kink = np.array([d.kink for d in found], dtype=bool)
        self.kinks[name] = at[kink]
        values, noise = (np.array([getattr(d, field) for d in found])[~kink] / scale for field in ("value", "error"))
        return at[~kink], values, float(np.linalg.norm(noise))

    def floor(self, name: str) -> float:
        """The norm below which a gradient counts as next to nothing."""
        return _FLOOR * self.largest / self.scale(name)

    def gradients(self) -> Iterator[Entry]:
        numeric = {name: self.numeric(name) for name in self.analytic}
        norms = [float(np.linalg.norm(n)) * self.scale(name) for name, (_, n, _) in numeric.items()]
        self.largest = max((n for n in norms if np.isfinite(n)), default=0.0)
        entries = [self.compare(name, *found) for name, found in numeric.items()]
        yield from entries
        if entries and all(e.coordinates for e in entries):
            yield self.joint_direction()

    def compare(self, name: str, at: np.ndarray, n: np.ndarray, noise: float) -> Entry:
        """The entry of one gradient. Those of which no coordinate was compared say so, with `coordinates` 0."""
        g, shape, infinite = self.analytic[name], tuple(self.value(name).shape), float("inf")
        if not len(at):
            return Entry(name, infinite, 0, "every coordinate has a kink here; choose another x", infinite)
        if not np.isfinite(n).all():
            return Entry(name, infinite, 0, "y is NaN or infinite within a step from here; choose another x", infinite)
        if g is None:
            if name != "dx" and not n.any():
                return Entry(name, 0.0, len(at), "no gradient was written; y does not depend on it")
            return Entry(name, infinite, 0, "backward returned None" if name == "dx" else "no gradient was written")
        if not hasattr(g, "shape"):
            return Entry(name, infinite, 0, f"is a {type(g).__name__} instead of an array")
        if tuple(g.shape) != shape:
            return Entry(name, infinite, 0, misshapen(_host(g), shape, n, at))
        if bad := not_finite(g):
            return Entry(name, infinite, 0, bad)
        a = _host(g).ravel()[at]
        size = max(float(np.linalg.norm(a)), float(np.linalg.norm(n)), self.floor(name))
        entry = Entry(name, _relative(a, n, self.floor(name)), len(at), precision=noise / size if size else infinite)
        skipped = len(self.kinks[name])
        if entry.verdict(self.tol) == "WRONG":
            entry.remark = diagnose(name, self, a, n, at, max(0.01 * self.tol, entry.precision))
        elif not size:
            entry.remark = "every gradient is zero here; choose another x"
        elif skipped:
            entry.remark = f"left out {skipped} of {skipped + len(at)}: at a kink, or y varies too fast there"
        return entry

    def joint_direction(self) -> Entry:
        """One random direction through everything at once: it also sees what the sampled coordinates left out."""
        for _ in range(5):
            direction = {name: self.direction(name) for name in self.analytic}
            n, noise, kink = self.derivative(direction)
            if not kink and np.isfinite(n):
                break
        else:
            return Entry(_ALL, float("inf"), 0, "a kink in each of five directions; choose another x", float("inf"))
        grads = {name: g for name, g in self.analytic.items() if g is not None}
        a = sum(float((g * direction[name]).sum()) for name, g in grads.items())
        norm = float(np.sqrt(sum(float((g * g).sum()) * self.scale(name) ** 2 for name, g in grads.items())))
        size = max(norm, abs(n))
        return Entry(_ALL, abs(a - n) / size if size else 0.0, 1, precision=noise / size if size else float("inf"))

    def direction(self, name: str) -> Array:
        """Random, in proportion to the array's size, and zero where a kink was found."""
        v = self.rng.standard_normal(self.value(name).shape)
        v.reshape(-1)[self.kinks[name]] = 0
        return to_backend(self.scale(name) * v, self.home)

    def contract(self) -> Iterator[Entry]:
        """The promises that are not numbers. Only broken ones are listed."""

        def broke(name: str, remark: str) -> Entry:
            return Entry(name, float("inf"), 0, remark)

        self.zero_grad()
        c = self.c.copy()
        self.call("backward", c, self.forward()[1])
        self.backward(self.forward()[1])
        if not _same(c, self.c):
            yield broke("dy", "backward wrote into its argument")
        if not _same(self.x, self.before["x"]):
            yield broke("x", "was written to")
        for path, p in self.params.items():
            if not _same(dense(p.data), dense(self.before[path])):
                yield broke(path, "the parameter itself was written to")
            if not _trainable(p):
                if p.grad is not None:
                    yield broke(path, "is frozen but has a gradient")
            elif not self.matches(path, p.grad, 2):
                once = self.matches(path, p.grad, 1)
                yield broke(path, f"two backward passes do not add up{': += is missing' if once else ''}")
        if not self.takes("backward", "need_dx"):
            return
        for given in ({}, {"need_dx": False}) if self.takes("forward", "need_dx") else ({},):
            self.zero_grad()
            dx = self.backward(self.forward(**given)[1], need_dx=False)
            if dx is not None:
                yield broke("dx", "need_dx=False still computes dx")
            changed = [path for path, p in self.params.items() if _trainable(p) and not self.matches(path, p.grad, 1)]
            yield from (broke(path, "need_dx=False changes this gradient") for path in changed)
            if changed or dx is not None:
                return

    def matches(self, path: str, grad: Any, factor: float) -> bool:
        """Is this gradient `factor` times the one analysed? Yes, too, if that one was reported as missing or misshapen."""
        one: Any = self.analytic.get(path)
        if getattr(one, "shape", None) != self.params[path].data.shape:
            return True
        return getattr(grad, "shape", None) == one.shape and _relative(_host(grad), factor * _host(one), self.floor(path)) < 1e-9


def _trainable(p: Any) -> bool:
    return getattr(p, "trainable", True)


def _host(x: Array) -> np.ndarray:
    return to_backend(x, "numpy")


def _same(a: Array, b: Array) -> bool:
    """Are the values the same? NaN equals itself."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _strided(x: Array) -> Array:
    """The same values with gaps between them in memory: a backward that assumes contiguous input is found out."""
    wide = get_xp(x).zeros((*x.shape, 2), dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def _relative(a: np.ndarray, n: np.ndarray, floor: float) -> float:
    """||a - n|| over the larger norm, or over `floor` where both are next to nothing. What is not finite is infinitely wrong."""
    scale = max(float(np.linalg.norm(n)), float(np.linalg.norm(a)), floor)
    error = float(np.linalg.norm(a - n))
    if not np.isfinite(error):
        return float("inf")
    return error / scale if scale > 0 else 0.0
