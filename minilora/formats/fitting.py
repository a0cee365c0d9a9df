"""The architectures, and how the tensors of a file become the parameters of a model.

PyTorch keeps the weight of a Linear as (out, in); here it is (in, out). It is transposed here, as a view: nothing is copied that the
file holds in the dtype asked for.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora.layers import Layer, Linear
from minilora.lora.adapted import adapter_parameters
from minilora.quantization.nf4 import is_nf4


class Family(NamedTuple):
    """What there is to know of an architecture to read its checkpoints."""

    module: str
    config: str
    model: str
    architectures: tuple[str, ...]  # classes of transformers whose checkpoints fit; the first is the one written
    prefix: str  # what that class puts before the names of the bare model
    embedding: str  # the table that a tied head shares
    ignored: str  # regular expression: buffers, and heads for other tasks
    fresh: tuple[str, ...] = ()  # modules that a bare model may lack; they then start at random


_BERTS = ("BertForSequenceClassification", "BertModel", "BertForMaskedLM", "BertForPreTraining")
_BERT_HEADS = r"(bert\.)?embeddings\.position_ids|cls\..*"
_LLAMA = ("model.", "model.embed_tokens.weight", r".*rotary_emb\.inv_freq")
FAMILIES = {
    "gpt2": Family(
        *("gpt2", "GPT2Config", "GPT2", ("GPT2LMHeadModel", "GPT2Model"), "transformer.", "transformer.wte.weight"),
        r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    ),
    "bert": Family("bert", "BertConfig", "BertClassifier", _BERTS, "bert.", "", _BERT_HEADS, ("bert.pooler.dense", "classifier")),
    "llama": Family("llama", "LlamaConfig", "Llama", ("LlamaForCausalLM", "LlamaModel"), *_LLAMA),
    "qwen2": Family("llama", "LlamaConfig", "Llama", ("Qwen2ForCausalLM", "Qwen2Model"), *_LLAMA),
}


def family_of(raw: dict[str, Any], where: str) -> Family:
    """The architecture that a config.json names. Raises ValueError, listing those supported, for another."""
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise ValueError(f"{where} is of model_type {raw.get('model_type')!r:.80}; supported: {', '.join(FAMILIES)}.")
    names = raw.get("architectures") or []
    if not isinstance(names, list):
        raise ValueError(f"{where}: architectures must be a list of names, got {names!r:.80}.")
    for name in names:
        if name not in family.architectures:
            raise ValueError(f"{where} is of architecture {name!r}; supported: {', '.join(family.architectures)}.")
    return family


def classes_of(family: Family) -> tuple[Any, Any]:
    module = importlib.import_module(f"minilora.models.{family.module}")
    return getattr(module, family.config), getattr(module, family.model)


def named(classes: Sequence[str]) -> bool:
    """Does a head name its classes? Where config.json gives none, transformers calls them LABEL_0, LABEL_1, ..."""
    return list(classes) != [f"LABEL_{i}" for i in range(len(classes))]


def check_sizes(config: Any, tensors: dict[str, Any], where: str) -> None:
    """Raise ValueError for sizes beyond those of the tensors in the file: they decide how much is built, before a tensor is fitted."""
    largest = max((n for value in tensors.values() for n in value.shape), default=0)
    sizes = {field.name: getattr(config, field.name) for field in fields(config) if not field.name.endswith("_id")}
    sizes.pop("max_position_embeddings", None)  # nothing is built of it
    if "head_dim" in sizes:
        sizes["num_attention_heads * head_dim"] = sizes["num_attention_heads"] * sizes["head_dim"]
    for name, size in sizes.items():
        most = len(tensors) if name in ("n_layer", "num_hidden_layers") else largest
        if type(size) is int and size > most:
            raise ValueError(f"{where}: {name} is {size}, but of what the file holds there are at most {most}.")


def renamed(model: Layer, family: Family, tensors: dict[str, np.ndarray], source: Path) -> dict[str, np.ndarray]:
    """The tensors under the paths of the model: with the prefix that bare models lack, without buffers and a tied head."""
    paths = {path for path, _ in model.parameters()}
    head = f"{getattr(model, 'output_head', '')}.weight"
    renamed: dict[str, np.ndarray] = {}
    dropped = None
    for name, value in tensors.items():
        if re.fullmatch(family.ignored, name):
            dropped = name if name.startswith("cls.") else dropped
            continue
        path = name if name in paths or name == head or name.startswith(family.prefix) else family.prefix + name
        path = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", path))  # the first BERTs
        if path in renamed:
            raise ValueError(f"{source} does not fit the model: it has {path!r} twice.")
        renamed[path] = value
    if head in renamed and head not in paths and family.embedding:  # the head is the embedding: it may be there, if it is the same
        tied = renamed.pop(head)
        if not np.array_equal(tied, renamed.get(family.embedding, tied)):
            raise ValueError(f"{source}: {head} differs from {family.embedding}, but the configuration says that they are tied.")
    if dropped:
        print(f"{source}: the head for another task ({dropped}, ...) is left out.", file=sys.stderr)
    return renamed


def fresh(
    model: Any, family: Family, tensors: dict[str, np.ndarray], raw: dict[str, Any], source: Path, new_head: bool, seed: int
) -> dict[str, np.ndarray]:
    """Initial values, in the file's orientation, of modules that a bare checkpoint or new_head leaves out. Said on standard error."""
    if family.architectures[0] in (raw.get("architectures") or ()) and not new_head:
        return {}
    parameters = dict(model.parameters())
    absent = [name for name in family.fresh if not any(path.startswith(f"{name}.") for path in tensors)]
    rng, values = np.random.default_rng(seed), {}
    for name in absent:
        W, b = parameters[f"{name}.weight"].data, parameters[f"{name}.bias"].data
        values[f"{name}.weight"] = rng.normal(0, 0.02, W.shape).astype(W.dtype).T
        values[f"{name}.bias"] = np.zeros(b.shape, b.dtype)
    model.drawn = tuple(absent)
    if absent:
        print(f"{source} has no {' and no '.join(absent)}: drawn at random, until it is trained or loaded.", file=sys.stderr)
    return values


