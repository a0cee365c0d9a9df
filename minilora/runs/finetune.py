"""The main job: adapt a model to data, by LoRA, by another adapter or by full fine-tuning, and measure what came of it."""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from minilora.adapters import METHODS, inject, method_name
from minilora.backend import choose_backend
from minilora.data.records import listed, note
from minilora.formats.adapter import save_adapter
from minilora.formats.checkpoint import load_model, save_model
from minilora.formats.tokenizer import Tokenizer
from minilora.kernels.memory import peak_memory
from minilora.lora import LoraConfig, disabled, lora_layers
from minilora.lora.registry import config_classes
from minilora.models.generate import context_length, generate
from minilora.optim.loraplus import create_loraplus_optimizer
from minilora.optim.optimizers import AdamW
from minilora.optim.preconditioned import create_lora_pro_optimizer, create_lorafa_optimizer, create_riemannian_optimizer
from minilora.optim.schedules import schedule
from minilora.runs.folder import RunFolder
from minilora.runs.plot import have_matplotlib, plot_run
from minilora.runs.recipe import Recipe
from minilora.runs.run_file import published_classes, tokenizer_of
from minilora.runs.tasks import Task, measure, training_task
from minilora.training.few_sample import PulledAdamW, reinitialise
from minilora.training.loop import Diverged, Step, train
from minilora.training.loss_scale import LossScale
from minilora.training.memory import sequences_that_fit
from minilora.training.prefix import PrefixCache

PROMPT = "def read_config(path, encoding=None):\n    "  # what the samples of a text model go on from

LOOK = 4  # batches that initial values from data look at

Say = Callable[[str], None]


def finetune(recipe: Recipe, out: str | Path | None = None, say: Say = print) -> dict[str, Any]:
    """Run a recipe and leave a run folder. Returns the results, which are also in its run.json.

    Raises ValueError or OSError for bad input, before the folder is made; Diverged when the loss is not finite: what was
    trained until then is saved first. Ctrl-C saves likewise, and raises KeyboardInterrupt again.
    """
    begun = time.perf_counter()
    if recipe.tf32:
        if "cupy" in sys.modules and os.environ.get("CUPY_TF32") != "1":
            raise RuntimeError("tf32 has to be asked for before CuPy's first product: set CUPY_TF32=1 before Python starts.")
        os.environ["CUPY_TF32"] = "1"
    recipe.backend = choose_backend(recipe.backend)
    model, tokenizer, task = open_recipe(recipe)
    recipe.settle(task.steps)
    base = sum(p.data.size for _, p in model.parameters())
    optimizer = prepare(model, recipe, task)
    folder = RunFolder.create(out, recipe.method)
    settings = asdict(recipe) | ({} if recipe.data is None else {"data": str(Path(recipe.data).absolute())})  # found from anywhere
    folder.write_run(settings, {}, task.labels, task.trained_on)

    trained = optimizer.flat.data.size
    say(f"model     {recipe.model}: {base:,} parameters, {recipe.backend}, {recipe.threads} thread{'s' * (recipe.threads > 1)}")
    say(f"data      {task.what}")
    say(f"method    {_method(recipe, model)}: {trained:,} trainable parameters, {trained / base:.1%} of the model")

    before, wrote_before = measure(model, task, recipe.threads), _sample(model, tokenizer, recipe)
    records: list[dict[str, Any]] = []
    scale = LossScale.of(model)

    def save(steps: int) -> int:
        """Write what has been made in so many steps. Returns the bytes of its tensors."""
        folder.write_metrics(records)
        size = _save(model, folder, recipe)
        folder.write_run(settings, {"stopped_after_step": steps, **_state(scale)}, task.labels, task.trained_on)
        return size

    try:
        seconds, tokens = _train(model, optimizer, task, recipe, records, scale)
    except (Diverged, KeyboardInterrupt, MemoryError, OSError) as stop:
        done = stop.kept if isinstance(stop, Diverged) else optimizer.t if isinstance(stop, MemoryError) else len(records)
        save(done)
        if isinstance(stop, Diverged):
            say(f"the {_made(recipe)} as of step {done}, the last whose loss was finite, is in {folder.path}")
        if isinstance(stop, MemoryError):
            traceback.clear_frames(stop.__traceback__)  # what the failed step had saved is still held there
            raise MemoryError(_too_large(model, recipe, task, done, folder.path)) from stop
        raise
    size = save(len(records))
    after, wrote_after = measure(model, task, recipe.threads), _sample(model, tokenizer, recipe)
    if not math.isfinite(after["loss"]):
        raise ArithmeticError(f"the held-out loss is not finite; the {_made(recipe)} is in {folder.path}. A lower --lr may help.")
    if wrote_after:
        folder.write_samples(PROMPT, wrote_before, wrote_after)
    left_out = sum(record["grad_norm"] is None for record in records)
    if left_out:
        say(f"left out  {left_out} of {len(records)} steps changed nothing: their gradients overflowed in {recipe.dtype}")
    results = {
        "headline": task.headline,
        "before": before,
        "after": after,
        "trainable_parameters": trained,
        "model_parameters": base,
        "trainable_share": trained / base,
        "saved_bytes": size,
        "model_bytes": 4 * base,
        "steps": len(records),
        **({} if scale is None else {"steps_left_out": left_out}),
        "tokens_per_second": tokens / seconds,
        "seconds": time.perf_counter() - begun,
        "peak_memory_bytes": peak_memory(recipe.backend),
        **_state(scale),
    }
    folder.write_run(settings, results, task.labels, task.trained_on)
    _tell(say, folder, recipe, results, wrote_before, wrote_after)
    _draw(say, folder, recipe, records, results)
    return {"folder": str(folder.path), **results}


