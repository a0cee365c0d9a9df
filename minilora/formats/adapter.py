"""Adapters as folders in PEFT's layout: adapter_config.json and adapter_model.safetensors.

Here A is (in, r) and B is (r, out); in the files both are transposed, as PyTorch's Linear has (out, in), and so are fully trained weights
(modules_to_save) of models whose files have them so. This is the one place where that happens. Keys, after "base_model.model.":

    <path>.lora_A.weight (r, in)    <path>.lora_B.weight (out, r)    <path>.base_layer.bias    a bias of an adapted layer
    <path>.<name>                   what other methods train, under its name there
    <path>                          any other trained parameter: of modules_to_save, or a bias with bias="all"

Bottleneck adapters and partial tuning, which PEFT does not have, are folders of the same two files, with the path alone as the key.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minilora.adapters.bottleneck import bottleneck_parameters
from minilora.backend import Array, as_like, to_numpy
from minilora.formats.adapter_config import BARE, check_expressions, config_of, prefix_of, to_json
from minilora.formats.atomic import read_json, write_json
from minilora.formats.fetch import origin
from minilora.formats.fitting import FAMILIES, check_fit, drawn_parameters, warn_of_pooling
from minilora.formats.gguf_adapter import from_gguf
from minilora.formats.mark import check_base, check_kind, mark_of
from minilora.formats.mlx import Factors, from_mlx, is_mlx
from minilora.formats.tensors import holds_bfloat16, map_tensors, rounded, write_tensors
from minilora.kernels.half import upcast
from minilora.layers import Layer, Linear
from minilora.lora import LoraConfig, adaptation, adapter_parameters, inject, lora_layers

_PREFIX = "base_model.model."
_SHARED = "base_model."  # the prefix of what all layers share
_LINEAR = ("lora_A", "lora_B")  # in PEFT these are layers: their keys end with ".weight"


def save_adapter(model: Layer, folder: str | Path) -> int:
    """Write what was trained: adapters, and the model's own parameters. Returns the size of the tensors' file in bytes.

    A head or a pooler that no file of the base has is written too, as one of modules_to_save: otherwise loading would draw another.
    Raises ValueError when the model has no adapters, or has something trainable that its configuration does not name: the file would be
    without it.
    """
    config, folder = adaptation(model).config, Path(folder)
    adapted = [path for path, _ in lora_layers(model)]
    if config is None or (isinstance(config, LoraConfig) and not adapted):
        raise ValueError("save_adapter: this model has no LoRA layers; call inject first.")
    trained = config.trained(model, adapted, strict=False) | adapter_parameters(model).keys() | bottleneck_parameters(model)
    if odd := [path for path, p in model.parameters() if p.trainable and path not in trained]:
        raise ValueError(f"save_adapter: {odd[0]} is trainable, but the configuration does not name it; add its layer to modules_to_save.")
    bare = _bare_prefix(model, trained) if getattr(config, "task_type", None) == BARE else ""
    mark = mark_of(model, _not_the_base(model, trained), getattr(config, "init_lora_weights", None) == "loftq")
    trained = {path for path in trained if path.startswith(bare)}
    layout, joined = _Layout(model, config, bare), _with_the_initial_product(model)
    kept = {path for path in drawn_parameters(model) if path.startswith(bare)} - trained
    saved = {path: p for path, p in model.parameters() if path in trained | kept}
    tensors = {layout.key(path): layout.transposed(path, to_numpy(joined.get(path, p.data))) for path, p in saved.items()}
    tensors |= {key: to_numpy(value) for key, value in _shared(model).items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, mark)
    drawn = sorted({path.rpartition(".")[0] for path in kept} - layout.adapted)
    write_json(folder / "adapter_config.json", to_json(model, config, drawn, bool(joined), bare))
    if isinstance(config, LoraConfig):
        warn_of_pooling(model, folder)
    return (folder / "adapter_model.safetensors").stat().st_size


def _bare_prefix(model: Layer, trained: set[str]) -> str:
    """The prefix of the bare model; "" if something outside it is trained. An unchanged bias of bias="all" does not count as trained."""
    prefix, then = prefix_of(model), adaptation(model).base_values
    head = {path: p for path, p in model.parameters() if path in trained and not path.startswith(prefix)}
    still = all(path.endswith(".bias") and np.array_equal(to_numpy(p.data), to_numpy(then[path])) for path, p in head.items())
    return prefix if still else ""


def load_adapter(model: Layer, folder: str | Path, allow_other_weights: bool = False) -> Any:
    """Inject the adapter in a folder of PEFT or mlx-lm, or in a GGUF file, into a base model. Returns its configuration.

    Everything is checked before the model is touched, and every tensor is loaded: the base's own weights in the file are fully trained
    (modules_to_save) where they differ from those of the model. An adapter of a model without its head is recognised.
    allow_other_weights: accept an adapter that was trained on other weights, with a line on standard error. There is such a line in any
    case for one that was trained on a rounded or quantized copy. Raises FileNotFoundError; ValueError when the configuration needs
    something that is not supported, or when the adapter was made for another model.
    """
    folder, bare = Path(folder), ""
    raw, found, metadata = _read(folder, model)
    config, tensors = config_of(raw, folder if folder.is_file() else folder / "adapter_config.json"), found
    try:
        check_expressions(config, [path for path, _ in model.modules()])
        if isinstance(config, LoraConfig):
            config, tensors, bare = _with_the_head(model, config, tensors)
            _check_ranks(config.targets(model, strict=False), config, tensors)
        inject(dry_run := model.replica(), config, rng=0, strict=False)  # to find out which tensors it needs
        trained = [path for path, p in dry_run.parameters() if p.trainable]
        layout, without = _Layout(dry_run, config), _not_the_base(dry_run, trained)
        if isinstance(config, LoraConfig):
            tensors = _without_copies(layout, tensors)
            if changed := [path for path in layout.bases(tensors) if path not in config.saved_modules]:
                config = replace(config, modules_to_save=[*config.saved_modules, *changed])
                inject(dry_run := model.replica(), config, rng=0, strict=False)
                layout = _Layout(dry_run, config)
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter does not fit this model: {error}") from None
    check_kind(model, raw, found, metadata, folder, allow_other_weights)
    check_base(model, without, metadata, folder, allow_other_weights)
    kept = {path for path in drawn_parameters(dry_run) if layout.key(path) in tensors}
    taken = {path: p for path, p in dry_run.parameters() if (p.trainable or path in kept) and path.startswith(bare)}
    shared = _shared(dry_run)
    expected = {layout.key(path): layout.transposed(path, p.data).shape for path, p in taken.items()}
    check_fit(folder, tensors, expected | {key: value.shape for key, value in shared.items()})

    inject(model, config, rng=0, strict=False)
    for _, layer in lora_layers(model) if shared else ():
        layer.share({key.removeprefix(_SHARED): tensors[key] for key in shared})
    for path, p in model.parameters():
        if path in taken:
            value = layout.transposed(path, tensors[layout.key(path)]).astype(p.data.dtype)
            p.data = as_like(np.ascontiguousarray(value), p.data)
    if left := [module for module in origin(model).drawn if f"{module}.weight" not in taken]:
        print(f"{folder} has no {' and no '.join(left)}, and its base has none: initialised at random.", file=sys.stderr)
    return config


def _read(folder: Path, model: Any) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, str]]:
    """(the configuration and the tensors as in PEFT's files, the metadata of these) of an adapter in any of the formats."""
    if folder.suffix == ".gguf" and folder.is_file():
        return *from_gguf(folder, model), {}
    where, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not where.is_file():
        raise FileNotFoundError(f"there is no adapter in {folder}: expected adapter_config.json and adapter_model.safetensors.")
    if is_mlx(raw := read_json(where)):
        return *from_mlx(folder, raw), {}
    if (folder / "adapter_model.bin").exists() and not file.exists():
        raise FileNotFoundError(
            f"{folder} has only adapter_model.bin, a pickle, which is never read; save it with safe_serialization=True."
        )
    return raw, *map_tensors(file)


def factors(model: Layer) -> Factors:
    """{path: (A (in, r), B (r, out), scaling, DoRA's magnitudes or None)} of the LoRA layers, as they are in the file."""
    joined, found = _with_the_initial_product(model), {}
    for path, layer in lora_layers(model):
        A, B = (to_numpy(joined.get(f"{path}.{name}", getattr(layer, name).data)) for name in _LINEAR)
        m = getattr(layer, "lora_magnitude_vector", None)
        found[path] = A, B, layer.scaling, None if m is None else to_numpy(m.data)
    return found


def _not_the_base(model: Layer, trained: Iterable[str]) -> list[str]:
    """The paths of the modules whose weights are not the base's: they are trained, or were drawn at random."""
    return [*(path.removesuffix(".weight") for path in trained if path.endswith(".weight")), *origin(model).drawn]


def _with_the_head(model: Layer, config: LoraConfig, tensors: dict[str, np.ndarray]) -> tuple[LoraConfig, dict[str, np.ndarray], str]:
    """An adapter of the bare model (AutoModel's) as one of the model with its head: names get the missing prefix, which is returned too.

    Targets are looked up in the bare model, since expressions and numbers of blocks depend on the prefix of a name.
    """
    prefix, top = prefix_of(model), {name.partition(".")[0] for name, _ in model.children()}
    if not prefix or any(key.startswith(_PREFIX) and key.removeprefix(_PREFIX).partition(".")[0] in top for key in tensors):
        return config, tensors, ""
    body = dict(model.modules())[prefix.removesuffix(".")]
    full = list(replace(config, task_type=BARE).full_modules(body, strict=False))
    saved = [name for name in config.modules_to_save or () if any(path.endswith(name) for path in full)]
    config = replace(config, task_type=BARE, modules_to_save=saved or None)  # saved again, it is the same
    if isinstance(config.target_modules, str) or config.exclude_modules or config.layers_to_transform:
        config = config.only(prefix + path for path in config.targets(body, strict=False))
    return config, {re.sub(rf"^{re.escape(_PREFIX)}", _PREFIX + prefix, key): value for key, value in tensors.items()}, prefix


# With bias="all", or saved embeddings, PEFT writes what modules_to_save names three times: as trained, again, and as before training.
_COPY = re.compile(r"\.(modules_to_save|original_module)(\.(?:.+\.)?(?:bias|weight))$")


def _without_copies(layout: _Layout, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without second copies, and without the base's own weights. Raises ValueError for a copy that differs."""
    found = {}
    for key, value in tensors.items():
        if (copy := _COPY.search(key)) is not None:
            others = [key[: copy.start()] + tail for tail in (copy[2], re.sub(r"^\.[^.]+", "", copy[2]))]  # PEFT may leave its own name in
            if copy[1] == "modules_to_save" and not any(np.array_equal(tensors.get(name, 0), value) for name in others):
                raise ValueError(f"{key} differs from what it is a copy of.")
        elif not layout.is_of_the_base(key, value):
            found[key] = value
    return found


class _Layout:
    """Names and orientation in the file, for a model that has its adapters; `bare` is the prefix that names lack there."""

    def __init__(self, model: Layer, config: Any, bare: str = "") -> None:
        self.prefix = _PREFIX if isinstance(config, LoraConfig) else ""
        self.parameters, self.bare, self.drawn = dict(model.parameters()), bare, drawn_parameters(model)
        self.tied = FAMILIES[model.model_type].embedding if prefix_of(model) else ""  # type: ignore[attr-defined]
        self.head = f"{getattr(model, 'output_head', '')}.weight"
        self.adapted = {path for path, _ in lora_layers(model)}
        self.own = set(adapter_parameters(model))
        self.transposes = set(self.own)
        if not getattr(model, "weights_are_in_out", True):
            self.transposes |= {f"{path}.weight" for path, layer in model.modules() if isinstance(layer, Linear)}

    def key(self, path: str) -> str:
        owner, _, name = path.rpartition(".")
        if owner not in self.adapted:
            return self.prefix + path.removeprefix(self.bare)
        if path in self.own:
            return _PREFIX + (f"{path}.weight" if name in _LINEAR else path).removeprefix(self.bare)
        return f"{_PREFIX}{owner.removeprefix(self.bare)}.base_layer.{name}"

    def transposed(self, path: str, value: np.ndarray) -> np.ndarray:
        """From the model to the file, or back."""
        return value.T if path in self.transposes else value

    def is_of_the_base(self, key: str, value: np.ndarray) -> bool:
        """Whether this is a frozen weight of the base, equal to the model's up to the rounding of either. PEFT's files have some."""
        path = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        path = self.tied if path == self.head and path not in self.parameters else path  # a head that is the embedding
        p = self.parameters.get(path)
        if p is None or p.trainable or path in self.drawn or value.dtype.kind != "f":
            return False
        own = self.transposed(path, to_numpy(p.data))
        return own.shape == value.shape and _same(own, value)

    def bases(self, tensors: dict[str, np.ndarray]) -> list[str]:
        """The modules of the base, not adapted, for which the tensors have other weights."""
        frozen = [path for path, p in self.parameters.items() if not p.trainable and path not in self.drawn]
        return sorted({path.rpartition(".")[0] for path in frozen if self.key(path) in tensors} - self.adapted)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether both are equal, element by element, rounded to the dtype of either. bfloat16 is read as float32."""
    dtypes = {a.dtype.name, b.dtype.name}
    a, b = upcast(a), upcast(b)
    if holds_bfloat16(a) or holds_bfloat16(b):
        dtypes.add("bfloat16")
    return any(np.array_equal(rounded(a, dtype), rounded(b, dtype)) for dtype in dtypes)


def _shared(model: Layer) -> dict[str, Any]:
    """{key: array} that all adapted layers share, as in the file."""
    return {f"{_SHARED}{name}": value for _, layer in lora_layers(model)[:1] for name, value in layer.shared().items()}


def _with_the_initial_product(model: Layer) -> dict[str, Array]:
    """{path: array} of the adapters whose initial A B is subtracted from the weight (PiSSA): in the file, they have rank 2 r."""
    offset = [(path, layer) for path, layer in lora_layers(model) if getattr(layer, "offset", None) is not None]
    return {f"{path}.{name}": value for path, layer in offset for name, value in layer.offset.joined(layer).items()}


def _check_ranks(targets: dict[str, Any], config: LoraConfig, tensors: dict[str, np.ndarray]) -> None:
    """Raise ValueError for a rank beyond min(in, out) that the tensors do not have: nothing larger than the file is built."""
    for path, layer in targets.items():
        r, (m, n) = config.rank_of(path), layer.weight.data.shape
        if r > min(m, n) and not any(r in value.shape for key, value in tensors.items() if key.startswith(f"{_PREFIX}{path}.")):
            raise ValueError(f"rank {r} is beyond {path}, which is {m} x {n}, and not that of the tensors.")
