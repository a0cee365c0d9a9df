"""How a wrong gradient differs from the true one: the usual mistakes leave fingerprints.

A cause states a fact about the numbers, which was tested: with it undone, the gradient is right. It never guesses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array, to_numpy
from minilora.functional.gelu import erf


@dataclass
class Known:
    """What is known of the call whose gradient is wrong.

    dy         the cotangent
    factors    {words: number}, such as {"s": 0.5}: one that is left out, or applied twice, is named
    terms      {words: array}: parts of the gradient, one of which may be left out, doubled, or of the wrong sign
    others     {words: (array, array)}: the gradient of another function, and the true one
    n_head     into how many groups of columns the array is cut
    again      () -> the gradient from a backward right after forward, with no other call in between; `alone`: the first one of these
    """

    dy: np.ndarray
    factors: dict[str, float] = field(default_factory=dict)
    terms: dict[str, np.ndarray] = field(default_factory=dict)
    others: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    n_head: int = 1
    alone: Any = None
    again: Callable[[], Any] = lambda: None


def cause(g: np.ndarray, numeric: np.ndarray, at: np.ndarray, precision: float, known: Known) -> str:
    """What is wrong with the gradient g, in one sentence, or "" if nothing explains nearly all of the error.

    numeric: the true values at the coordinates `at`, from finite differences with this relative precision.
    """
    analytic = g.ravel()[at]
    missing = numeric - analytic
    difference, size = float(np.linalg.norm(missing)), float(np.linalg.norm(numeric))

    def explains(true: np.ndarray) -> bool:
        """Whether the gradient would be right if `analytic` were this."""
        rest = float(np.linalg.norm(true - numeric))
        return rest <= 0.01 * difference and rest <= 10 * precision * size

    def is_right(other: Any) -> bool:
        return getattr(other, "shape", None) == g.shape and explains(to_numpy(other).ravel()[at])

    if g.dtype != np.float64:
        return f"is {g.dtype}, and its array is float64: precision is lost"
    if not numeric.any():
        return "is not zero, and the true gradient is"
    if is_right(known.alone):
        when = "if no other forward comes in between" if is_right(known.again()) else "the first time"
        return f"is right only {when}: state is kept in the layer"
    if known.dy.shape == g.shape and explains(analytic + known.dy.ravel()[at]):
        return "lacks exactly dy: the gradient of a residual add is left out"
    if not analytic.any():
        return "is zero, and the true gradient is not"
    factor = float(analytic @ numeric / (numeric @ numeric))
    if f"{factor:.6g}" != "1" and explains(analytic / factor if factor else analytic):
        return f"is {factor:.6g} times the true gradient{_named(factor, known.factors)}"
    if g.ndim == 2 and is_right(g.T):
        return "is transposed"
    for words, (other, true) in known.others.items():
        if explains(analytic - other.ravel()[at] + true.ravel()[at]):
            return f"is the gradient of {words}"
    for words, term in known.terms.items():
        part = term.ravel()[at] if term.shape == g.shape else np.zeros(1)
        times = float(part @ missing / (part @ part)) if part.any() else 0.0
        if times and explains(analytic + times * part):
            return {"1": f"lacks {words}", "2": f"has {words} with the wrong sign", "-1": f"has {words} twice"}.get(
                f"{times:.4g}", f"has {1 - times:.4g} times {words}{_named(1 - times, known.factors)}"
            )
    wrong = np.abs(missing) > precision * np.abs(numeric).max()
    if wrong.any() and not wrong.all():
        first = _place(g.shape, int(at[np.argmax(wrong)]))
        zero = ", where it is zero" if not analytic[wrong].any() else ""
        right = ~wrong & (np.abs(numeric) > precision * np.abs(numeric).max())
        which = _pattern(g.shape, at, wrong, right, known.n_head)
        return f"{int(wrong.sum())} of {wrong.size} coordinates are wrong, the first at {first}{which}{zero}"
    return ""


def misshapen(g: np.ndarray, shape: tuple[int, ...], numeric: np.ndarray, at: np.ndarray, dy: np.ndarray) -> str:
    """A fact about a gradient whose shape differs from that of its array; "" if it does not."""
    if g.shape == shape:
        return ""
    extra = g.ndim - len(shape)
    axes = (*range(extra), *(i for i, n in enumerate(shape, extra) if 0 <= i < g.ndim and n == 1 < g.shape[i]))
    summed = g.sum(axis=axes)
    candidates = {
        "transposed, it is right": g.T if g.T.shape == shape else None,
        "its values are right": g.reshape(shape) if g.size == math.prod(shape) else None,
        f"the sum over axis {', '.join(map(str, axes))} is left out": summed.reshape(shape) if summed.size == math.prod(shape) else None,
    }
    text = f"has shape {g.shape} instead of {shape}"
    for remark, values in candidates.items():
        if values is not None and np.linalg.norm(values.ravel()[at] - numeric) <= 1e-5 * np.linalg.norm(numeric):
            return f"{text}: {remark}"
    if len(at) == math.prod(shape) and (*g.shape, *shape) == dy.shape and math.isclose(g.sum(), numeric.sum(), rel_tol=1e-5):
        return f"{text}: the sum is over axis 1 instead of 0"
    return text


def not_finite(values: Array) -> str:
    """How many values are NaN or infinite, and where the first one is; "" if none is."""
    bad = ~np.isfinite(to_numpy(values))
    if not bad.any():
        return ""
    return f"{int(bad.sum())} of {bad.size} values are NaN or infinite, the first at {_place(bad.shape, int(np.argmax(bad)))}"


def known_of(name: str, args: dict[str, Any], gradient: str, dy: Array, factors: dict[str, float]) -> Known:
    """What is known of the gradient of an operation, such as "dx" of lora_linear."""
    known = Known(to_numpy(dy), factors | {key: float(v) for key, v in args.items() if type(v) is float and key != "eps"})
    if isinstance(q := args.get("q"), np.ndarray):
        heads = {"dq": args["n_head"]}.get(gradient, args.get("n_kv_head") or args["n_head"])
        known.n_head, known.factors["sqrt d"] = heads, math.sqrt(q.shape[1] / args["n_head"])
    makers = {words: make for (operation, g, words), make in _TERMS.items() if (operation, g) == (name, gradient)}
    try:
        known.terms = {words: make(dy, **args) for words, make in makers.items()}
    except (TypeError, AttributeError, ValueError):  # the call had arguments of another kind: a factored weight
        known.terms = {}
    if name in ("gelu", "gelu_tanh"):
        known.others = gelus(dy, args["x"])
    return known


def gelus(dy: Array, x: Array) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`others` of a function that may be GELU, by erf or by tanh."""
    by_erf, by_tanh = to_numpy(F.gelu_backward(dy, x)), to_numpy(F.gelu_tanh_backward(dy, x))
    return {"gelu, and forward computes gelu_tanh": (by_erf, by_tanh), "gelu_tanh, and forward computes gelu": (by_tanh, by_erf)}


