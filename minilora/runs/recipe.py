"""What a fine-tune is asked to do, and the defaults that depend on the model and the data."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

from minilora import adapters
from minilora.data.records import is_dataset
from minilora.formats.fetch import BUNDLED
from minilora.optim.schedules import schedule

TASKS = ("lm", "classify")
DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("lora", "full", *adapters.METHODS)
WITHOUT_EFFECT = {  # {kind of data: (in words, settings that it does not read)}
    "text": ("plain text", "tokens_per_batch mask_prompt"),
    "lm": ("records to continue", "batch_size eval_bytes sample_bytes"),
    "classify": ("texts with a class", "tokens_per_batch mask_prompt eval_bytes sample_bytes"),
}
OPTIMIZERS = ("adamw", "riemannian", "lora_pro", "lora_fa")

# Peak learning rates. Those of LoRA and of full fine-tuning of the bundled model are the best of one grid (benchmarks/lora_vs_full.py);
# for published models LoRA takes about ten times the rate of full fine-tuning ("LoRA Without Regret", 2025), and what trains fewer
# numbers still more.
_RATES: dict[str, dict[str, float]] = {
    BUNDLED: {"lora": 8e-3, "full": 2e-3, "bottleneck": 8e-3, "bitfit": 2e-2, "layer-norm": 2e-2, "head": 2e-2},
    "lm": {"lora": 5e-4, "full": 5e-5, "bottleneck": 1e-3, "bitfit": 5e-3, "layer-norm": 5e-3, "head": 5e-3},
    "classify": {"lora": 1e-3, "full": 5e-5, "bottleneck": 1e-3, "bitfit": 5e-3, "layer-norm": 5e-3, "head": 5e-3},
}


def threads_for(requested: int | None) -> int:
    """The number requested; by default the cores, at most 8. Raises ValueError for one below 0."""
    if (requested or 0) < 0:
        raise ValueError(f"threads must be at least 0, got {requested}.")
    return requested or min(os.cpu_count() or 1, 8)


@dataclass
class Recipe:
    """What `finetune` is asked; the names are those of the flags. None takes a default that depends on the model or the data:

    data            the standard library's source
    bias, modules_to_save   for the bundled model all biases and the layer norms, else none
    lr              by model, task and method, see _RATES
    steps           120 for text; else `epochs` (3) times the batches of an epoch
    warmup          10 steps, or half the run if that is shorter; below 1 it is a share of the run
    eval_bytes      how much held-out text to measure on, in bytes for the bundled model (65,536), else in tokens (8,192)
    sample_bytes    240 for the bundled model, else 0: no samples, as they go on from Python source
    recompute       blocks save their inputs alone, and run forward again in the backward pass: less memory, more time
    cache           what frozen blocks give is kept over epochs (training/prefix.py)
    reinit          None; else the pooler and so many top blocks begin anew (method full only), see training/few_sample.py
    pull            of the weights towards where they began; bias_correction=False is Adam as the first BERT had it
    train_size, eval_size   of texts with a class: all; else at most so many, drawn by the seed
    dtype           of activations and frozen matrices; what is trained, norms and loss are of float32 (kernels/half.py)
    encoding        of text and record files
    new_head        a classifier that the model has is replaced by one for the classes of the data
    tf32            on a GPU: products of float32 in 19 bits, several times as fast, with errors of 1e-3
    threads         the cores, at most 8
    Raises ValueError for values out of range.
    """

    model: str = BUNDLED
    data: str | None = None
    task: str = "lm"
    method: str = "lora"
    peft_type: str = "LORA"
    r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    layers_to_transform: list[int] | None = None
    use_rslora: bool = False
    use_dora: bool | str = False
    init_lora_weights: bool | str = True
    quantize: str = ""
    dtype: str = "float32"
    optimizer: str = "adamw"
    loraplus_lr_ratio: float | None = None
    reduction_factor: float = 16
    bias: str | None = None
    modules_to_save: list[str] | None = None
    lr: float | None = None
    schedule: str = "linear"
    warmup: float | None = None
    weight_decay: float = 0.0
    pull: float = 0.0
    bias_correction: bool = True
    reinit: int | None = None
    clip: float = 1.0
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    tokens_per_batch: int = 2048
    accumulate: int = 1
    recompute: bool = False
    cache: bool = True
    window: int = 256
    mask_prompt: bool = True
    encoding: str = "utf-8"
    new_head: bool = False
    eval_bytes: int | None = None
    train_size: int | None = None
    eval_size: int | None = None
    seed: int = 0
    threads: int = 0
    backend: str = "auto"
    tf32: bool = False
    sample_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; choose {', '.join(METHODS)}.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; choose {' or '.join(OPTIMIZERS)}.")
        if self.optimizer != "adamw" and self.loraplus_lr_ratio is not None:
            raise ValueError(f"loraplus_lr_ratio and optimizer {self.optimizer!r} exclude each other; choose one.")
        if self.optimizer == "lora_fa" and (self.pull or not self.bias_correction):
            raise ValueError("optimizer lora_fa has neither a pull nor a choice of bias_correction; leave them out.")
        usual = {"use_dora": False, "init_lora_weights": True, "optimizer": "adamw", "loraplus_lr_ratio": None, "quantize": ""}
        usual["peft_type"] = "LORA"
        if self.method != "lora" and (named := next((name for name, value in usual.items() if getattr(self, name) != value), None)):
            raise ValueError(f"{named} is for LoRA; method {self.method} has none.")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; choose {', '.join(DTYPES)}.")
        if self.dtype != "float32" and (self.quantize or self.method == "full"):
            other = "quantize" if self.quantize else "method full, which trains in float32,"
            raise ValueError(f"dtype {self.dtype} and {other} exclude each other; choose one.")
        if self.quantize and self.init_lora_weights == "loftq":
            raise ValueError("init_lora_weights 'loftq' quantizes by itself; leave quantize out.")
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}; choose {' or '.join(TASKS)}.")
        if self.task == "classify" and self.data is None:
            raise ValueError("task classify needs --data: a record file with text and label, or a folder with train and valid.")
        bundled = self.model == BUNDLED
        self.eval_bytes = (65536 if bundled else 8192) if self.eval_bytes is None else self.eval_bytes
        self.sample_bytes = (240 if bundled else 0) if self.sample_bytes is None else self.sample_bytes
        counts = "batch_size tokens_per_batch accumulate window eval_bytes steps train_size eval_size".split()
        for name in (*counts, "sample_bytes", "seed"):
            least, value = int(name in counts), getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        for name in ("train_size", "eval_size"):
            if getattr(self, name) is not None and self.task != "classify":
                raise ValueError(f"{name} counts texts with a class; it needs task classify.")
        if self.reinit is not None and self.method != "full":
            raise ValueError(f"reinit changes the weights that method {self.method} leaves frozen and does not save; it needs method full.")
        for name in ("pull", "weight_decay", "warmup"):
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}.")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}.")
        if self.epochs is not None and not 0 < self.epochs <= 100_000:
            raise ValueError(f"epochs must be above 0 and at most 100,000, got {self.epochs}.")
        if self.data == "":
            raise ValueError("data is empty: name a file or a folder.")
        if self.new_head and self.task != "classify":
            raise ValueError("new_head replaces a classifier; it needs task classify.")
        self.threads = threads_for(self.threads)

    @property
    def kind(self) -> str:
        """ "text" in windows, records to continue ("lm"), or records with a class ("classify")."""
        return "text" if self.task == "lm" and (self.data is None or not is_dataset(self.data)) else self.task

    def settle(self, steps: Callable[[float, int, int], int | None]) -> None:
        """Fill in what was left open. steps(epochs, accumulate, seed) is how many those are, None where there are no epochs.

        Raises ValueError for epochs of plain text, and a schedule or warm-up that does not fit.
        """
        bundled = self.model == BUNDLED and self.method == "lora"
        self.bias = self.bias or ("all" if bundled else "none")
        if self.modules_to_save is None and bundled:
            self.modules_to_save = ["ln_1", "ln_2", "ln_f"]
        self.lr = _RATES[BUNDLED if self.model == BUNDLED else self.task][self.method] if self.lr is None else self.lr
        if self.steps is None:
            counted = steps(3 if self.epochs is None else self.epochs, self.accumulate, self.seed)
            if counted is None and self.epochs is not None:
                raise ValueError("plain text is read in windows that start anywhere, which have no epochs; give steps.")
            self.steps = counted or 120
        self.warmup = min(10, self.steps // 2) if self.warmup is None else self.warmup
        self.warmup = round(self.warmup if self.warmup >= 1 else self.warmup * self.steps)
        schedule(self.schedule, self.steps, int(self.warmup))  # which refuses what does not fit
