"""Opening what a path names: a run folder, an adapter folder, a model folder or file, an id of the hub, or the bundled model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from minilora.adapters import PartialConfig, bottlenecks, method_name
from minilora.backend import get_xp
from minilora.formats.adapter import load_adapter
from minilora.formats.adapter_config import read_adapter_config
from minilora.formats.atomic import read_json
from minilora.formats.checkpoint import STORED, load_model, save_model
from minilora.formats.fetch import model_folder, read_weights
from minilora.formats.fitting import Family, classes_of, family_of, named
from minilora.formats.tensors import map_tensors
from minilora.formats.tokenizer import Tokenizer, gguf_tokenizer, load_tokenizer
from minilora.layers import Linear
from minilora.lora import lora_layers, merge
from minilora.quantization.half import KINDS
from minilora.quantization.quantize import PACK


def open_model(
    path: str | Path,
    backend: str = "auto",
    adapter: str | Path | None = None,
    dtype: str | None = None,
    allow_other_weights: bool = False,
) -> Any:
    """The model that a path names, with the adapter that it or `adapter` names; dtype: by default its run's. Raises as the loaders do."""
    model, found = _base(path, backend, adapter, dtype)
    if found is not None:
        load_adapter(model, found, allow_other_weights)
    return model


def _base(path: str | Path, backend: str, adapter: str | Path | None = None, dtype: str | None = None) -> tuple[Any, Path | None]:
    """The base model that a path names, as it is, and the folder of the adapter that is to be put on it, if any."""
    base, found = base_of(path)
    if adapter is not None:
        found = _adapter_folder(Path(adapter)) or Path(adapter)
    record = record_of(adapter or path)
    labels = (record.get("labels") or _classes(found)) if found else None  # a model says in its own config.json
    settings = record.get("configuration", {})
    typed = base == str(path)  # or named by a file, which is not to send anybody to the hub
    try:
        published = None if labels is None else published_classes(base, download=typed)
        count = labels if isinstance(labels, int) else len(labels or ())
        same = published is None or labels == published or (count == len(published) and (isinstance(labels, int) or not named(published)))
        options: dict[str, Any] = {"labels": labels, "quantize": settings.get("quantize", ""), "download": typed, "new_head": not same}
        model = load_model(base, backend, dtype or settings.get("dtype", "float32"), **options)
    except FileNotFoundError as error:
        if typed:
            raise
        why = f"the base model of {path} is not where it was: {error} Give it as the model, and --adapter {path}."
        raise FileNotFoundError(why) from None
    if base == str(Path(path) / "model"):  # in the memory layout that it was trained in: the same figures to the last digit
        for _, p in model.parameters():
            p.data = get_xp(p.data).ascontiguousarray(p.data)
    return model, found


def base_of(path: str | Path) -> tuple[str, Path | None]:
    """(the model, its adapter folder or None) that a path names: a run knows its base, an adapter too, a model is its own."""
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():  # a run of full fine-tuning
        return str(folder / "model"), None
    adapter = _adapter_folder(folder)
    if adapter is not None:
        base = read_adapter_config(adapter).base_model_name_or_path
        if not base:
            raise ValueError(f"{adapter} names no base model (base_model_name_or_path); give one as the model, and --adapter {adapter}.")
        return base, adapter
    if (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder} is a run that has not saved an adapter or a model.")
    return str(path), None


def record_of(path: str | Path) -> dict[str, Any]:
    """The run.json of a run, or of the run that an adapter or a model lies in; empty where there is none.

    Raises ValueError, naming the file, where it is not as a run writes it.
    """
    folder = Path(path).absolute()
    for place in (folder, folder.parent) if folder.name in ("adapter", "model", "base") else (folder,):
        if (file := place / "run.json").is_file():
            record = read_json(file)
            _check_record(record, Path(path) / os.path.relpath(file, folder))
            return record
    return {}


def _check_record(record: dict[str, Any], file: Path) -> None:
    """Raise ValueError, naming the file and the field, for a run.json that is not as a run writes it."""

    def check(fits: bool, name: str, expected: str, value: Any) -> None:
        if not fits:
            raise ValueError(f"{file}: {name} must be {expected}, got {value!r:.60}.")

    for name in ("configuration", "results", "trained_on"):
        check(isinstance(record.get(name, {}), dict), name, "an object", record.get(name))
    labels = record.get("labels")
    check(labels is None or (isinstance(labels, list) and all(isinstance(x, str) for x in labels)), "labels", "a list of names", labels)
    settings, results = record.get("configuration", {}), record.get("results", {})
    for name, allowed in (("dtype", ("float32", *KINDS)), ("quantize", ("", *PACK))):
        check(settings.get(name, allowed[0]) in allowed, name, f"one of {', '.join(map(repr, allowed))}", settings.get(name))
    if "after" in results:
        name = results.get("headline")
        check(isinstance(name, str), "results.headline", "a name", name)
        for when in ("before", "after"):
            figures = results.get(when)
            check(isinstance(figures, dict) and name in figures, f"results.{when}", f"an object with {name!r}", figures)
            check(type(figures[name]) in (int, float, type(None)), f"results.{when}.{name}", "a number", figures[name])


