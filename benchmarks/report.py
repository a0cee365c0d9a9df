"""The arithmetic of a comparison, and what is told of it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DISTURBED = 0.1  # cores at work for something else
COMPARED = 200  # steps whose losses are compared: in later ones, training itself has made rounding errors grow


@dataclass
class Measured:
    """Of one side: seconds of each round, losses of all steps, peak bytes of its process, and those before the first step (loaded).

    others: how many cores were busy before each of its turns, when all sides idle.
    """

    side: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    memory: int = 0
    loaded: int = 0
    others: list[float] = field(default_factory=list)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of the ratios within a round."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def disagreement(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference of the first losses, as a share of the very first; infinite if they cannot be compared."""
    pairs = list(zip(ours, theirs, strict=False))[:COMPARED]
    if len(ours) != len(theirs) or not pairs or not all(math.isfinite(a) and math.isfinite(b) for a, b in pairs):
        return math.inf
    return max(abs(a - b) for a, b in pairs) / (abs(theirs[0]) or 1.0)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """p of y ~ x^p: the slope of log y over log x, by least squares over the upper half of the points, and at least two."""
    upper = sorted(zip(x, y, strict=True))[-max(2, (len(x) + 1) // 2) :]
    return statistics.linear_regression([math.log(a) for a, _ in upper], [math.log(b) for _, b in upper]).slope


def summary(sides: Sequence[Measured], steps: int, tolerance: float | None) -> dict[str, Any]:
    """The first of the sides against the others: ratios of time and memory, the fastest other, and whether the losses agree.

    There has to be another; with a tolerance, no loss may differ by more (see `disagreement`).
    """
    first, *others = sides
    told: dict[str, Any] = {"sides": {}}
    for m in sides:
        told["sides"][m.side] = {"seconds_per_step": [s / steps for s in m.seconds], "peak_memory_bytes": m.memory}
        if m is not first:
            told["sides"][m.side] |= {"ratio": ratios(first.seconds, m.seconds), "memory_ratio": first.memory / m.memory}
            told["sides"][m.side] |= {"losses_apart": _number(disagreement(first.losses, m.losses))}
    if others:
        told["best"] = min(others, key=lambda m: statistics.median(m.seconds)).side
        told["ratio_to_best"] = told["sides"][told["best"]]["ratio"]
    apart = max((disagreement(first.losses, m.losses) for m in others), default=math.inf)
    told["losses"] = {"steps": len(first.losses), "first": _number(first.losses[0], 6), "last": _number(first.losses[-1], 6)}
    told["losses"] |= {"compared": min(COMPARED, len(first.losses)), "apart": _number(apart), "tolerance": tolerance}
    told["ok"] = bool(others) and (tolerance is None or apart <= tolerance)
    busy = [cores for m in sides for cores in m.others]
    told["busy_cores_between_turns"] = {"median": statistics.median(busy), "max": max(busy)} if busy else None
    return told


def show(told: Mapping[str, Any], about: Mapping[str, str], words: tuple[str, str] = ("step", "losses")) -> None:
    """Print a summary as a table, and what there is to say of it; then all of it as one line of JSON.

    about: {side: what it is}; words: what a step and its value are called.
    """
    names = list(told["sides"])
    first, width = names[0], max(map(len, names))
    print(f"{'':{width}}{'ms a ' + words[0]:>11}   {first + ' / it':26}{'peak MB':>7}   {first} / it")
    for name, m in told["sides"].items():
        line = f"{name:{width}}{1e3 * statistics.median(m['seconds_per_step']):11.2f}   "
        spread = "{median:.3f} ({min:.3f} to {max:.3f})".format(**m["ratio"]) if "ratio" in m else ""
        memory = f"{m['memory_ratio']:.3f}" if "ratio" in m else ""
        print(f"{line}{spread:26}{m['peak_memory_bytes'] / 1e6:7,.0f}   {memory:5}   {about.get(name, '')}".rstrip())
    if "best" in told:
        print(f"the fastest of the others is {told['best']}: {first} / {told['best']} = {told['ratio_to_best']['median']:.3f}")
    if {"malloc", "compile"} <= told["sides"].keys():
        compiled, plain = (told["sides"][name]["seconds_per_step"] for name in ("compile", "malloc"))
        print(f"torch.compile takes {ratios(compiled, plain)['median']:.2f} of the time without it")
    if busy := told["busy_cores_between_turns"]:
        warning = "; too busy for these figures to hold" if busy["median"] > DISTURBED else ""
        print("between the turns, with all sides idle, {median:.2f} cores were busy, at most {max:.2f}".format(**busy) + warning)
    if "best" not in told:
        print("there was nothing to compare with: this fails.")
    elif told["losses"]["tolerance"] is not None:
        verdict = "as wanted" if told["ok"] else "and this fails"
        print(words[1], "of {steps} steps: {first} to {last}; in the first {compared} apart by".format(**told["losses"]), end=" ")
        print("{apart} of the first, tolerance {tolerance}, ".format(**told["losses"]) + verdict)
    print(json.dumps(told), flush=True)


def _number(x: float, digits: int = 3) -> float | None:
    """JSON knows no infinity."""
    return float(f"{x:.{digits}g}") if math.isfinite(x) else None
