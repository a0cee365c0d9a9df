"""Memory and FLOPs of a training step by count, from a model's configuration alone: nothing is allocated.

    process + weights + adapters (data, gradient, two moments, a copy, a gradient for each further lane) + lanes (saved + scratch)

The formulas of FAMILIES give numbers a token or a block; BYTES gives the bytes of a number. LoRA is on all linear layers, every token has
a label, and sequences are longer than 192 tokens, so that attention keeps no probabilities (kernels/grouped.py).
tests/test_benchmarks.py compares all of it with what models of each family hold, save, and multiply.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minilora import kernels as K
from minilora.checking.flops import forward_flops, value
from minilora.kernels.dispatch import choose
from minilora.kernels.grouped import QUERIES, SCORES
from minilora.quantization.nf4 import BLOCK, NESTED
from minilora.tuned import SIZES

PROCESS = 47e6  # bytes of Python, NumPy, BLAS and the code, measured
BYTES = {"float32": 4, "bfloat16": 2}  # of a number of an activation or a matrix; with NF4 both are float32 where they are not in NF4
LETTERS = {
    "d": "hidden size",
    "f": "intermediate size",
    "q": "features of all query heads",
    "k": "features of all key heads",
    "h": "query heads",
    "g": "key heads",
    "n": "features of a head",
    "V": "vocabulary",
    "P": "positions",
    "K": "token types",
    "c": "classes",
    "r": "rank",
}


class Family(NamedTuple):
    """Formulas in LETTERS; see minilora.checking.flops.value."""

    linear: str  # in > out of each linear layer of a block
    vectors: str  # numbers in the norms and biases of a block
    tables: str  # numbers in matrices outside of the blocks
    ends: str  # numbers in vectors there, and others that are always float32
    saved: str  # numbers a token that a block saves for its backward pass, in the dtype of activations
    statistics: str  # numbers a token that a block saves in float32: 1 / sqrt(var + eps) of each norm
    outside: str  # numbers a token that are saved outside of the blocks: the gradient of the last hidden state
    rotary: str  # the same in float32: cos and sin
    feed_forward: str  # numbers a token that exist at once in the backward pass of this layer, besides what was saved
    attention: str  # the same of attention, besides two blocks of scores
    half: str  # bytes a token that exist at once where the activation of half-precision arrays is upcast
    head: str = ""  # numbers in a classifier, which is fully trained
    unused: str = ""  # as `linear`: adapted layers outside of the blocks that a step does not run


_LLAMA = Family(
    linear="d > q, d > k, d > k, q > d, d > f, d > f, f > d",
    vectors="2 d",
    tables="V d",
    ends="d",
    saved="4 d + 2 q + 2 k + 3 f + 7 r",
    statistics="2",
    outside="d",
    rotary="n",
    feed_forward="3 f + 4 d",
    attention="4 d + 3 q + 2 k",
    half="26 f + 2 d",
)
FAMILIES = {
    "llama": _LLAMA,
    "qwen3": _LLAMA._replace(vectors="2 d + 2 n", saved="4 d + 3 q + 3 k + 3 f + 7 r", statistics="2 + h + g"),
    "gemma3_text": _LLAMA._replace(
        vectors="4 d + 2 n",
        saved="6 d + 3 q + 3 k + 4 f + 7 r",
        statistics="4 + h + g",
        rotary="2 n",
        feed_forward="3 f + 5 d",
        half="18 f + 2 d",
    ),
    "gpt2": Family(
        linear="d > 3 d, d > d, d > f, f > d",
        vectors="9 d + f",
        tables="V d + P d",
        ends="2 d",
        saved="8 d + 2 f + 4 r",
        statistics="2",
        outside="d",
        rotary="0",
        feed_forward="2 f + 3 d",
        attention="8 d",
        half="16 f + 2 d",
    ),
    "bert": Family(
        linear="d > d, d > d, d > d, d > d, d > f, f > d",
        vectors="9 d + f",
        tables="V d + P d + K d",
        ends="3 d + c d + c",  # the original head too
        saved="8 d + 2 f + 6 r",
        statistics="2",
        outside="0",
        rotary="0",
        feed_forward="2 f + 4 d",
        attention="f + 10 d",
        half="16 f + 2 d",
        head="c d + c",
        unused="d > d",  # the pooler, where the head reads the mean
    ),
}


@dataclass
class Count:
    """Of a step: bytes by kind, and FLOPs. lanes: how many run at the same time, each with its saved arrays and scratch."""

    weights: int
    trained: int  # numbers
    adapters: int
    saved: int
    scratch: int
    flops: int
    lanes: int

    @property
    def total(self) -> int:
        return int(PROCESS) + self.weights + self.adapters + self.lanes * (self.saved + self.scratch)


def sizes_of(config: Any, r: int = 8) -> dict[str, int]:
    """The values of LETTERS for a configuration."""
    if hasattr(config, "n_embd"):
        d = config.n_embd
        sizes = {"d": d, "f": config.n_inner or 4 * d, "q": d, "k": d, "h": config.n_head, "P": config.n_positions}
    else:
        d, h = config.hidden_size, config.num_attention_heads
        g, n = getattr(config, "num_key_value_heads", h), getattr(config, "head_dim", d // h)
        sizes = {"d": d, "f": config.intermediate_size, "q": h * n, "k": g * n, "h": h, "g": g, "n": n}
        sizes |= {"P": config.max_position_embeddings, "K": getattr(config, "type_vocab_size", 0), "c": getattr(config, "num_labels", 0)}
    return sizes | {"V": config.vocab_size, "r": r, "L": getattr(config, "num_hidden_layers", 0) or config.n_layer}


def pairs(linear: str, sizes: dict[str, int]) -> list[tuple[int, int]]:
    """(in, out) of each layer of a formula such as "d > q, q > d"."""
    return [tuple(value(side.strip(), sizes) for side in each.split(">")) for each in linear.split(",") if each]  # type: ignore[misc]


def weights(family: Family, sizes: dict[str, int], tied: bool, dtype: str) -> int:
    """Bytes of the frozen parameters. dtype: "float32", "bfloat16" (matrices only), or "nf4" (linear layers only, the head excepted)."""
    linear = sizes["L"] * pairs(family.linear, sizes) + pairs(family.unused, sizes)
    tables = value(family.tables, sizes) + (0 if tied else sizes["V"] * sizes["d"])
    vectors = 4 * (sizes["L"] * value(family.vectors, sizes) + value(family.ends, sizes))
    each = BYTES.get(dtype, 4)
    return vectors + each * tables + sum(nf4_bytes(m * n) if dtype == "nf4" else each * m * n for m, n in linear)


def nf4_bytes(numbers: int) -> int:
    """Four bits a number, a byte for each block of 64, and four for each 256 of these and for their mean."""
    blocks = math.ceil(numbers / BLOCK)
    return math.ceil(numbers / 2) + blocks + 4 * math.ceil(blocks / NESTED) + 4


def trained(family: Family, sizes: dict[str, int]) -> int:
    """Numbers that are trained: r (in + out) a layer, and a classifier's head."""
    layers = sizes["L"] * pairs(family.linear, sizes) + pairs(family.unused, sizes)
    return sizes["r"] * sum(m + n for m, n in layers) + (value(family.head, sizes) if family.head else 0)