def open_recipe(recipe: Recipe) -> tuple[Any, Tokenizer, Task]:
    """The model, its tokenizer and the data, each checked against the others."""
    options: dict[str, Any] = {"quantize": recipe.quantize}
    if recipe.kind == "classify":  # the data are read first: they say how many classes a new head has
        tokenizer = tokenizer_of(recipe.model)
        published = published_classes(recipe.model)
        task = training_task(recipe, tokenizer, None if recipe.new_head else published)
        options["labels"] = task.labels or published
        if recipe.new_head and published:
            note(f"{recipe.model}: the head for {listed(published, 40)} is replaced by one for {listed(task.labels or (), 40)}.")
        model = load_model(recipe.model, recipe.backend, recipe.dtype, new_head=recipe.new_head, seed=recipe.seed, **options)
        if not hasattr(model, "classifier"):
            raise ValueError(f"{recipe.model} ({type(model).__name__}) has no classifier; task classify needs a BERT.")
    else:
        model = load_model(recipe.model, recipe.backend, recipe.dtype, **options)
        if not hasattr(model, "decode"):
            raise ValueError(f"{recipe.model} ({type(model).__name__}) is no decoder; task lm needs one. Is --task classify meant?")
        tokenizer = tokenizer_of(recipe.model, model.config.vocab_size)
        task = training_task(recipe, tokenizer)
    if recipe.window > context_length(model):
        raise ValueError(f"a window of {recipe.window} is longer than the model's {context_length(model)} positions.")
    return model, tokenizer, task


def prepare(model: Any, recipe: Recipe, task: Task) -> AdamW:
    """Make trainable what the method trains, and its optimizer."""
    assert recipe.lr is not None and recipe.bias is not None
    if recipe.reinit is not None:
        reinitialise(model, recipe.reinit, rng=recipe.seed)
    if recipe.method == "full":
        model.unfreeze()
    elif recipe.method == "lora":
        inject(model, _config(recipe), rng=recipe.seed, train_step=partial(_look, model, task, recipe.seed))
    else:
        bottleneck = {"reduction_factor": recipe.reduction_factor} if recipe.method == "bottleneck" else {}
        inject(model, METHODS[recipe.method](**bottleneck, modules_to_save=recipe.modules_to_save), rng=recipe.seed)
    for _, layer in model.modules():
        if hasattr(layer, "recompute"):
            layer.recompute = recipe.recompute
    return _optimizer(model, recipe)


def _config(recipe: Recipe) -> LoraConfig:
    """The configuration of the recipe's adapters, for `inject`."""
    names = "r target_modules layers_to_transform bias modules_to_save use_dora init_lora_weights use_rslora".split()
    values = {name: getattr(recipe, name) for name in names}
    values["task_type"] = "SEQ_CLS" if recipe.task == "classify" else "CAUSAL_LM"
    if recipe.peft_type == "LORA":
        values |= {"lora_alpha": recipe.lora_alpha, "lora_dropout": recipe.lora_dropout}
    else:
        values["vera_dropout"] = recipe.lora_dropout
    return config_classes()[recipe.peft_type](**values)


