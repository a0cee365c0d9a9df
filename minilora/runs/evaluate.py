"""`minilora evaluate`: measure a model on data; a run as it was measured when it was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from minilora.formats.fetch import BUNDLED
from minilora.models.config_file import check_types
from minilora.models.generate import context_length
from minilora.runs.recipe import Recipe, threads_for
from minilora.runs.run_file import open_model, record_of, tokenizer_of
from minilora.runs.tasks import Task, measure, measuring_task


def evaluate_run(
    model: str | Path,
    data: str | None = None,
    *,
    adapter: str | Path | None = None,
    split: str | None = None,
    backend: str = "auto",
    threads: int = 0,
    allow_other_weights: bool = False,
    say: Callable[[str], None] = print,
    **given: Any,
) -> dict[str, Any]:
    """The figures of a model, a run or an adapter on data: loss and perplexity, or accuracy, F1 and Matthews correlation.

    What is not given (data, task, window, mask_prompt, encoding, seed, eval_size, eval_bytes: fields of Recipe) is as it was for the run;
    what differs from that is said. split: "train", "valid", "test" or "all", by default see `measuring_task`.
    Raises ValueError for a task that the model is not for, data that cannot be used, or a run.json that is damaged.
    """
    threads = threads_for(threads)
    opened = open_model(model, backend, adapter, allow_other_weights=allow_other_weights)
    task = task_of(opened, str(adapter or model), data, tokenizer_source=str(model), split=split, say=say, **given)
    say(f"{model} on {task.what}")
    figures = measure(opened, task, threads)
    for name, value in figures.items():
        say(f"{name.replace('_', ' '):<16} {value:,.4f}" if isinstance(value, float) else f"{name.replace('_', ' '):<16} {value:,}")
    return figures


def task_of(
    model: Any, run: str, data: str | None, *, tokenizer_source: str, split: str | None, say: Callable[[str], None], **given: Any
) -> Task:
    """What to measure an opened model on, by the settings of the run that it comes from, and those given. Raises as `evaluate_run`."""
    record, decoder = record_of(run), hasattr(model, "decode")
    recipe = made = recipe_of(record, run)
    given = {name: value for name, value in {"data": data, **given}.items() if value is not None}
    given.setdefault("task", recipe.task if record else "lm" if decoder else "classify")
    if decoder != (given["task"] == "lm"):
        expected = "a decoder" if given["task"] == "lm" else "a BERT"
        raise ValueError(f"task {given['task']} needs {expected}; {tokenizer_source} is a {type(model).__name__}.")
    if given.get("data", recipe.data) is None and not record.get("configuration") and tokenizer_source != BUNDLED:
        raise ValueError(f"{tokenizer_source} is not a run, which would know its data; give --data.")
    if "window" not in given and not record:
        given["window"] = min(recipe.window, context_length(model))
    changed = [f"{name} {value} (the run had {getattr(recipe, name)})" for name, value in given.items() if getattr(recipe, name) != value]
    if record and (changed := [text for text in changed if not text.startswith("data ")]):
        say(f"differs from the run: {', '.join(changed)}")
    recipe = replace(recipe, **given)
    if recipe.window > context_length(model):
        raise ValueError(f"a window of {recipe.window} is longer than the model's {context_length(model)} positions.")
    tokenizer = tokenizer_of(tokenizer_source, getattr(model.config, "vocab_size", None))
    labels = model.config.class_names if recipe.task == "classify" else None
    if "eval_bytes" in given and recipe.kind != "text":
        raise ValueError(f"eval_bytes is an amount of plain text; {recipe.data} holds records.")
    sampled = "eval_size" in given or "eval_bytes" in given
    return measuring_task(recipe, tokenizer, labels, split, made if record else None, record.get("trained_on"), sampled)


def recipe_of(record: dict[str, Any], run: str) -> Recipe:
    """What a run.json says of the data and how they are measured, as a recipe; without a run.json the defaults. Raises ValueError."""
    settings = record.get("configuration") or {}
    names = set("model data task window mask_prompt encoding seed train_size eval_size eval_bytes batch_size tokens_per_batch".split())
    known = {name: settings[name] for name in names & settings.keys()}
    check_types(Recipe, known, f"the run.json of {run}")
    try:
        return Recipe(**known)
    except ValueError as error:
        raise ValueError(f"the run.json of {run}: {error}") from None
