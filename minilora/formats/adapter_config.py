"""adapter_config.json: in PEFT's layout for its methods, so that older versions read it too; else the fields of the configuration."""

import re
from collections.abc import Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from minilora.formats.atomic import read_json
from minilora.formats.fetch import origin
from minilora.formats.fitting import FAMILIES
from minilora.formats.mlx import from_mlx, is_mlx
from minilora.formats.sandbox import can_match
from minilora.layers import Layer
from minilora.lora import LoraConfig, lora_layers
from minilora.lora.registry import METHODS, load
from minilora.models.config_file import check_types, made

BARE = "FEATURE_EXTRACTION"  # the task_type of a model without its head, whose modules have no prefix in PEFT
_NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "")  # values with which a field has no effect
_SAYS_NOTHING = {"peft_type", "peft_version", "auto_mapping", "revision", "inference_mode", "runtime_config"}
_INITIALISERS = {"eva_config", "corda_config", "lora_ga_config", "loftq_config"}  # read with the init_lora_weights of that name only
_OF_OTHERS = {"megatron_core", "qalora_group_size"}  # read with megatron_config and use_qalora only, which are refused
_KEPT_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica", "normal", "seed")  # initialisers that do not change W
_ALWAYS = {"bias", "fan_in_fan_out", "modules_to_save", "task_type", "base_model_name_or_path", "target_modules", "save_projection"}
_EXPRESSIONS = {  # fields with regular expressions, and what lora/targets.py puts around one
    **dict.fromkeys(("target_modules", "exclude_modules"), ("(?:", r")\Z")),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (r"(.*\.)?(", ")$")),
    "modules_to_save": (r"(^|.*\.)", r"($|\..*)"),
    "layers_pattern": (r"(?:^|.*?\.)", r"\.(?P<number>\d+)\."),
}


def read_adapter_config(folder: str | Path) -> Any:
    """adapter_config.json of PEFT or mlx-lm as a configuration.

    Raises ValueError, naming the field, for what would change the result and is not supported.

    The initialiser does not matter, since the tensors replace its values: it is read as True. But if it changed the base weights (PiSSA,
    OLoRA, CorDA, LoftQ, LoRA-GA), the tensors are the difference from weights that the model does not have.
    """
    path = Path(folder) / "adapter_config.json"
    raw = read_json(path)
    return config_of(from_mlx(Path(folder), raw)[0] if is_mlx(raw) else raw, path)


def config_of(raw: dict[str, Any], path: Path) -> Any:
    """A configuration in PEFT's layout. path: the file that it comes from, for messages. Raises as `read_adapter_config`."""
    peft_type = raw.get("peft_type", "LORA")
    if not isinstance(peft_type, str) or peft_type not in METHODS:
        raise ValueError(f"{path}: peft_type is {peft_type!r:.80}; supported: {', '.join(METHODS)}.")
    kind = load(METHODS[peft_type])
    init = raw.get("init_lora_weights", True)
    if init not in _KEPT_THE_BASE:
        raise ValueError(
            f"{path}: init_lora_weights={init!r:.80} is not supported, since it may have changed the base weights; "
            "let PEFT convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    known = {field.name for field in fields(kind)}
    for key, value in raw.items():
        if key not in known | _SAYS_NOTHING | _INITIALISERS | _OF_OTHERS and value not in _NEUTRAL:
            raise ValueError(f"{path}: {key}={value!r:.80} is not supported.")
    if issubclass(kind, LoraConfig) and raw.get("target_modules") is None:
        raise ValueError(f"{path}: target_modules is missing.")
    usual = kind()
    read = known - _INITIALISERS
    values = {key: value for key, value in raw.items() if key in read and (value is not None or getattr(usual, key) not in _NEUTRAL)}
    check_types(kind, values, str(path))
    return made(kind, values | ({"init_lora_weights": True} if "init_lora_weights" in known else {}), str(path))


def check_expressions(config: Any, paths: Collection[str]) -> None:
    """Raise ValueError for a regular expression of the configuration that is invalid, or takes too long to match one of these paths."""
    odd = []
    for name, (before, after) in _EXPRESSIONS.items():
        value = getattr(config, name, None) or ()
        listed = () if "target" in name or "exclude" in name else value  # there, a list has plain names
        for expression in [value] if isinstance(value, str) else listed:
            try:
                re.compile(before + expression + after)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{name}={expression!r:.80} is not a regular expression ({error}).") from None
            if not re.fullmatch(r"[\w.-]*", expression):
                odd.append(before + expression + after)
    if odd and not can_match(odd, paths):
        raise ValueError(f"matching its expressions takes too long: {', '.join(odd):.200}.")


def to_json(model: Layer, config: Any, drawn: list[str], joined: bool, bare: str) -> dict[str, Any]:
    """The configuration as PEFT writes it: with "all-linear" spelled out, and a task, which decides PEFT's class of model.

    drawn: modules that are saved too, since no file of the base has them. joined: the tensors have twice the rank (PiSSA).
    bare: a prefix that names lack in the file. Fields without effect are left out, since a version of PEFT that does not know them
    would refuse the file.
    """
    result = asdict(config)
    result["base_model_name_or_path"] = config.base_model_name_or_path or origin(model).hub_id or origin(model).source
    if not isinstance(config, LoraConfig):
        return {"peft_type": config.peft_type, **result}
    named = isinstance(config.target_modules, list) and not (bare and config.layers_to_transform)
    if config.target_modules == "all-linear" or (bare and not named):
        adapted = [path for path, _ in lora_layers(model)]
        names = sorted({path.rpartition(".")[2] for path in adapted})
        meant = [path for path, _ in model.modules() if path.rpartition(".")[2] in names]
        result["target_modules"] = names if meant == adapted else adapted
        result["exclude_modules"] = result["layers_to_transform"] = result["layers_pattern"] = None
    if joined:
        factor = 2**0.5 if config.use_rslora else 2
        result["r"], result["rank_pattern"] = 2 * config.r, {key: 2 * r for key, r in config.rank_pattern.items()}
        result["lora_alpha"] = factor * config.lora_alpha
        result["alpha_pattern"] = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    head = getattr(model, "output_head", None)
    full = [*config.full_modules(model, strict=False), *drawn]
    task = "CAUSAL_LM" if head == "lm_head" else "SEQ_CLS" if head in full else None
    result["task_type"] = config.task_type or task
    result["modules_to_save"] = [*config.saved_modules, *drawn] or None
    result |= {"init_lora_weights": True, "use_dora": bool(config.use_dora), "eva_config": None, "lora_ga_config": None, "loftq_config": {}}
    result["fan_in_fan_out"] = bool(getattr(model, "weights_are_in_out", True))
    for key in ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if isinstance(result[key], list):
            result[key] = [name.removeprefix(bare) for name in result[key]]
        elif isinstance(result[key], dict):
            result[key] = {name.removeprefix(bare): value for name, value in result[key].items()}
    result = {key: value for key, value in result.items() if key in _ALWAYS or value or (value == 0 and value is not False)}
    result = {key: value for key, value in result.items() if key not in config.not_in_file}
    return {"peft_type": config.peft_type, "inference_mode": True, **result}


def prefix_of(model: Any) -> str:
    """The prefix of the names of the modules of the bare model: "bert.", "model." or "transformer."; "" for another model."""
    return FAMILIES[model.model_type].prefix if getattr(model, "model_type", None) in FAMILIES else ""
