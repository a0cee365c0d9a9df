"""The main job: adapt a byte-level decoder to a text, by LoRA or by full fine-tuning, and measure what came of it."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from minilora.backend import choose_backend, peak_memory
from minilora.formats.adapter import save_adapter
from minilora.formats.checkpoint import BUNDLED, load_model, save_model
from minilora.lora import LoraConfig, inject, lora_layers
from minilora.models import GPT2
from minilora.models.generate import generate
from minilora.training.data import check_length, held_out_windows, random_windows
from minilora.training.evaluate import evaluate
from minilora.training.loop import Diverged, train
from minilora.training.optimizers import AdamW
from minilora.training.plot import have_matplotlib, plot_run
from minilora.training.run_folder import RunFolder
from minilora.training.schedules import schedule
from minilora.training.text import decode, encode, read_text, split_text, stdlib_source

LEARNING_RATE = {"lora": 1e-2, "full": 2e-3}  # each the best of the same grid: benchmarks/lora_vs_full.py
PROMPT = "def read_config(path, encoding=None):\n    "


@dataclass
class Recipe:
    """What `finetune` is asked. None takes: for lr the tuned rate of the method, for warmup 10 steps or half the run, for data
    the standard library's source. Raises ValueError for numbers out of range.
    """

    model: str = BUNDLED
    data: str | None = None
    method: str = "lora"
    r: int = 8
    lora_alpha: float = 16
    target_modules: str | list[str] = "all-linear"
    lr: float | None = None
    schedule: str = "cosine"
    warmup: int | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    steps: int = 200
    batch_size: int = 8
    accumulate: int = 1
    window: int = 256
    eval_bytes: int = 65536
    seed: int = 0
    threads: int = 0
    backend: str = "auto"
    sample_bytes: int = 240

    def __post_init__(self) -> None:
        if self.method not in LEARNING_RATE:
            raise ValueError(f"unknown method {self.method!r}; choose {' or '.join(LEARNING_RATE)}.")
        for name in ("steps", "batch_size", "accumulate", "window", "eval_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        self.warmup = min(10, self.steps // 2) if self.warmup is None else self.warmup
        for name in ("threads", "sample_bytes", "seed", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}.")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}.")
        self.threads = self.threads or min(os.cpu_count() or 1, 8)
        self.lr = LEARNING_RATE[self.method] if self.lr is None else self.lr


def finetune(recipe: Recipe, out: str | Path | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run a recipe and leave a run folder. Returns the results, which are also in its run.json.

    Raises ValueError or OSError for bad input, before the folder is made; Diverged when the loss is not finite: what was
    trained until then is saved first. Ctrl-C saves likewise, and raises KeyboardInterrupt again.
    """
    recipe.backend = choose_backend(recipe.backend)
    model = load_model(recipe.model, recipe.backend)
    train_text, held_out, what = _texts(recipe, model)
    optimizer = _prepare(model, recipe)
    rate = schedule(recipe.schedule, recipe.steps, recipe.warmup or 0)
    batches = random_windows(train_text, recipe.window, recipe.batch_size, np.random.default_rng(recipe.seed))
    folder = RunFolder.create(out, recipe.method)
    folder.write_run(asdict(recipe), {})

    total = sum(p.data.size for _, p in model.parameters())
    trained = optimizer.flat.data.size
    base = total - sum(layer.lora_A.data.size + layer.lora_B.data.size for _, layer in lora_layers(model))
    say(f"model     {recipe.model}: {base:,} parameters, {recipe.backend}, {recipe.threads} thread{'s' * (recipe.threads > 1)}")
    say(f"data      {what}: {len(train_text):,} bytes to train on, {len(held_out):,} held out")
    method = (
        f"LoRA r={recipe.r} alpha={recipe.lora_alpha:g} on {len(lora_layers(model))} layers"
        if recipe.method == "lora"
        else "full fine-tuning"
    )
    say(f"method    {method}: {trained:,} trainable parameters, {trained / base:.1%} of the model")

    def measure() -> float:
        nats, _ = evaluate(model, held_out_windows(held_out, recipe.window, 4), recipe.threads)
        return nats / math.log(2)

    def sample() -> str:
        with threadpool_limits(1, user_api="blas"):  # one token at a time: products too small to share out
            return decode(list(generate(model, encode(PROMPT), recipe.sample_bytes, 0.7, recipe.seed)))

    begun = time.perf_counter()
    before, wrote_before = measure(), sample()
    records: list[dict[str, Any]] = []
    try:
        seconds, tokens = _train(model, optimizer, batches, rate, recipe, records)
    except (Diverged, KeyboardInterrupt) as stop:
        _save(model, folder, recipe)
        folder.write_metrics(records)
        folder.write_run(asdict(recipe), {"stopped_after_step": len(records)})
        if isinstance(stop, Diverged):
            say(f"the {'adapter' if recipe.method == 'lora' else 'model'} as of step {stop.kept}, the last good one, is in {folder.path}")
        raise
    folder.write_metrics(records)
    size = _save(model, folder, recipe)
    after, wrote_after = measure(), sample()
    folder.write_samples(PROMPT, wrote_before, wrote_after)
    results = {
        "bits_per_byte_before": before,
        "bits_per_byte_after": after,
        "trainable_parameters": trained,
        "model_parameters": base,
        "trainable_share": trained / base,
        "saved_bytes": size,
        "model_bytes": 4 * base,
        "steps": len(records),
        "tokens_per_second": tokens / seconds,
        "seconds": time.perf_counter() - begun,
        "peak_memory_bytes": peak_memory(recipe.backend),
    }
    folder.write_run(asdict(recipe), results)
    _tell(say, folder, recipe, results, wrote_before, wrote_after)
    _draw(say, folder, recipe, records, before, after)
    return {"folder": str(folder.path), **results}


