"""The architectures, and how the tensors of a file become the parameters of a model.

PyTorch stores the weight of a Linear as (out, in); here it is (in, out). It is transposed as a view, so tensors stored in the requested
dtype are not copied.
"""

import mmap
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.fetch import origin
from minilora.kernels.half import is_half
from minilora.layers import Layer, Linear
from minilora.lora import adapter_parameters
from minilora.models.registry import ARCHITECTURES as FAMILIES
from minilora.models.registry import Architecture as Family
from minilora.quantization.nf4 import is_nf4

_NO_SIZE = """max_position_embeddings sliding_window max_window_layers sliding_window_pattern no_rope_layer_interval
    query_pre_attn_scalar local_attention global_attn_every_n_layers""".split()  # fields that allocate nothing


def family_of(raw: dict[str, Any], where: str) -> Family:
    """The architecture that a config.json names. Raises ValueError, listing those supported, for another."""
    if (family := FAMILIES.get(str(raw.get("model_type")))) is None:
        raise ValueError(f"{where} is of model_type {raw.get('model_type')!r:.80}; supported: {', '.join(FAMILIES)}.")
    names = raw.get("architectures") or []
    if not isinstance(names, list):
        raise ValueError(f"{where}: architectures must be a list of names, got {names!r:.80}.")
    for name in names:
        if name not in family.architectures:
            raise ValueError(f"{where} is of architecture {name!r}; supported: {', '.join(family.architectures)}.")
    return family


def named(classes: Sequence[str]) -> bool:
    """Whether these names were chosen: without names in config.json, transformers uses LABEL_0, LABEL_1, ..."""
    return list(classes) != [f"LABEL_{i}" for i in range(len(classes))]


def check_sizes(config: Any, tensors: dict[str, Any], where: str) -> None:
    """Raise ValueError for sizes larger than those of the tensors, before a model of these sizes is built."""
    largest = max((n for value in tensors.values() for n in value.shape), default=0)
    integers = [field.name for field in fields(config) if "int" in str(field.type)]  # rope_theta is none, even where a file writes 1000000
    sizes = {name: getattr(config, name) for name in integers if not name.endswith("_id")}
    for name in _NO_SIZE:
        sizes.pop(name, None)
    if "head_dim" in sizes:
        sizes["num_attention_heads * head_dim"] = sizes["num_attention_heads"] * sizes["head_dim"]
    for name, size in sizes.items():
        most = len(tensors) if name in ("n_layer", "num_hidden_layers") else largest
        if type(size) is int and size > most:
            raise ValueError(f"{where}: {name} is {size}, but the tensors in the file allow at most {most}.")


def fill(model: Any, family: Family, tensors: dict[str, np.ndarray], source: Path, seed: int | None) -> tuple[str, ...]:
    """Set every parameter to the tensor of its path, without a copy.

    With a seed, modules of family.fresh that the file lacks are initialised: weights from N(0, 0.02^2), biases 0, norms 1. Their paths
    are returned. Raises ValueError as `check_fit`, and for a name that occurs twice, a decoder's head that is missing, or a tied head
    that differs from the embedding.
    """
    tensors, parameters = _renamed(model, family, tensors, source), dict(model.parameters())
    fresh, rng = family.fresh if seed is not None else (), np.random.default_rng(seed)
    drawn = tuple(name for name in fresh if not any(path.startswith(f"{name}.") for path in tensors))
    for path, p in parameters.items():
        if path.rpartition(".")[0] in drawn:
            tensors[path] = rng.normal(0, 0.02, p.data.shape).astype(p.data.dtype).T if p.data.ndim == 2 else p.data.copy()
    head = f"{model.output_head}.weight"
    if family.embedding and head in parameters.keys() - tensors.keys():
        save = "save the model with its head (AutoModelForCausalLM, not AutoModel), or tie it to the embedding (tie_word_embeddings)"
        raise ValueError(f"{source} lacks {head!r}: {save}.")
    tensors = oriented(model, tensors)
    check_fit(source, tensors, {path: p.data.shape for path, p in parameters.items()})
    for path, p in parameters.items():
        p.data = tensors[path]
    return drawn


