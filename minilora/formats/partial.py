"""Folders of the methods that PEFT has not: bottleneck adapters, and parts of the model that were trained as they are.

adapter_config.json          peft_type "BOTTLENECK" or "PARTIAL", and the fields of BottleneckConfig or PartialConfig
adapter_model.safetensors    {path: array} of everything that was trained, with weights transposed as in the model's own checkpoint

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
from minilora.formats.fitting import check_fit, drawn_parameters, oriented
from minilora.formats.mark import check_base, mark_of
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.layers import Layer, Linear
from minilora.models.config_file import check_types, made

KINDS: dict[str, type[PartialConfig]] = {kind.peft_type: kind for kind in (BottleneckConfig, PartialConfig)}


def save(model: Layer, folder: str | Path) -> int:
    """Write what was trained. Returns the size of the tensors' file in bytes; raises ValueError as `save_adapter`."""
    folder, config = Path(folder), model.lora_config
    tensors = {path: to_numpy(p.data) for path, p in model.parameters() if p.trainable}
    new = {path for path in tensors if path not in model.base_values}
    if odd := sorted(path for path in new if ".down." not in path and ".up." not in path):
        raise ValueError(f"save_adapter: {odd[0]} is trainable, but the configuration does not name it; add its layer to modules_to_save.")
    if missing := sorted(model.base_values.keys() - tensors.keys()):
        raise ValueError(f"save_adapter: {missing[0]} was frozen after it had been trained; unfreeze it, or the file would be without it.")
    drawn = drawn_parameters(model)
    tensors |= {path: to_numpy(p.data) for path, p in model.parameters() if path in drawn}
    file = folder / "adapter_model.safetensors"
    write_tensors(file, oriented(model, tensors), mark_of(model, _not_the_base(model)))
    result = {**asdict(config), "base_model_name_or_path": config.base_model_name_or_path or model.hub_id or model.source}
    write_json(folder / "adapter_config.json", {"peft_type": config.peft_type, **result})
    return file.stat().st_size


def load(model: Layer, folder: Path, config: PartialConfig, allow_other_weights: bool = False) -> PartialConfig:
    """Adapt a base model as a folder says; everything is checked before the model is touched. Raises as `load_adapter`."""
    tensors, metadata = read_tensors(folder / "adapter_model.safetensors")
    dry_run = model.replica()
    try:
        inject(dry_run, config, rng=0, strict=False)
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter does not fit this model: {error}") from None
    check_base(dry_run, _not_the_base(dry_run), metadata, folder, allow_other_weights)
    kept = tensors.keys() & drawn_parameters(dry_run)
    expected = oriented(dry_run, {path: p.data for path, p in dry_run.parameters() if p.trainable or path in kept})
    check_fit(folder, tensors, {path: value.shape for path, value in expected.items()})

    inject(model, config, rng=0, strict=False)
    tensors = oriented(model, tensors)
    for path, p in model.parameters():
        if path in tensors:
            p.data = as_like(np.ascontiguousarray(tensors[path], dtype=p.data.dtype), p.data)
    return config


def read_config(raw: dict[str, Any], path: Path) -> PartialConfig:
    """The configuration in an adapter_config.json. Raises ValueError for a field that there is not, or a value without meaning."""
    kind = KINDS[raw["peft_type"]]
    values = {key: value for key, value in raw.items() if key != "peft_type"}
    if unknown := sorted(values.keys() - {field.name for field in fields(kind)}):
        raise ValueError(f"{path}: {unknown[0]}={raw[unknown[0]]!r:.80} is not supported.")
    check_types(kind, values, str(path))
    return made(kind, values, str(path))


def _not_the_base(model: Layer) -> list[str]:
    """Paths of the dense layers whose weight is trained, or was drawn."""
    return [*model.drawn, *(path for path, layer in model.modules() if isinstance(layer, Linear) and layer.weight.trainable)]
