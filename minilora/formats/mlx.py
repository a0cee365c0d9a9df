"""Adapters of mlx-lm: adapters.safetensors, and an adapter_config.json of its own.

    <path>.lora_a (in, r)    <path>.lora_b (r, out)    <path>.m (out,)   DoRA's magnitudes        y = x W + scale (x A) B

All layers have one rank and one scale: smaller ranks are padded with zeros, and what differs from the scale is part of B. A layer is named
by its whole path.
Source: mlx-lm 0.32, tuner/utils.py (load_adapters), tuner/lora.py and tuner/dora.py.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.atomic import write_json
from minilora.formats.tensors import map_tensors, write_tensors
from minilora.models.config_file import check_types

FILE = "adapters.safetensors"
Factors = dict[str, tuple[np.ndarray, np.ndarray, float, np.ndarray | None]]  # {path: (A (in, r), B (r, out), scaling, m (out,) or None)}


class _Parameters:
    rank: int
    scale: float


def is_mlx(raw: dict[str, Any]) -> bool:
    """Whether an adapter_config.json is one of mlx-lm."""
    return "peft_type" not in raw and "lora_parameters" in raw


def write_mlx(folder: Path, layers: Factors, blocks: int, base: str | None) -> None:
    """Write the adapters. blocks: the number of the model's. Raises OSError."""
    rank, scale = max(A.shape[1] for A, *_ in layers.values()), next(iter(layers.values()))[2]
    tensors = {}
    for path, (A, B, scaling, m) in layers.items():
        more = rank - A.shape[1]
        tensors[f"{_theirs(path)}.lora_a"] = np.pad(A, ((0, 0), (0, more)))
        tensors[f"{_theirs(path)}.lora_b"] = np.pad(B * np.float32(scaling / scale), ((0, more), (0, 0)))
        if m is not None:
            tensors[f"{_theirs(path)}.m"] = m
    kind = "lora" if next(iter(layers.values()))[3] is None else "dora"
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": [_theirs(path) for path in layers]}
    write_tensors(folder / FILE, tensors)
    write_json(folder / "adapter_config.json", {"model": base, "fine_tune_type": kind, "num_layers": blocks, "lora_parameters": parameters})


def from_mlx(folder: Path, raw: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the configuration, the tensors) of such a folder, as PEFT has them. Raises ValueError, naming the file."""
    where, kind = folder / "adapter_config.json", raw.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ValueError(f"{where}: fine_tune_type is {kind!r:.40}; only lora and dora are adapters.")
    about = raw["lora_parameters"]
    if not isinstance(about, dict) or not {"rank", "scale"} <= about.keys():
        raise ValueError(f"{where}: lora_parameters must be an object with rank and scale.")
    check_types(_Parameters, {name: about[name] for name in ("rank", "scale")}, f"{where}, lora_parameters")
    names, tensors = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}, {}
    for name, value in map_tensors(folder / FILE)[0].items():
        path, _, part = name.rpartition(".")
        if part not in names:
            raise ValueError(f"{folder / FILE} has a tensor {name!r:.80}, which is not part of an adapter.")
        tensors[f"base_model.model.{_ours(path)}.{names[part]}"] = value.T
    paths = sorted({_ours(name.rpartition(".")[0]) for name in map_tensors(folder / FILE)[0]})
    config = {"peft_type": "LORA", "r": about["rank"], "lora_alpha": about["scale"] * about["rank"], "target_modules": paths}
    return config | {"use_dora": kind == "dora", "base_model_name_or_path": raw.get("model")}, tensors


def _theirs(path: str) -> str:
    return re.sub(r"^transformer\.", "model.", path)  # GPT-2


def _ours(path: str) -> str:
    return re.sub(r"^model\.h\.", "transformer.h.", path)