def drawn_parameters(model: Layer) -> list[str]:
    """The paths of the parameters, but for adapters', of the modules that no file held (`Layer.drawn`)."""
    own = adapter_parameters(model)
    return [path for path, _ in model.parameters() if path not in own and path.rpartition(".")[0] in model.drawn]


def oriented(model: Layer, tensors: dict[str, Any]) -> dict[str, Any]:
    """Weights of Linear from the file's orientation to (in, out), or back, as views."""
    if getattr(model, "weights_are_in_out", True):
        return tensors
    linear = {f"{path}.weight" for path, layer in model.modules() if isinstance(layer, Linear)}
    return {path: value.T if path in linear and not is_nf4(value) else value for path, value in tensors.items()}


def assign(model: Layer, tensors: dict[str, np.ndarray], source: str | Path) -> None:
    """Set every parameter of the model to the tensor of the same path. Nothing is copied; the dtypes are the tensors'.

    Raises ValueError, before anything is set, as `check_fit`.
    """
    parameters = dict(model.parameters())
    check_fit(source, tensors, {path: p.data.shape for path, p in parameters.items()})
    for path, p in parameters.items():
        p.data = tensors[path]


def check_fit(source: str | Path, tensors: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError, naming the file or folder, for missing, unexpected and misshapen tensors, and values that are not finite."""
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        text = f"it misses {missing[0]!r} ({len(missing)} tensors in all); was it made for another model?"
        raise ValueError(f"{source} does not fit the model: {text}")
    if extra:
        text = f"it has {extra[0]!r} ({len(extra)} tensors in all), which the model has no place for."
        raise ValueError(f"{source} does not fit the model: {text}")
    for key, shape in expected.items():
        value = tensors[key]
        if value.shape != tuple(shape):
            raise ValueError(f"{source} does not fit the model: {key} has shape {value.shape}, the model wants {tuple(shape)}.")
        if value.dtype.kind != "f" or not _finite(value):
            raise ValueError(f"{source}: {key} ({value.dtype}) holds values that are not finite floating-point numbers.")


def _finite(x: np.ndarray) -> bool:
    """By the extremes, which takes no memory, unlike isfinite: both are NaN if one element is. NF4 was looked at when it was read."""
    if is_nf4(x):
        return True
    with np.errstate(invalid="ignore"):
        return x.size == 0 or bool(max(-x.min(), x.max()) <= np.finfo(np.float32).max)  # what float64 may hold beyond would become infinite


def warn_of_pooling(model: Any, folder: Path) -> None:
    """Say on standard error that transformers and PEFT cannot reproduce what is written, where "pooling" is "mean"."""
    if getattr(model.config, "pooling", "first") == "mean":
        print(
            f"{folder}: its classifier reads the mean of the tokens (pooling), which transformers and PEFT have not: "
            "there it reads BERT's pooler, and answers otherwise.",
            file=sys.stderr,
        )
