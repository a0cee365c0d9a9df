"""A mark in the metadata of an adapter's tensors, to check whether a model is the base it was trained on.

    mark = fingerprint : kind : samples       kind is "" or "quantized"; samples are 64 weights, float32 in hexadecimal
    mark = loftq: ...                         the same, for a base that must match exactly, quantization included

Equal fingerprints mean the same base. Otherwise the samples distinguish a rounded or quantized copy from other weights.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import Matrix, as_like, to_numpy
from minilora.formats.fetch import origin
from minilora.formats.tensors import holds_bfloat16, rounded
from minilora.kernels.half import is_half
from minilora.layers import Layer, Linear
from minilora.quantization.residual import dense

KEY = "minilora.base"
_LOFTQ = "loftq:"
_SAMPLES = 64
_FAR = 0.5  # relative difference: about 0.1 after rounding to four bits, 1.4 between unrelated weights


def mark_of(model: Layer, without: Collection[str], loftq: bool = False) -> dict[str, str]:
    """The metadata of an adapter for this base; `without`: paths of modules that do not belong to the base."""
    digest, samples = fingerprint(model, without)
    return {KEY: f"{_LOFTQ * loftq}{digest}:{'quantized' * _quantized(model)}:{samples.tobytes().hex()}"}


def check_base(model: Layer, without: Collection[str], metadata: dict[str, str], source: Path, allow: bool) -> None:
    """Raise ValueError if the mark in `metadata` is of other weights; report a copy of this base on standard error.

    allow: report other weights too, instead of raising. Adapters without a mark, such as PEFT's, are accepted.
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
        raise ValueError(
            f"{source}: this adapter was made for a base model with other weights; "
            "load it anyway with --allow-other-weights (allow_other_weights=True)."
        )


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
