"""The arithmetic of a comparison, and its table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import where

DISTURBED = 0.1  # cores that are busy with other work
COMPARED = 200  # number of steps whose losses are compared; later, training amplifies rounding errors


@dataclass
class Measured:
    """One side: seconds of each round, losses of all steps, peak memory of its process in bytes, and that before the first step (loaded).

    others: number of busy cores before each turn, while all sides idle. where: where the time of a step goes (where.py).
    """

    side: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: int = 0
    loaded: int = 0
    others: list[float] = field(default_factory=list)
    where: dict[str, Any] = field(default_factory=dict)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum of the ratios within a round."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def disagreement(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference of the first COMPARED losses, relative to the first loss; infinite if they cannot be compared."""
    pairs = list(zip(ours, theirs, strict=False))[:COMPARED]
    if len(ours) != len(theirs) or not pairs or not all(math.isfinite(a) and math.isfinite(b) for a, b in pairs):
        return math.inf
    return max(abs(a - b) for a, b in pairs) / (abs(theirs[0]) or 1.0)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of y ~ x^p: least-squares slope of log y over log x on the upper half of the points, at least two."""
    upper = sorted(zip(x, y, strict=True))[-max(2, (len(x) + 1) // 2) :]
    return statistics.linear_regression([math.log(a) for a, _ in upper], [math.log(b) for _, b in upper]).slope


def summary(sides: Sequence[Measured], steps: int, tolerance: float | None) -> dict[str, Any]:
    """The first of the sides against the others: ratios of time and memory, the fastest other, and whether the losses agree.

    "ok" needs at least one other side and, with a tolerance, a `disagreement` of at most that.
    """
    first, *others = sides
    result: dict[str, Any] = {"sides": {}}
    for m in sides:
        result["sides"][m.side] = {"seconds_per_step": [s / steps for s in m.seconds], "peak_memory_bytes": m.memory}
        if m is not first:
            result["sides"][m.side] |= {"ratio": ratios(first.seconds, m.seconds), "memory_ratio": first.memory / m.memory}
            result["sides"][m.side] |= {"losses_apart": _number(disagreement(first.losses, m.losses))}
    if others:
        result["best"] = min(others, key=lambda m: statistics.median(m.seconds)).side
        result["ratio_to_best"] = result["sides"][result["best"]]["ratio"]
    apart = max((disagreement(first.losses, m.losses) for m in others), default=math.inf)
    result["losses"] = {"steps": len(first.losses), "first": _number(first.losses[0], 6), "last": _number(first.losses[-1], 6)}
    result["losses"] |= {"compared": min(COMPARED, len(first.losses)), "apart": _number(apart), "tolerance": tolerance}
    result["ok"] = bool(others) and (tolerance is None or apart <= tolerance)
    busy = [cores for m in sides for cores in m.others]
    result["busy_cores_between_turns"] = {"median": statistics.median(busy), "max": max(busy)} if busy else None
    result |= {"where": first.where} if first.where else {}
    return result


def show(result: Mapping[str, Any], about: Mapping[str, str], words: tuple[str, str] = ("step", "losses")) -> None:
    """Print a summary as a table with comments, then as one line of JSON.

    about: {side: description}; words: the names of a step and of its value.
    """
    names = list(result["sides"])
    first, width = names[0], max(map(len, names))
    print(f"{'':{width}}{'ms/' + words[0]:>11}   {first + ' / other':26}{'peak MB':>7}   {first} / other")
    for name, m in result["sides"].items():
        line = f"{name:{width}}{1e3 * statistics.median(m['seconds_per_step']):11.2f}   "
        spread = "{median:.3f} ({min:.3f} to {max:.3f})".format(**m["ratio"]) if "ratio" in m else ""
        memory = f"{m['memory_ratio']:.3f}" if "ratio" in m else ""
        print(f"{line}{spread:26}{m['peak_memory_bytes'] / 1e6:7,.0f}   {memory:5}   {about.get(name, '')}".rstrip())
    if "best" in result:
        print(f"the fastest other side is {result['best']}: {first} / {result['best']} = {result['ratio_to_best']['median']:.3f}")
    if {"malloc", "compile"} <= result["sides"].keys():
        compiled, plain = (result["sides"][name]["seconds_per_step"] for name in ("compile", "malloc"))
        print(f"torch.compile takes {ratios(compiled, plain)['median']:.2f} times as long as without it")
    if "where" in result:
        print(where.text(result["where"]))
    if busy := result["busy_cores_between_turns"]:
        warning = "; the machine is too busy for reliable figures, which are not kept" if busy["median"] > DISTURBED else ""
        print("between the turns, with all sides idle, {median:.2f} cores were busy, at most {max:.2f}".format(**busy) + warning)
    if "best" not in result:
        print("FAILED: there is no rival to compare with.")
    elif result["losses"]["tolerance"] is not None:
        verdict = "passed" if result["ok"] else "FAILED"
        print(words[1], "of {steps} steps: {first} to {last}; the first {compared} differ by up to".format(**result["losses"]), end=" ")
        print("{apart} of the first, tolerance {tolerance}: ".format(**result["losses"]) + verdict)
    print(json.dumps(result), flush=True)


def _number(x: float, digits: int = 3) -> float | None:
    """x rounded to `digits` significant digits; None if it is not finite, since JSON has no infinity."""
    return float(f"{x:.{digits}g}") if math.isfinite(x) else None
