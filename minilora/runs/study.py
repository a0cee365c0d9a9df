"""A study: several ways to fine-tune, each with several seeds, on the same data; mean, standard deviation, worst and failed runs.

A row of the table is a name and its changes of a common recipe, {"longer": {"steps": None, "epochs": 30}}. The seed draws the head of a
classifier, the adapters, the batches and the dropout masks; the examples to train and to measure on do not depend on it. The model is
read once: each run has a replica, which shares the weights that it does not train.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minilora.backend import choose_backend
from minilora.formats import mark
from minilora.formats.atomic import to_json, write_text
from minilora.formats.fetch import origin
from minilora.lora.registry import DATA_INITIALISERS
from minilora.runs import Say
from minilora.runs.folder import StudyFolder, lanes_of
from minilora.runs.interrupt import locked
from minilora.runs.plot import have_matplotlib, plot_study
from minilora.runs.prepare import open_recipe, prefix_for, prepare, steps_of
from minilora.runs.recipe import METHODS, Recipe, ResolvedRecipe, threads_for
from minilora.runs.tasks import Task, fingerprint, general_task, measure
from minilora.training.prefix import PrefixCache
from minilora.training.ranks import Ranks, joined
from minilora.training.reinitialise import draw
from minilora.training.watch import Diverged

Rows = dict[str, dict[str, Any]]

_LONGER = {"steps": None, "epochs": 30}
ROWS: Rows = {
    **{method: {"method": method} for method in METHODS},
    "standard": {"method": "full"},
    "re-init": {"method": "full", "reinit": 1},
    "longer": {"method": "full", **_LONGER},
    "both": {"method": "full", "reinit": 1, **_LONGER},
    "uncorrected": {"method": "full", "bias_correction": False},
    "l2-sp": {"method": "full", "l2_sp": 1.0},
}
GRIDS = {"methods": METHODS, "few-sample": ("standard", "re-init", "longer", "both", "uncorrected")}

# A row may not change these: figures on other data, or measured otherwise, cannot be compared.
_SHARED = """model data task window batch_size tokens_per_batch mask_prompt train_size eval_size eval_bytes quantize dtype seed backend
    encoding new_head""".split()
_HIGHER = ("accuracy", "pearson")  # of other figures, lower is better


@dataclass
class Summary:
    """One row of the table. Figures are the task's headline, over the runs that did not diverge; nan if there are none."""

    row: str
    runs: int
    mean: float
    std: float
    worst: float
    best: float
    failed: int
    trained: int
    steps: int
    seconds: float
    forgetting: float = math.nan  # rise of the loss on a general text, nats a token; nan for classifiers


def rows_named(names: Sequence[str]) -> Rows:
    """The rows of names of grids ("methods", "few-sample") and of single rows. Raises ValueError for an unknown one."""
    for name in names:
        if name not in GRIDS and name not in ROWS:
            raise ValueError(f"there is no row {name!r}; choose from {', '.join((*GRIDS, *ROWS))}.")
    return {row: ROWS[row] for name in names for row in GRIDS.get(name, (name,))}


