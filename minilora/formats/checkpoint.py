"""Published models: a folder with config.json and model.safetensors (one file or shards), a .gguf file, or an id on the hub."""

import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minilora.adapters import bottlenecks
from minilora.backend import choose_backend, to_numpy
from minilora.formats.atomic import read_json, write_file, write_json
from minilora.formats.fetch import BUNDLED, Origin, is_hub_id, model_folder, origin, read_weights, weight_files
from minilora.formats.fitting import FAMILIES, Blank, check_sizes, family_of, fill, named, oriented, warn_of_pooling
from minilora.formats.gguf import read_gguf
from minilora.formats.nf4 import CONFIG, is_nf4_config, packed, unpacked
from minilora.formats.tensors import stored_dtypes, write_tensors
from minilora.formats.tokenizer import load_tokenizer
from minilora.kernels.half import HALF
from minilora.layers import Embedding
from minilora.lora import adapter_parameters, lora_layers
from minilora.models.bert import BertConfig
from minilora.models.decoder import Decoder
from minilora.quantization.nf4 import is_nf4
from minilora.quantization.quantize import bfloat16_or_none, check_kind, quantize_model, to_half_precision

_TOKENIZER_FILES = "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja".split()
_TOKENIZER_FILES += "vocab.txt vocab.json merges.txt tokenizer.model generation_config.json".split()
_COPIED = [f"{name}_token_id" for name in ("bos", "eos", "pad", "cls", "sep")]
_COPIED += "hidden_dropout_prob attention_probs_dropout_prob attention_dropout".split()
STORED = "stored"  # a dtype for save_model


def load_model(
    path_or_id: str | Path = BUNDLED,
    backend: str = "auto",
    dtype: Any = "float32",
    labels: int | Sequence[str] | None = None,
    quantize: str = "",
    *,
    download: bool = True,
    new_head: bool | None = False,
    seed: int = 0,
    report: bool = True,
) -> Any:  # Any: one of the classes of FAMILIES, which have more in common than Layer
    """A published model on a backend, frozen. Its architecture is one of models/registry.py.

    path_or_id: a folder with config.json and model.safetensors (or shards and model.safetensors.index.json), a .gguf file, an id
    "org/name" on the hub (fetched by huggingface_hub, with its cache and HF_HUB_OFFLINE), or "pydoc", the model in this package.
    On NumPy, parameters stored in `dtype` are read-only views of the mapped file.
    dtype: "float16" and "bfloat16" apply to matrices, embeddings included, and so to activations (kernels/half.py); norms, biases, and
    what `inject` makes trainable stay in float32.
    labels: the class names of a classifier, or their number; by default those of config.json. A classifier in the checkpoint is kept,
    unless new_head=True; None replaces it where its classes are others. A classifier or pooler that is missing or replaced is initialised
    from N(0, 0.02^2) with `seed`, and reported on standard error, unless an adapter that may have it follows (report=False);
    `model.origin.drawn` lists them.
    quantize: "nf4" keeps the weights of linear layers, except the head, in four bits (quantization/nf4.py). A folder in
    NF4, as written by bitsandbytes, is read without `quantize`.
    download: False looks up an id only in the local cache of the hub.

    Raises FileNotFoundError; ValueError when the configuration, a file or a tensor does not fit; ImportError for a missing extra.
    """
    kind = _dtype_name("load_model", dtype)
    if quantize and kind in HALF:
        raise ValueError(f"load_model: dtype {kind} and quantize {quantize!r} exclude each other; choose one.")
    if quantize:
        check_kind(quantize)
    backend = choose_backend(backend, quiet=True)
    if str(path_or_id).endswith(".gguf"):
        source = Path(path_or_id)
        raw, tensors = read_gguf(source)
        where = str(source)
    else:
        source, tensors = model_folder(path_or_id, download), {}
        where = f"{source}/config.json"
        raw = read_json(where)
    family = family_of(raw, where)
    if is_nf4_config(raw.get("quantization_config")):
        del raw["quantization_config"]
    config: Any = family.config.from_json(raw, where)
    published = config.class_names if isinstance(config, BertConfig) else []
    tensors = tensors or unpacked(read_weights(source, None if kind is None else bfloat16_or_none()), source)
    check_sizes(config, tensors, where)
    others = isinstance(labels, Sequence) and list(labels) != published and named(published)
    if labels is not None:
        config = _with_labels(config, labels, where)
        if new_head is None:
            new_head = others or config.num_labels != len(published)
    if new_head:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("classifier.")}
    elif isinstance(labels, Sequence) and others and any(name.startswith("classifier.") for name in tensors):
        raise ValueError(f"{where}: the head is for {', '.join(published)}, not {', '.join(labels)}; new_head=True replaces it.")
    model = family.model(config, rng=Blank(), dtype="float32")
    complete = family.architectures[0] in (raw.get("architectures") or ()) and not new_head
    drawn = fill(model, family, tensors, source, None if complete else seed)
    if drawn and report:
        print(f"{source} has no {' and no '.join(drawn)}: initialised at random, to be trained or loaded.", file=sys.stderr)
    name = BUNDLED if str(path_or_id) == BUNDLED else str(source.absolute())  # adapters name their base by it
    model.origin = Origin(name, str(path_or_id) if is_hub_id(path_or_id) else None, drawn)
    if quantize:
        quantize_model(model, quantize)
    if kind in HALF:
        to_half_precision(model, kind)
    return model.freeze().to(backend, None if kind in HALF else dtype)


