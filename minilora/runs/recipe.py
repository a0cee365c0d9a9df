# ruff: noqa: RUF009  (`option` returns a dataclasses.field)
"""The recipe of a fine-tune. Its fields are the flags of the command line and the keys of a TOML file (cli/flags.py)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from minilora import adapters
from minilora.backend import BACKENDS
from minilora.data.datasets import TASKS
from minilora.data.records import is_dataset
from minilora.formats.fetch import BUNDLED
from minilora.lora.registry import STARTS, STARTS_FROM_DATA
from minilora.optim.schedules import SHAPES, schedule
from minilora.quantization.quantize import PACK

DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("lora", "full", *adapters.METHODS)
_INITIALISERS = ", ".join(name for name in (*STARTS, *STARTS_FROM_DATA) if isinstance(name, str))
GROUPS = ("data", "method", "adapter", "optimisation", "memory and speed", "output")
WITHOUT_EFFECT = {  # {kind of data: (in words, settings that it does not read)}
    "text": ("plain text", "tokens_per_batch mask_prompt"),
    "lm": ("records to continue", "batch_size eval_bytes sample_bytes"),
    "classify": ("texts with a class", "tokens_per_batch mask_prompt eval_bytes sample_bytes"),
}

# Peak learning rates. Those of LoRA and of full fine-tuning of the bundled model are the best of one grid (benchmarks/lora_vs_full.py);
# for published models LoRA needs about ten times the rate of full fine-tuning ("LoRA Without Regret", 2025), and methods that train
# fewer parameters need still more.
_RATES: dict[str, dict[str, float]] = {
    BUNDLED: {"lora": 8e-3, "full": 2e-3, "bottleneck": 8e-3, "bitfit": 2e-2, "layer-norm": 2e-2, "head": 2e-2},
    "lm": {"lora": 5e-4, "full": 5e-5, "bottleneck": 1e-3, "bitfit": 5e-3, "layer-norm": 5e-3, "head": 5e-3},
    "classify": {"lora": 1e-3, "full": 5e-5, "bottleneck": 1e-3, "bitfit": 5e-3, "layer-norm": 5e-3, "head": 5e-3},
}
_ONLY_LORA = "use_dora init_lora_weights loraplus_lr_ratio quantize peft_type".split()


def threads_for(requested: int | None) -> int:
    """The number requested; by default the number of cores, at most 8. Raises ValueError for one below 0."""
    if (requested or 0) < 0:
        raise ValueError(f"threads must be at least 0, got {requested}.")
    return requested or min(os.cpu_count() or 1, 8)


def option(
    default: Any,
    group: str,
    help: str,
    *,
    unset: str = "",
    aliases: Sequence[str] = (),
    metavar: str | None = None,
    choices: Sequence[str] = (),
    least: float | None = None,
) -> Any:
    """A field of Recipe. unset: the default in words, where the value does not say it. least: the smallest value allowed."""
    return field(
        default=default,
        metadata={"group": group, "help": help, "unset": unset, "aliases": aliases, "metavar": metavar, "choices": choices, "least": least},
    )


@dataclass(frozen=True)
class Recipe:
    """The settings of `finetune`. None, where it is the default, stands for a value that depends on the model or the data: see `resolve`.

    Raises ValueError for values out of range, and for combinations that exclude each other.
    """

    model: str = option(BUNDLED, "data", "a model folder, a .gguf file, or an id of the hub", unset="pydoc, the bundled model")
    data: str | None = option(None, "data", "text or records, a file or a folder", unset="the standard library's source", metavar="PATH")
    task: str = option("lm", "data", "continue a text, or classify it", choices=TASKS)
    window: int = option(256, "data", "longest sequence, in tokens", aliases=["--max-length"], metavar="N", least=1)
    mask_prompt: bool = option(True, "data", "learn completions only, or prompts too", unset="completions only")
    encoding: str = option("utf-8", "data", "encoding of text and record files", metavar="NAME")
    new_head: bool = option(False, "data", "replace a classifier that the model has by one for the data")
    train_size: int | None = option(None, "data", "number of texts with a class to train on", unset="all", metavar="N", least=1)
    eval_size: int | None = option(None, "data", "number of them to measure on", unset="all that are held out", metavar="N", least=1)
    eval_bytes: int | None = option(
        None, "data", "held-out text to measure on", unset="65536 bytes for pydoc, else 8192 tokens", metavar="N", least=1
    )

    method: str = option("lora", "method", "what to train", choices=METHODS)
    reinit: int | None = option(
        None, "method", "reinitialise the pooler and the top L blocks (method full)", unset="no", metavar="L", least=0
    )

    peft_type: str = option("LORA", "adapter", "the kind of adapter; VERA needs a rank of about 256", choices=("LORA", "VERA"))
    r: int = option(8, "adapter", "rank", aliases=["--rank"], metavar="R")
    lora_alpha: float = option(32, "adapter", "the update is scaled by alpha / r", aliases=["--alpha"], metavar="ALPHA")
    lora_dropout: float = option(0.0, "adapter", "dropout on the adapters' input", metavar="P")
    target_modules: str | list[str] = option("all-linear", "adapter", "names separated by commas, or all-linear", metavar="NAMES")
    layers_to_transform: list[int] | None = option(None, "adapter", "numbers of the blocks to adapt", unset="all", metavar="N,N")
    use_rslora: bool = option(False, "adapter", "scale by alpha / sqrt(r) instead")
    use_dora: bool | str = option(
        False, "adapter", "DoRA: train the magnitudes of W's columns apart from their directions", metavar="exact"
    )
    init_lora_weights: bool | str = option(
        True, "adapter", f"initialiser of A and B: {_INITIALISERS}", unset="Kaiming for A, zero for B", aliases=["--init"], metavar="HOW"
    )
    reduction_factor: float = option(16, "adapter", "width of a layer over that of its bottleneck", metavar="X")
    bias: str | None = option(
        None, "adapter", "biases to train too", unset="all for pydoc, else none", choices=("none", "all", "lora_only", "vera_only")
    )
    modules_to_save: list[str] | None = option(
        None, "adapter", "modules to train fully", unset="layer norms for pydoc, else none", metavar="NAMES"
    )

    lr: float | None = option(None, "optimisation", "peak learning rate", unset="by model, task and method")
    schedule: str = option("linear", "optimisation", "shape of the learning rate", choices=tuple(SHAPES))
    warmup: float | None = option(
        None, "optimisation", "steps of linear warm-up; below 1, a share of the run", unset="10", metavar="STEPS", least=0
    )
    weight_decay: float = option(0.0, "optimisation", "decoupled weight decay", metavar="X", least=0)
    l2_sp: float = option(0.0, "optimisation", "L2-SP: decoupled decay towards the initial weights", metavar="X", least=0)
    bias_correction: bool = option(True, "optimisation", "bias correction of Adam", unset="on")
    loraplus_lr_ratio: float | None = option(None, "optimisation", "LoRA+: learning rate of B over that of A", unset="1", metavar="X")
    clip: float = option(1.0, "optimisation", "largest gradient norm", metavar="NORM")
    steps: int | None = option(None, "optimisation", "optimizer steps", unset="120 for text, else by --epochs", least=1)
    epochs: float | None = option(None, "optimisation", "passes over the records", unset="3")
    batch_size: int = option(8, "optimisation", "windows or texts a batch", metavar="N", least=1)
    tokens_per_batch: int = option(2048, "optimisation", "tokens a batch of records", metavar="N", least=1)
    accumulate: int = option(1, "optimisation", "batches a step", metavar="N", least=1)
    seed: int = option(0, "optimisation", "seed of initial weights, batches and samples", least=0)

    quantize: str = option("", "memory and speed", "quantize the frozen weights of linear layers", choices=tuple(PACK))
    dtype: str = option("float32", "memory and speed", "dtype of activations and frozen matrices", choices=DTYPES)
    recompute: bool = option(False, "memory and speed", "save less for the backward pass and compute more")
    cache: bool = option(True, "memory and speed", "cache the outputs of frozen blocks over epochs", unset="on")
    threads: int = option(0, "memory and speed", "replicas, one thread each", unset="the cores, at most 8", metavar="N", least=0)
    backend: str = option("auto", "memory and speed", "where to compute", choices=("auto", *BACKENDS))
    tf32: bool = option(False, "memory and speed", "on a GPU: products in TF32, several times as fast, with errors of 1e-3")

    sample_bytes: int | None = option(None, "output", "length of the samples", unset="240 for pydoc, else none", metavar="N", least=0)

    def __post_init__(self) -> None:
        for f in fields(Recipe):
            value, choices, least = getattr(self, f.name), f.metadata["choices"], f.metadata["least"]
            if choices and value not in (*choices, f.default):
                raise ValueError(f"unknown {f.name} {value!r}; choose {', '.join(choices)}.")
            if least is not None and value is not None and not least <= value < math.inf:
                finite = "" if isinstance(value, int) else " and finite"
                raise ValueError(f"{f.name} must be at least {least}{finite}, got {value}.")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}.")
        if self.epochs is not None and not 0 < self.epochs <= 100_000:
            raise ValueError(f"epochs must be above 0 and at most 100,000, got {self.epochs}.")
        defaults = {f.name: f.default for f in fields(Recipe)}
        lora_only = next((name for name in _ONLY_LORA if getattr(self, name) != defaults[name]), None)
        only_classify = next((name for name in ("train_size", "eval_size") if getattr(self, name) is not None), None)
        full, lm = "method full, which trains in float32,", self.task != "classify"
        for wrong, message in (
            (self.method != "lora" and lora_only, f"{lora_only} is for LoRA; method {self.method} has none."),
            (self.dtype != "float32" and self.quantize, f"dtype {self.dtype} and quantize exclude each other; choose one."),
            (self.dtype != "float32" and self.method == "full", f"dtype {self.dtype} and {full} exclude each other; choose one."),
            (self.quantize and self.init_lora_weights == "loftq", "init_lora_weights 'loftq' quantizes by itself; leave quantize out."),
            (self.data == "", "data is empty: name a file or a folder."),
            (
                not lm and self.data is None,
                "task classify needs --data: a record file with text and label, or a folder with train and valid.",
            ),
            (lm and only_classify, f"{only_classify} counts texts with a class; it needs task classify."),
            (lm and self.new_head, "new_head replaces a classifier; it needs task classify."),
            (
                self.reinit is not None and self.method != "full",
                f"reinit changes weights that method {self.method} leaves frozen and does not save; it needs method full.",
            ),
        ):
            if wrong:
                raise ValueError(message)

    @property
    def kind(self) -> str:
        """ "text" in windows, records to continue ("lm"), or records with a class ("classify")."""
        return "text" if self.task == "lm" and (self.data is None or not is_dataset(self.data)) else self.task

    @property
    def product(self) -> str:
        """The result of the run in one word."""
        return "model" if self.method == "full" else "adapter"

    @property
    def text_to_measure(self) -> int:
        """eval_bytes, or its default."""
        return self.eval_bytes or (65536 if self.model == BUNDLED else 8192)

    def resolve(self, count_steps: Callable[[float, int, int], int | None]) -> ResolvedRecipe:
        """A complete copy. count_steps(epochs, accumulate, seed): the number of steps, None if the data have no epochs (Task.steps).

        Raises ValueError for epochs of plain text, and for a schedule or warm-up that does not fit.
        """
        bundled = self.model == BUNDLED
        steps = self.steps
        if steps is None:
            counted = count_steps(self.epochs or 3, self.accumulate, self.seed)
            if counted is None and self.epochs is not None:
                raise ValueError("plain text is read in windows that start anywhere, which have no epochs; give steps.")
            steps = counted or 120
        warmup = min(10, steps // 2) if self.warmup is None else self.warmup
        warmup = round(warmup if warmup >= 1 else warmup * steps)
        schedule(self.schedule, steps, warmup)  # raises if it does not fit
        also = bundled and self.method == "lora"
        values: dict[str, Any] = {
            "bias": self.bias or ("all" if also else "none"),
            "modules_to_save": ["ln_1", "ln_2", "ln_f"] if also and self.modules_to_save is None else self.modules_to_save,
            "lr": _RATES[BUNDLED if bundled else self.task][self.method] if self.lr is None else self.lr,
            "steps": steps,
            "warmup": warmup,
            "eval_bytes": self.text_to_measure,
            "sample_bytes": (240 if bundled else 0) if self.sample_bytes is None else self.sample_bytes,
            "threads": threads_for(self.threads),
        }
        return ResolvedRecipe(**vars(self) | values)


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe(Recipe):
    """A recipe in which every default that depends on model and data has its value: the result of `Recipe.resolve`."""

    bias: str
    lr: float
    steps: int
    warmup: int
    eval_bytes: int
    sample_bytes: int