def _xhat(x: np.ndarray, eps: float, centred: bool = True) -> tuple[np.ndarray, np.ndarray]:
    x = x - x.mean(axis=1, keepdims=True) if centred else x
    rstd = 1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps)
    return x * rstd, rstd


def _along(dy: np.ndarray, x: np.ndarray, gamma: np.ndarray, eps: float, centred: bool) -> np.ndarray:
    xhat, rstd = _xhat(x, eps, centred)
    return -rstd * xhat * (gamma * dy * xhat).mean(axis=1, keepdims=True)


def _masked(x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return x if mask is None else x * mask


_TERMS: dict[tuple[str, str, str], Callable[..., np.ndarray]] = {  # (operation, gradient, the term in words) -> (dy, arguments of forward)
    ("lora_linear", "dx", "dy W^T"): lambda dy, W, **_: dy @ W.T,
    ("lora_linear", "dx", "s (dy B^T) A^T"): lambda dy, A, B, s, mask=None, **_: _masked(s * (dy @ B.T) @ A.T, mask),
    ("layer_norm", "dx", "the mean of dxhat"): lambda dy, x, gamma, beta, eps=1e-5: (
        -_xhat(x, eps)[1] * (gamma * dy).mean(axis=1, keepdims=True) + 0 * x
    ),
    ("layer_norm", "dx", "xhat mean(dxhat xhat)"): lambda dy, x, gamma, beta, eps=1e-5: _along(dy, x, gamma, eps, True),
    ("rms_norm", "dx", "xhat mean(dxhat xhat)"): lambda dy, x, gamma, eps=1e-6: _along(dy, x, gamma, eps, False),
    ("softmax", "dx", "y sum(dy y)"): lambda dy, x: -F.softmax(x) * (dy * F.softmax(x)).sum(axis=-1, keepdims=True),
    ("rotary", "dx", "the part with sin"): lambda dy, x, cos, sin: F.rotary(dy, 0 * cos, -sin),
    ("rotary", "dx", "the part with cos"): lambda dy, x, cos, sin: F.rotary(dy, cos, 0 * sin),
    ("gelu", "dx", "Phi(x)"): lambda dy, x: dy * 0.5 * (1 + erf(x / math.sqrt(2))),
    ("gelu", "dx", "x phi(x)"): lambda dy, x: dy * x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi),
    ("tanh", "dx", "dy"): lambda dy, x: dy,
    ("tanh", "dx", "dy y^2"): lambda dy, x: -dy * np.tanh(x) ** 2,
    ("silu", "dx", "sigmoid(x)"): lambda dy, x: dy * F.silu(x) / x,
    ("column_norms", "dA", "W H^T"): lambda dc, W, A, B, s, squares: s * (W @ (B * (dc / _norms(W, A, B, s))).T),
}


