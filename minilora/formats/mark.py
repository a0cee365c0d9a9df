"""A mark in the metadata of an adapter's tensors, to check whether a model is the base it was trained on.

    mark = fingerprint : kind : samples       kind is "" or "quantized"; samples are 64 weights, float32 in hexadecimal
    mark = loftq: ...                         the same, for a base that must match exactly, quantization included

Equal fingerprints mean the same base. Otherwise the samples distinguish a rounded or quantized copy from other weights.
"""

import hashlib
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import Matrix, as_like, to_numpy
from minilora.formats.fetch import model_type_of, origin
from minilora.formats.fitting import FAMILIES
from minilora.formats.tensors import holds_bfloat16, rounded
from minilora.kernels.half import is_half
from minilora.layers import Layer, Linear
from minilora.quantization.residual import dense

KEY = "minilora.base"
_LOFTQ = "loftq:"
_ANYWAY = "--allow-other-weights (allow_other_weights=True)"
_SAMPLES = 64
_FAR = 0.5  # relative difference: about 0.1 after rounding to four bits, 1.4 between unrelated weights


def mark_of(model: Layer, without: Collection[str], loftq: bool = False) -> dict[str, str]:
    """The metadata of an adapter for this base; `without`: paths of modules that do not belong to the base."""
    digest, samples = fingerprint(model, without)
    return {KEY: f"{_LOFTQ * loftq}{digest}:{'quantized' * _quantized(model)}:{samples.tobytes().hex()}"}


def check_base(model: Layer, without: Collection[str], metadata: dict[str, str], source: Path, allow: bool) -> None:
    """Raise ValueError if the mark in `metadata` is of other weights; report a copy of this base on standard error.

    allow: report other weights too, instead of raising. Adapters without a mark, such as PEFT's: `check_kind`.
    """
    if (mark := metadata.get(KEY)) is None:
        return
    digest, samples = fingerprint(model, without)
    if mark.removeprefix(_LOFTQ).partition(":")[0] == digest:
        return
    difference = None if mark.startswith(_LOFTQ) else _difference(mark, model, samples)
    if difference is not None:
        print(f"{source}: it was trained on another copy of this base, by {difference}: results will differ a little.", file=sys.stderr)
    elif allow:
        print(f"{source}: it was trained on a base model with other weights.", file=sys.stderr)
    else:
        raise ValueError(f"{source}: this adapter was made for a base model with other weights; load it anyway with {_ANYWAY}.")


def check_kind(model: Any, raw: dict[str, Any], tensors: Collection[str], metadata: dict[str, str], source: Path, allow: bool) -> None:
    """As `check_base` for an adapter without a mark, if it was trained on a model of another model_type than this one.

    raw: adapter_config.json. PEFT notes the module of the base's class in auto_mapping where it has no task_type, and always the name of
    the base, which may be at hand; and keys begin with the name of the body, which encoders do not share.
    """
    ours, mapping = getattr(model, "model_type", None), raw.get("auto_mapping")
    if KEY in metadata or ours not in FAMILIES:
        return
    module = re.match(r"transformers\.models\.(\w+)", str(mapping.get("parent_library"))) if isinstance(mapping, dict) else None
    theirs = module[1] if module else model_type_of(str(raw.get("base_model_name_or_path")))
    if theirs is None:
        bodies = {key.split(".")[2] for key in tensors if key.startswith("base_model.model.") and key.count(".") > 2}
        theirs = next((body for body in sorted(bodies & FAMILIES.keys()) if f"{body}." != FAMILIES[ours].prefix), ours)
    if theirs.replace("-", "_").removesuffix("_text") == ours.replace("-", "_").removesuffix("_text"):
        return
    why = f"{source}: this adapter was made for a model of type {theirs}, and the model here is of type {ours}"
    if not allow:
        raise ValueError(f"{why}; load it anyway with {_ANYWAY}.")
    print(f"{why}.", file=sys.stderr)


def _difference(mark: str, model: Layer, ours: np.ndarray) -> str | None:
    """What distinguishes two copies of a base, in words; None where the mark is not of a copy."""
    _, kind, samples = [*mark.split(":"), "", ""][:3]
    try:
        theirs = np.frombuffer(bytes.fromhex(samples), "<f4")
    except ValueError:
        return None
    if theirs.shape != ours.shape or not ours.size:
        return None
    if holds_bfloat16(theirs) != holds_bfloat16(ours) and np.array_equal(rounded(theirs, "bfloat16"), rounded(ours, "bfloat16")):
        return "rounding to bfloat16"  # rounding to float16 does not change the fingerprint
    distance = float(np.linalg.norm(theirs - ours) / max(np.linalg.norm(theirs), 1e-30))
    if distance < _FAR and (kind == "quantized" or _quantized(model)):
        return f"quantization ({distance:.1%} in a sample of its weights)"
    return None


def fingerprint(model: Layer, without: Collection[str] = ()) -> tuple[str, np.ndarray]:
    """(16 hexadecimal digits: a hash of paths, shapes and a few values, as float16, of every dense weight; 64 of these values).

    `without`: paths of modules to skip, as those that are fully trained do not belong to the base.
    """
    digest, values = hashlib.sha256(), np.zeros(0, "<f4")
    for path, layer in model.modules():
        if isinstance(layer, Linear) and not any(f"{path}.".startswith(f"{skipped}.") for skipped in without):
            W = dense(layer.weight.data)
            rows, columns = np.divmod(np.arange(0, W.size, max(1, W.size // 16)), W.shape[1])
            sample = to_numpy(W[as_like(rows, W), as_like(columns, W)])
            digest.update(f"{path}{tuple(W.shape)}".encode() + rounded(sample, "float16").tobytes())
            values = np.append(values, sample.astype("<f4"))
    return digest.hexdigest()[:16], values[np.linspace(0, len(values) - 1, _SAMPLES).astype(int)] if len(values) else values


def _quantized(model: Any) -> bool:
    weights = [layer.weight.data for _, layer in model.modules() if isinstance(layer, Linear)]
    return str(origin(model).source).endswith(".gguf") or any(isinstance(W, Matrix) or is_half(W) for W in weights)
