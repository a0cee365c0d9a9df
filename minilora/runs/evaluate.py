"""`minilora evaluate`: measure a model on data; a run with the settings that it was made with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.formats.fetch import BUNDLED
from minilora.models.decoder import Decoder
from minilora.runs import Say
from minilora.runs.recipe import Recipe, threads_for
from minilora.runs.run_file import check_task, check_window, open_model, run_of, tokenizer_of
from minilora.runs.tasks import Task, measure, measuring_task


def evaluate_run(
    model: str | Path,
    data: str | None = None,
    *,
    adapter: str | Path | None = None,
    split: str | None = None,
    backend: str = "auto",
    threads: int | None = None,
    allow_other_weights: bool = False,
    say: Say = print,
    **changed: Any,
) -> dict[str, Any]:
    """The figures of a model, a run or an adapter on data: loss and perplexity, or accuracy, F1 and Matthews correlation.

    changed: any of task, window, mask_prompt, encoding, seed, eval_size, eval_bytes (fields of Recipe); the others, and data, are those of
    the run, and differences from it are printed. split: "train", "valid", "test" or "all", by default see `measuring_task`.
    Raises ValueError for a task that the model is not for, data that cannot be used, or a damaged run.json.
    """
    threads = threads_for(threads)
    opened = open_model(model, backend, adapter, allow_other_weights=allow_other_weights)
    task = task_of(opened, str(adapter or model), data, tokenizer_source=str(model), split=split, say=say, **changed)
    say(f"{model} on {task.what}")
    figures = measure(opened, task, threads)
    for name, value in figures.items():
        say(f"{name.replace('_', ' '):<16} {value:{',.4f' if isinstance(value, float) else ','}}")
    return figures


def task_of(model: Any, run: str, data: str | None, *, tokenizer_source: str, split: str | None, say: Say, **changed: Any) -> Task:
    """The data to measure an opened model on, by the settings of its run and those in `changed`. Raises as `evaluate_run`."""
    made = run_of(run)
    had = Recipe() if made is None else made.recipe
    changed = {name: value for name, value in {"data": data, **changed}.items() if value is not None}
    if made is None:
        task = "lm" if isinstance(model, Decoder) else "classify"
        changed = {"window": min(had.window, model.config.longest_sequence), "task": task, **changed}
    check_task(model, changed.get("task", had.task), tokenizer_source)
    if data is None and made is None and tokenizer_source != BUNDLED:
        raise ValueError(f"{tokenizer_source} is not a run, which would know its data; give --data.")
    recipe = replace(had, **changed)
    differs = [name for name, value in changed.items() if name != "data" and getattr(had, name) != value]
    if made is not None and differs:
        say("differs from the run: " + ", ".join(f"{name} {changed[name]} (the run had {getattr(had, name)})" for name in differs))
    check_window(model, recipe.window)
    tokenizer = tokenizer_of(tokenizer_source, getattr(model.config, "vocab_size", None))
    labels = model.config.class_names if recipe.task == "classify" else None
    if "eval_bytes" in changed and recipe.kind != "text":
        raise ValueError(f"eval_bytes is an amount of plain text; {recipe.data} holds records.")
    sampled = "eval_size" in changed or "eval_bytes" in changed
    return measuring_task(recipe, tokenizer, labels, split, made, sampled)
