"""`minilora merge`, `extract` and `compare`: an adapter as part of its model, the reverse, and the distance of two models."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from minilora.adapters import PartialConfig
from minilora.adapters.extraction import embeddings_changed, extract, input_roots, largest_changes
from minilora.data.records import note
from minilora.formats.adapter import save_adapter
from minilora.formats.checkpoint import STORED, load_model, save_model
from minilora.formats.fetch import origin
from minilora.lora import adaptation, merge
from minilora.runs import Say, silent
from minilora.runs.evaluate import task_of
from minilora.runs.folder import check_free
from minilora.runs.recipe import threads_for
from minilora.runs.run_file import base_of, open_model, run_of
from minilora.runs.tasks import measure


def merge_run(
    model: str | Path,
    out: str | Path,
    adapter: str | Path | None = None,
    dtype: str = STORED,
    allow_other_weights: bool = False,
    say: Say = silent,
) -> dict[str, float]:
    """Write the merged model of a run or adapter folder to a new folder `out`. Returns {path: largest change of a weight}.

    dtype: of the result; by default that of the base's files.
    Raises ValueError when there is no adapter, FileExistsError when `out` is in use.
    """
    out = check_free(out)
    if adapter is None and base_of(model)[1] is None:
        raise ValueError(f"{model} has no adapter to merge.")
    merged = open_model(model, "numpy", adapter, "float32", allow_other_weights)  # computed in float32, whatever the run's dtype
    if isinstance(adaptation(merged).config, PartialConfig):  # trained without an adapter
        before = adaptation(merged).base_values
        changes = {name: float(abs(p.data - before[name]).max()) for name, p in merged.parameters() if name in before}
    else:
        changes = merge(merged)
    save_model(merged, check_free(out), dtype)  # again: another process may have written there meanwhile
    say(f"merged {len(changes)} adapters into {out}; the largest change of a weight is {max(changes.values()):.3g}")
    if still := [name for name, change in changes.items() if change == 0]:
        note(f"warning: {len(still)} adapters are still zero, {still[0]} first: was anything trained?")
    return changes


def extract_run(
    model: str,
    out: str | Path,
    base: str | None = None,
    r: int = 8,
    energy: float | None = None,
    data: str | None = None,
    task: str | None = None,
    window: int | None = None,
    whole: bool = True,
    threads: int | None = None,
    allow_other_weights: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Write the adapter that brings `base` nearest to `model` to a new folder `out`; see adapters/extraction.py.

    model  as for `open_model`: a run of full fine-tuning, a model, or an adapter whose rank is to change
    base   by default that of the run or adapter
    data   held-out data; each layer is then whitened with its inputs, and all three models are measured. Task and window: by default
           those of the run
    Raises ValueError when the base is not known or the models do not fit, FileExistsError when `out` is in use.
    """
    out, threads = check_free(out), threads_for(threads)
    typed = base is not None
    if base is None:
        base, adapter = base_of(model)
        if adapter is None:
            if (run := run_of(model)) is None:
                raise ValueError(f"{model} does not name the model it was tuned from; name it with --base.")
            base = run.recipe.model
    tuned = open_model(model, "numpy", allow_other_weights=allow_other_weights)
    options: Any = {"download": typed, "new_head": None, "report": False}
    original = load_model(base, "numpy", labels=getattr(tuned.config, "num_labels", None), **options)
    measured = roots = None
    if data is not None:
        measured = task_of(tuned, model, data, tokenizer_source=model, split=None, say=say, task=task, window=window)
        roots = input_roots(tuned, measured.held_out)
    adapted, layers = extract(original, tuned, r, energy, roots, whole)
    adaptation(adapted).config.base_model_name_or_path = base
    changes = largest_changes(original, tuned)
    result: dict[str, Any] = {
        "folder": str(out),
        "base": base,
        "layers": [asdict(layer) for layer in layers],
        "saved_bytes": save_adapter(adapted, check_free(out)),
        "largest_change": max(layer.largest_change for layer in layers),
        "largest_error": max(layer.largest_error for layer in layers),
        "left_out": {path: changes[path] for path in embeddings_changed(original, changes)},
    }
    kept, ranks = [layer.energy for layer in layers], sorted({layer.rank for layer in layers})
    span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    say(f"extracted a LoRA of rank {span} on {len(layers)} layers, {result['saved_bytes'] / 1e3:,.0f} kB, into {out}")
    say(f"energy    {min(kept):.1%} to {max(kept):.1%} of each layer's change{' as its inputs see it' if roots else ''}")
    say(f"largest   change of a weight {result['largest_change']:.3g}; the adapter misses it by up to {result['largest_error']:.3g}")
    for path, change in result["left_out"].items():
        say(f"left out  {path}, an embedding, changed by up to {change:.3g}")
    if measured is not None:
        models = {"base": original, "tuned": tuned, "extracted": adapted}
        result["held_out"] = {name: measure(each, measured, threads) for name, each in models.items()}
        figures = ", ".join(f"{name} {value[measured.headline]:.4f}" for name, value in result["held_out"].items())
        say(f"held out  {measured.headline.replace('_', ' ')}: {figures}")
    return result


def compare(first: str, second: str, allow_other_weights: bool = False, say: Say = silent) -> dict[str, float]:
    """{parameter: the largest change of an element} between two models with their adapters, in either order.

    A base without a head gets one with as many classes as the other's. Raises ValueError when the models do not fit.
    """
    models = [open_model(name, "numpy", allow_other_weights=allow_other_weights) for name in (first, second)]
    classes = [getattr(model.config, "num_labels", None) for model in models]
    for i, name in enumerate((first, second)):
        drawn = any(path.startswith(models[i].output_head) for path in origin(models[i]).drawn)
        if None not in classes and classes[0] != classes[1] and drawn and adaptation(models[i]).config is None:
            models[i] = load_model(name, "numpy", labels=classes[1 - i], report=False)
    changes = largest_changes(*models)
    changed = sorted((path for path, change in changes.items() if change), key=lambda path: -changes[path])
    for path in changed[:10]:
        say(f"{changes[path]:10.3g}  {path}")
    say(f"{len(changed)} of {len(changes)} parameters differ" + (f"; the largest change is {changes[changed[0]]:.3g}" if changed else ""))
    return changes
