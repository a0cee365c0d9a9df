"""LoRA adapters as GGUF files, the format of llama.cpp and Ollama.

    <name>.weight.lora_a (r, in)    <name>.weight.lora_b (out, r)        y = W x + (alpha / r) B A x,   r of each tensor

A layer's scaling is part of its B where it is not alpha / r. Rows of B for q and k are ordered as those of W in a model's file (gguf.py).
Source: llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats import extra
from minilora.formats.atomic import write_file
from minilora.formats.gguf import INTERLEAVED, TYPES, in_halves
from minilora.formats.gguf_header import dequantized, read_header
from minilora.formats.mlx import Factors

ARCHITECTURES = {**{model_type: name for name, model_type in TYPES.items()}, "mistral": "llama", "gpt2": "gpt2"}  # by model_type


def write_gguf_adapter(file: Path, layers: Factors, model: Any, alpha: float) -> None:
    """Write the adapters of a model. Raises ImportError without gguf; OSError."""
    extra("gguf", "gguf", f"writing {file}")
    import gguf

    def write(temporary: str) -> None:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURES[kind_of(model)])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        names = {path: name for name, path in _names(model).items()}
        for path, (A, B, scaling, _) in layers.items():
            B = _reordered(B.T, path, model, back=False) * np.float32(scaling * A.shape[1] / alpha)
            writer.add_tensor(f"{names[path]}.weight.lora_a", np.ascontiguousarray(A.T))
            writer.add_tensor(f"{names[path]}.weight.lora_b", np.ascontiguousarray(B))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_file(file, write)


def from_gguf(file: Path, model: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the configuration, the tensors) of an adapter for this model, as PEFT has them. Raises ValueError, naming the file; ImportError."""
    meta, stored = read_header(file)
    if (meta.get("general.type"), meta.get("adapter.type")) != ("adapter", "lora"):
        raise ValueError(f"{file} is not a LoRA adapter: general.type is {meta.get('general.type')!r:.40}.")
    expected = ARCHITECTURES.get(kind_of(model))
    if expected is None or meta.get("general.architecture") != expected:
        model_is = expected or f"{kind_of(model)}, for which there are no such adapters"
        raise ValueError(f"{file} is for the architecture {meta.get('general.architecture')!r:.40}, the model is {model_is}.")
    paths, tensors, ranks = _names(model), {}, {}
    for name, tensor in stored.items():
        stem, _, part = name.rpartition(".weight.lora_")
        if stem not in paths or part not in ("a", "b") or len(tensor.shape) != 2:
            raise ValueError(f"{file} has a tensor {name!r:.80}, for which the model has no place.")
        value, path = np.asarray(dequantized(tensor, file), np.float32), paths[stem]
        ranks[path] = tensor.shape[0 if part == "a" else 1]
        tensors[f"base_model.model.{path}.lora_{part.upper()}.weight"] = value if part == "a" else _reordered(value, path, model, back=True)
    if not ranks:
        raise ValueError(f"{file} has no adapters.")
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], meta.get("adapter.lora.alpha") or 0
    if not isinstance(alpha, float | int):
        raise ValueError(f"{file}: adapter.lora.alpha is {alpha!r:.40}, not a number.")
    other = {path: rank for path, rank in ranks.items() if rank != r}
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha or r, "target_modules": sorted(ranks), "rank_pattern": other}
    return config | {"alpha_pattern": {} if alpha else other}, tensors  # without alpha, the scaling is 1


def kind_of(model: Any) -> str:
    """The model_type in the config.json of a model; several may share a class."""
    return getattr(model.config, "model_type", model.model_type)


def _names(model: Any) -> dict[str, str]:
    """{llama.cpp's name: path} of the layers of a model."""
    import gguf

    arch = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[kind_of(model)])
    names = gguf.get_tensor_name_map(arch, len(model.body.parts()[1]))
    return {name: path for path, _ in model.modules() if (name := names.get_name(path)) is not None}


def _reordered(B: np.ndarray, path: str, model: Any, back: bool) -> np.ndarray:
    """B (out, r) of q or k for interleaved rotary embeddings; back: for half-split ones. Others are returned unchanged."""
    fields = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    field = fields.get(path.rpartition(".")[2])
    if field is None or ARCHITECTURES[kind_of(model)] not in INTERLEAVED:
        return B
    heads = getattr(model.config, field)
    if len(B) % (2 * heads):
        return B  # of another model: its shape does not fit, either
    return in_halves(B, heads) if back else B.reshape(heads, 2, -1, B.shape[1]).swapaxes(1, 2).reshape(B.shape)