def published_classes(name: str | Path, download: bool = True) -> list[str] | None:
    """The classes of the head that a published model has, in its order; None where it has none."""
    if str(name).endswith(".gguf"):
        return None
    folder = model_folder(name, download)
    raw, family = _config(folder)
    if "classifier" not in family.fresh or not any(path.startswith("classifier.") for path in read_weights(folder)):
        return None
    return list(classes_of(family)[0].from_json(raw, f"{folder}/config.json").class_names)


def _config(folder: Path) -> tuple[dict[str, Any], Family]:
    """config.json, but for how weights are quantized, and the architecture that it names."""
    raw = read_json(folder / "config.json")
    raw.pop("quantization_config", None)
    return raw, family_of(raw, f"{folder}/config.json")


def tokenizer_of(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of the model that a path names; vocab_size is read from its config.json if it is not given."""
    base, _ = base_of(path)
    if base.endswith(".gguf"):
        from minilora.formats.gguf import read_gguf_tokenizer

        rows, vocabulary = read_gguf_tokenizer(base)
        return gguf_tokenizer(vocabulary, vocab_size or rows, base)
    folder = model_folder(base, download=base == str(path))
    raw, family = _config(folder)
    size: Any = vocab_size or raw.get("vocab_size")
    if type(size) is not int:
        size = classes_of(family)[0].from_json(raw, f"{folder}/config.json").vocab_size
    return load_tokenizer(folder, size)


def merge_run(
    path: str | Path, out: str | Path, adapter: str | Path | None = None, dtype: str = STORED, allow_other_weights: bool = False
) -> dict[str, float]:
    """Write the merged model of a run or adapter folder to a new folder `out`. Returns {path: largest change of a weight}.

    dtype: what the sums are rounded to; by default what the base's files hold. What was trained as it is, with no adapter at all, is
    compared with the base model.
    Raises ValueError when there is no adapter, FileExistsError when `out` is in use.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is in use; name another folder with --out, or remove it first.")
    if adapter is None and base_of(path)[1] is None:
        raise ValueError(f"{path} has no adapter to merge.")
    model = open_model(path, "numpy", adapter, "float32", allow_other_weights)  # a sum is not rounded to what the run was computed in
    if isinstance(model.lora_config, PartialConfig):
        changes = {name: float(abs(p.data - model.base_values[name]).max()) for name, p in model.parameters() if name in model.base_values}
    else:
        changes = merge(model)
    save_model(model, out, dtype)
    return changes


def describe(path: str | Path, allow_other_weights: bool = False) -> dict[str, Any]:
    """What is in a model or a run: parameters, memory, adapters, results, and the names that can be adapted."""
    model, adapter = _base(path, "numpy")
    count = sum(p.data.size for _, p in model.parameters())
    names: dict[str, list[str]] = {}
    for name, layer in model.modules():
        if isinstance(layer, Linear) and name:
            names.setdefault(name.rpartition(".")[2], []).append(f"{layer.in_features} x {layer.out_features}")
    result = {
        "model": str(path),
        "model_type": model.model_type,
        "config": {key: value for key, value in model.config.to_json().items() if isinstance(value, (int, float, str))},
        "parameters": count,
        "bytes_float32": 4 * count,
        "adaptable": {name: {"layers": len(sizes), "sizes": sorted(set(sizes))} for name, sizes in names.items()},
    }
    if adapter is not None:
        config = load_adapter(model, adapter, allow_other_weights)
        result["adapter"] = {"method": method_name(config), "layers": len(lora_layers(model)) + len(bottlenecks(model))}
        if adapters := lora_layers(model):
            result["adapter"]["r"] = sorted({layer.r for _, layer in adapters})
        added = sum(p.data.size for _, p in model.parameters()) - count
        result["adapter"]["parameters"] = added + sum(value.size for value in model.base_values.values())
    if (Path(path) / "run.json").is_file():
        result["results"] = record_of(path).get("results", {})
    return result


def _classes(adapter: Path) -> int | None:
    """How many classes the head in an adapter's file tells apart: PEFT keeps them nowhere else."""
    file = adapter / "adapter_model.safetensors"
    tensors = map_tensors(file)[0] if file.is_file() else {}
    return next((len(value) for name, value in tensors.items() if re.search(r"\.classifier\.(lora_B\.)?weight$", name)), None)


def _adapter_folder(folder: Path) -> Path | None:
    """The adapter in a run folder, or the folder itself if it is an adapter."""
    return next((f for f in (folder / "adapter", folder) if (f / "adapter_config.json").is_file()), None)
