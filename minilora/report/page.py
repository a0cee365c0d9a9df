"""`minilora report`: one HTML page about a run, or two, that needs no network. The templates beside it choose and draw the pictures."""

import math
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats import extra
from minilora.formats.atomic import write_text
from minilora.report.changes import Change, changes_of, similarity
from minilora.report.read import Run, read_run
from minilora.runs import Say, silent

POINTS = 1000  # of a curve, at most: of a longer run, means of consecutive steps


def report_run(run: str | Path, other: str | Path | None = None, out: str | Path | None = None, say: Say = silent) -> dict[str, Any]:
    """Write the page about the run in a folder, or about two. out: by default report.html in the first folder, which is replaced.

    Returns {"file", "missing": {run: sentences}}. Raises ValueError when a folder holds no run, its run.json is damaged, or two runs
    adapt different layers; FileExistsError when `out` exists; ImportError without jinja2.
    """
    template = _template()
    if out is not None and Path(out).exists():
        raise FileExistsError(f"{out} is in use; name another file with --out, or remove it first.")
    runs = [read_run(path) for path in (run, other) if path is not None]
    for letter, each in zip("AB", runs, strict=False):
        each.name = f"{letter}: {each.name}" if other else each.name
    changes = [changes_of(each) for each in runs]
    first, last = changes[0], changes[-1]
    common = [path for path in first if path in last and first[path].shape == last[path].shape]
    if first and last and not common:
        models = " and ".join(str(each.settings.get("model")) for each in runs)
        raise ValueError(f"{run} and {other} adapt no layer of the same name and shape, so they cannot be compared ({models}).")
    phi = {path: similarity(first[path].directions, last[path].directions) for path in common if other}
    views = [_view(each, of) for each, of in zip(runs, changes, strict=True)]
    file = Path(out or runs[0].path / "report.html")
    write_text(file, template.render(views=views, phi=phi, inputs=[float(first[path].shape[0]) for path in common]))
    for each in runs:
        for sentence in each.missing:
            say(f"missing   {each.name}: {sentence}")
    say(f"written to {file}")
    return {"file": str(file), "missing": {each.name: each.missing for each in runs}}


def _template() -> Any:
    jinja2 = extra("jinja2", "html", "minilora report")
    loader = jinja2.PackageLoader("minilora.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {f.__name__: f for f in (median, number, short)}
    environment.tests["finite"] = math.isfinite
    environment.globals |= {"log": math.log, "ticks": ticks, "unique": count(1).__next__, "zip": zip}
    return environment.get_template("report.html.j2")


def _view(run: Run, changes: dict[str, Change]) -> dict[str, Any]:
    """The numbers of a run's pictures, beside its own.

    curves   {column of metrics.jsonl: (points,)}; "mean": of the loss over the last `window` steps
    layers   {layer: (S,)} gradient norms
    bands    {"dA", "dB", "A" or "B": (number of layers, lowest, median, highest)} norms over the layers, (S,) each
    """
    every = -(-len(run.steps.get("step", ())) // POINTS)
    curves = {name: _means(v, every, every) for name, v in run.steps.items()}
    n = max(5, len(curves.get("loss", ())) // 20)
    curves |= {"mean": _means(curves["loss"], n)} if curves else {}
    layers: dict[str, Any] = {}
    for path, norm in run.grads.items():
        layer = path.rpartition(".")[0]
        layers[layer] = np.hypot(layers.get(layer, 0.0), norm)
    bands = {}
    for name, of in (("dA", run.grads), ("dB", run.grads), ("A", run.values), ("B", run.values)):
        if own := [norm for path, norm in of.items() if path.endswith(f"lora_{name[-1]}")]:
            bands[name] = (len(own), *np.quantile(own, [0, 0.5, 1], axis=0).tolist())
    return {"run": run, "changes": changes, "curves": curves, "window": n * every, "layers": layers, "bands": bands}


def _means(v: np.ndarray, n: int, every: int = 1) -> np.ndarray:
    """The mean of the finite ones of the last n, at every `every`-th."""
    parts = (v[max(0, i - n) : i] for i in range(every, len(v) + every, every))
    return np.array([p[np.isfinite(p)].mean() if np.isfinite(p).any() else math.nan for p in parts])


def median(matrices: list[np.ndarray]) -> list[list[float]]:
    """The median of every element, over matrices of which the common rows and columns count."""
    a, b = np.min([x.shape for x in matrices], axis=0)
    return np.median([x[:a, :b] for x in matrices], axis=0).tolist()


def number(x: float) -> str:
    """Four digits; a dash for what is not known."""
    if not math.isfinite(x):
        return "–"
    return f"{x:,.0f}" if x == int(x) or abs(x) >= 1e3 else f"{x:.4g}"


def short(paths: list[str]) -> list[str]:
    """Paths without the modules that all of them are in."""
    parts = [path.split(".") for path in paths]
    shared = next((i for i, of in enumerate(zip(*parts, strict=False)) if len(set(of)) > 1), 0)
    return [".".join(of[shared:]) for of in parts]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five, two at least, from at or below `low` to at or above `high`."""
    rough = (high - low) / 5 or abs(low) or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= rough * 0.999)
    first = math.floor(low / step)
    return [k * step for k in range(first, max(first + 1, math.ceil(high / step)) + 1)]
