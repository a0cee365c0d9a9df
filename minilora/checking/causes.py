"""How a wrong gradient differs from the true one: the usual mistakes leave fingerprints.

A cause states a fact about the numbers, which was tested: with it undone, the gradient is right. It never guesses.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array, to_numpy
from minilora.functional.gelu import erf


@dataclass
class Known:
    """What is known of the call whose gradient is wrong."""

    dy: np.ndarray | None = None  # the cotangent, where a residual may be left out
    factors: dict[str, float] = field(default_factory=dict)  # by their names: one that is left out, or applied twice, is named
    terms: dict[str, np.ndarray] = field(default_factory=dict)  # parts of the gradient: one may be left out, doubled, of the wrong sign
    others: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # the gradient of another function, and the true one
    n_head: int = 1  # into how many groups of columns the array is cut
    again: Any = None  # the gradient by a backward right after forward, with no other call in between
    alone: Any = None  # the first one of these


def cause(g: np.ndarray, numeric: np.ndarray, at: np.ndarray, precision: float, known: Known) -> str:
    """What is wrong with the gradient g, in one sentence, or "" if nothing explains nearly all of the error.

    numeric: the true values at the coordinates `at`, from finite differences with this relative precision.
    """
    if g.dtype != np.float64:
        return f"is {g.dtype}, and its array is float64: precision is lost"
    if not numeric.any():
        return "is not zero, and the true gradient is"
    analytic = g.ravel()[at]
    most = min(0.01 * float(np.linalg.norm(analytic - numeric)), 10 * precision * float(np.linalg.norm(numeric)))
    for words, undone in mistakes(g, analytic, numeric, at, known):
        if np.linalg.norm(undone - numeric) <= most:
            return words
    return coordinates(g.shape, analytic, numeric, at, precision, known.n_head)


def mistakes(g: np.ndarray, analytic: np.ndarray, numeric: np.ndarray, at: np.ndarray, known: Known) -> Iterator[tuple[str, np.ndarray]]:
    """The usual mistakes, each with what the gradient at these coordinates would be without it."""
    for other, when in ((known.again, "if no other forward comes in between"), (known.alone, "the first time")):
        if getattr(other, "shape", None) == g.shape:
            yield f"is right only {when}: state is kept in the layer", to_numpy(other).ravel()[at]
    if known.dy is not None and known.dy.shape == g.shape:
        yield "lacks exactly dy: the gradient of a residual add is left out", analytic + known.dy.ravel()[at]
    if not analytic.any():
        yield "is zero, and the true gradient is not", numeric
    factor = float(analytic @ numeric / (numeric @ numeric))
    if factor and f"{factor:.6g}" != "1":
        yield f"is {factor:.6g} times the true gradient{_named(factor, known.factors)}", analytic / factor
    if g.T.shape == g.shape and g.ndim == 2:
        yield "is transposed", g.T.ravel()[at]
    for words, (other, true) in known.others.items():
        yield f"is the gradient of {words}", true.ravel()[at] + (analytic - other.ravel()[at])
    for words, term in known.terms.items():
        part = term.ravel()[at] if term.shape == g.shape else np.zeros(1)
        if part.any():
            times = float(part @ (numeric - analytic) / (part @ part))
            usual = {"1": f"lacks {words}", "2": f"has {words} with the wrong sign", "-1": f"has {words} twice"}
            other_factor = f"has {1 - times:.4g} times {words}{_named(1 - times, known.factors)}"
            yield usual.get(f"{times:.4g}", other_factor), analytic + times * part


def coordinates(shape: tuple[int, ...], analytic: np.ndarray, numeric: np.ndarray, at: np.ndarray, precision: float, n_head: int) -> str:
    """Which coordinates are wrong, "" if all are."""
    least = precision * np.abs(numeric).max()
    wrong = np.abs(numeric - analytic) > least
    if wrong.all() or not wrong.any():
        return ""
    which = _pattern(shape, at, wrong, ~wrong & (np.abs(numeric) > least), n_head)
    zero = ", where it is zero" if not analytic[wrong].any() else ""
    return f"{wrong.sum()} of {wrong.size} coordinates are wrong, the first at {_place(shape, at[wrong.argmax()])}{which}{zero}"


def unusable(g: Any, shape: tuple[int, ...], numeric: np.ndarray, at: np.ndarray, dy: Array) -> str:
    """Why a gradient cannot be compared with the true values at some coordinates; "" if it can."""
    if not hasattr(g, "shape"):
        return f"is a {type(g).__name__} instead of an array"
    if g.shape == shape:
        return not_finite(g)
    g, dy = to_numpy(g), to_numpy(dy)
    extra = g.ndim - len(shape)
    axes = (*range(extra), *(i for i, n in enumerate(shape, extra) if 0 <= i < g.ndim and n == 1 < g.shape[i]))
    candidates = {"transposed, it is right": g.T} if g.T.shape == shape else {}
    candidates |= {"its values are right": g, f"the sum over axis {', '.join(map(str, axes))} is left out": g.sum(axis=axes)}
    text = f"has shape {g.shape} instead of {shape}"
    for remark, values in candidates.items():
        if values.size == math.prod(shape) and np.linalg.norm(values.ravel()[at] - numeric) <= 1e-5 * np.linalg.norm(numeric):
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


def known_of(name: str, args: dict[str, Any], gradient: str, dy: Array) -> Known:
    """What is known of the gradient of an operation, such as "dx" of lora_linear."""
    known = Known(to_numpy(dy), {key: float(v) for key, v in args.items() if type(v) is float and key != "eps"})
    if isinstance(q := args.get("q"), np.ndarray):
        heads = {"dq": args["n_head"]}.get(gradient, args.get("n_kv_head") or args["n_head"])
        known.n_head, known.factors["sqrt d"] = heads, math.sqrt(q.shape[1] / args["n_head"])
    with suppress(TypeError, AttributeError, ValueError):  # the call had arguments of another kind: a factored weight
        known.terms = {words: make(dy, **args) for words, make in _TERMS.get((name, gradient), {}).items()}
    if name in ("gelu", "gelu_tanh"):
        known.others = gelus(dy, args["x"])
    return known


def gelus(dy: Array, x: Array) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`others` of a function that may be GELU, by erf or by tanh."""
    by_erf, by_tanh = to_numpy(F.gelu_backward(dy, x)), to_numpy(F.gelu_tanh_backward(dy, x))
    return {"gelu, and forward computes gelu_tanh": (by_erf, by_tanh), "gelu_tanh, and forward computes gelu": (by_tanh, by_erf)}


