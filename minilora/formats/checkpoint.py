"""Models as folders: config.json and model.safetensors, as published."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import choose_backend, to_numpy
from minilora.formats.atomic import read_json, write_json
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.layers import Layer
from minilora.lora import lora_layers
from minilora.models import GPT2, GPT2Config

BUNDLED = "pydoc"  # the model inside the package: load_model("pydoc")


def model_folder(name: str | Path = BUNDLED) -> Path:
    """The folder of a model: the bundled one by its name, anything else is a path.

    Raises FileNotFoundError when there is no such folder, or no config.json in it.
    """
    folder = Path(__file__).parent.parent / "data" / BUNDLED if str(name) == BUNDLED else Path(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"there is no model at {name}: wanted a folder with config.json and model.safetensors, or {BUNDLED!r}.")
    return folder


def load_model(path_or_id: str | Path = BUNDLED, backend: str = "auto", dtype: Any = "float32") -> GPT2:
    """The model in a folder (or the bundled one), on a backend, frozen.

    Architectures: gpt2. Raises FileNotFoundError, or ValueError when the configuration or a tensor does not fit.
    """
    folder = model_folder(path_or_id)
    backend = choose_backend(backend, quiet=True)
    model = GPT2(read_config(folder), rng=0)
    tensors, _ = read_tensors(folder / "model.safetensors")
    assign(model, {_full_name(name): value for name, value in tensors.items()}, folder)
    model.source = str(path_or_id)
    return model.freeze().to(backend, dtype)


def read_config(folder: Path) -> GPT2Config:
    """config.json as a GPT2Config. Raises ValueError for another architecture, or options that are not supported."""
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != "gpt2":
        raise ValueError(f"{folder}/config.json is of model_type {raw.get('model_type')!r}; supported: gpt2.")
    if raw.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"{folder}/config.json asks for activation_function {raw['activation_function']!r}; supported: gelu_new.")
    known = {field.name for field in fields(GPT2Config)} - {"dropout"}
    return GPT2Config(**{key: value for key, value in raw.items() if key in known})


def save_model(model: GPT2, folder: str | Path, dtype: Any = None) -> None:
    """Write config.json and model.safetensors. Merged adapters are part of the weights; unmerged ones raise ValueError."""
    folder = Path(folder)
    merged = {}
    for path, layer in lora_layers(model):
        if layer.merged is None:
            raise ValueError(f"save_model: {path} has an unmerged adapter; call minilora.merge first, or save_adapter.")
        merged[f"{path}.weight"] = layer.merged
    tensors = {path: to_numpy(merged.get(path, p.data)) for path, p in model.parameters() if ".lora_" not in path}
    if dtype is not None:
        tensors = {path: value.astype(dtype) for path, value in tensors.items()}
    config = asdict(model.config)
    del config["dropout"]
    names = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "tie_word_embeddings": True}
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", {**names, **config})


def assign(model: Layer, tensors: dict[str, np.ndarray], source: str | Path) -> None:
    """Set every parameter of the model from tensors of the same path and shape, in the parameter's dtype.

    Raises ValueError, before anything is set, naming missing, unexpected and misshapen tensors.
    """
    parameters = dict(model.parameters())
    missing, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing:
        raise ValueError(f"{source} does not fit the model: it misses {missing[0]!r} ({len(missing)} tensors in all).")
    if extra:
        raise ValueError(f"{source} does not fit the model: it has {extra[0]!r} too many ({len(extra)} tensors in all).")
    for path, p in parameters.items():
        if tensors[path].shape != p.data.shape:
            raise ValueError(f"{source} does not fit the model: {path} has shape {tensors[path].shape}, the model wants {p.data.shape}.")
        if tensors[path].dtype.kind != "f" or not np.isfinite(tensors[path]).all():
            raise ValueError(f"{source}: {path} ({tensors[path].dtype}) holds values that are not finite floating-point numbers.")
    for path, p in parameters.items():
        p.data = tensors[path].astype(p.data.dtype)


def _full_name(name: str) -> str:
    """The published "gpt2" names its tensors without the "transformer." that GPT2LMHeadModel puts before them."""
    return name if name.startswith("transformer.") else f"transformer.{name}"
