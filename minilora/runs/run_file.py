"""Opening the model of a path: a run folder, an adapter folder, a model folder or file, an id of the hub, or the bundled model."""

import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from minilora.backend import get_xp
from minilora.formats.adapter import load_adapter
from minilora.formats.adapter_config import read_adapter_config
from minilora.formats.atomic import read_json
from minilora.formats.checkpoint import load_model
from minilora.formats.fetch import model_folder, read_weights
from minilora.formats.fitting import Family, family_of
from minilora.formats.gguf import read_gguf_classifier
from minilora.formats.tensors import map_tensors
from minilora.formats.tokenizer import Tokenizer, load_tokenizer
from minilora.models import BertClassifier
from minilora.models.config_file import check_types, made
from minilora.models.decoder import Decoder
from minilora.runs.recipe import Recipe

# Fields of a recipe that say how the model of a run was loaded, what it was trained on, and how it was measured.
_KEPT = (
    "model quantize dtype data task window mask_prompt encoding seed train_size eval_size eval_bytes batch_size tokens_per_batch".split()
)


@dataclass(frozen=True)
class Run:
    """What a run.json says; the fields of its recipe beyond _KEPT have their defaults."""

    configuration: dict[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None
    trained_on: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)


class _Results(TypedDict):
    headline: str
    before: dict[str, float | None]
    after: dict[str, float | None]


def open_model(
    path: str | Path, backend: str = "auto", adapter: str | Path | None = None, dtype: str | None = None, allow_other_weights: bool = False
) -> Any:
    """The model of a path, with the adapter of that path or of `adapter`; dtype: by default its run's. Raises as the loaders do."""
    model, found = open_base(path, backend, adapter, dtype)
    if found is not None:
        load_adapter(model, found, allow_other_weights)
    return model


def open_base(path: str | Path, backend: str, adapter: str | Path | None = None, dtype: str | None = None) -> tuple[Any, Path | None]:
    """The base model of a path without an adapter, and the folder of its adapter, if any."""
    base, found = base_of(path)
    if adapter is not None:
        found = adapter_folder(Path(adapter)) or Path(adapter)
    run = run_of(adapter or path)
    recipe = Recipe() if run is None else run.recipe
    labels = ((run and run.labels) or _classes(found)) if found else None  # a model has them in its own config.json
    typed = base == str(path)  # a name in a file must not lead to a download
    try:
        options: Any = {"download": typed, "new_head": None, "report": found is None}
        model = load_model(base, backend, dtype or recipe.dtype, labels, recipe.quantize, **options)
    except FileNotFoundError as error:
        if typed:
            raise
        why = f"the base model of {path} is not where it was: {error} Give it as the model, and --adapter {path}."
        raise FileNotFoundError(why) from None
    if base == str(Path(path) / "model"):  # the memory layout of training: the same figures to the last digit
        for _, p in model.parameters():
            p.data = get_xp(p.data).ascontiguousarray(p.data)
    return model, found


def base_of(path: str | Path) -> tuple[str, Path | None]:
    """(base model, adapter folder or None) of a path. Runs and adapters name their base; a model is its own base.

    Raises ValueError for an adapter without a base, FileNotFoundError for a run that has saved nothing.
    """
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():  # a run of full fine-tuning
        return str(folder / "model"), None
    adapter = adapter_folder(folder)
    if adapter is not None:
        base = read_adapter_config(adapter).base_model_name_or_path
        if not base:
            raise ValueError(f"{adapter} names no base model (base_model_name_or_path); give one as the model, and --adapter {adapter}.")
        return base, adapter
    if (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder} is a run that has not saved an adapter or a model.")
    return str(path), None


def run_of(path: str | Path) -> Run | None:
    """The run of a run folder, or of the adapter or model in one; None without a run.json, or with one that has no configuration.

    Raises ValueError, naming the file and the field, for a value that no run writes.
    """
    folder = Path(path).absolute()
    for place in (folder, folder.parent) if folder.name in ("adapter", "model", "base") else (folder,):
        if (file := place / "run.json").is_file():
            return _run(read_json(file), str(Path(path) / os.path.relpath(file, folder)))
    return None


def _run(record: dict[str, Any], where: str) -> Run | None:
    about = {part.name: record[part.name] for part in fields(Run) if part.name in record}
    check_types(Run, about, where)
    run = Run(**about)
    if "after" in run.results:
        check_types(_Results, {name: run.results.get(name) for name in _Results.__annotations__}, f"{where}, results")
    settings = {name: run.configuration[name] for name in _KEPT if name in run.configuration}
    check_types(Recipe, settings, where)
    return replace(run, recipe=made(Recipe, settings, where)) if settings else None


def published_classes(name: str | Path, download: bool = True) -> list[str] | None:
    """The classes of a published model's head, in its order; None if it has no head."""
    if str(name).endswith(".gguf"):
        found = read_gguf_classifier(name)
        return None if found is None else list(family_of(found, str(name)).config.from_json(found, str(name)).class_names)
    folder = model_folder(name, download)
    raw, family = _config(folder)
    if not family.fresh or not any(path.startswith("classifier.") for path in read_weights(folder)):
        return None
    return list(family.config.from_json(raw, f"{folder}/config.json").class_names)


def _config(folder: Path) -> tuple[dict[str, Any], Family]:
    """config.json without the quantization of weights, and the architecture that it names."""
    raw = read_json(folder / "config.json")
    raw.pop("quantization_config", None)
    return raw, family_of(raw, f"{folder}/config.json")


def tokenizer_of(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of the model of a path; vocab_size: by default from its config.json."""
    base, _ = base_of(path)
    if base.endswith(".gguf"):
        return load_tokenizer(base, vocab_size)
    folder = model_folder(base, download=base == str(path))
    raw, family = _config(folder)
    size: Any = vocab_size or raw.get("vocab_size")
    if type(size) is not int:
        size = family.config.from_json(raw, f"{folder}/config.json").vocab_size
    return load_tokenizer(folder, size)


def check_task(model: Any, task: str, source: str | Path) -> None:
    """Raise ValueError when the model, which comes from `source`, is not for the task."""
    what = f"{source} ({type(model).__name__})"
    if task == "lm" and not isinstance(model, Decoder):
        raise ValueError(f"{what} is not a decoder, and task lm needs a decoder. Is --task classify meant?")
    if task == "classify" and not isinstance(model, BertClassifier):
        raise ValueError(f"{what} has no classifier, and task classify needs a BERT or one of its relatives.")


def check_window(model: Any, window: int) -> None:
    """Raise ValueError when the window is longer than the model's positions."""
    if window > (longest := model.config.longest_sequence):
        raise ValueError(f"a window of {window} is longer than the model's {longest} positions.")


def _classes(adapter: Path) -> int | None:
    """The number of classes of the head in an adapter's file, None without a head: PEFT keeps it nowhere else."""
    file = adapter / "adapter_model.safetensors"
    tensors = map_tensors(file)[0] if file.is_file() else {}
    return next((len(value) for name, value in tensors.items() if re.search(r"\.classifier\.(out_proj\.)?(lora_B\.)?weight$", name)), None)


def adapter_folder(folder: Path) -> Path | None:
    """The adapter in a run folder, or the folder itself if it is an adapter, else None."""
    return next((f for f in (folder / "adapter", folder) if (f / "adapter_config.json").is_file()), None)