def _centred(x: np.ndarray) -> np.ndarray:
    return x - x.mean(axis=1, keepdims=True)


def _rstd(x: np.ndarray, eps: float) -> np.ndarray:
    return 1 / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps)


def _along(dy: np.ndarray, x: np.ndarray, gamma: np.ndarray, eps: float) -> np.ndarray:
    xhat = x * _rstd(x, eps)
    return -_rstd(x, eps) * xhat * (gamma * dy * xhat).mean(axis=1, keepdims=True)


_TERMS: dict[tuple[str, str], dict[str, Callable[..., np.ndarray]]] = {  # (operation, gradient) -> {term: (dy, arguments of forward) -> it}
    ("lora_linear", "dx"): {
        "dy W^T": lambda dy, W, **_: dy @ W.T,
        "s (dy B^T) A^T": lambda dy, A, B, s, mask=None, **_: s * (dy @ B.T) @ A.T * (1 if mask is None else mask),
    },
    ("layer_norm", "dx"): {
        "the mean of dxhat": lambda dy, x, gamma, beta, eps=1e-5: (
            -_rstd(_centred(x), eps) * (gamma * dy).mean(axis=1, keepdims=True) + 0 * x
        ),
        "xhat mean(dxhat xhat)": lambda dy, x, gamma, beta, eps=1e-5: _along(dy, _centred(x), gamma, eps),
    },
    ("rms_norm", "dx"): {"xhat mean(dxhat xhat)": lambda dy, x, gamma, eps=1e-6: _along(dy, x, gamma, eps)},
    ("softmax", "dx"): {"y sum(dy y)": lambda dy, x: -F.softmax(x) * (dy * F.softmax(x)).sum(axis=-1, keepdims=True)},
    ("rotary", "dx"): {
        "the part with sin": lambda dy, x, cos, sin: F.rotary(dy, 0 * cos, -sin),
        "the part with cos": lambda dy, x, cos, sin: F.rotary(dy, cos, 0 * sin),
    },
    ("gelu", "dx"): {
        "Phi(x)": lambda dy, x: dy * 0.5 * (1 + erf(x / math.sqrt(2))),
        "x phi(x)": lambda dy, x: dy * x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi),
    },
    ("tanh", "dx"): {"dy": lambda dy, x: dy, "dy y^2": lambda dy, x: -dy * np.tanh(x) ** 2},
    ("silu", "dx"): {"sigmoid(x)": lambda dy, x: dy * F.silu(x) / x},
    ("column_norms", "dA"): {"W H^T": lambda dc, W, A, B, s, squares: s * W @ (B * (dc / np.linalg.norm(W + s * A @ B, axis=0))).T},
}


_POWERS = {-1: "lacks the factor {}", 1: "has the factor {} once too often", -2: "lacks the factor {}^2", 2: "has {}^2"}


def _named(factor: float, factors: dict[str, float]) -> str:
    """The factor in words, where it is a known one."""
    if math.isclose(factor, -1, rel_tol=1e-4):
        return ": its sign is wrong"
    for words, value in factors.items():
        for power, text in _POWERS.items():
            if abs(value) not in (0.0, 1.0) and math.isclose(factor, value**power, rel_tol=1e-4):
                return f": it {text.format(words)}"
    return ""


def _pattern(shape: tuple[int, ...], at: np.ndarray, wrong: np.ndarray, right: np.ndarray, n_head: int) -> str:
    """Which rows or columns the wrong coordinates are, where they are all of some and none of others."""
    if len(shape) != 2:
        return ""
    rows, columns = np.unravel_index(at, shape)
    heads = {"heads": columns // (shape[1] // n_head)} if n_head > 1 else {}
    for kind, lines in {**heads, "columns": columns, "rows": rows}.items():
        bad, good = set(lines[wrong].tolist()), set(lines[right].tolist())
        if good and not bad & good:
            return f": all of {kind if len(bad) > 1 else kind[:-1]} {', '.join(_ranges(sorted(bad)))}"
    return ""


def _ranges(numbers: list[int]) -> Iterator[str]:
    """2, 4 to 6, ... of sorted numbers."""
    while numbers:
        n = next((i for i in range(1, len(numbers)) if numbers[i] != numbers[0] + i), len(numbers))
        yield f"{numbers[0]}" if n == 1 else f"{numbers[0]} to {numbers[n - 1]}"
        numbers = numbers[n:]


def _place(shape: tuple[int, ...], i: int) -> str:
    return str([int(k) for k in np.unravel_index(i, shape)])
