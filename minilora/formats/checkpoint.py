"""Models as published: a folder with config.json and model.safetensors (in one file or in shards), a .gguf file, or an id of the hub.

PyTorch keeps the weight of a Linear as (out, in); here it is (in, out). It is turned here, as a view: nothing is copied that the
file holds in the dtype asked for.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np

from minilora.adapters import bottlenecks
from minilora.backend import choose_backend, to_numpy
from minilora.family.adapted import adapter_parameters
from minilora.family.half import KINDS
from minilora.family.nf4 import is_nf4
from minilora.family.quantize import PACK, narrow_model, quantize_model
from minilora.formats.atomic import read_json, write_file, write_json
from minilora.formats.blank import Blank
from minilora.formats.nf4 import CONFIG, is_nf4_config, packed, unpacked
from minilora.formats.tensors import map_tensors, write_tensors
from minilora.formats.tokenizer import load_tokenizer
from minilora.layers import Embedding, Layer, Linear
from minilora.lora import lora_layers

BUNDLED = "pydoc"  # the model inside the package: load_model("pydoc")


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

_TOKENIZER_FILES = "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja".split()
_TOKENIZER_FILES += "vocab.txt vocab.json merges.txt tokenizer.model generation_config.json".split()
_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_dropout_prob", "attention_probs_dropout_prob")  # of the config.json read


# -- reading ----------------------------------------------------------------------------------------------------------------


def load_model(
    path_or_id: str | Path = BUNDLED,
    backend: str = "auto",
    dtype: Any = "float32",
    labels: int | Sequence[str] | None = None,
    quantize: str = "",
    *,
    new_head: bool = False,
    seed: int = 0,
) -> Any:  # Any: one of the classes of FAMILIES, which have more in common than Layer
    """A published model on a backend, frozen. Architectures: gpt2, bert, llama, qwen2.

    path_or_id: a folder with config.json and model.safetensors (or shards and model.safetensors.index.json), a .gguf file, an id
    "org/name" of the hub (fetched by huggingface_hub, whose cache and HF_HUB_OFFLINE hold), or "pydoc", the model in this package.
    On NumPy, parameters that the file holds in `dtype` are read-only views of the mapped file.
    labels: the names of a classifier's classes, or how many there are; by default what config.json says. A head of the checkpoint keeps
    its own; new_head=True leaves that out. A classifier or pooler that is not there, or left out, is drawn from N(0, 0.02^2) by `seed`,
    and a line on standard error says so; `model.drawn` names them.
    dtype: "float16" and "bfloat16" are of matrices, embeddings included, and so of activations (kernels/half.py): norms, biases, and what
    `inject` makes trainable, are then of float32.
    quantize: "nf4" keeps the weights of linear layers, but for the head, in four bits (family/nf4.py), "float16" and "bfloat16" in
    sixteen (family/half.py), with activations in `dtype`. A folder that holds them in NF4, as bitsandbytes does, is read as it is.

    Raises FileNotFoundError; ValueError when the configuration, a file or a tensor does not fit; ImportError for a missing extra.
    """
    kind = None if dtype is None else str(np.dtype(dtype) if _is_dtype(dtype) else dtype)
    if kind not in (None, "float64", "float32", *KINDS):
        raise ValueError(f"load_model: dtype is {dtype!r}; choose float32, float64, {' or '.join(KINDS)}.")
    if quantize and kind in KINDS:
        raise ValueError(f"load_model: dtype {kind} and quantize {quantize!r} exclude each other; choose one.")
    if quantize not in ("", *PACK):
        raise ValueError(f"load_model: quantize is {quantize!r}; choose {', '.join(map(repr, PACK))}, or '' for none.")
    backend = choose_backend(backend, quiet=True)
    if str(path_or_id).endswith(".gguf"):
        source = Path(path_or_id)
        raw, tensors = _read_gguf(source)
        where = str(source)
    else:
        source, tensors = model_folder(path_or_id), None
        where = f"{source}/config.json"
        raw = read_json(where)
    family = family_of(raw, where)
    if is_nf4_config(raw.get("quantization_config")):
        del raw["quantization_config"]
    config, model_class = _classes(family)
    config = config.from_json(raw, where)
    published = getattr(config, "class_names", [])
    if labels is not None:
        config = _with_labels(config, labels, where)
    model = model_class(config, rng=Blank(), dtype="float32")
    if tensors is None:
        tensors = unpacked(read_weights(source), source)
    tensors = _renamed(model, family, tensors, source)
    if new_head:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("classifier.")}
    elif isinstance(labels, Sequence) and "classifier.weight" in tensors and list(labels) != published and named(published):
        raise ValueError(f"{where}: the head is for {', '.join(published)}, not {', '.join(labels)}; new_head=True replaces it.")
    drawn = _fresh(model, family, tensors, raw, source, new_head, seed)
    tensors |= drawn
    assign(model, turned(model, tensors), source)
    model.drawn = sorted({name.rpartition(".")[0] for name in drawn})
    model.source = BUNDLED if str(path_or_id) == BUNDLED else str(source.absolute())  # an adapter will name it, from anywhere
    model.hub_id = str(path_or_id) if _is_hub_id(path_or_id) else None
    if quantize:
        quantize_model(model, quantize)
    if kind in KINDS:
        narrow_model(model, kind)
    return model.freeze().to(backend, None if kind in KINDS else dtype)


def model_folder(name: str | Path = BUNDLED) -> Path:
    """The folder of a model: the bundled one by its name, a path, or what huggingface_hub has fetched for an id "org/name".

    Raises FileNotFoundError when there is no such folder, or no config.json in it; ImportError when huggingface_hub is missing.
    """
    if _is_hub_id(name):
        return _fetch(str(name))
    folder = Path(__file__).parent.parent / "data" / BUNDLED if str(name) == BUNDLED else Path(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no model at {name}: wanted a folder with config.json and model.safetensors, a .gguf file, "
            f'an id of the hub ("org/name"), or {BUNDLED!r}.'
        )
    return folder


def family_of(raw: dict[str, Any], where: str) -> Family:
    """The architecture that a config.json names. Raises ValueError, listing those supported, for another."""
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise ValueError(f"{where} is of model_type {raw.get('model_type')!r}; supported: {', '.join(FAMILIES)}.")
    for name in raw.get("architectures") or ():
        if name not in family.architectures:
            raise ValueError(f"{where} is of architecture {name!r}; supported: {', '.join(family.architectures)}.")
    return family


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """{name: array} of a folder's safetensors files, mapped. Raises FileNotFoundError or ValueError."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return map_tensors(folder / "model.safetensors")[0]
    if index.is_file():
        return _read_shards(index)
    pickled = sorted(p.name for suffix in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{suffix}"))
    if pickled:
        raise ValueError(f"{folder} has only a pickled checkpoint ({pickled[0]}), which is not read; convert it to safetensors.")
    raise FileNotFoundError(f"there is no file {folder}/model.safetensors, nor model.safetensors.index.json.")


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    """The tensors of all the files that an index names, each of which must lie beside it and hold what the index says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map.")
    files = []
    for name in dict.fromkeys(places.values()):
        if not isinstance(name, str) or name in ("", ".", "..") or PureWindowsPath(name).name != name:
            raise ValueError(f"{index} names the file {name!r:.80}, which is not a plain name of a file in its folder.")
        files.append(name)
    shards = {file: map_tensors(index.parent / file)[0] for file in files}
    for file, shard in shards.items():
        listed = {name for name, place in places.items() if place == file}
        if listed != shard.keys():
            odd = min(listed ^ shard.keys())
            where = "is not there" if odd in listed else "is there, but not in the index"
            raise ValueError(f"{index} and {file} differ: {odd!r:.80} {where}.")
    return {name: value for shard in shards.values() for name, value in shard.items()}


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from minilora.formats.gguf import read_gguf

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    raw, tensors, _ = read_gguf(path)
    return raw, tensors


def _is_hub_id(name: str | Path) -> bool:
    """Does this look like "org/name", with nothing of the sort on disk?"""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()


def _fetch(hub_id: str) -> Path:
    """The local snapshot of a model on the hub."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"there is no folder {hub_id}, and to fetch it from the hub takes huggingface_hub: pip install 'minilora[hf]'."
        ) from error
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # no network, offline, no such name, no permission: each has a class of its own, some from other libraries
        why = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(f"there is no folder {hub_id}, and the hub did not give it: {why:.300}") from None
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{hub_id} on the hub has no config.json; is it a model?")
    return folder


