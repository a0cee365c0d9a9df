"""Is a model the one that an adapter was trained on? The metadata of an adapter's tensors say so by a few of the base's weights.

    mark = fingerprint : kind : samples       kind is "" or "quantized"; samples are float32 in hexadecimal digits
    mark = loftq: ...                         the same, of a base that has to be this one, quantized as it was

Equal fingerprints are the same base. Otherwise the samples tell a copy that was rounded or quantized from a model with other weights.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import Matrix, as_like, to_numpy
from minilora.formats.tensors import holds_bfloat16, rounded
from minilora.kernels.half import is_half
from minilora.layers import Layer, Linear
from minilora.quantization.residual import dense

KEY = "minilora.base"
_LOFTQ = "loftq:"
_SAMPLES = 64
_FAR = 0.5  # of a difference, relative: four bits are off by a tenth, weights that have nothing to do with each other by 1.4


def mark_of(model: Layer, without: Collection[str], loftq: bool = False) -> dict[str, str]:
    """The metadata of an adapter for this base; `without` are paths of modules that are not the base's."""
    mark = f"{fingerprint(model, without)}:{'quantized' * _quantized(model)}:{_samples(model, without).tobytes().hex()}"
    return {KEY: _LOFTQ * loftq + mark}


def check_base(model: Layer, without: Collection[str], metadata: dict[str, str], source: Path, allow: bool) -> None:
    """Raise ValueError where the mark in `metadata` is of another base; say on standard error where it is of a copy of this one.

    allow: say that, too, on standard error, and go on. An adapter without a mark (PEFT's) is taken.
    """
    mark = metadata.get(KEY)
    own = fingerprint(model, without)
    if mark is None or mark.removeprefix(_LOFTQ).partition(":")[0] == own:
        return
    difference = None if mark.startswith(_LOFTQ) else _difference(mark, model, _samples(model, without))
    if difference is not None:
        print(f"{source}: it was trained on another copy of this base, by {difference}: results will differ a little.", file=sys.stderr)
    elif allow:
        print(f"{source}: it was trained on a base model with other weights than the one it is put on.", file=sys.stderr)
    else:
        raise ValueError(
            f"{source}: this adapter was made for a base model with other weights than the one it is put on; "
            "with --allow-other-weights (allow_other_weights=True) it is put on all the same."
        )


def _difference(mark: str, model: Layer, ours: np.ndarray) -> str | None:
    """In words, what tells a copy of the base from the base; None where it is no copy."""
    _, kind, samples = [*mark.split(":"), "", ""][:3]
    try:
        theirs = np.frombuffer(bytes.fromhex(samples), "<f4")
    except ValueError:
        return None
    if theirs.shape != ours.shape or not ours.size:
        return None
    if holds_bfloat16(theirs) != holds_bfloat16(ours) and np.array_equal(rounded(theirs, "bfloat16"), rounded(ours, "bfloat16")):
        return "rounding to bfloat16"  # to float16 leaves the fingerprint as it is
    distance = float(np.linalg.norm(theirs - ours) / max(np.linalg.norm(theirs), 1e-30))
    if distance < _FAR and (kind == "quantized" or _quantized(model)):
        return f"quantization ({distance:.1%} in a sample of its weights)"
    return None


def fingerprint(model: Layer, without: Collection[str] = ()) -> str:
    """16 hexadecimal digits for the base model: paths, shapes and a few values, as float16, of every dense weight.

    `without` are paths of modules to leave out: those that are fully trained are not the base's.
    """
    digest = hashlib.sha256()
    for path, shape, sample in _sampled(model, without):
        digest.update(f"{path}{shape}".encode() + rounded(sample, "float16").tobytes())
    return digest.hexdigest()[:16]


def _samples(model: Layer, without: Collection[str]) -> np.ndarray:
    """Some of the values that the fingerprint reads."""
    values = np.concatenate([np.zeros(0, "<f4"), *(sample.astype("<f4") for _, _, sample in _sampled(model, without))])
    return values[np.linspace(0, len(values) - 1, _SAMPLES).astype(int)] if len(values) else values


def _sampled(model: Layer, without: Collection[str]) -> Iterator[tuple[str, tuple[int, ...], np.ndarray]]:
    for path, layer in model.modules():
        if isinstance(layer, Linear) and not any(f"{path}.".startswith(f"{skipped}.") for skipped in without):
            W = dense(layer.weight.data)
            rows, columns = np.divmod(np.arange(0, W.size, max(1, W.size // 16)), W.shape[1])
            yield path, tuple(W.shape), to_numpy(W[as_like(rows, W), as_like(columns, W)])


def _quantized(model: Any) -> bool:
    weights = [layer.weight.data for _, layer in model.modules() if isinstance(layer, Linear)]
    return str(model.source).endswith(".gguf") or any(isinstance(W, Matrix) or is_half(W) for W in weights)
