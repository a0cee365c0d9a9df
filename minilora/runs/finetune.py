"""`minilora finetune`: adapt a model to data, and measure it before and after."""

import hashlib
import math
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from minilora import tuned
from minilora.backend import choose_backend
from minilora.data.batches import Batch
from minilora.formats.adapter import save_adapter
from minilora.formats.atomic import to_json, write_json, write_text
from minilora.formats.checkpoint import save_model
from minilora.formats.mark import fingerprint
from minilora.formats.tokenizer import Tokenizer
from minilora.kernels.cuda.blas import allow_tf32
from minilora.kernels.memory import peak_memory
from minilora.lora import adaptation, disabled, lora_layers
from minilora.models.generate import generate
from minilora.runs import Say, signs
from minilora.runs.card import card
from minilora.runs.checkpoint import State, adapter_config, method_of, read_last, restore
from minilora.runs.doctor import check_products
from minilora.runs.folder import check_free, clean, new_folder
from minilora.runs.interrupt import Interruption, locked
from minilora.runs.plot import have_matplotlib, plot_run
from minilora.runs.prepare import open_recipe, prepare
from minilora.runs.recipe import Recipe, ResolvedRecipe, threads_for
from minilora.runs.tasks import general_task, measure
from minilora.runs.training import Training, assist
from minilora.training.loss_scale import LossScale
from minilora.training.memory import advice
from minilora.training.ranks import Ranks, joined
from minilora.training.watch import Diverged

PROMPT = "def read_config(path, encoding=None):\n    "  # which the samples of a text model continue


def finetune(recipe: Recipe, out: str | Path | None = None, say: Say = print, *, resumed: bool = False) -> dict[str, Any]:
    """Run a recipe and leave a run folder. Returns the results, which are also in its run.json.

    resumed: continue the run in the folder `out`, whose resolved recipe is `recipe` (resume.py).
    Raises ValueError or OSError for bad input, before the folder is made; Diverged when the loss is not finite, after saving the last
    good parameters. The first Ctrl-C or SIGTERM ends the run after its step: it saves, and raises KeyboardInterrupt.
    Started by mpiexec, all ranks share the work, and return {} but for rank 0; an error of one ends all (training/ranks.py).
    """
    with joined() as ranks:
        return _finetune(recipe, out, say, resumed, ranks)


