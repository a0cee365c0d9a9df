"""The result of `gradcheck`: one entry for each gradient, and the report in words."""

from dataclasses import dataclass, field

CONCLUSIVE = 1e-4  # finite differences less precise than this would hide the mistakes that a check should find
_INF = float("inf")


@dataclass
class Entry:
    """One gradient: its name ("dx" or a parameter's path), a remark on what is wrong, and its relative error over `coordinates`.

    `precision` is that of the finite differences, relative to the gradient: rounding of y, mostly. Infinite: nothing could be compared.
    """

    name: str
    remark: str = ""
    error: float = _INF
    coordinates: int = 0
    precision: float = 0.0

    def verdict(self, tol: float) -> str:
        """ "ok", "WRONG", or "inconclusive" where a mistake would not be seen."""
        if not self.error < max(tol, self.precision) and self.precision < _INF:
            return "WRONG"
        return "ok" if self.precision <= max(tol, CONCLUSIVE) else "inconclusive"

    def line(self, tol: float, width: int) -> str:
        """Its line in a table whose names are that wide."""
        words = [f"  {self.name:<{width}}", f"{self.error:8.1e}", self.verdict(tol), *([self.remark] if self.remark else [])]
        if tol < self.precision < _INF:
            advice = "; choose smaller values" if self.verdict(tol) == "inconclusive" else ""
            words.append(f"finite differences are good to {self.precision:.0e} here{advice}")
        return "  ".join(words)


@dataclass
class Fault:
    """A call that is itself wrong, while everything it calls is right."""

    places: list[str]  # of all calls in which this function is wrong; of an operation "path/operation"; "" is the whole object
    name: str  # the layer's class, or the operation
    gradient: str  # "dW" of an operation, "dx" or a parameter's path of a layer; or the method that failed
    cause: str  # what is wrong with it; "" where no cause that was tried explains it
    source: str  # file:line of the backward function
    error: float = _INF

    @property
    def place(self) -> str:
        return self.places[0]

    def __str__(self) -> str:
        more = f" (and in {len(self.places) - 1} more places)" if len(self.places) > 1 else ""
        cause = self.cause or f"is wrong by {self.error:.1e}, relative to its size"
        return f"{self.place or self.name}: {self.gradient} {cause}{more}  [{self.source}]".replace(":  ", ": ")


def wrong(entries: list[Entry], tol: float) -> list[Entry]:
    """Those entries that are WRONG."""
    return [e for e in entries if e.verdict(tol) == "WRONG"]


class Broken(Exception):
    """The check cannot continue; the entry, its one argument, says why."""


@dataclass
class Report:
    """The result of `gradcheck`. `ok`, `verdict`, `worst` (the largest relative error), `failures` (entries), and a table by `str()`.

    faults: the calls to blame where something is WRONG, the first one first.
    """

    what: str
    tol: float
    entries: list[Entry]
    faults: list[Fault] = field(default_factory=list)

    @property
    def worst(self) -> float:
        return max((e.error for e in self.entries), default=float("nan"))

    @property
    def failures(self) -> list[Entry]:
        """Every entry that is not ok."""
        return [e for e in self.entries if e.verdict(self.tol) != "ok"]

    @property
    def verdict(self) -> str:
        """ "ok", "WRONG", "inconclusive" or "nothing to check"."""
        verdicts = {e.verdict(self.tol) for e in self.entries}
        return next((v for v in ("WRONG", "inconclusive", "ok") if v in verdicts), "nothing to check")

    @property
    def ok(self) -> bool:
        return self.verdict == "ok"

    def __str__(self) -> str:
        if not self.entries:
            return (
                f"{self.what}: nothing to check: x has no gradient, as it holds integers or nothing, and no parameter is trainable. "
                "Set p.trainable = True on the parameters to check."
            )
        width = max(len(e.name) for e in self.entries)
        summary = f"{self.what}: {self.verdict}, worst relative error {self.worst:.1e} (tolerance {self.tol:.0e})"
        return "\n".join([*map(str, self.faults), summary, *(e.line(self.tol, width) for e in self.entries)])
