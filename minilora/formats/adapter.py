"""Adapters as folders in PEFT's layout: adapter_config.json and adapter_model.safetensors.

Here A is (in, r) and B is (r, out); in the files both are turned, as PyTorch's Linear keeps (out, in), and so are whole weights
(modules_to_save) of models whose files keep them so. This is the one place where that happens. Keys, after "base_model.model.":

    <path>.lora_A.weight (r, in)    <path>.lora_B.weight (out, r)    <path>.base_layer.bias    a bias of an adapted layer
    <path>.<name>                   what other methods train, under its name there
    <path>                          any other parameter that is trained: of modules_to_save, or a bias with bias="all"
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from minilora.adapters import PartialConfig
from minilora.backend import Array, as_like, to_numpy
from minilora.family import config_classes
from minilora.family.adapted import adapter_parameters
from minilora.family.packed import is_packed
from minilora.family.residual import dense
from minilora.formats import partial
from minilora.formats.atomic import read_json, write_json
from minilora.formats.tensors import read_tensors, write_tensors
from minilora.kernels.half import is_half
from minilora.layers import Layer, Linear
from minilora.lora import LoraConfig, inject, lora_layers
from minilora.lora.injection import find_modules, find_targets, trained_paths

_PREFIX = "base_model.model."
_SHARED = "base_model."  # before what belongs to no module
_LINEAR = ("lora_A", "lora_B")  # in PEFT these are layers: their keys end with ".weight"
_FINGERPRINT = "minilora.base"
_LOFTQ = "loftq:"  # before the fingerprint of a base that must be this one, quantized as it was
_NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "")  # values by which a field of PEFT's that is unknown here asks for nothing
_SAYS_NOTHING = {"peft_type", "peft_version", "auto_mapping", "revision", "inference_mode", "runtime_config"}
_OF_THE_START = {"eva_config", "corda_config", "lora_ga_config", "loftq_config"}  # read with the init_lora_weights of that name only
_OF_OTHERS = {"megatron_core", "qalora_group_size"}  # read with megatron_config and use_qalora only, which are refused
_KEPT_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")  # init_lora_weights that leave W alone: trained, a plain LoRA


def save_adapter(model: Layer, folder: str | Path, config: LoraConfig | PartialConfig | None = None) -> int:
    """Write what was trained: adapters, and biases or modules_to_save with them. Returns the size of the tensors' file in bytes.

    `config` is what the model was injected with; by default the one `inject` left on the model. Raises ValueError when the model
    has no adapters, or has something trainable that the configuration does not name: the file would be without it.
    """
    config = config or model.lora_config
    if isinstance(config, PartialConfig):
        return partial.save(model, folder)
    if config is None or not lora_layers(model):
        raise ValueError("save_adapter: this model has no LoRA layers; call inject first.")
    folder, trained = Path(folder), trained_paths(model, config)
    for path, p in model.parameters():
        if p.trainable and path not in trained:
            raise ValueError(
                f"save_adapter: {path} is trainable, but the configuration does not name it; add its layer to modules_to_save."
            )
    door, joined = _Door(model), _less_their_start(model)
    tensors = {door.key(path): door.turned(path, to_numpy(joined.get(path, p.data))) for path, p in model.parameters() if path in trained}
    tensors |= {key: to_numpy(value) for key, value in _shared(model).items()}
    mark = _mark(config, fingerprint(model, find_modules(model, config, strict=False)), model)
    write_tensors(folder / "adapter_model.safetensors", tensors, {_FINGERPRINT: mark} if mark else None)
    write_json(folder / "adapter_config.json", _to_peft(model, config))
    return (folder / "adapter_model.safetensors").stat().st_size


def load_adapter(model: Layer, folder: str | Path) -> LoraConfig | PartialConfig:
    """Inject the adapter in a folder into a base model. Returns its configuration.

    Everything is checked before the model is touched. Raises FileNotFoundError; ValueError when the configuration asks for what is
    not supported, or when the adapter was made for another model.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"there is no adapter in {folder}: wanted adapter_config.json and adapter_model.safetensors.")
    config = read_adapter_config(folder)
    if isinstance(config, PartialConfig):
        return partial.load(model, folder, config)
    if (folder / "adapter_model.bin").exists() and not (folder / "adapter_model.safetensors").exists():
        raise FileNotFoundError(
            f"{folder} has only adapter_model.bin, a pickle, which is never read; save it with safe_serialization=True."
        )
    tensors, metadata = read_tensors(folder / "adapter_model.safetensors")

    rehearsal = model.replica()
    try:
        _check_ranks(find_targets(model, config, strict=False), config, tensors)
        inject(rehearsal, config, rng=0, strict=False)
        base = fingerprint(model, find_modules(model, config, strict=False))
    except ValueError as error:
        raise ValueError(f"{folder}: the adapter does not fit this model: {error}") from None
    mark = metadata.get(_FINGERPRINT, base)
    if mark.removeprefix(_LOFTQ) != base and (mark.startswith(_LOFTQ) or not _quantized(model)):
        raise ValueError(f"{folder}: this adapter was made for a base model with other weights than the one it is put on.")
    door = _Door(rehearsal)
    if config.bias == "all":
        tensors = {key: value for key, value in tensors.items() if not _COPY.search(key)}
    tensors = {key: value for key, value in tensors.items() if not door.is_of_the_base(key, value)}
    wanted = {door.key(path): door.turned(path, p.data).shape for path, p in rehearsal.parameters() if p.trainable}
    shared = _shared(rehearsal)
    _check_fit(folder, tensors, wanted | {key: value.shape for key, value in shared.items()})

    inject(model, config, rng=0, strict=False)
    for _, layer in lora_layers(model) if shared else ():
        layer.share({key.removeprefix(_SHARED): tensors[key] for key in shared})
    for path, p in model.parameters():
        if p.trainable:
            value = door.turned(path, tensors[door.key(path)]).astype(p.data.dtype)
            p.data = as_like(np.ascontiguousarray(value), p.data)
    return config


