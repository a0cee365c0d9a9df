"""Folders of the methods that PEFT has not: bottleneck adapters, and parts of the model that were trained as they are.

adapter_config.json          peft_type "BOTTLENECK" or "PARTIAL", and the fields of BottleneckConfig or PartialConfig
adapter_model.safetensors    {path: array} of everything that was trained, with weights turned as in the model's own checkpoint

A path is that of the parameter in the model; a bottleneck's are <projection>.down.weight, .down.bias, .up.weight and .up.bias.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from minilora.adapters import BottleneckConfig, PartialConfig, inject
from minilora.backend import as_like, to_numpy
from minilora.formats.atomic import write_json
from minilora.formats.fitting import turned
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.layers import Layer, Linear

KINDS: dict[str, type[PartialConfig]] = {kind.peft_type: kind for kind in (BottleneckConfig, PartialConfig)}


def save(model: Layer, folder: str | Path) -> int:
    """Write what was trained. Returns the size of the tensors' file in bytes; raises ValueError as `save_adapter`."""
    from minilora.formats.adapter import _FINGERPRINT, fingerprint

    folder, config = Path(folder), model.lora_config
    tensors = {path: to_numpy(p.data) for path, p in model.parameters() if p.trainable}
    new = {path for path in tensors if path not in model.base_values}
    if odd := sorted(path for path in new if ".down." not in path and ".up." not in path):
        raise ValueError(f"save_adapter: {odd[0]} is trainable, but the configuration does not name it; add its layer to modules_to_save.")
    if missing := sorted(model.base_values.keys() - tensors.keys()):
        raise ValueError(f"save_adapter: {missing[0]} was frozen after it had been trained; unfreeze it, or the file would be without it.")
    file = folder / "adapter_model.safetensors"
    write_tensors(file, turned(model, tensors), {_FINGERPRINT: fingerprint(model, _trained_weights(model))})
    told = {**asdict(config), "base_model_name_or_path": config.base_model_name_or_path or model.hub_id or model.source}
    write_json(folder / "adapter_config.json", {"peft_type": config.peft_type, **told})
    return file.stat().st_size


def load(model: Layer, folder: Path, config: PartialConfig) -> PartialConfig:
    """Adapt a base model as a folder says; everything is checked before the model is touched. Raises as `load_adapter`."""
    from minilora.formats.adapter import _FINGERPRINT, _check_fit, fingerprint

    tensors, metadata = read_tensors(folder / "adapter_model.safetensors")
    rehearsal = model.replica()
    try:
        inject(rehearsal, config, rng=0, strict=False)
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter does not fit this model: {error}") from None
    base = fingerprint(rehearsal, _trained_weights(rehearsal))
    if metadata.get(_FINGERPRINT, base) != base:
        raise ValueError(f"{folder}: this adapter was made for a base model with other weights than the one it is put on.")
    wanted = turned(rehearsal, {path: p.data for path, p in rehearsal.parameters() if p.trainable})
    _check_fit(folder, tensors, {path: value.shape for path, value in wanted.items()})

    inject(model, config, rng=0, strict=False)
    tensors = turned(model, tensors)
    for path, p in model.parameters():
        if p.trainable:
            p.data = as_like(np.ascontiguousarray(tensors[path], dtype=p.data.dtype), p.data)
    return config


def read_config(raw: dict[str, Any], path: Path) -> PartialConfig:
    """The configuration in an adapter_config.json. Raises ValueError for a field that there is not, or a value without meaning."""
    kind = KINDS[raw["peft_type"]]
    known = {field.name for field in fields(kind)}
    if unknown := sorted(raw.keys() - known - {"peft_type"}):
        raise ValueError(f"{path}: {unknown[0]}={raw[unknown[0]]!r} is not supported.")
    try:
        return kind(**{key: value for key, value in raw.items() if key in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _trained_weights(model: Layer) -> list[str]:
    """Paths of the dense layers whose weight is not the base's."""
    return [path for path, layer in model.modules() if isinstance(layer, Linear) and layer.weight.trainable]