def _finetune(recipe: Recipe, out: str | Path | None, say: Say, resumed: bool, ranks: Ranks | None) -> dict[str, Any]:
    begun = time.perf_counter()
    check_products()
    if recipe.tf32:
        allow_tf32()
    recipe = replace(recipe, backend=choose_backend(recipe.backend))
    if ranks is not None:
        lanes = recipe.lanes or ranks.meet("the start", threads_for(recipe.threads) if recipe.backend == "numpy" else 1, sum)
        recipe = replace(recipe, lanes=lanes)
        if recipe.backend == "cupy":
            if lanes != ranks.size:
                raise ValueError(f"on GPUs each rank computes one lane, but {ranks.size} ranks share {lanes}; start {lanes} ranks.")
            ranks.on_gpus()
    leads = ranks is None or ranks.rank == 0
    model, tokenizer, task = open_recipe(recipe)
    general = general_task(model, recipe, tokenizer)
    plan = recipe if isinstance(recipe, ResolvedRecipe) else recipe.resolve(task.steps)
    base = sum(p.data.size for _, p in model.parameters())
    about: dict[str, Any] = {"base": fingerprint(model)[0], "data": task.sha256}
    with ExitStack() as held:
        state = held.enter_context(_continued(Path(str(out)), about, leads)) if resumed else None
        if ranks is not None:
            _greet(ranks, plan, about | {"checkpoint": state.sha256 if state else ""}, next(task.batches(plan.seed)))
        optimizer = prepare(model, plan, task, adapter_config(state.method) if state and state.method else None)
        scale = LossScale.of(model)
        if state is not None:
            restore(state, model, optimizer, scale, str(out))
        interruption = held.enter_context(Interruption())
        if ranks is not None:
            ranks.interruption = interruption
            if not leads:
                assist(model, optimizer, task, plan, scale, state or State(), ranks)
                return {}
        folder = Path(str(out)) if resumed else new_folder(out, plan.method)
        if not resumed:
            held.enter_context(locked(folder))
            check_free(folder)  # again: another run may have begun and ended there in between
        trained = optimizer.flat.data.size
        paths = {name: value for name in ("data", "forgetting") if (value := getattr(plan, name))}
        settings = asdict(plan) | {name: str(Path(value).absolute()) for name, value in paths.items()}  # found from anywhere

        def write_run(results: dict[str, Any]) -> dict[str, Any]:
            """Write run.json. Returns the results in it: those given, and the loss scale, if there is one."""
            results = results | ({} if scale is None else {"loss_scale": asdict(scale)})
            about = {"configuration": settings, "labels": task.labels, "trained_on": task.trained_on}
            write_json(folder / "run.json", {**about, "sizes": tuned.sizes, "kernels": tuned.kernels_in_use(), "results": results})
            return results

        write_run({})
        say(f"model     {plan.model}: {base:,} parameters, {plan.backend}, {plan.threads} thread{'s' * (plan.threads > 1)}")
        if plan.backend == "numpy" and plan.threads > (most := min(plan.lanes, os.cpu_count() or 1)):
            say(f"threads   {plan.threads} are no faster than {most}: the machine has {os.cpu_count()} cores, a step {plan.lanes} lanes")
        say(f"data      {task.what}")
        say(f"method    {_method(plan, model)}: {trained:,} trainable parameters, {trained / base:.1%} of the model")
        if state is not None:
            say(f"continued from the checkpoint of step {state.step}")
        else:
            first = {"figures": measure(model, task, plan.threads, matrix=True), "sample": _sample(model, tokenizer, plan)}
            first |= {"general": measure(model, general, plan.threads)["loss"]} if general else {}
            state = State(before=first, method=method_of(model))
        about |= {"before": state.before, "method": state.method}
        training = held.enter_context(closing(Training(model, optimizer, task, plan, folder, scale, about, state)))

        def save(steps: int) -> int:
            """Write the result of so many steps. Returns the bytes of its tensors."""
            training.sync()
            size = _save(model, folder, plan)
            write_run({"stopped_after_step": steps})
            return size

        try:
            training.run(interruption, ranks)
        except (Diverged, KeyboardInterrupt, MemoryError, OSError) as stop:
            done = stop.kept if isinstance(stop, Diverged) else optimizer.t if isinstance(stop, MemoryError) else training.step
            save(done)
            if isinstance(stop, Diverged):
                say(f"the {plan.product} of step {done}, the last whose loss was finite, is in {folder}")
            if isinstance(stop, KeyboardInterrupt):
                say(f"stopped after step {done}; minilora finetune --resume {folder} continues from step {training.saved}")
            if isinstance(stop, MemoryError):
                traceback.clear_frames(stop.__traceback__)  # which still hold what the failed step had saved
                fits = advice(model, next(task.batches(plan.seed)), "--tokens-per-batch" if plan.kind == "lm" else "", plan.recompute)
                raise MemoryError(f"memory ran out after step {done}; {fits}. The {plan.product} of that step is in {folder}.") from stop
            raise
        best = training.take_best()
        size = save(training.step)
        records, before, sample_before = training.records.records, dict(about["before"]["figures"]), about["before"]["sample"]
        after, sample_after = measure(model, task, plan.threads, matrix=True), _sample(model, tokenizer, plan)
        known = {"before": about["before"].get("general")}
        seen = [signs.still_zero(model)]
        if "confusion" in after:
            seen.append(signs.never_predicted(after["confusion"], task.labels or []))
            write_text(folder / "confusion.json", to_json({"before": before.pop("confusion"), "after": after.pop("confusion")}) + "\n")
        if not math.isfinite(after["loss"]):
            raise ArithmeticError(f"the held-out loss is not finite; the {plan.product} is in {folder}. A lower --lr may help.")
        if sample_after:
            parts = {"prompt": PROMPT, "before": PROMPT + sample_before, "after": PROMPT + sample_after}
            write_text(folder / "samples.txt", "\n\n".join(f"# {name}\n{text}" for name, text in parts.items()) + "\n")
        figures = {
            "headline": task.headline,
            "before": before,
            "after": after,
            "trainable_parameters": trained,
            "model_parameters": base,
            "trainable_share": trained / base,
            "saved_bytes": size,
            "model_bytes": 4 * base,
            "steps": len(records),
            **({"forgetting": {"text": general.what, **known, "after": measure(model, general, plan.threads)["loss"]}} if general else {}),
            **({} if best is None else {"best_step": best}),
            **({} if scale is None else {"steps_left_out": sum(record["grad_norm"] is None for record in records)}),
            "tokens_per_second": training.tokens / training.seconds,
            "seconds": time.perf_counter() - begun,
            "peak_memory_bytes": peak_memory(plan.backend),
        }
        if have_matplotlib(say):
            unit, nats = task.unit
            method = {"lora": f"LoRA, rank {plan.r}", "full": "full fine-tuning"}.get(plan.method, plan.method)
            title = f"{Path(plan.model).name}, {method}, {len(records)} steps"
            plot_run(folder / "curves.png", records, before["loss"], after["loss"], title, unit, nats)
        if plan.method != "full":
            write_text(folder / "adapter" / "README.md", card(plan, _method(plan, model), task.what, figures))
        results = write_run(figures)  # last: with its results, the run has ended
        _print(say, plan, results, {"before": sample_before, "after": sample_after})
        for sign in filter(None, seen):
            say(f"warning   {sign}")
        say(f"\nwritten to {folder}")
        return {"folder": str(folder), **results}