def _look(model: Any, task: Task, seed: int) -> None:
    """Run the model on the first batches, forward and backward, for initial values from data. Training begins with the same."""
    for batch in islice(task.batches(seed), LOOK):
        model.loss_backward(model.loss(batch.ids, batch.labels, batch.offsets)[1])


def _optimizer(model: Any, recipe: Recipe) -> AdamW:
    """AdamW, one that is pulled back, or relatives that know A and B."""
    assert recipe.lr is not None
    if recipe.optimizer == "lora_fa":
        return create_lorafa_optimizer(model, recipe.lr, recipe.weight_decay)
    kind: type[AdamW] = AdamW
    options: dict[str, Any] = {"bias_correction": recipe.bias_correction}
    if recipe.pull:
        kind, options["pull"] = PulledAdamW, recipe.pull
    if recipe.loraplus_lr_ratio is not None:
        options |= {"loraplus_lr_ratio": recipe.loraplus_lr_ratio, "loraplus_weight_decay": recipe.weight_decay}
        return create_loraplus_optimizer(model, kind, lr=recipe.lr, **options)
    options["weight_decay"] = recipe.weight_decay
    if recipe.optimizer != "adamw":
        create = {"riemannian": create_riemannian_optimizer, "lora_pro": create_lora_pro_optimizer}[recipe.optimizer]
        return create(model, kind, lr=recipe.lr, **options)
    return kind(model.parameters(), recipe.lr, **options)


def prefix_for(task: Task, recipe: Recipe) -> PrefixCache | None:
    """Where what frozen blocks give is kept; None where nothing comes a second time."""
    assert recipe.steps is not None
    once = task.steps(1, recipe.accumulate, recipe.seed)
    comes_again = once is not None and recipe.steps > once
    return PrefixCache() if recipe.cache and comes_again else None


def _state(scale: LossScale | None) -> dict[str, Any]:
    """What a run in float16 would go on from, for its run.json."""
    return {} if scale is None else {"loss_scale": scale.state()}


def steps_of(
    model: Any, optimizer: AdamW, task: Task, recipe: Recipe, prefix: PrefixCache | None, scale: LossScale | None = None
) -> Iterator[Step]:
    """The steps of a settled recipe."""
    assert recipe.steps is not None
    rate = schedule(recipe.schedule, recipe.steps, int(recipe.warmup or 0))
    options: dict[str, Any] = {"clip": recipe.clip, "accumulate": recipe.accumulate, "threads": recipe.threads, "seed": recipe.seed}
    return train(model, optimizer, task.batches(recipe.seed), recipe.steps, rate, prefix=prefix, loss_scale=scale, **options)