def saved(family: Family, sizes: dict[str, int], tokens: int, dtype: str, recompute: bool = False) -> int:
    """Bytes that the forward pass of one shard keeps for its backward pass. recompute: of each block its input, and the last norm's.

    The first norm of the lowest block saves nothing, as nobody needs its gradient; the norm after the last block saves as much.
    """
    each, d, L = BYTES.get(dtype, 4), sizes["d"], sizes["L"]
    outside = each * value(family.outside, sizes) + 4 * value(family.rotary, sizes)
    if recompute:
        norm = each * d + 4 if value(family.outside, sizes) else 0
        return tokens * (L * each * d + norm + outside)
    return tokens * (L * (each * value(family.saved, sizes) + 4 * value(family.statistics, sizes)) + outside)


def scratch(family: Family, sizes: dict[str, int], tokens: int, dtype: str, recompute: bool = False) -> int:
    """Bytes that exist at once besides, at the worst moment of a step: in the backward pass of a layer, or in the head.

    In half precision an operation's arguments are upcast (kernels/half.py): a whole weight, and arrays of intermediate size. With
    recompute, what a block saves exists while it runs forward once more, and then backward.
    """
    d, f, q, k = (sizes[name] for name in "dfqk")
    half, each = dtype == "bfloat16", BYTES.get(dtype, 4)
    scores = 8 * min(SCORES, QUERIES * sizes["h"] * tokens)  # and their gradient, of a block of queries
    width = min(sizes["V"], max(256, SIZES["logits"] // tokens))  # of a block of the vocabulary
    head = 4 * (tokens * (width + 3 * d) + half * width * d) if value(family.outside, sizes) else 0
    if half:
        upcast = tokens * value(family.half, sizes)
        attention = scores + tokens * (2 * value(family.attention, sizes) + 12 * q + 16 * k)
        backward = max(upcast, attention, 4 * d * f + tokens * (14 * f + 6 * d))
        forward = max(upcast, 4 * d * f + tokens * (8 * f + 8 * d))
    else:
        backward = max(4 * tokens * value(family.feed_forward, sizes), scores + 4 * tokens * value(family.attention, sizes))
        forward = 4 * tokens * (2 * f + 4 * d)
    if recompute:
        block = tokens * (each * value(family.saved, sizes) + 4 * value(family.statistics, sizes))
        return max(block + max(backward, forward), head)
    return max(backward, head)


def flops(family: Family, config: Any, sizes: dict[str, int], tokens: int, sequence: int, recompute: bool = False) -> int:
    """FLOPs of a step: forward and back to the lowest adapter, by the formulas of minilora.checking.flops."""
    L, causal = sizes["L"], not hasattr(config, "num_labels")
    offsets, total = np.arange(0, tokens + 1, sequence), 0
    biased = value(family.vectors, sizes) > 4 * sizes["d"] + 2 * sizes.get("n", 0)
    layers, r = pairs(family.linear, sizes), sizes["r"]
    lowest = 1 if layers[0][1] > sizes["q"] else 3  # layers of the lowest block that read its input, whose gradient nobody needs
    for i, (m, n) in enumerate(layers):
        arrays = [_blank(tokens, m), _blank(m, n), _blank(n) if biased else None, _blank(m, r), _blank(r, n)]
        each = _flops("lora_linear", arrays, ("dx", "dA", "dB"))
        total += L * (each.total + recompute * each.forward)
        total -= each.dx - each.formed(("dA", "dB")).dx - each.costs["dx dA"][0] if i < lowest else 0
    for i in range(L):
        q, k = _blank(tokens, sizes["q"]), _blank(tokens, sizes["k"])
        window = config.window(i) if hasattr(config, "window") else None
        each = forward_flops("attention", _heads(q, k, sizes, offsets, causal, window), "numpy").formed(("dq", "dk", "dv"))
        total += each.total + recompute * each.forward
    if causal:
        total += _flops("linear_cross_entropy", [_blank(tokens, sizes["d"]), _blank(sizes["d"], sizes["V"])], ("dx",)).total
    return total


def _heads(q: Any, k: Any, sizes: dict[str, int], offsets: Any, causal: bool, window: int | None) -> dict[str, Any]:
    return {"q": q, "k": k, "v": k, "n_head": sizes["h"], "offsets": offsets, "causal": causal, "window": window}


def _flops(name: str, arrays: list[Any], gradients: Collection[str]) -> Any:
    names = ("x", "W", "b", "A", "B") if name == "lora_linear" else ("x", "W")
    implementation = choose(K.TABLE[name], (*arrays, 1.0))[0].where if name == "lora_linear" else "numpy"
    return forward_flops(name, dict(zip(names, arrays, strict=True)), implementation).formed(gradients)


def _blank(*shape: int) -> np.ndarray:
    """An array of a shape, of one number in memory."""
    return np.broadcast_to(np.float32(0), shape)


def count(config: Any, dtype: str, sequences: int, length: int, threads: int = 2, recompute: bool = False, r: int = 8) -> Count:
    """Of a step on `sequences` of `length` tokens, a lane each. Raises ValueError for more of them than threads."""
    if sequences > threads:
        raise ValueError(f"{sequences} sequences would share {threads} lanes; count at most one sequence a thread.")
    kind = getattr(config, "model_type", "gpt2")
    family, sizes = FAMILIES[kind], sizes_of(config, r)
    tied = getattr(config, "tie_word_embeddings", True) or kind == "bert"
    numbers, lanes = trained(family, sizes), min(sequences, threads)
    return Count(
        weights(family, sizes, tied, dtype),
        numbers,
        4 * numbers * (4 + threads),  # data, two moments, a copy of the last good ones, and a gradient for each lane
        saved(family, sizes, length, dtype, recompute),
        scratch(family, sizes, length, dtype, recompute),
        flops(family, config, sizes, sequences * length, length, recompute),
        lanes,
    )