# With bias="all" PEFT writes the biases of modules_to_save three times: as trained, the same again, and as they were.
_COPY = re.compile(r"\.(modules_to_save|original_module)\.(.+\.)?bias$")


def read_adapter_config(folder: str | Path) -> LoraConfig | PartialConfig:
    """adapter_config.json as a configuration. Raises ValueError, naming the field, for what would change the result and is not supported.

    How training began does not matter: the tensors follow. But where it began by changing the base weights (PiSSA, OLoRA, CorDA,
    LoftQ, LoRA-GA), the tensors are the difference from weights that are not there.
    """
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    kinds = config_classes()
    if str(raw.get("peft_type")) in partial.KINDS:
        return partial.read_config(raw, path)
    if raw.get("peft_type", "LORA") not in kinds:
        raise ValueError(f"{path}: peft_type is {raw['peft_type']!r}; supported: {', '.join([*kinds, *partial.KINDS])}.")
    kind = kinds[raw.get("peft_type", "LORA")]
    init = raw.get("init_lora_weights", True)
    if init not in _KEPT_THE_BASE:
        raise ValueError(
            f"{path}: init_lora_weights={init!r} is not supported, since it may have changed the base weights; "
            "let PEFT convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    known = {field.name for field in fields(kind)}
    for key, value in raw.items():
        if key not in known | _SAYS_NOTHING | _OF_THE_START | _OF_OTHERS and value not in _NEUTRAL:
            raise ValueError(f"{path}: {key}={value!r} is not supported.")
    if raw.get("target_modules") is None:
        raise ValueError(f"{path}: target_modules is missing.")
    given = {key: value for key, value in raw.items() if key in known - _OF_THE_START and value is not None}
    given["init_lora_weights"] = True
    try:
        return kind(**given)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from None


def fingerprint(model: Layer, without: Collection[str] = ()) -> str:
    """16 hexadecimal digits for the base model: paths, shapes and a few values, as float16, of every dense weight.

    `without` are paths of modules to leave out: those that are trained whole are not the base's.
    """
    digest = hashlib.sha256()
    for path, layer in model.modules():
        if isinstance(layer, Linear) and not any(f"{path}.".startswith(f"{skipped}.") for skipped in without):
            W = dense(layer.weight.data)
            rows, columns = np.divmod(np.arange(0, W.size, max(1, W.size // 16)), W.shape[1])
            sample = to_numpy(W[as_like(rows, W), as_like(columns, W)])
            digest.update(f"{path}{tuple(W.shape)}".encode() + sample.astype(np.float16).tobytes())
    return digest.hexdigest()[:16]


class _Door:
    """Names and orientation in the file, for a model that has its adapters."""

    def __init__(self, model: Layer) -> None:
        self.parameters = dict(model.parameters())
        self.adapted = {path for path, _ in lora_layers(model)}
        self.own = set(adapter_parameters(model))
        self.turns = set(self.own)
        if not getattr(model, "weights_are_in_out", True):
            self.turns |= {f"{path}.weight" for path, layer in model.modules() if isinstance(layer, Linear)}

    def key(self, path: str) -> str:
        owner, _, name = path.rpartition(".")
        if owner not in self.adapted:
            return _PREFIX + path
        if path in self.own:
            return _PREFIX + (f"{path}.weight" if name in _LINEAR else path)
        return f"{_PREFIX}{owner}.base_layer.{name}"

    def turned(self, path: str, value: np.ndarray) -> np.ndarray:
        """From here to the file, or back."""
        return value.T if path in self.turns else value

    def is_of_the_base(self, key: str, value: np.ndarray) -> bool:
        """Is this a frozen weight of the base, as it is here? PEFT writes some along (of an adapted head, or if told to)."""
        path = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        p = self.parameters.get(path)
        if p is None or p.trainable or value.dtype.kind != "f":
            return False
        own = self.turned(path, to_numpy(p.data))
        return own.shape == value.shape and bool(np.abs(own - value).max() <= 1e-2 * np.abs(own).max())


def _to_peft(model: Layer, config: LoraConfig) -> dict[str, Any]:
    """The configuration as PEFT writes it: "all-linear" is spelled out, and the task named, which decides PEFT's class of model."""
    told = asdict(config)
    whole = find_modules(model, config, strict=False)
    if config.target_modules == "all-linear":
        adapted = [path for path, _ in lora_layers(model)]
        names = sorted({path.rpartition(".")[2] for path in adapted})
        meant = [path for path, _ in model.modules() if path.rpartition(".")[2] in names]
        told["target_modules"] = names if meant == adapted else adapted
        told["exclude_modules"] = None
    if _less_their_start(model):
        factor = 2**0.5 if config.use_rslora else 2
        told["r"], told["rank_pattern"] = 2 * config.r, {key: 2 * r for key, r in config.rank_pattern.items()}
        told["lora_alpha"] = factor * config.lora_alpha
        told["alpha_pattern"] = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    head = getattr(model, "output_head", None)
    task = "CAUSAL_LM" if head == "lm_head" else "SEQ_CLS" if head in whole else None
    told["task_type"] = config.task_type or task
    told["modules_to_save"] = config.saved_modules or None
    told |= {"init_lora_weights": True, "use_dora": bool(config.use_dora), "eva_config": None, "lora_ga_config": None, "loftq_config": {}}
    told["fan_in_fan_out"] = bool(getattr(model, "weights_are_in_out", True))
    told["base_model_name_or_path"] = config.base_model_name_or_path or model.hub_id or model.source
    told = {key: value for key, value in told.items() if key not in config.not_in_file}
    return {"peft_type": config.peft_type, "inference_mode": True, **told}


def _shared(model: Layer) -> dict[str, Any]:
    """{key: array}, as in the file, of what all adapted layers share and the file holds."""
    return {f"{_SHARED}{name}": value for _, layer in lora_layers(model)[:1] for name, value in layer.shared().items()}


def _quantized(model: Layer) -> bool:
    return any(is_packed(layer.weight.data) or is_half(layer.weight.data) for _, layer in model.modules() if isinstance(layer, Linear))


def _mark(config: LoraConfig, base: str, model: Layer) -> str | None:
    """What the file says of the base that it fits. A quantized one is as good as what it was made from, but not for LoftQ."""
    if config.init_lora_weights == "loftq":
        return _LOFTQ + base
    return None if _quantized(model) else base


def _less_their_start(model: Layer) -> dict[str, Array]:
    """{path: array} of the adapters that began by taking A B off the weight (PiSSA): on the file's unchanged weight, they have rank 2 r."""
    started = [(path, layer) for path, layer in lora_layers(model) if getattr(layer, "start", None) is not None]
    return {f"{path}.{name}": value for path, layer in started for name, value in layer.start.joined(layer).items()}


def _check_ranks(targets: dict[str, Any], config: LoraConfig, tensors: dict[str, np.ndarray]) -> None:
    """A rank beyond min(in, out) is believed where the tensors have it: nothing is made that is larger than the file."""
    for path, layer in targets.items():
        r, (m, n) = config.rank_of(path), layer.weight.data.shape
        if r > min(m, n) and not any(r in value.shape for key, value in tensors.items() if key.startswith(f"{_PREFIX}{path}.")):
            raise ValueError(f"rank {r} is beyond {path}, which is {m} x {n}, and not that of the tensors.")


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
        if tensors[key].dtype.kind != "f" or not np.isfinite(tensors[key]).all():
            raise ValueError(f"{folder}: {key} ({tensors[key].dtype}) holds values that are not finite floating-point numbers.")
