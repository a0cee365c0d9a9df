"""A fine-tuned model as a LoRA of its base:   dW = W_tuned - W_base ~ A B,   and how far two models are apart.

The rank: with the singular values S of dW, the energy that rank r keeps is sum_{i <= r} S_i^2 / sum_i S_i^2 (Eckart, Young 1936).
With the inputs of each layer it is that of L dW, L^T L = x^T x / T: what counts is the change of the outputs.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from minilora.adapters.sums import with_lora
from minilora.backend import Array, get_xp
from minilora.layers import Embedding, Layer, LayerNorm, Linear, Output, RMSNorm
from minilora.lora import LoraConfig, adaptation, adapter_parameters, factorize, lora_layers
from minilora.lora.layer import Adapted
from minilora.lora.targets import CLASSIFIERS
from minilora.quantization.residual import dense

_RIDGE = 1e-6  # of the mean square of the inputs, so that errors in directions without inputs cost little, and the root exists


@dataclass
class Extracted:
    """One layer: its rank, the share of the energy of dW (or L dW) that it keeps, and the largest element of dW and of dW - A B."""

    path: str
    rank: int
    energy: float
    largest_change: float
    largest_error: float


def extract(
    base: Layer, tuned: Layer, r: int = 8, energy: float | None = None, inputs: dict[str, Array] | None = None, whole: bool = True
) -> tuple[Layer, list[Extracted]]:
    """A replica of `base` with the LoRA adapter that comes closest to `tuned`, and a line for each adapted layer.

    r        the rank of every layer; with `energy` (0 to 1), each layer has the lowest rank that keeps this share instead
    inputs   {path: root} of `input_roots`; the closest in the weights for a layer that is not in it
    whole    biases, norms and a classifier's head that have changed are part of the adapter, fully (its `bias` and `modules_to_save`);
             embeddings that have changed cannot be, see `embeddings_changed`

    `tuned` may be a full fine-tune or an adapted model, whose adapter then gets another rank.
    Raises ValueError when the models are not of one kind, nothing has changed, or a rank is beyond min(in, out) of a layer.
    """
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"extract: the energy to keep is {energy}; it must be above 0 and at most 1.")
    if r < 1:
        raise ValueError(f"extract: the rank must be at least 1, got {r}.")
    changed = largest_changes(base, tuned)
    head = getattr(base, "output_head", "") or ""
    ours, theirs = dict(base.modules()), dict(tuned.modules())
    of_head = {path for path in ours if head.endswith(CLASSIFIERS) and path.partition(".")[0].endswith(head)}  # fully trained, as it is new
    products, result = {}, []
    for path in [path for path, layer in ours.items() if isinstance(layer, Linear) and changed[f"{path}.weight"] and path not in of_head]:
        dW = _weight(theirs[path]).astype("float64") - _weight(ours[path]).astype("float64")
        if energy is None and r > min(dW.shape):
            raise ValueError(f"extract: rank {r} is beyond {path}, which is {dW.shape[0]} x {dW.shape[1]}.")
        A, B = factorize(dW, min(dW.shape), (inputs or {}).get(path))
        squares = (B * B).sum(axis=1)  # S_i, since B = sqrt(S) V^T
        kept = (squares * squares).cumsum() / (squares * squares).sum()
        rank = r if energy is None else min(int((kept < energy * (1 - 1e-12)).sum()) + 1, len(kept))
        products[path] = A[:, :rank], B[:rank]
        error = float(abs(dW - products[path][0] @ products[path][1]).max())
        result.append(Extracted(path, rank, float(kept[rank - 1]), changed[f"{path}.weight"], error))
    if not products:
        raise ValueError("extract: no linear layer differs between the two models; there is nothing to extract.")

    config = LoraConfig()
    if whole:
        norms = [p for p, layer in ours.items() if isinstance(layer, (LayerNorm, RMSNorm)) and changed[f"{p}.weight"]]
        heads = [head] if any(changed[f"{path}.{name}"] for path in of_head for name, _ in ours[path].parameters()) else []
        biased = any(value for path, value in changed.items() if path.endswith(".bias"))
        config = LoraConfig(bias="all" if biased else "none", modules_to_save=[*norms, *heads] or None)
    adapted = with_lora(base, products, config)
    parameters, sources = dict(adapted.parameters()), dict(tuned.parameters())
    for path in adaptation(adapted).base_values:
        parameters[path].data = sources[path].data.astype(parameters[path].data.dtype)
    return adapted, result


def largest_changes(base: Layer, tuned: Layer) -> dict[str, float]:
    """{path: the largest |difference| of an element} for every weight; an adapter of either counts with its weight.

    Raises ValueError when the models do not have the same weights, or have bottlenecks.
    """
    first, second = _weights(base), _weights(tuned)
    for path in {**first, **second}:
        if path not in first or path not in second:
            raise ValueError(f"the models are not of one kind: {path} is missing in the {'second' if path in first else 'first'}.")
    changes = {}
    for path, W in first.items():
        ours, theirs = W(), second[path]()
        if ours.shape != theirs.shape:
            raise ValueError(f"the models are not of one kind: {path} is {ours.shape} in the first, and {theirs.shape} in the second.")
        changes[path] = 0.0 if ours is theirs else float(abs(theirs - ours).max())
    return changes


def _weights(model: Layer) -> dict[str, Callable[[], Array]]:
    """{path: function that returns the weight, its adapter included}, so that one at a time is formed."""
    own = adapter_parameters(model)
    found: dict[str, Callable[[], Array]] = {path: partial(dense, p.data) for path, p in model.parameters() if path not in own}
    return found | {f"{path}.weight": partial(_weight, layer) for path, layer in lora_layers(model)}


def _weight(layer: Any) -> Array:
    """The weight of the layer, its adapter included."""
    if not isinstance(layer, Adapted):
        return dense(layer.weight.data)
    return layer.weight.data + layer.delta() if layer.merged is None else layer.merged


class _Watched(Layer):
    """Runs a Linear, and sums x^T x over its inputs, in float64."""

    def __init__(self, layer: Linear) -> None:
        self.watched, self.count = layer, 0
        self.gram: Any = 0.0

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        z = x.astype("float64")
        self.gram = self.gram + z.T @ z
        self.count += len(x)
        return self.watched.forward(x, keep, need_dx)


def input_roots(model: Layer, batches: Iterable[Any]) -> dict[str, Array]:
    """{path: R (m, m)} of every Linear that saw the batches (each with ids and offsets), R^T R = x^T x / T + a small ridge.

    R replaces all the inputs x wherever only x^T x counts, as in `factorize`. With the ridge, 1e-6 of the mean square, a few texts are
    enough; more are better.
    """
    replica = model.replica()
    watched = {path: _Watched(layer) for path, layer in replica.modules() if isinstance(layer, Linear)}
    for path, layer in reversed(watched.items()):  # inner layers first
        replica.replace(path, layer)
    for batch in batches:
        replica.forward(batch.ids, keep=False, offsets=batch.offsets)  # type: ignore[call-arg]  # models take offsets
    return {path: _root(layer.gram / layer.count) for path, layer in watched.items() if layer.count}


def _root(C: Array) -> Array:
    """Upper triangular R with R^T R / m = C (m, m) + the ridge: factorize divides by the number of rows, here m."""
    xp, m = get_xp(C), len(C)
    one = xp.eye(m)
    ridge = _RIDGE * float((C * one).sum()) / m or 1.0
    return xp.linalg.cholesky(C + ridge * one).T * math.sqrt(m)


def embeddings_changed(base: Layer, changes: dict[str, float]) -> list[str]:
    """The paths of the embedding tables that differ, which `extract` leaves out."""
    tables = [f"{path}.weight" for path, layer in base.modules() if isinstance(layer, Embedding)]
    return [path for path in tables if changes[path]]