def _classes(family: Family) -> tuple[Any, Any]:
    module = importlib.import_module(f"minilora.models.{family.module}")
    return getattr(module, family.config), getattr(module, family.model)


def _with_labels(config: Any, labels: int | Sequence[str], where: str) -> Any:
    """The configuration with other classes: names, or a number of them, with which the names in it stay if they still fit."""
    if not hasattr(config, "num_labels"):
        raise ValueError(f"{where}: this model is no classifier, which takes a BERT.")
    n, names = (labels, None) if isinstance(labels, int) else (len(labels), dict(enumerate(labels)))
    if n == config.num_labels:
        return replace(config, id2label=names or config.id2label)
    return replace(config, num_labels=n, id2label=names, problem_type=None)


def named(classes: Sequence[str]) -> bool:
    """Does a head name its classes? Where config.json gives none, transformers calls them LABEL_0, LABEL_1, ..."""
    return list(classes) != [f"LABEL_{i}" for i in range(len(classes))]


def _is_dtype(dtype: Any) -> bool:
    try:
        np.dtype(dtype)
    except TypeError:
        return False
    return True


# -- fitting the tensors to the model ---------------------------------------------------------------------------------------


def _renamed(model: Layer, family: Family, tensors: dict[str, np.ndarray], source: Path) -> dict[str, np.ndarray]:
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