def _norms(W: np.ndarray, A: np.ndarray, B: np.ndarray, s: float) -> np.ndarray:
    return np.sqrt(((W + s * A @ B) ** 2).sum(axis=0))


def _named(factor: float, factors: dict[str, float]) -> str:
    """The factor in words, where it is a known one."""
    if math.isclose(factor, -1, rel_tol=1e-4):
        return ": its sign is wrong"
    for words, value in factors.items():
        for power, text in (
            (-1, "lacks the factor {}"),
            (1, "has the factor {} once too often"),
            (-2, "lacks the factor {}^2"),
            (2, "has {}^2"),
        ):
            if abs(value) not in (0.0, 1.0) and math.isclose(factor, value**power, rel_tol=1e-4):
                return f": it {text.format(words)}"
    return ""


def _pattern(shape: tuple[int, ...], at: np.ndarray, wrong: np.ndarray, right: np.ndarray, n_head: int) -> str:
    """Which rows or columns the wrong coordinates are, where they are all of some and none of others."""
    if len(shape) != 2:
        return ""
    rows, columns = np.unravel_index(at, shape)
    for lines, what, group in ((columns, "columns", shape[1] // n_head), (rows, "rows", 1)):
        bad, good = set(lines[wrong].tolist()), set(lines[right].tolist())
        if not bad & good and good:
            head = sorted({i // group for i in bad})
            heads = n_head > 1 and what == "columns" and bad == {i for i in lines.tolist() if i // group in head}
            numbers, kind = (head, "heads") if heads else (sorted(bad), what)
            return f": all of {kind if len(numbers) > 1 else kind[:-1]} {', '.join(_ranges(numbers))}"
    return ""


def _ranges(numbers: list[int]) -> Iterator[str]:
    """2, 4 to 6, ... of sorted numbers."""
    while numbers:
        n = next((i for i in range(1, len(numbers)) if numbers[i] != numbers[0] + i), len(numbers))
        yield f"{numbers[0]}" if n == 1 else f"{numbers[0]} to {numbers[n - 1]}"
        numbers = numbers[n:]


def _place(shape: tuple[int, ...], i: int) -> str:
    return str([int(k) for k in np.unravel_index(i, shape)])
