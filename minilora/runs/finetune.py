"""`minilora finetune`: adapt a model to data, and measure it before and after."""

from __future__ import annotations

import math
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from minilora.backend import choose_backend
from minilora.formats.adapter import save_adapter
from minilora.formats.atomic import to_json, write_json, write_text
from minilora.formats.checkpoint import save_model
from minilora.formats.tokenizer import Tokenizer
from minilora.kernels.cuda.blas import allow_tf32
from minilora.kernels.memory import peak_memory
from minilora.lora import adaptation, disabled, lora_layers
from minilora.models.generate import generate
from minilora.optim.optimizers import AdamW
from minilora.runs import Say
from minilora.runs.folder import new_folder, write_lines
from minilora.runs.plot import have_matplotlib, plot_run
from minilora.runs.prepare import open_recipe, prefix_for, prepare, steps_of
from minilora.runs.recipe import Recipe, ResolvedRecipe
from minilora.runs.tasks import Task, measure
from minilora.training.loss_scale import LossScale
from minilora.training.memory import advice
from minilora.training.watch import Diverged

PROMPT = "def read_config(path, encoding=None):\n    "  # which the samples of a text model continue
NORMS = 100  # measurements of the norms of every parameter in a run, at most, and one after the last step's gradient

Records = list[dict[str, Any]]


def finetune(recipe: Recipe, out: str | Path | None = None, say: Say = print) -> dict[str, Any]:
    """Run a recipe and leave a run folder. Returns the results, which are also in its run.json.

    Raises ValueError or OSError for bad input, before the folder is made; Diverged when the loss is not finite, after saving the last
    good parameters. Ctrl-C saves too, and raises KeyboardInterrupt again.
    """
    begun = time.perf_counter()
    if recipe.tf32:
        allow_tf32()
    recipe = replace(recipe, backend=choose_backend(recipe.backend))
    model, tokenizer, task = open_recipe(recipe)
    plan = recipe.resolve(task.steps)
    base = sum(p.data.size for _, p in model.parameters())
    optimizer = prepare(model, plan, task)
    trained = optimizer.flat.data.size
    folder = new_folder(out, plan.method)
    settings = asdict(plan) | ({} if plan.data is None else {"data": str(Path(plan.data).absolute())})  # found from anywhere
    records: Records = []
    norms: Records = [{"parameters": optimizer.flat.paths}]
    scale = LossScale.of(model)

    def write_run(results: dict[str, Any]) -> dict[str, Any]:
        """Write run.json. Returns the results in it: those given, and the loss scale, if there is one."""
        results = results | ({} if scale is None else {"loss_scale": scale.state()})
        about = {"configuration": settings, "labels": task.labels, "trained_on": task.trained_on}
        write_json(folder / "run.json", {**about, "results": results})
        return results

    def save(steps: int) -> int:
        """Write the result of so many steps. Returns the bytes of its tensors."""
        write_lines(folder / "metrics.jsonl", records)
        write_lines(folder / "norms.jsonl", norms)
        size = _save(model, folder, plan)
        write_run({"stopped_after_step": steps})
        return size

    write_run({})
    say(f"model     {plan.model}: {base:,} parameters, {plan.backend}, {plan.threads} thread{'s' * (plan.threads > 1)}")
    say(f"data      {task.what}")
    say(f"method    {_method(plan, model)}: {trained:,} trainable parameters, {trained / base:.1%} of the model")
    before, sample_before = measure(model, task, plan.threads, matrix=True), _sample(model, tokenizer, plan)
    try:
        seconds, tokens = _train(model, optimizer, task, plan, records, norms, scale)
    except (Diverged, KeyboardInterrupt, MemoryError, OSError) as stop:
        done = stop.kept if isinstance(stop, Diverged) else optimizer.t if isinstance(stop, MemoryError) else len(records)
        save(done)
        if isinstance(stop, Diverged):
            say(f"the {plan.product} of step {done}, the last whose loss was finite, is in {folder}")
        if isinstance(stop, MemoryError):
            traceback.clear_frames(stop.__traceback__)  # which still hold what the failed step had saved
            fits = advice(model, next(task.batches(plan.seed)), "--tokens-per-batch" if plan.kind == "lm" else "", plan.recompute)
            raise MemoryError(f"memory ran out after step {done}; {fits}. The {plan.product} of that step is in {folder}.") from stop
        raise
    size = save(len(records))
    after, sample_after = measure(model, task, plan.threads, matrix=True), _sample(model, tokenizer, plan)
    if "confusion" in after:
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
        **({} if scale is None else {"steps_left_out": sum(record["grad_norm"] is None for record in records)}),
        "tokens_per_second": tokens / seconds,
        "seconds": time.perf_counter() - begun,
        "peak_memory_bytes": peak_memory(plan.backend),
    }
    results = write_run(figures)
    _print(say, plan, results, {"before": sample_before, "after": sample_after})
    say(f"\nwritten to {folder}")
    if have_matplotlib(say):
        unit, nats = task.unit
        method = {"lora": f"LoRA, rank {plan.r}", "full": "full fine-tuning"}.get(plan.method, plan.method)
        title = f"{Path(plan.model).name}, {method}, {len(records)} steps"
        plot_run(folder / "curves.png", records, before["loss"], after["loss"], title, unit, nats)
    return {"folder": str(folder), **results}


def _train(
    model: Any, optimizer: AdamW, task: Task, recipe: ResolvedRecipe, records: Records, norms: Records, scale: LossScale | None
) -> tuple[float, int]:
    """Run the loop with a progress bar, appending one record a step, and one of norms on every `norms_every`-th.

    Returns (seconds, tokens) of the training alone.
    """
    seconds, tokens = 0.0, 0
    unit, nats = task.unit
    options = {"loss_scale": scale, "norms_every": -(-recipe.steps // NORMS)}
    with tqdm(total=recipe.steps, unit="step", desc=recipe.method, dynamic_ncols=True) as bar:
        for s in steps_of(model, optimizer, task, recipe, prefix_for(task, recipe), **options):
            seconds, tokens = seconds + s.seconds, tokens + s.tokens
            norm = s.grad_norm if math.isfinite(s.grad_norm) else None  # JSON has no infinity; the step was left out
            records.append({"step": s.step, "loss": s.loss, "lr": s.lr, "grad_norm": norm, "tokens": s.tokens})
            if s.norms is not None:
                grads, values = ([float(f"{x:.6g}") for x in row] for row in s.norms)
                norms.append({"step": s.step, "grad_norms": grads, "norms": values})
            bar.set_postfix_str(f"{s.loss / nats:.3f} {unit}, {tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update()
    return seconds, tokens


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
    say(f"speed     {results['tokens_per_second']:,.0f} tokens a second, {results['seconds']:.1f} s in all")
    say(f"saved     {recipe.product} of {results['saved_bytes'] / 1e3:,.0f} kB; the model has {results['model_bytes'] / 1e3:,.0f} kB")
    for when, text in samples.items() if samples["after"] else ():
        say(f"\n--- a sample {when} ---\n{(PROMPT + text).rstrip()}")