def _fresh(
    model: Any, family: Family, tensors: dict[str, np.ndarray], raw: dict[str, Any], source: Path, new_head: bool, seed: int
) -> dict[str, np.ndarray]:
    """Initial values, in the file's orientation, of modules that a checkpoint of a bare model has not. Said on standard error."""
    if family.architectures[0] in (raw.get("architectures") or ()) and not new_head:
        return {}
    parameters = dict(model.parameters())
    absent = [name for name in family.fresh if not any(path.startswith(f"{name}.") for path in tensors)]
    rng, values = np.random.default_rng(seed), {}
    for name in absent:
        W, b = parameters[f"{name}.weight"].data, parameters[f"{name}.bias"].data
        values[f"{name}.weight"] = rng.normal(0, 0.02, W.shape).astype(W.dtype).T
        values[f"{name}.bias"] = np.zeros(b.shape, b.dtype)
    if absent:
        print(f"{source} has no {' and no '.join(absent)}: drawn at random, until it is trained or loaded.", file=sys.stderr)
    return values


def turned(model: Layer, tensors: dict[str, Any]) -> dict[str, Any]:
    """Weights of Linear from the file's orientation to (in, out), or back, as views."""
    if getattr(model, "weights_are_in_out", True):
        return tensors
    linear = {f"{path}.weight" for path, layer in model.modules() if isinstance(layer, Linear)}
    return {path: value.T if path in linear and not is_nf4(value) else value for path, value in tensors.items()}


