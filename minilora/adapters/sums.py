"""Weighted sums of LoRA adapters, as PEFT's add_weighted_adapter has them:   W + sum_i w_i s_i A_i B_i."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from minilora.backend import Array, get_xp
from minilora.layers import Layer, Linear
from minilora.lora import LoraConfig, LoRALinear, adaptation, factorize, inject, lora_layers
from minilora.quantization.residual import dense

_KEPT = ("lora_dropout", "bias", "modules_to_save", "task_type", "base_model_name_or_path")  # fields that a sum takes over
Part = tuple[float, Array, Array]  # w s, A (m, r), B (r, n)


def _cat(parts: Sequence[Part], r: int) -> tuple[Array, Array]:
    """[w_1 s_1 A_1 | w_2 s_2 A_2 | ...] and the B_i stacked: the sum exactly, its rank the sum of the ranks."""
    xp = get_xp(parts[0][1])
    return xp.concatenate([c * A for c, A, _ in parts], axis=1), xp.concatenate([B for _, _, B in parts])


def _svd(parts: Sequence[Part], r: int) -> tuple[Array, Array]:
    """The best rank-r approximation of the sum."""
    return factorize(sum(c * (A @ B) for c, A, B in parts), r)


def _linear(parts: Sequence[Part], r: int) -> tuple[Array, Array]:
    """sum sign(w) sqrt(|w s|) A_i  and  sum sqrt(|w s|) B_i: cheap, but with cross terms A_i B_j."""
    if len({A.shape[1] for _, A, _ in parts}) > 1:
        raise ValueError("combine: 'linear' adds A to A and B to B, so the ranks must be the same; use 'cat' or 'svd'.")
    roots = [math.sqrt(abs(c)) for c, _, _ in parts]
    A = sum(math.copysign(root, c) * A for root, (c, A, _) in zip(roots, parts, strict=True))
    return A, sum(root * B for root, (_, _, B) in zip(roots, parts, strict=True))


WAYS: dict[str, Callable[[Sequence[Part], int], tuple[Any, Any]]] = {"cat": _cat, "svd": _svd, "linear": _linear}


def combine(base: Layer, models: Sequence[Layer], weights: Sequence[float], how: str = "svd", r: int | None = None) -> Layer:
    """A replica of `base` with one LoRA adapter: the weighted sum of those of `models`, which are adapted replicas of it.

    how   "cat": exactly the sum, of rank r_1 + r_2 + ...; "svd": the best approximation of rank r, by default the largest of theirs;
          "linear": A and B are added separately, which needs equal ranks and is not the sum (PEFT calls it a rough approximation)

    Weights may be negative. A layer that only some of the models adapt gets the sum of those. The result has scale 1 (lora_alpha = r).
    Raises ValueError when weights and models do not match, when a rank does not fit, and for what has no such sum: other methods than
    plain LoRA, fully trained biases and modules, other base weights.
    """
    if how not in WAYS:
        raise ValueError(f"combine: unknown way {how!r}; choose {', '.join(WAYS)}.")
    if len(models) != len(weights) or not models or not all(math.isfinite(w) for w in weights):
        raise ValueError(f"combine: the weights {list(weights)} do not match {len(models)} adapters; pass one finite number for each.")
    plain = dict(base.modules())
    if adaptation(base).config is not None:
        raise ValueError("combine: the base model has an adapter itself; pass the model without.")
    parts: dict[str, list[Part]] = {}
    for w, model in zip(weights, models, strict=True):
        if (values := adaptation(model).base_values) or not isinstance(adaptation(model).config, LoraConfig):
            what = f"fully trained {min(values)}" if values else "has no LoRA adapter"
            raise ValueError(f"combine: a model {what}; only LoRA adapters have a sum.")
        for path, layer in lora_layers(model):
            if type(layer) is not LoRALinear or not _is_weight_of(plain.get(path), layer.weight.data):
                raise ValueError(f"combine: {path} is no plain LoRA, or was made for other weights than those of the base model.")
            A, B = (layer.lora_A.data, layer.lora_B.data) if layer.offset is None else layer.offset.joined(layer).values()
            parts.setdefault(path, []).append((w * layer.scaling, A, B))

    r = r or max(A.shape[1] for each in parts.values() for _, A, _ in each)
    sums = {path: WAYS[how](each, r) for path, each in parts.items()}
    return with_lora(base, sums, adaptation(models[0]).config)


def _is_weight_of(layer: Any, W: Array) -> bool:
    """Whether the layer is a Linear with the weight W."""
    if not isinstance(layer, Linear) or layer.weight.data.shape != W.shape:
        return False
    return layer.weight.data is W or bool((dense(layer.weight.data) == dense(W)).all())


def with_lora(base: Layer, products: dict[str, tuple[Array, Array]], like: LoraConfig | None = None) -> Layer:
    """A replica of the base with LoRA layers of scale 1 that add these products {path: (A, B)}; `like` has its other fields."""
    ranks = {path: int(A.shape[1]) for path, (A, _) in products.items()}
    r = max(ranks.values())
    other = {path: rank for path, rank in ranks.items() if rank != r}
    kept = {name: getattr(like or LoraConfig(), name) for name in _KEPT}
    config = LoraConfig(r=r, lora_alpha=r, target_modules=list(products), rank_pattern=other, alpha_pattern=dict(other), **kept)
    adapted = base.replica()
    inject(adapted, config, rng=0, strict=False)
    for path, layer in lora_layers(adapted):
        for p, value in zip((layer.lora_A, layer.lora_B), products[path], strict=True):
            p.data = value.astype(p.data.dtype)
    return adapted