def _train(
    model: Any, optimizer: AdamW, task: Task, recipe: Recipe, records: list[dict[str, Any]], scale: LossScale | None
) -> tuple[float, int]:
    """Run the loop behind a progress bar, collecting a record a step. Returns (seconds, tokens) of the training alone."""
    seconds, tokens = 0.0, 0
    unit, nats = ("bits/byte", math.log(2)) if task.headline == "bits_per_byte" else ("loss", 1.0)
    with tqdm(total=recipe.steps, unit="step", desc=recipe.method, dynamic_ncols=True) as bar:
        for s in steps_of(model, optimizer, task, recipe, prefix_for(task, recipe), scale):
            seconds, tokens = seconds + s.seconds, tokens + s.tokens
            norm = s.grad_norm if math.isfinite(s.grad_norm) else None  # JSON knows no infinity; the step was left out
            records.append({"step": s.step, "loss": s.loss, "lr": s.lr, "grad_norm": norm, "tokens": s.tokens})
            bar.set_postfix_str(f"{s.loss / nats:.3f} {unit}, {tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update()
    return seconds, tokens


def _sample(model: Any, tokenizer: Tokenizer, recipe: Recipe) -> str:
    """What a model of text writes; nothing for other tasks."""
    if recipe.kind != "text" or not recipe.sample_bytes:
        return ""
    with threadpool_limits(1, user_api="blas"):  # one token at a time: products too small to share out
        return tokenizer.decode(list(generate(model, tokenizer.encode_prompt(PROMPT), recipe.sample_bytes, 0.7, recipe.seed)))


def _save(model: Any, folder: RunFolder, recipe: Recipe) -> int:
    """Write the adapter, or the whole model. Returns the bytes of its tensors' file."""
    if recipe.method != "full":
        if recipe.init_lora_weights == "loftq":  # the adapter fits the quantized weights only, so that they are kept with it
            model.lora_config.base_model_name_or_path = str(folder.base.absolute())
            with disabled(model):
                save_model(model, folder.base)
        return save_adapter(model, folder.adapter)
    save_model(model, folder.model)
    return (folder.model / "model.safetensors").stat().st_size


def _method(recipe: Recipe, model: Any) -> str:
    if recipe.method != "lora":
        return "full fine-tuning" if recipe.method == "full" else method_name(model.lora_config)
    also = ["biases"] * (recipe.bias != "none") + (["the head"] if recipe.task == "classify" else []) + list(recipe.modules_to_save or [])
    how = [recipe.quantize] if recipe.quantize else []
    how += [recipe.dtype] * (recipe.dtype != "float32")
    how += [str(recipe.init_lora_weights)] * (recipe.init_lora_weights is not True) + [recipe.optimizer] * (recipe.optimizer != "adamw")
    if recipe.loraplus_lr_ratio is not None:
        how.append(f"LoRA+ of {recipe.loraplus_lr_ratio:g}")
    name, alpha = "DoRA" if recipe.use_dora else "LoRA", f" alpha={recipe.lora_alpha:g}"
    if recipe.peft_type == "VERA":
        name, alpha = "VeRA", ""
    name += f" ({', '.join(how)})" if how else ""
    layers = len(lora_layers(model))
    return f"{name} r={recipe.r}{alpha} on {layers} layers{', with ' + ', '.join(also) if also else ''}"


def _too_large(model: Any, recipe: Recipe, task: Task, step: int, folder: Path) -> str:
    """What to say when memory has run out, with a size of the batch that fits."""
    batch = next(task.batches(recipe.seed))
    n, fit = len(batch.offsets) - 1, sequences_that_fit(model, batch)
    flag, size = ("--tokens-per-batch", int(batch.offsets[fit])) if recipe.kind == "lm" else ("--batch-size", fit)
    advice = f"{fit} of a batch's {n} sequences fit: {flag} {size}" if fit else f"not one of {n} sequences fits: a shorter --window"
    advice += "" if recipe.recompute else ", or --recompute"
    return f"memory ran out after step {step}; {advice}. The {_made(recipe)} as it was then is in {folder}."


def _made(recipe: Recipe) -> str:
    return "model" if recipe.method == "full" else "adapter"


def _tell(say: Say, folder: RunFolder, recipe: Recipe, results: dict[str, Any], wrote_before: str, wrote_after: str) -> None:
    name, before, after = results["headline"], results["before"], results["after"]
    what = name.replace("_", " ")
    say(f"held out  {what} {before[name]:.3f} before, {after[name]:.3f} after; loss {before['loss']:.4f}, {after['loss']:.4f}")
    say(f"speed     {results['tokens_per_second']:,.0f} tokens a second, {results['seconds']:.1f} s in all")
    say(f"saved     {_made(recipe)} of {results['saved_bytes'] / 1e3:,.0f} kB beside a model of {results['model_bytes'] / 1e3:,.0f} kB")
    if wrote_after:
        for title, text in (("before", wrote_before), ("after", wrote_after)):
            say(f"\n--- a sample {title} ---")
            say((PROMPT + text).rstrip())
    say(f"\nwritten to {folder.path}")


def _draw(say: Say, folder: RunFolder, recipe: Recipe, records: list[dict[str, Any]], results: dict[str, Any]) -> None:
    if not have_matplotlib():
        say("no picture of the curves: matplotlib is not installed (pip install 'minilora[plot]')")
        return
    method = {"lora": f"LoRA, rank {recipe.r}", "full": "full fine-tuning"}.get(recipe.method, recipe.method)
    unit, scale = ("bits per byte", math.log(2)) if results["headline"] == "bits_per_byte" else ("loss", 1.0)
    before, after = (results[when]["loss"] / scale for when in ("before", "after"))
    title = f"{Path(recipe.model).name}, {method}, {len(records)} steps"
    plot_run(folder.curves, records, before, after, title, unit, scale)