def _renamed(model: Layer, family: Family, tensors: dict[str, np.ndarray], source: Path) -> dict[str, np.ndarray]:
    """The tensors by their paths in the model: with the prefix that bare models lack, without buffers and a tied head."""
    paths = {path for path, _ in model.parameters()}
    head = f"{getattr(model, 'output_head', '')}.weight"
    renamed: dict[str, np.ndarray] = {}
    dropped = None
    for name, value in tensors.items():
        if re.fullmatch(family.ignored, name):
            dropped = name if re.match(r"(cls|lm_head|vocab_.*|decoder)\.", name) else dropped
            continue
        path = name if name in paths or name == head or name.startswith(family.prefix) else family.prefix + name
        path = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", path))  # the first BERTs
        if path in renamed:
            raise ValueError(f"{source} does not fit the model: it has {path!r} twice.")
        renamed[path] = value
    if head in renamed and head not in paths and family.embedding:  # tied: a copy of the embedding
        tied = renamed.pop(head)
        if not np.array_equal(tied, renamed.get(family.embedding, tied)):
            raise ValueError(f"{source}: {head} differs from {family.embedding}, but the configuration ties them.")
    if dropped:
        print(f"{source}: the head for another task ({dropped}, ...) is ignored.", file=sys.stderr)
    return renamed


def drawn_parameters(model: Layer) -> list[str]:
    """The paths of the parameters, except adapters', of modules that were initialised at random (`Origin.drawn`)."""
    own = adapter_parameters(model)
    return [path for path, _ in model.parameters() if path not in own and path.rpartition(".")[0] in origin(model).drawn]


def oriented(model: Layer, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors with weights of Linear transposed, from the file's orientation to (in, out) or back, as views."""
    if getattr(model, "weights_are_in_out", True):
        return tensors
    linear = {f"{path}.weight" for path, layer in model.modules() if isinstance(layer, Linear)}
    return {path: value.T if path in linear and not is_nf4(value) else value for path, value in tensors.items()}


def check_fit(source: str | Path, tensors: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError, naming the file or folder, for missing and unexpected tensors, wrong shapes, and values that are not finite."""
    for what, keys, why in (
        ("lacks", expected.keys() - tensors.keys(), "; was it made for another model?"),
        ("has", tensors.keys() - expected.keys(), ", which the model has no place for."),
    ):
        if keys:
            raise ValueError(f"{source} does not fit the model: it {what} {min(keys)!r} ({len(keys)} tensors in all){why}")
    for key, shape in expected.items():
        value = tensors[key]
        if value.shape != tuple(shape):
            raise ValueError(f"{source} does not fit the model: {key} has shape {value.shape}, the model expects {tuple(shape)}.")
        if not (is_nf4(value) or _finite(value)):  # NF4 is checked when it is read
            raise ValueError(f"{source}: {key} ({value.dtype}) holds values that are not finite floating-point numbers.")
        _give_back(value)


def _finite(value: np.ndarray) -> bool:
    """Whether these are floating-point numbers, all finite in float32."""
    if value.size == 0:
        return value.dtype.kind == "f" or is_half(value)
    if is_half(value) and value.dtype.kind == "V":  # bfloat16, whose exponent is all ones where it is not finite
        return bool((value.view(np.uint16) & 0x7FFF).max() < 0x7F80)
    with np.errstate(invalid="ignore"):  # min and max take no memory, unlike isfinite, and are NaN if one element is
        return value.dtype.kind == "f" and bool(max(-value.min(), value.max()) <= np.finfo(np.float32).max)


def _give_back(value: Any) -> None:
    """Release the pages of a mapped file that the check has read: of an embedding few are read again, and those from the system's cache."""
    while isinstance(value, np.ndarray):
        value = value.base
    if isinstance(value, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        value.madvise(mmap.MADV_DONTNEED)


def warn_of_pooling(model: Any, folder: Path) -> None:
    """Report on standard error that transformers and PEFT cannot reproduce a model with "pooling": "mean"."""
    if getattr(model.config, "pooling", "first") == "mean" and model.model_type != "modernbert":
        print(f"{folder}: its classifier reads the mean of the tokens; transformers and PEFT read the first one instead.", file=sys.stderr)


class Blank(np.random.Generator):
    """Every array is one zero, repeated by strides of zero."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def normal(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> Any:
        shape = (size,) if isinstance(size, int) else size
        return np.lib.stride_tricks.as_strided(np.zeros(()), shape, (0,) * len(shape)).view(_Unset)

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        return self.normal(size=size)


class _Unset(np.ndarray):
    """An array of one number, repeated by strides of zero; a change of dtype keeps it so."""

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        return np.lib.stride_tricks.as_strided(np.zeros((), dtype), self.shape, (0,) * self.ndim)