def _texts(recipe: Recipe, model: GPT2) -> tuple[np.ndarray, np.ndarray, str]:
    """(train, held out, what it is), checked against the model and the window."""
    if model.config.vocab_size < 256:
        raise ValueError(f"{recipe.model} has {model.config.vocab_size} tokens; a model of bytes needs 256.")
    if recipe.window > model.config.n_positions:
        raise ValueError(f"a window of {recipe.window} is longer than the model's {model.config.n_positions} positions.")
    if recipe.data is None:
        train_text, held_out = stdlib_source(held_out=False), stdlib_source(held_out=True)
        what = f"Python source of the standard library {sys.version_info.major}.{sys.version_info.minor}"
    else:
        train_text, held_out = split_text(read_text(recipe.data))
        what = recipe.data
    held_out = held_out[: recipe.eval_bytes + 1]
    check_length(train_text, recipe.window)
    check_length(held_out, recipe.window)
    return train_text, held_out, what


def _prepare(model: GPT2, recipe: Recipe) -> AdamW:
    """Make trainable what the method trains, and its optimizer."""
    if recipe.method == "lora":
        config = LoraConfig(
            r=recipe.r, lora_alpha=recipe.lora_alpha, target_modules=recipe.target_modules, base_model_name_or_path=recipe.model
        )
        inject(model, config, rng=recipe.seed)
    else:
        model.unfreeze()
    assert recipe.lr is not None
    return AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)


def _train(model: GPT2, optimizer: AdamW, batches: Any, rate: Any, recipe: Recipe, records: list[dict[str, Any]]) -> tuple[float, int]:
    """Run the loop behind a progress bar, collecting a record a step. Returns (seconds, tokens) of the training alone."""
    seconds, tokens = 0.0, 0
    steps = train(
        model,
        optimizer,
        batches,
        recipe.steps,
        rate,
        clip=recipe.clip,
        accumulate=recipe.accumulate,
        threads=recipe.threads,
        seed=recipe.seed,
    )
    with tqdm(total=recipe.steps, unit="step", desc=recipe.method, dynamic_ncols=True) as bar:
        for s in steps:
            seconds, tokens = seconds + s.seconds, tokens + s.tokens
            records.append({"step": s.step, "loss": s.loss, "lr": s.lr, "grad_norm": s.grad_norm, "tokens": s.tokens})
            bar.set_postfix_str(f"{s.loss / math.log(2):.3f} bits/byte, {tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update()
    return seconds, tokens


def _save(model: GPT2, folder: RunFolder, recipe: Recipe) -> int:
    """Write the adapter, or the whole model. Returns the bytes of its tensors' file."""
    if recipe.method == "lora":
        return save_adapter(model, folder.adapter)
    save_model(model, folder.model)
    return (folder.model / "model.safetensors").stat().st_size


def _tell(say: Callable[[str], None], folder: RunFolder, recipe: Recipe, results: dict[str, Any], before: str, after: str) -> None:
    say(f"held out  {results['bits_per_byte_before']:.3f} bits per byte before, {results['bits_per_byte_after']:.3f} after")
    say(f"speed     {results['tokens_per_second']:,.0f} tokens a second, {results['seconds']:.1f} s in all")
    name = "adapter" if recipe.method == "lora" else "model"
    say(f"saved     {name} of {results['saved_bytes'] / 1e3:,.0f} kB beside a model of {results['model_bytes'] / 1e3:,.0f} kB")
    for title, text in (("before", before), ("after", after)):
        say(f"\n--- a sample {title} ---")
        say((PROMPT + text).rstrip())
    say(f"\nwritten to {folder.path}")


def _draw(
    say: Callable[[str], None], folder: RunFolder, recipe: Recipe, records: list[dict[str, Any]], before: float, after: float
) -> None:
    if have_matplotlib():
        method = f"LoRA, rank {recipe.r}" if recipe.method == "lora" else "full fine-tuning"
        plot_run(folder.curves, records, before, after, f"{recipe.model}, {method}, {len(records)} steps")
    else:
        say("no picture of the curves: matplotlib is not installed (pip install 'minilora[plot]')")
