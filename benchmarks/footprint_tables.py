"""The tables of docs/what-fits.md and README.md: a step by count, and as benchmarks/footprint.py measured it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.footprint_count import FAMILIES, LETTERS, count
from benchmarks.report import DISTURBED

LENGTH, RANK, THREADS = 512, 8, 2
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "nf4": "NF4"}
Points = Mapping[tuple[str, str, int, bool], dict[str, Any]]  # by model, dtype, sequences and recompute
TO_MEASURE = "to be measured"  # on an idle machine


def tables(results: dict[str, Any], configs: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """{mark: table in Markdown}."""
    points = {(p["model"], p["dtype"], p["sequences"], p["recompute"]): p for p in results["points"] if p["threads"] == THREADS}
    made = {"formulas": _formulas(), "parts": _parts(configs, names), "processor": _processor(results)}
    for n in (1, 2):
        made[f"memory-{n}"] = _memory(points, configs, names, n)
        made[f"times-{n}"] = _times(points, results, configs, names, n)
    return made | {"laptop": _laptop(points, configs, names)}


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def _formulas() -> str:
    """FAMILIES, one column a family."""
    fields = {
        "linear": "linear layers of a block, in > out",
        "vectors": "norms and biases of a block",
        "tables": "matrices outside of the blocks",
        "ends": "vectors outside of the blocks",
        "saved": "saved by a block, a token",
        "statistics": "the same, in float32",
        "feed_forward": "scratch of the feed-forward layer, a token",
        "attention": "scratch of attention, a token",
    }
    letters = ", ".join(f"{letter} {meaning}" for letter, meaning in LETTERS.items())
    rows = [[words, *(getattr(family, name).replace(", ", "<br>") for family in FAMILIES.values())] for name, words in fields.items()]
    return f"{_table(['numbers', *FAMILIES], rows)}\n\n{letters}."


def _parts(configs: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Where the memory of a step goes, by count."""
    rows = []
    for name, config in configs.items():
        by = {dtype: count(config, dtype, 1, LENGTH) for dtype in DTYPES}
        f, again = by["float32"], count(config, "float32", 1, LENGTH, recompute=True)
        cells = [f"{each.weights / 1e6:,.0f}" for each in by.values()]
        cells += [f"{f.trained / 1e6:.2f} M", f"{f.adapters / 1e6:,.0f}"]
        cells += [f"{each.saved / LENGTH / 1e3:,.0f}" for each in (f, by["bfloat16"], again)]
        rows.append([names[name], *cells, f"{f.scratch / 1e6:,.0f}", f"{again.scratch / 1e6:,.0f}"])
    header = ["model", *(f"weights, {words}" for words in DTYPES.values()), "trained", "adapters and optimizer"]
    header += ["saved a token, kB", "in bfloat16", "with `--recompute`", "scratch", "with `--recompute`"]
    return _table(header, rows)


def _memory(points: Points, configs: Mapping[str, Any], names: Mapping[str, str], sequences: int) -> str:
    """Measured peaks, and how much lower or higher the count is."""
    rows = []
    for name, config in configs.items():
        cells = []
        for dtype in DTYPES:
            for recompute in (False, True)[: 2 if dtype == "nf4" else 1]:
                total = count(config, dtype, sequences, LENGTH, recompute=recompute).total
                found = points.get((name, dtype, sequences, recompute))
                peak = found["peak_memory_bytes"] if found else 0
                cells.append(f"{peak / 1e6:,.0f} ({total / peak - 1:+.1%})" if found else f"{total / 1e6:,.0f} by count")
        rows.append([names[name], *cells])
    return _table(["model", *DTYPES.values(), "NF4, `--recompute`"], rows)


def _times(points: Points, results: dict[str, Any], configs: Mapping[str, Any], names: Mapping[str, str], sequences: int) -> str:
    """TFLOP of a step, the floor, and seconds."""
    rows, speeds = [], results["speed"]
    for name, config in configs.items():
        counted = count(config, "float32", sequences, LENGTH)
        floor = f"{counted.flops / speeds[str(counted.lanes)]:.1f} s" if idle(results) else TO_MEASURE
        seconds = [_seconds(points.get((name, dtype, sequences, False))) for dtype in DTYPES]
        rows.append([names[name], f"{counted.flops / 1e12:.2f}", floor, *seconds])
    return _table(["model", "TFLOP", "floor", *DTYPES.values()], rows)


def idle(results: dict[str, Any]) -> bool:
    """Whether the speed of products was measured on an idle machine."""
    return results.get("busy_cores", 1) <= DISTURBED


def _seconds(found: Any) -> str:
    if found is None:
        return ""
    return f"{min(found['seconds']):.1f} s" if found.get("busy_cores", 1) <= DISTURBED else TO_MEASURE


def _laptop(points: Points, configs: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """README's table: the memory as measured, or by count where it was not."""
    rows = []
    for name, config in configs.items():
        cells = []
        for dtype, recompute in [*((dtype, False) for dtype in DTYPES), ("nf4", True)]:
            total = count(config, dtype, 1, LENGTH, recompute=recompute).total
            found = points.get((name, dtype, 1, recompute))
            cells.append(f"{found['peak_memory_bytes'] / 1e9:.2f} GB" if found else f"{total / 1e9:.1f} GB by count")
        found = points.get((name, "float32", 1, False)) or points.get((name, "nf4", 1, False))
        parameters = count(config, "float32", 1, LENGTH).weights / 4e6
        rows.append([names[name], f"{parameters:,.0f} M", *cells, _seconds(found)])
    return _table(["model", "parameters", *DTYPES.values(), "NF4, `--recompute`", "a step, float32 (8B: NF4)"], rows)


def _processor(results: dict[str, Any]) -> str:
    machine, speeds = results["machine"], results["speed"]
    words = ", ".join(f"{speed / 1e9:.0f} GFLOP/s on {n} thread{'s' * (n != '1')}" for n, speed in speeds.items())
    words = words if idle(results) else TO_MEASURE
    return f"{machine['cpu']}, {machine['cores']} cores, NumPy {machine['numpy']}, {machine['blas']}. Products: {words}."