@contextmanager
def _continued(folder: Path, about: dict[str, Any], leads: bool) -> Iterator[State | None]:
    """The last state of the run in a folder, which is held meanwhile. Raises ValueError when model or data have changed since.

    leads: not a rank other than 0, which only reads.
    """
    with locked(folder) if leads else nullcontext():
        if leads:
            clean(folder)
        state = read_last(folder)
        for what, key in (("the model's weights", "base"), ("the training data", "data")):
            if state is not None and getattr(state, key) != about[key]:
                raise ValueError(f"{folder}: {what} have changed since the run began; it cannot be continued.")
        yield state


def _greet(ranks: Ranks, plan: ResolvedRecipe, about: dict[str, Any], batch: Batch) -> None:
    """Raise ValueError, naming the rank and the difference, unless all ranks do the same work on the same data."""
    free = ("model", "data", "threads", "save_every", "keep")  # may differ; for the first two, what they hold is compared
    settings = {name: value for name, value in asdict(plan).items() if name not in free}
    tokens = hashlib.sha256(batch.ids.tobytes() + batch.labels.tobytes()).hexdigest()
    hashes = {f"the {name} with SHA-256": value for name, value in {**about, "first batch": tokens}.items()}
    ranks.greet({**settings, **tuned.sizes, **hashes}, plan.lanes)


def _sample(model: Any, tokenizer: Tokenizer, recipe: ResolvedRecipe) -> str:
    """A text that a model of plain text generates; empty for other tasks."""
    if recipe.kind != "text" or not recipe.sample_bytes:
        return ""
    with threadpool_limits(1, user_api="blas"):  # one token at a time: products too small for several threads
        return tokenizer.decode(list(generate(model, tokenizer.encode_prompt(PROMPT), recipe.sample_bytes, 0.7, recipe.seed)))


def _save(model: Any, folder: Path, recipe: Recipe) -> int:
    """Write the adapter, or the fully trained model. Returns the bytes of its tensors' file."""
    if recipe.method == "full":
        save_model(model, folder / "model")
        return (folder / "model" / "model.safetensors").stat().st_size
    if recipe.init_lora_weights == "loftq":  # the adapter fits the quantized weights only, which are therefore saved too
        adaptation(model).config.base_model_name_or_path = str((folder / "base").absolute())
        with disabled(model):
            save_model(model, folder / "base")
    return save_adapter(model, folder / "adapter")


def _method(recipe: ResolvedRecipe, model: Any) -> str:
    """The method in words, as "LoRA (pissa, nf4) r=8 alpha=32 on 16 layers, with biases"."""
    if recipe.method != "lora":
        return "full fine-tuning" if recipe.method == "full" else adaptation(model).config.method
    vera = recipe.peft_type == "VERA"
    how = [recipe.quantize] * bool(recipe.quantize) + [recipe.dtype] * (recipe.dtype != "float32")
    how += [str(recipe.init_lora_weights)] * (recipe.init_lora_weights is not True)
    how += [f"LoRA+ of {recipe.loraplus_lr_ratio:g}"] if recipe.loraplus_lr_ratio is not None else []
    also = ["biases"] * (recipe.bias != "none") + ["the head"] * (recipe.task == "classify") + list(recipe.modules_to_save or [])
    name = ("VeRA" if vera else "DoRA" if recipe.use_dora else "LoRA") + (f" ({', '.join(how)})" if how else "")
    alpha = "" if vera else f" alpha={recipe.lora_alpha:g}"
    return f"{name} r={recipe.r}{alpha} on {len(lora_layers(model))} layers{', with ' + ', '.join(also) if also else ''}"


def _print(say: Say, recipe: ResolvedRecipe, results: dict[str, Any], samples: dict[str, str]) -> None:
    if left_out := results.get("steps_left_out"):
        say(f"left out  {left_out} of {results['steps']} steps: their gradients overflowed in {recipe.dtype}")
    name, before, after = results["headline"], results["before"], results["after"]
    losses = f"loss {before['loss']:.4f}, {after['loss']:.4f}"
    say(f"held out  {name.replace('_', ' ')} {before[name]:.3f} before, {after[name]:.3f} after; {losses}")
    if (general := results.get("forgetting")) and general["before"] is not None:
        say(f"general   loss {general['before']:.4f} before, {general['after']:.4f} after, on {general['text']}, which is not trained on")
    say(f"speed     {results['tokens_per_second']:,.0f} tokens a second, {results['seconds']:.1f} s in all")
    say(f"saved     {recipe.product} of {results['saved_bytes'] / 1e3:,.0f} kB; the model has {results['model_bytes'] / 1e3:,.0f} kB")
    for when, text in samples.items() if samples["after"] else ():
        say(f"\n--- a sample {when} ---\n{(PROMPT + text).rstrip()}")