def assign(model: Layer, tensors: dict[str, np.ndarray], source: str | Path) -> None:
    """Set every parameter of the model to the tensor of the same path. Nothing is copied; the dtypes are the tensors'.

    Raises ValueError, before anything is set, naming missing, unexpected and misshapen tensors, and values that are not finite.
    """
    parameters = dict(model.parameters())
    missing, extra = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing:
        raise ValueError(f"{source} does not fit the model: it misses {missing[0]!r} ({len(missing)} tensors in all).")
    if extra:
        raise ValueError(f"{source} does not fit the model: it has {extra[0]!r} too many ({len(extra)} tensors in all).")
    for path, p in parameters.items():
        value = tensors[path]
        if value.shape != p.data.shape:
            raise ValueError(f"{source} does not fit the model: {path} has shape {value.shape}, the model wants {p.data.shape}.")
        if value.dtype.kind != "f" or not _finite(value):
            raise ValueError(f"{source}: {path} ({value.dtype}) holds values that are not finite floating-point numbers.")
    for path, p in parameters.items():
        p.data = tensors[path]


def _finite(x: np.ndarray) -> bool:
    """By the extremes, which takes no memory, unlike isfinite: both are NaN if one element is."""
    x = getattr(x, "nested_absmax", x)
    with np.errstate(invalid="ignore"):
        return x.size == 0 or bool(np.isfinite(x.min()) and np.isfinite(x.max()))


# -- writing ----------------------------------------------------------------------------------------------------------------


def save_model(model: Any, folder: str | Path, dtype: Any = None) -> None:
    """Write a folder that transformers loads: config.json, model.safetensors, and the tokenizer's files where the model came with one.

    dtype: of the tensors; by default the model's. Weights in NF4 are written so. Merged adapters are part of the weights; unmerged
    ones raise ValueError, but `with minilora.disabled(model)` the base is written without them. Bottlenecks raise it in any case.
    The tokenizer of a GGUF file is written if it can be read; else a line on standard error says why it is not.
    """
    if bottled := bottlenecks(model):
        raise ValueError(f"save_model: {bottled[0][0]} has a bottleneck adapter, which no weight can hold; use save_adapter.")
    folder, own, modules = Path(folder), adapter_parameters(model), dict(model.modules())
    merged: dict[str, Any] = {}
    for path, layer in lora_layers(model):
        if layer.enabled and layer.merged is None:
            raise ValueError(f"save_model: {path} has an unmerged adapter; call minilora.merge first, or save_adapter.")
        if layer.enabled and isinstance(layer, Embedding) and getattr(model, "output_head", path) not in modules:
            raise ValueError(f"save_model: the head is tied to {path}, so that its adapter would change the head too; use save_adapter.")
        merged[f"{path}.weight"] = layer.merged if layer.enabled else layer.weight.data
    values = {path: merged.get(path, p.data) for path, p in model.parameters() if path not in own}
    quantized = {path: value for path, value in values.items() if is_nf4(value)}
    tensors = {path: to_numpy(value) for path, value in values.items() if path not in quantized}
    if dtype is not None:
        tensors = {path: value.astype(dtype) for path, value in tensors.items()}
    told = {"model_type": model.model_type, **model.config.to_json()}
    told["architectures"] = [FAMILIES[told["model_type"]].architectures[0]]
    told["torch_dtype"] = str(max((value.dtype for value in tensors.values()), key=lambda d: d.itemsize))
    source = Path(model.source) if model.source and model.source != BUNDLED else None
    if source is not None and (source / "config.json").is_file():
        told = {**{key: value for key, value in read_json(source / "config.json").items() if key in _KEPT}, **told}
    tensors = turned(model, tensors)
    for path, value in quantized.items():
        tensors, told["quantization_config"] = tensors | packed(path, value), CONFIG
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", told)
    if source is not None and source.is_dir():
        _copy(source, folder, _TOKENIZER_FILES)
    elif source is not None and source.is_file():
        try:
            load_tokenizer(source, model.config.vocab_size).save(folder)
        except (ValueError, ImportError) as error:
            print(f"{folder} is without a tokenizer: {error}", file=sys.stderr)


def _copy(source: Path, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (source / name).is_file() and (source / name).resolve() != (folder / name).resolve():
            write_file(folder / name, partial(shutil.copyfile, source / name))
