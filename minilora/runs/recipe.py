# ruff: noqa: RUF009  (`_option` returns a dataclasses.field)
"""The recipe of a fine-tune. Its fields are the flags of the command line and the keys of a TOML file (cli/flags.py)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

from minilora import adapters
from minilora.backend import BACKENDS
from minilora.data import TASKS
from minilora.data.records import is_dataset
from minilora.formats.fetch import BUNDLED
from minilora.lora.registry import DATA_INITIALISERS, INITIALISERS
from minilora.optim.schedules import SHAPES, schedule
from minilora.quantization.quantize import check_kind

DTYPES = ("float32", "bfloat16", "float16")
BIASES = ("none", "all", "lora_only", "vera_only")
METHODS = ("lora", "full", *adapters.METHODS)
_INITIALISERS = ", ".join(name for name in (*INITIALISERS, *DATA_INITIALISERS) if isinstance(name, str))
GROUPS = ("data", "method", "adapter", "optimisation", "memory and speed", "output")
WITHOUT_EFFECT = {  # {kind of data: (in words, settings that it does not read)}
    "text": ("plain text", "tokens_per_batch mask_prompt"),
    "lm": ("records to continue", "batch_size eval_bytes sample_bytes"),
    "classify": ("texts with a class", "tokens_per_batch mask_prompt eval_bytes sample_bytes forgetting"),
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
    """The number requested; by default the number of cores, at most 8, shared by the ranks that mpiexec started on this machine.

    Raises ValueError for one below 0.
    """
    if (requested or 0) < 0:
        raise ValueError(f"threads must be at least 0, got {requested}.")
    ranks = next((int(os.environ[name]) for name in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE") if name in os.environ), 1)
    return requested or max(1, min((os.cpu_count() or 1) // ranks, 8))


def _option(group: str, default: Any, help: str, **about: Any) -> Any:
    """A field of Recipe and its flag. about: any of

    unset     the default in words, if the value does not say it
    aliases   other names of the flag        metavar   its value in --help
    choices   the values allowed             least     the smallest value allowed
    """
    empty = {"unset": "", "aliases": (), "metavar": None, "choices": (), "least": None}
    return field(default=default, metadata={"group": group, "help": help, **empty, **about})


_data, _method, _adapter, _optimisation, _memory, _output = (partial(_option, group) for group in GROUPS)


@dataclass(frozen=True)
class Recipe:
    """The settings of `finetune`. None, where it is the default, stands for a value that depends on the model or the data: see `resolve`.

    Raises ValueError for values out of range, and for combinations that exclude each other.
    """

    model: str = _data(BUNDLED, "a model folder, a .gguf file, or an id of the hub", unset="pydoc, the bundled model")
    data: str | None = _data(None, "text or records, a file or a folder", unset="the standard library's source", metavar="PATH")
    task: str = _data("lm", "continue a text, or classify it", choices=tuple(TASKS))
    window: int = _data(256, "longest sequence, in tokens", aliases=["--max-length"], metavar="N", least=1)
    mask_prompt: bool = _data(True, "learn completions only, or prompts too", unset="completions only")
    encoding: str = _data("utf-8", "encoding of text and record files", metavar="NAME")
    new_head: bool = _data(False, "replace a classifier that the model has by one for the data")
    train_size: int | None = _data(None, "number of texts with a class to train on", unset="all", metavar="N", least=1)
    eval_size: int | None = _data(None, "number of them to measure on", unset="all that are held out", metavar="N", least=1)
    eval_bytes: int | None = _data(None, "held-out text to measure on", unset="65536 for pydoc, else 8192 tokens", metavar="N", least=1)

    forgetting: str | None = _data(
        None, "a text whose loss is measured before and after, by decoders; '' for none", unset="a page of English", metavar="PATH"
    )

    method: str = _method("lora", "what to train", choices=METHODS)
    reinit: int | None = _method(None, "method full: reinitialise the pooler and the top L blocks", unset="no", metavar="L", least=0)

    peft_type: str = _adapter("LORA", "the kind of adapter; VERA needs a rank of about 256", choices=("LORA", "VERA"))
    r: int = _adapter(8, "rank", aliases=["--rank"], metavar="R")
    lora_alpha: float = _adapter(32, "the update is scaled by alpha / r", aliases=["--alpha"], metavar="ALPHA")
    lora_dropout: float = _adapter(0.0, "dropout on the adapters' input", metavar="P")
    target_modules: str | list[str] = _adapter("all-linear", "names separated by commas, or all-linear", metavar="NAMES")
    layers_to_transform: list[int] | None = _adapter(None, "numbers of the blocks to adapt", unset="all", metavar="N,N")
    use_rslora: bool = _adapter(False, "scale by alpha / sqrt(r) instead")
    use_dora: bool | str = _adapter(False, "DoRA: magnitudes of W's columns trained apart from directions", metavar="exact")
    init_lora_weights: bool | str = _adapter(
        True, f"initialiser of A and B: {_INITIALISERS}", unset="Kaiming for A, zero for B", aliases=["--init"], metavar="HOW"
    )
    reduction_factor: float = _adapter(16, "width of a layer over that of its bottleneck", metavar="X")
    bias: str | None = _adapter(None, "biases to train too", unset="all for pydoc, else none", choices=BIASES)
    modules_to_save: list[str] | None = _adapter(None, "modules to train fully", unset="layer norms for pydoc, else none", metavar="NAMES")

    lr: float | None = _optimisation(None, "peak learning rate", unset="by model, task and method")
    schedule: str = _optimisation("linear", "shape of the learning rate", choices=tuple(SHAPES))
    warmup: float | None = _optimisation(None, "steps of linear warm-up; below 1, a share of the run", unset="10", metavar="STEPS", least=0)
    weight_decay: float = _optimisation(0.0, "decoupled weight decay", metavar="X", least=0)
    l2_sp: float = _optimisation(0.0, "L2-SP: decoupled decay towards the initial weights", metavar="X", least=0)
    bias_correction: bool = _optimisation(True, "bias correction of Adam", unset="on")
    loraplus_lr_ratio: float | None = _optimisation(None, "LoRA+: learning rate of B over that of A", unset="1", metavar="X")
    clip: float = _optimisation(1.0, "largest gradient norm", metavar="NORM")
    steps: int | None = _optimisation(None, "optimizer steps", unset="120 for text, else by --epochs", least=1)
    epochs: float | None = _optimisation(None, "passes over the records", unset="3")
    batch_size: int = _optimisation(8, "windows or texts a batch", metavar="N", least=1)
    tokens_per_batch: int = _optimisation(2048, "tokens a batch of records", metavar="N", least=1)
    accumulate: int = _optimisation(1, "batches a step", metavar="N", least=1)
    seed: int = _optimisation(0, "seed of initial weights, batches and samples", least=0)

    quantize: str = _memory("", "quantize the frozen weights of linear layers: nf4", metavar="KIND", unset="no")
    dtype: str = _memory("float32", "dtype of activations and frozen matrices", choices=DTYPES)
    recompute: bool = _memory(False, "save less for the backward pass and compute more")
    cache: bool = _memory(True, "cache the outputs of frozen blocks over epochs", unset="on")
    threads: int = _memory(0, "cores to compute on, each with lanes of its own", unset="the cores, at most 8", metavar="N", least=0)
    lanes: int = _memory(
        0, "parts of a batch: they fix the result to the bit, whatever --threads", unset="the threads", metavar="N", least=0
    )
    backend: str = _memory("auto", "where to compute", choices=("auto", *BACKENDS))
    tf32: bool = _memory(False, "on a GPU: products in TF32, several times as fast, with errors of 1e-3")

    save_every: int = _output(100, "steps between two checkpoints; 0 for none", metavar="N", least=0)
    keep: int = _output(1, "checkpoints to keep, the last ones", metavar="K", least=1)
    eval_every: int | None = _output(
        None, "steps between two measurements on held-out data; the best result is kept", unset="at the end only", metavar="N", least=1
    )
    patience: int | None = _output(
        None, "measurements without a lower loss after which training ends", unset="no limit", metavar="N", least=1
    )
    log: str = _output("", "also write the figures of each step as events", unset="no", choices=("tensorboard",))
    sample_bytes: int | None = _output(None, "length of the samples", unset="240 for pydoc, else none", metavar="N", least=0)

    def __post_init__(self) -> None:
        for f in fields(Recipe):
            value, choices, least = getattr(self, f.name), f.metadata["choices"], f.metadata["least"]
            if choices and value not in (*choices, f.default):
                raise ValueError(f"unknown {f.name} {value!r}; choose {', '.join(choices)}.")
            if least is not None and value is not None and not least <= value < math.inf:
                finite = "" if isinstance(value, int) else " and finite"
                raise ValueError(f"{f.name} must be at least {least}{finite}, got {value}.")
        if self.quantize:
            check_kind(self.quantize)
        classify, full, half = self.task == "classify", self.method == "full", self.dtype != "float32"
        epochs = 1 if self.epochs is None else self.epochs
        defaults = {f.name: f.default for f in fields(Recipe)}
        lora_only = next((name for name in _ONLY_LORA if getattr(self, name) != defaults[name]), None)
        counted = next((name for name in ("train_size", "eval_size") if getattr(self, name) is not None), None)
        no_data = "task classify needs --data: a record file with text and label, or a folder with train and valid."
        frozen = f"reinit changes weights that method {self.method} leaves frozen and does not save; it needs method full."
        for wrong, message in (
            (not self.clip > 0, f"clip must be above 0, got {self.clip}."),
            (not 0 < epochs <= 100_000, f"epochs must be above 0 and at most 100,000, got {epochs}."),
            (self.method != "lora" and lora_only, f"{lora_only} is for LoRA; method {self.method} has none."),
            (half and self.quantize, f"dtype {self.dtype} and quantize exclude each other; choose one."),
            (half and full, f"dtype {self.dtype} and method full, which trains in float32, exclude each other; choose one."),
            (self.quantize and self.init_lora_weights == "loftq", "init_lora_weights 'loftq' quantizes by itself; leave quantize out."),
            (self.data == "", "data is empty: name a file or a folder."),
            (classify and self.data is None, no_data),
            (not classify and counted, f"{counted} counts texts with a class; it needs task classify."),
            (self.patience and not self.eval_every, "patience counts measurements; it needs eval_every."),
            (not classify and self.new_head, "new_head replaces a classifier; it needs task classify."),
            (self.reinit is not None and not full, frozen),
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
            "lanes": self.lanes or threads_for(self.threads),
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
