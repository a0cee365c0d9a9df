"""Compare a backward pass with central finite differences, in float64.

    L(x, parameters) = sum(c * y),  c a random cotangent       dL/dp ~ (L(p + h v) - L(p - h v)) / 2h

A plain sum of y would test nothing where it is a constant (softmax, layer norm); hence c. Works on any object with the
contract of `layers/base.py`: forward(x) -> (y, saved), backward(dy, saved) -> dx, parameters() -> (path, p) with p.data, p.grad.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from minilora.backend import Array, backend_name, get_xp, to_backend
from minilora.checking.diagnose import diagnose
from minilora.layers import Layer, reseed

_STEP = 1e-4  # relative to the size of what is moved; the truncation, h^4, and the rounding, eps / h, are then both about 1e-12

_FLOOR = 1e-3  # of the largest gradient: one that is exactly zero (the bias of a key) leaves only rounding, which is 1e-12 of it


@dataclass
class Entry:
    """One gradient: its name ("dx" or a parameter's path), its relative error, and what seems wrong with it."""

    name: str
    error: float
    coordinates: int
    remark: str = ""


@dataclass
class Report:
    """What `gradcheck` found. `ok`, `worst` (the largest relative error), `failures` (entries), and a table by `str()`."""

    what: str
    tol: float
    entries: list[Entry]

    @property
    def worst(self) -> float:
        return max((e.error for e in self.entries), default=float("nan"))

    @property
    def failures(self) -> list[Entry]:
        return [e for e in self.entries if not e.error < self.tol]

    @property
    def ok(self) -> bool:
        return bool(self.entries) and not self.failures

    def __str__(self) -> str:
        width = max((len(e.name) for e in self.entries), default=0)
        lines = [f"{self.what}: {'ok' if self.ok else 'WRONG'}, worst relative error {self.worst:.1e} (tolerance {self.tol:.0e})"]
        for e in self.entries:
            lines.append(
                f"  {e.name:<{width}}  {e.error:8.1e}  {'ok' if e.error < self.tol else 'WRONG'}{'  ' + e.remark if e.remark else ''}"
            )
        return "\n".join(lines)


def gradcheck(layer: Any, x: Array, *, tol: float = 1e-7, seed: int = 0, max_coordinates: int = 200, **forward: Any) -> Report:
    """Check every gradient of `layer` at x against finite differences. The layer itself is not touched: a float64 copy is.

    x: what forward takes; floating (then dx is checked too) or integer ids. `forward` is passed on (offsets=...).
    Checked for dx and each trainable parameter: every coordinate if there are at most `max_coordinates`, else as many at
    random; then one random direction through x and all parameters together. The relative error is ||analytic - numeric||
    over the larger of the two norms, both over the coordinates looked at.

    Parameters that are all zero are moved away from zero first: with B = 0, LoRA's dA is zero whatever backward does.
    Also part of the contract, and reported by name when broken: gradients accumulate; x, dy and the parameters are not
    written to; frozen parameters get no gradient; the call's state is not kept in the layer; need_dx=False changes nothing.
    """
    check = _Check(layer, x, seed, max_coordinates, forward)
    entries = check.gradients() if not check.broken else []
    wrong = {e.name for e in entries if not e.error < tol}  # of these enough is said
    entries += [e for e in check.contract() if e.name not in wrong]
    return Report(getattr(layer, "name", type(layer).__name__), tol, entries)


class _Check:
    """The float64 copy under test, its inputs, and the analytic gradients."""

    def __init__(self, layer: Any, x: Array, seed: int, max_coordinates: int, forward: dict[str, Any]) -> None:
        self.rng = np.random.default_rng(seed)
        self.max_coordinates, self.kwargs = max_coordinates, forward
        self.layer = copy.deepcopy(layer)
        self.params = dict(self.layer.parameters())
        self.home = backend_name(next(iter(self.params.values())).data if self.params else x)
        for p in self.params.values():
            p.grad = None
            p.data = to_backend(p.data, self.home, "float64")
            if getattr(p, "trainable", True) and not float(abs(p.data).max()) > 0:
                p.data = p.data + self.draw(p.data.shape) * 0.1
        self.floating = x.dtype.kind == "f"
        self.x = self.strided(to_backend(x, backend_name(x), "float64")) if self.floating else x
        self.broken: list[Entry] = []
        self.kinks: dict[str, np.ndarray] = {}  # coordinates that were left out
        self.analyse()

    def draw(self, shape: tuple[int, ...]) -> Array:
        """Standard normal numbers, from the host's generator, on the layer's backend."""
        return to_backend(self.rng.standard_normal(shape), self.home)

    def strided(self, x: Array) -> Array:
        """The same values with gaps between them in memory: a backward that assumes contiguous input is found out."""
        wide = get_xp(x).zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    def forward(self) -> tuple[Array, Any]:
        if isinstance(self.layer, Layer):
            reseed(self.layer, 0)  # every forward draws the same dropout masks
        return self.layer.forward(self.x, **self.kwargs)

    def backward(self, saved: Any, **options: Any) -> Array | None:
        """dx, or None when the layer's backward raised; the exception becomes an entry."""
        try:
            return self.layer.backward(self.c.copy(), saved, **options)
        except Exception as error:  # a wrong backward may fail in any way; its message is the finding
            self.broken.append(Entry("backward", float("inf"), 0, f"raised {type(error).__name__}: {error}"))
            return None

    def analyse(self) -> None:
        """The analytic gradients, with another call in between: state kept in the layer would be overwritten by it."""
        y, saved = self.forward()
        self.c = self.draw(y.shape) if y.ndim else get_xp(y).ones_like(y)
        x, alone = self.x, None
        if self.floating:
            _, s_alone = self.forward()
            alone = self.collect(self.backward(s_alone))
            self.x = x + self.draw(x.shape)
            self.forward()
            self.x = x
        self.zero_grad()
        self.analytic = self.collect(self.backward(saved))
        self.alone = alone
        # A slope below this is rounding, and says nothing of kinks.
        self.smallest = 1e-6 * float(abs(self.c * y).sum())

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None

    def collect(self, dx: Array | None) -> dict[str, Array | None]:
        """{name: gradient} of dx and every trainable parameter, copied."""
        grads = {"dx": dx} if self.floating else {}
        grads.update({path: p.grad for path, p in self.params.items() if getattr(p, "trainable", True)})
        return {name: None if g is None else g.copy() for name, g in grads.items()}

    def value(self, name: str) -> Array:
        return self.x if name == "dx" else self.params[name].data

    def scale(self, name: str) -> float:
        """The typical size of an array's elements: steps are taken in proportion to it."""
        value = self.value(name)
        return float((value * value).mean()) ** 0.5 or 1.0

    def moved(self, shift: dict[str, Array]) -> Array:
        """y with every named array shifted."""
        before = {name: self.value(name) for name in shift}
        for name, v in shift.items():
            self.assign(name, before[name] + v)
        y, _ = self.forward()
        for name, old in before.items():
            self.assign(name, old)
        return y

    def assign(self, name: str, value: Array) -> None:
        if name == "dx":
            self.x = value
        else:
            self.params[name].data = value

    def slope(self, direction: dict[str, Array]) -> tuple[float, bool]:
        """The derivative of L along a direction, and whether there is a kink (as in ReLU) within the step.

        Two central differences, with steps h and 2h, are combined so that their error is of order h^4. Where L is smooth they
        agree already to order h^2; where it has a kink nearby they do not, or, with the kink just here, right and left differ.
        """
        h = _STEP
        y = {s: self.moved({name: s * h * v for name, v in direction.items()}) for s in (-2, -1, 1, 2)}

        def L(s: int, t: int) -> float:  # the difference is taken before the sum: less is lost to rounding
            return float((self.c * (y[s] - y[t])).sum())

        near, wide = L(1, -1) / (2 * h), L(2, -2) / (4 * h)
        right, left = L(2, 1) / h, L(-1, -2) / h
        size = max(abs(right), abs(left), self.smallest)
        kink = abs(near - wide) > 1e-4 * size or abs(right - left) > 0.1 * size
        return (4 * near - wide) / 3, kink

    def gradients(self) -> list[Entry]:
        entries, numeric = [], {}
        for name, analytic in self.analytic.items():
            shape = self.value(name).shape
            size = int(np.prod(shape))
            if analytic is None:
                entries.append(Entry(name, float("inf"), 0, "no gradient was written"))
                continue
            if analytic.shape != shape:
                entries.append(
                    Entry(name, float("inf"), 0, f"has shape {tuple(analytic.shape)} instead of {tuple(shape)}: a sum left out?")
                )
                continue
            at = np.arange(size) if size <= self.max_coordinates else np.sort(self.rng.choice(size, self.max_coordinates, replace=False))
            slopes, kept = [], []
            scale = self.scale(name)
            for i in at:
                one = np.zeros(size)
                one[i] = scale
                slope, kink = self.slope({name: to_backend(one.reshape(shape), self.home)})
                if not kink:
                    slopes.append(slope / scale)
                    kept.append(i)
            self.kinks[name] = np.setdiff1d(at, kept)
            if not kept:
                entries.append(Entry(name, float("inf"), 0, "every coordinate has a kink here; choose another x"))
                continue
            numeric[name] = (np.array(kept), np.array(slopes))
        largest = max((float(np.linalg.norm(n)) for _, n in numeric.values()), default=0.0)
        for name, (at, n) in numeric.items():
            a = to_backend(self.analytic[name], "numpy").ravel()[at]
            error = _relative(a, n, _FLOOR * largest)
            remark = "" if error < 1e-7 else diagnose(name, self, a, n, at)
            skipped = min(self.value(name).size, self.max_coordinates) - len(at)
            if skipped and not remark:
                remark = f"{skipped} coordinates at a kink left out"
            entries.append(Entry(name, error, len(at), remark))
        if numeric and len(numeric) == len(self.analytic):
            entries.append(self.joint_direction())
        return entries

    def joint_direction(self) -> Entry:
        """One random direction through everything at once: it also sees what the sampled coordinates left out."""
        for _ in range(5):
            direction = {name: self.direction(name) for name in self.analytic}
            n, kink = self.slope(direction)
            if not kink:
                break
        grads = {name: g for name, g in self.analytic.items() if g is not None}
        a = sum(float((g * direction[name]).sum()) for name, g in grads.items())
        norm = float(np.sqrt(sum(float((g * g).sum()) * self.scale(name) ** 2 for name, g in grads.items())))
        return Entry("(all, one direction)", abs(a - n) / max(norm, abs(n), 1e-300), 1)

    def direction(self, name: str) -> Array:
        """Random, in proportion to the array's size, and zero where a kink was found."""
        v = self.rng.standard_normal(self.value(name).shape)
        v.reshape(-1)[self.kinks[name]] = 0
        return to_backend(self.scale(name) * v, self.home)

    def contract(self) -> list[Entry]:
        """The promises that are not numbers. Only broken ones are listed."""
        x, before = self.x.copy(), {path: p.data.copy() for path, p in self.params.items()}
        self.zero_grad()
        _, saved = self.forward()
        c = self.c.copy()
        try:
            self.layer.backward(c, saved)
            _, again = self.forward()
            self.backward(again)
        except Exception:
            return self.broken
        wrong = list(self.broken)

        def broke(name: str, remark: str) -> None:
            wrong.append(Entry(name, float("inf"), 0, remark))

        if float(abs(c - self.c).max()) > 0:
            broke("dy", "backward wrote into its argument")
        if float(abs(self.x - x).max()) > 0:
            broke("x", "was written to")
        for path, p in self.params.items():
            if float(abs(p.data - before[path]).max()) > 0:
                broke(path, "the parameter itself was written to")
            if not getattr(p, "trainable", True):
                if p.grad is not None:
                    broke(path, "is frozen but has a gradient")
                continue
            if not self.matches(path, p.grad, 2):
                broke(path, "two backward passes do not add up: += is missing")
        if self.floating and not self.broken:
            self.zero_grad()
            _, saved = self.forward()
            if self.backward(saved, need_dx=False) is not None:
                broke("dx", "need_dx=False still computes dx")
            for path, p in self.params.items():
                if getattr(p, "trainable", True) and not self.matches(path, p.grad, 1):
                    broke(path, "need_dx=False changes this gradient")
        return wrong

    def matches(self, path: str, grad: Array | None, factor: float) -> bool:
        """Is this gradient `factor` times the one analysed? Yes, too, if that one was reported as missing or misshapen."""
        one = self.analytic[path]
        if one is None or one.shape != self.params[path].data.shape:
            return True
        return grad is not None and grad.shape == one.shape and _relative(_flat(grad), factor * _flat(one), 0) < 1e-9


def _flat(x: Array) -> np.ndarray:
    return to_backend(x, "numpy").ravel()


def _relative(a: np.ndarray, n: np.ndarray, floor: float) -> float:
    """||a - n|| over the larger norm, or over `floor` where both are next to nothing. NaN counts as infinitely wrong."""
    scale = max(float(np.linalg.norm(a)), float(np.linalg.norm(n)), floor)
    error = float(np.linalg.norm(a - n)) / scale if scale > 0 else 0.0
    return error if np.isfinite(error) else float("inf")