def _with_labels(config: Any, labels: int | Sequence[str], where: str) -> Any:
    """The configuration with other classes: their names, or their number, which keeps the present names if it is theirs."""
    if not isinstance(config, BertConfig):
        raise ValueError(f"{where}: this model is not a classifier; labels need a BERT or one of its relatives.")
    n, names = (labels, None) if isinstance(labels, int) else (len(labels), dict(enumerate(labels)))
    if n == config.num_labels:
        return replace(config, id2label=names or config.id2label)
    return replace(config, num_labels=n, id2label=names, problem_type=None)


def _dtype_name(who: str, dtype: Any, *more: str) -> str | None:
    """The name of a dtype, or of one of `more`; None stays None. Raises ValueError, naming the function `who`, for any other."""
    known = ("float32", "float64", *HALF, *more)
    with suppress(TypeError):  # NumPy lacks "bfloat16" until ml_dtypes is imported
        dtype = dtype if dtype is None else np.dtype(dtype).name
    if dtype is not None and dtype not in known:
        raise ValueError(f"{who}: dtype is {dtype!r}; choose {', '.join(known[:-1])} or {known[-1]}.")
    return dtype


def save_model(model: Any, folder: str | Path, dtype: Any = None) -> None:
    """Write a folder that transformers loads: config.json, model.safetensors, and the tokenizer's files where the model has them.

    dtype: "float32", "float64", "float16" or "bfloat16", by default the model's; or "stored", for each tensor its dtype in the files that
    the model was loaded from. NF4 weights are written in NF4. Merged adapters are part of the weights. Unmerged ones raise ValueError,
    except within `with minilora.disabled(model)`, which writes the base model; bottleneck adapters always do.
    Reported on standard error: a GGUF tokenizer that cannot be read and so is not written, a linked file outside the model's folder, which
    is not copied, and an option that transformers lacks ("pooling": "mean").
    """
    kind = _dtype_name("save_model", dtype, STORED)
    if bottled := bottlenecks(model):
        raise ValueError(f"save_model: {bottled[0][0]} has a bottleneck adapter, which cannot be merged into a weight; use save_adapter.")
    folder, own, modules = Path(folder), adapter_parameters(model), dict(model.modules())
    merged: dict[str, Any] = {}
    for path, layer in lora_layers(model):
        if layer.enabled and layer.merged is None:
            raise ValueError(f"save_model: {path} has an unmerged adapter; call minilora.merge first, or save_adapter.")
        if layer.enabled and isinstance(layer, Embedding) and getattr(model, "output_head", path) not in modules:
            raise ValueError(f"save_model: the head is tied to {path}, so its adapter would change the head too; use save_adapter.")
        merged[f"{path}.weight"] = layer.merged if layer.enabled else layer.weight.data
    values = {path: merged.get(path, p.data) for path, p in model.parameters() if path not in own}
    quantized = {path: value for path, value in values.items() if is_nf4(value)}
    tensors = {path: to_numpy(value) for path, value in values.items() if path not in quantized}
    name = origin(model).source
    source = model_folder() if name == BUNDLED else Path(name) if name else None
    published = read_json(source / "config.json", {}) if source else {}
    result = {key: value for key, value in published.items() if key in _COPIED}
    result |= {"model_type": model.model_type, **model.config.to_json()}
    family = FAMILIES[result["model_type"]]
    result["architectures"] = [family.architectures[0]]
    dtypes = dict.fromkeys(tensors, kind) if kind else {}
    if kind == STORED:
        dtypes = _stored(source, family.prefix, tensors) if source and published else {}
    result["torch_dtype"] = max((dtypes.get(path, value.dtype.name) for path, value in tensors.items()), key=lambda name: name[-2:])
    tensors = oriented(model, tensors)
    for path, value in quantized.items():
        tensors, result["quantization_config"] = tensors | packed(path, value), CONFIG
    write_tensors(folder / "model.safetensors", tensors, dtypes=dtypes)
    warn_of_pooling(model, folder)
    write_json(folder / "config.json", result)
    if source is not None:
        _save_tokenizer(model, source, folder)


def _save_tokenizer(model: Any, source: Path, folder: Path) -> None:
    """The tokenizer's files, with all tokens that end an answer for a decoder; a warning on standard error if they cannot be read.

    Links to files elsewhere are not copied. The hub's cache consists of links within its own folder.
    """
    if source.is_dir():
        home = source.resolve()
        home = home.parent.parent if home.parent.name == "snapshots" else home
        for name in _TOKENIZER_FILES:
            real = (source / name).resolve()
            if not real.is_file() or real == (folder / name).resolve():
                continue
            if home in real.parents:
                write_file(folder / name, partial(shutil.copyfile, real))
            else:
                print(f"{source / name} links to a file outside its folder, and is not copied into {folder}.", file=sys.stderr)
        if not isinstance(model, Decoder) or not (folder / "tokenizer.json").is_file():
            return
    try:
        tokenizer = load_tokenizer(source, model.config.vocab_size)
        (tokenizer.save_stop_ids if source.is_dir() else tokenizer.save)(folder)
    except (ValueError, ImportError, FileNotFoundError) as error:
        print(f"{folder} has no readable tokenizer: {error}", file=sys.stderr)


def _stored(source: Path, prefix: str, tensors: Iterable[str]) -> dict[str, str]:
    """{path: dtype in the files of a folder}, by default the most frequent one there."""
    found = {name: dtype for file in weight_files(source) for name, dtype in stored_dtypes(file).items() if "float" in dtype}
    usual = max(found.values(), key=[*found.values()].count)
    return {path: found.get(path) or found.get(path.removeprefix(prefix), usual) for path in tensors}
