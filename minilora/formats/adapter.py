"""Adapters as folders in PEFT's layout: adapter_config.json and adapter_model.safetensors.

Here A is (in, r) and B is (r, out); in the files both are turned, as PyTorch's Linear keeps (out, in). This is the one place
where that happens. Keys: base_model.model.<path>.lora_A.weight, and base_model.model.<path> for whole parameters
(biases, modules_to_save).
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import as_like, to_numpy
from minilora.formats.atomic import read_json, write_json
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.layers import Layer, Linear
from minilora.lora import LoraConfig, inject, lora_layers
from minilora.models import GPT2

_PREFIX = "base_model.model."
_FINGERPRINT = "minilora.base"
_NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "")  # values by which a field of PEFT's that is unknown here asks for nothing
_IGNORABLE = {"peft_type", "task_type", "inference_mode", "auto_mapping", "revision", "peft_version", "fan_in_fan_out", "runtime_config"}


def save_adapter(model: Layer, folder: str | Path, config: LoraConfig | None = None) -> int:
    """Write what was trained: adapters, and biases or modules_to_save with them. Returns the size of the tensors' file in bytes.

    `config` is what the model was injected with; by default the one `inject` left on the model. Raises ValueError when the model
    has no adapters.
    """
    config = config or model.lora_config
    if config is None or not lora_layers(model):
        raise ValueError("save_adapter: this model has no LoRA layers; call inject first.")
    folder = Path(folder)
    tensors = {_key(path): _turned(path, to_numpy(p.data)) for path, p in model.parameters() if p.trainable or ".lora_" in path}
    write_tensors(folder / "adapter_model.safetensors", tensors, {_FINGERPRINT: fingerprint(model)})
    write_json(folder / "adapter_config.json", _to_peft(model, config))
    return (folder / "adapter_model.safetensors").stat().st_size


def load_adapter(model: Layer, folder: str | Path) -> LoraConfig:
    """Inject the adapter in a folder into a base model. Returns its configuration.

    Everything is checked before the model is touched. Raises FileNotFoundError; ValueError when the configuration asks for what is
    not supported, or when the adapter was made for another model.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"there is no adapter in {folder}: wanted adapter_config.json and adapter_model.safetensors.")
    config = read_adapter_config(folder)
    tensors, metadata = read_tensors(folder / "adapter_model.safetensors")
    if metadata.get(_FINGERPRINT, fingerprint(model)) != fingerprint(model):
        raise ValueError(f"{folder}: this adapter was made for a base model with other weights than the one it is put on.")

    rehearsal = model.replica()
    try:
        inject(rehearsal, config, rng=0)
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter does not fit this model: {error}") from None
    wanted = {_key(path): _turned(path, p.data).shape for path, p in rehearsal.parameters() if p.trainable}
    _check_fit(folder, tensors, wanted)

    inject(model, config, rng=0)
    for path, p in model.parameters():
        if p.trainable:
            value = _turned(path, tensors[_key(path)]).astype(p.data.dtype)
            p.data = as_like(np.ascontiguousarray(value), p.data)
    return config


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """adapter_config.json as a LoraConfig. Raises ValueError for fields that would change the result and are not supported."""
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    if raw.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{path}: peft_type is {raw['peft_type']!r}; supported: LORA.")
    known = {field.name for field in fields(LoraConfig)}
    for key, value in raw.items():
        if key not in known | _IGNORABLE and value not in _NEUTRAL and _DEFAULTS.get(key, ...) != value:
            raise ValueError(f"{path}: {key}={value!r} is not supported.")
    if raw.get("target_modules") is None:
        raise ValueError(f"{path}: target_modules is missing.")
    given = {key: value for key, value in raw.items() if key in known and value is not None}
    given["init_lora_weights"] = True  # how it began does not matter: the tensors follow
    try:
        return LoraConfig(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


_DEFAULTS = {"lora_bias": False, "trainable_token_indices": None, "layers_pattern": None, "use_qalora": False, "qalora_group_size": 16}


def fingerprint(model: Layer) -> str:
    """16 hexadecimal digits for the base model: paths, shapes and a few values, as float16, of every dense weight."""
    digest = hashlib.sha256()
    for path, layer in model.modules():
        if isinstance(layer, Linear):
            W = layer.weight.data
            sample = to_numpy(W.ravel()[:: max(1, W.size // 16)])
            digest.update(f"{path}{tuple(W.shape)}".encode() + sample.astype(np.float16).tobytes())
    return digest.hexdigest()[:16]


def _to_peft(model: Layer, config: LoraConfig) -> dict[str, Any]:
    """The configuration as PEFT writes it; "all-linear" is spelled out."""
    adapted = [path for path, _ in lora_layers(model)]
    told = asdict(config)
    if config.target_modules == "all-linear":
        names = sorted({path.rpartition(".")[2] for path in adapted})
        linears = [path for path, layer in model.modules() if isinstance(layer, Linear)]
        told["target_modules"] = names if len(adapted) == sum(path.rpartition(".")[2] in names for path in linears) else adapted
        told["exclude_modules"] = None
    told["init_lora_weights"] = True
    told["base_model_name_or_path"] = config.base_model_name_or_path or model.source
    causal = isinstance(model, GPT2)
    head = {"peft_type": "LORA", "task_type": "CAUSAL_LM" if causal else None, "inference_mode": True, "fan_in_fan_out": causal}
    return {**head, **told}


def _key(path: str) -> str:
    return _PREFIX + (f"{path}.weight" if path.endswith((".lora_A", ".lora_B")) else path)


def _turned(path: str, value: np.ndarray) -> np.ndarray:
    return value.T if path.endswith((".lora_A", ".lora_B")) else value


def _check_fit(folder: Path, tensors: dict[str, np.ndarray], wanted: dict[str, tuple[int, ...]]) -> None:
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing:
        raise ValueError(f"{folder}: the adapter misses {missing[0]!r} ({len(missing)} in all); was it made for another model?")
    if extra:
        raise ValueError(f"{folder}: the adapter has {extra[0]!r} ({len(extra)} in all), which this model has no place for.")
    for key, shape in wanted.items():
        if tensors[key].shape != tuple(shape):
            raise ValueError(
                f"{folder}: {key} has shape {tensors[key].shape}, this model wants {tuple(shape)}; was it made for another model?"
            )
        if not np.isfinite(tensors[key]).all():
            raise ValueError(f"{folder}: {key} holds values that are not finite.")