def study(recipe: Recipe, rows: Rows, seeds: int, folder: str | Path, say: Say = print) -> list[Summary]:
    """Run those of len(rows) x seeds runs that are not yet done, and write table.txt and study.png to the folder. Returns the table.

    A run has failed when it diverged, or when it is no better than predicting the most frequent class or, for text, than the base model.
    An interrupted study continues when it is started again with the same recipe and folder; rows and seeds may be added.
    Started by mpiexec, rank 0 hands whole runs to the other ranks, for which the table is empty (training/ranks.py).
    Raises ValueError for a row that changes the data, or a folder that holds another study or a damaged record.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}.")
    for name, change in rows.items():
        if shared := sorted(change.keys() & set(_SHARED)):
            raise ValueError(f"row {name!r} changes {shared[0]}, which all rows of a study share; make it a study of its own.")
    recipe = replace(recipe, backend=choose_backend(recipe.backend), eval_bytes=recipe.text_to_measure)
    with joined() as ranks, locked(Path(folder)) if ranks is None or ranks.rank == 0 else nullcontext():
        return _study(recipe, rows, seeds, Path(folder), say, ranks)


def _study(recipe: Recipe, rows: Rows, seeds: int, folder: Path, say: Say, ranks: Ranks | None) -> list[Summary]:
    if ranks is not None and recipe.backend == "cupy":
        ranks.on_gpus(together=False)
    recipe = replace(recipe, lanes=recipe.lanes or lanes_of(folder) or threads_for(recipe.threads))
    store = StudyFolder(folder, recipe, rows, fingerprint(recipe.data, recipe.encoding) if recipe.data else None)
    done = {(record["row"], record["seed"]) for record in store.records}

    model, tokenizer, task = open_recipe(recipe)
    general = general_task(model, recipe, tokenizer)
    say(f"data      {task.what}")
    say(f"study     {len(rows)} rows x {seeds} seeds in {store.path}" + (f"; {len(done)} runs were there already" if done else ""))
    runs = [run for run in product(range(seeds), rows) if run[::-1] not in done]
    todo = {(name, seed): replace(recipe, **rows[name], seed=seed).resolve(task.steps) for seed, name in runs}
    if ranks is not None:
        about = {"the study": to_json(asdict(replace(recipe, threads=0))), "the data": task.sha256, "the base": mark.fingerprint(model)[0]}
        ranks.greet({**about, "the runs to do": [list(run) for run in runs]}, ranks.size)
    if ranks is None or ranks.rank == 0:
        store.begin()
    floor = _floor(model, task, recipe) if todo else 0.0
    known = measure(model, general, threads_for(recipe.threads))["loss"] if todo and general else 0.0
    prefixes: dict[str, PrefixCache | None] = {}
    try:
        with tqdm(total=sum(each.steps for each in todo.values()), unit="step", dynamic_ncols=True, smoothing=0.05) as bar:

            def run(name: str, seed: int) -> dict[str, Any]:
                each = todo[name, seed]
                bar.set_description(f"{name}, seed {seed}")
                if name not in prefixes or each.init_lora_weights in DATA_INITIALISERS:  # whose layers may depend on the seed
                    prefixes[name] = prefix_for(task, each)  # shared by the seeds of a row, whose frozen blocks are the same
                replica, record = _run(model, task, each, floor, bar, prefixes[name])
                if general and record["value"] is not None:
                    record["forgetting"] = measure(replica, general, each.threads)["loss"] - known
                return record

            for (name, seed), record in _results(run, list(todo), ranks):
                store.add({"row": name, "seed": seed, **record})
                bar.update(0 if ranks is None else todo[name, seed].steps)
        if ranks is not None and ranks.rank:
            return []
    except KeyboardInterrupt:
        say(f"stopped; {len(store.records)} runs are in {store.path}, and the same command continues from there.")
        raise
    records = [record for record in store.records if record["row"] in rows and record["seed"] < seeds]
    table = [summarise(name, [r for r in records if r["row"] == name], task.headline) for name in rows]
    text = format_table(table, task.headline)
    say(text)
    write_text(store.path / "table.txt", text + "\n")
    if have_matplotlib(say):
        plot_study(store.path / "study.png", table, records, task.headline.replace("_", " "), floor or None)
    return table


_here: dict[str, Callable[[str, int], dict[str, Any]]] = {}  # "run": of a rank that is given its runs


def _taken(name: str, seed: int) -> dict[str, Any]:
    return _here["run"](name, seed)


def _results(
    run: Callable[[str, int], dict[str, Any]], todo: Sequence[tuple[str, int]], ranks: Ranks | None
) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """(run, its record), in the order of completion; computed by the ranks other than 0, where there are any."""
    if ranks is None:
        yield from ((each, run(*each)) for each in todo)
        return
    from mpi4py.futures import MPICommExecutor, as_completed

    _here["run"] = run
    executor: Any = MPICommExecutor(ranks.comm, root=0)
    with executor as pool:
        if pool is not None:
            futures = {pool.submit(_taken, *each): each for each in todo}
            yield from ((futures[future], future.result()) for future in as_completed(futures))
    ranks.over = True


def _run(model: Any, task: Task, recipe: ResolvedRecipe, floor: float, bar: tqdm, prefix: PrefixCache | None) -> tuple[Any, dict[str, Any]]:
    """Train and measure a replica of the model, which is left unchanged. Returns the replica and the record of the run."""
    replica = model.replica()
    rng = np.random.default_rng((recipe.seed, 1))
    for path, layer in replica.modules():
        if path in origin(model).drawn:
            draw(layer, rng)
    optimizer = prepare(replica, recipe, task)
    record = {"trained": optimizer.flat.data.size, "steps": recipe.steps, "failed": True, "value": None, "seconds": 0.0}
    end = bar.n + recipe.steps
    try:
        for step in steps_of(replica, optimizer, task.batches(recipe.seed), recipe, prefix):
            record["seconds"] += step.seconds
            bar.update()
    except Diverged as error:
        bar.update(end - bar.n)
        return replica, {**record, "why": str(error)}
    measured = measure(replica, task, recipe.threads)
    value = measured[task.headline]
    if math.isfinite(value):
        record |= {"value": value, "failed": not (value > floor if task.headline in _HIGHER else value < floor)}
    return replica, {**record, "measured": measured}


def _floor(model: Any, task: Task, recipe: Recipe) -> float:
    """The figure that a run has to beat: the share of the most frequent class, or the figure of the base model."""
    if task.headline != "accuracy":
        return measure(model, task, threads_for(recipe.threads))[task.headline]
    labels = np.concatenate([batch.labels for batch in task.held_out])
    return float(np.bincount(labels).max() / len(labels))


def summarise(row: str, records: Sequence[dict[str, Any]], headline: str) -> Summary:
    """The figures of one row; the standard deviation is that of a sample (n - 1)."""
    values = sorted((r["value"] for r in records if r["value"] is not None), reverse=headline not in _HIGHER)  # the worst first
    forgotten = [r["forgetting"] for r in records if r.get("forgetting") is not None]
    return Summary(
        row,
        runs=len(records),
        mean=statistics.fmean(values) if values else math.nan,
        std=statistics.stdev(values) if len(values) > 1 else math.nan,
        worst=values[0] if values else math.nan,
        best=values[-1] if values else math.nan,
        failed=sum(r["failed"] for r in records),
        trained=records[0]["trained"],
        steps=records[0]["steps"],
        seconds=statistics.fmean(r["seconds"] for r in records),
        forgetting=statistics.fmean(forgotten) if forgotten else math.nan,
    )


def format_table(table: Sequence[Summary], headline: str) -> str:
    """The table as text."""
    width, shown = max(len(line.row) for line in table), any(math.isfinite(line.forgetting) for line in table)
    title = "    mean    std   worst    best  failed      trained  steps  seconds" + "  forgets" * shown
    lines = [f"{headline.replace('_', ' '):<{width}}{title}"]
    for s in table:
        figures = f"{s.mean:7.3f} {s.std:6.3f} {s.worst:7.3f} {s.best:7.3f}"
        lines.append(
            f"{s.row:<{width}} {figures} {f'{s.failed}/{s.runs}':>7} {s.trained:12,} {s.steps:6,} {s.seconds:8.1f}"
            + f" {s.forgetting:8.3f}" * shown
        )
    return "\n".join(lines)


def study_run(
    recipe: Recipe,
    rows: Sequence[str] | None = None,
    seeds: int | None = None,
    folder: str | Path | None = None,
    small: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """`study` with the defaults of `minilora study`: rows by task, 5 seeds (2 if small), a folder named after the rows.

    small: a few minutes for the whole table on two cores, enough to see that everything works.
    Returns {"folder": path, "rows": the table}.
    """
    if small and recipe.task == "classify":
        recipe = replace(recipe, train_size=min(recipe.train_size or 64, 64), eval_size=min(recipe.eval_size or 200, 200))
    elif small:
        recipe = replace(recipe, steps=min(recipe.steps or 20, 20), eval_bytes=8192)
    if small:
        recipe = replace(recipe, window=min(recipe.window, 64))
    names = rows or (["methods"] if recipe.task == "classify" else ["lora", "full", "bottleneck", "bitfit", "layer-norm"])
    folder = folder or f"studies/{'-'.join(rows or [recipe.kind])}{'-quick' * small}"
    table = study(recipe, rows_named(names), (2 if small else 5) if seeds is None else seeds, folder, say)
    return {"folder": str(folder), "rows": [asdict(line) for line in table]} if table else {}
