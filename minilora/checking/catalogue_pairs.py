"""The part of the catalogue that is functional pairs (minilora/functional)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array
from minilora.checking.subjects import OFFSETS, Pair, fixed_weight


def pairs(rng: np.random.Generator) -> Iterator[tuple[Pair, np.ndarray]]:
    """(pair, x) of every functional pair that layers are made of."""

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    x = draw(6, 5)
    labels = np.array([0, 3, -100, 1, 4, 4])
    kept = labels[labels != -100]

    def both(f: Callable[[Array], Array], f_backward: Callable[..., Array], from_output: bool = False) -> tuple[Callable, Callable]:
        """An elementwise pair: what it saves is its input, or its output."""
        return (lambda x: ((y := f(x)), y if from_output else x)), (lambda dy, saved, x: [f_backward(dy, saved)])

    yield (
        Pair(
            "linear", lambda x, W, b: (F.linear(x, W, b), None), lambda dy, s, x, W, b: F.linear_backward(dy, x, W), W=draw(5, 4), b=draw(4)
        ),
        x,
    )
    yield (
        Pair(
            "lora_linear",
            lambda x, A, B: F.lora_linear(x, fixed_weight(x), None, A, B, 0.7),
            lambda dy, u, x, A, B: F.lora_linear_backward(dy, x, u, fixed_weight(x), A, B, 0.7),
            A=draw(5, 2),
            B=draw(2, 4),
        ),
        x,
    )
    for name in ("relu", "gelu", "gelu_tanh", "silu", "tanh", "softmax"):
        f, f_backward = getattr(F, name), getattr(F, f"{name}_backward")
        yield Pair(name, *both(f, f_backward, from_output=name in ("tanh", "softmax"))), x
    yield Pair("layer_norm", F.layer_norm, lambda dy, s, x, g, b: F.layer_norm_backward(dy, s, g), gamma=draw(5), beta=draw(5)), x
    yield Pair("rms_norm", F.rms_norm, lambda dy, s, x, g: F.rms_norm_backward(dy, s, g), gamma=draw(5)), x
    yield Pair("dropout", lambda x: (F.dropout(x, 0.4, 11), None), lambda dy, s, x: [F.dropout_backward(dy, 0.4, 11)]), x
    ids = rng.integers(0, 6, 9)
    yield Pair("embedding", lambda E: (F.embedding(ids, E), None), lambda dy, s, E: [F.embedding_backward(dy, ids, E)]), x
    for kind, causal, offsets in (("causal", True, OFFSETS), ("both ways", False, OFFSETS), ("one sequence", True, None)):

        def attend(q: Array, k: Array, v: Array, causal: bool = causal, offsets: Any = offsets) -> tuple[Array, list[Array]]:
            return F.attention(q, k, v, 3, offsets, causal)

        def attend_backward(dy: Array, s: list[Array], q: Array, k: Array, v: Array, offsets: Any = offsets) -> tuple[Array, Array, Array]:
            return F.attention_backward(dy, q, k, v, s, 3, offsets)

        yield Pair(f"attention, {kind}", attend, attend_backward, k=draw(9, 6), v=draw(9, 6)), draw(9, 6)

    def attend_grouped(q: Array, k: Array, v: Array) -> tuple[Array, list[Array]]:
        return F.attention(q, k, v, 6, OFFSETS, n_kv_head=2)

    def attend_grouped_backward(dy: Array, s: list[Array], q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
        return F.attention_backward(dy, q, k, v, s, 6, OFFSETS, n_kv_head=2)

    yield Pair("attention, grouped heads", attend_grouped, attend_grouped_backward, k=draw(9, 4), v=draw(9, 4)), draw(9, 12)
    for interleaved in (False, True):

        def turn(x: Array, interleaved: bool = interleaved) -> tuple[Array, None]:
            return F.rotary(x, *_tables(x), interleaved), None

        def turn_back(dy: Array, s: None, x: Array, interleaved: bool = interleaved) -> list[Array]:
            return [F.rotary_backward(dy, *_tables(x), interleaved)]

        yield Pair(f"rotary, {'interleaved' if interleaved else 'halves'}", turn, turn_back), draw(9, 12)
    for name, loss in {
        "mse": lambda x: F.mse(x, x * 0 + 0.3),
        "cross_entropy": lambda x: F.cross_entropy(x, labels),
    }.items():
        yield Pair(name, loss, lambda dy, saved, x: [dy * saved]), x
    yield (
        Pair(
            "linear_cross_entropy",
            lambda x, W: _split_first(F.linear_cross_entropy(x, W, kept, block=2)),
            lambda dy, saved, x, W: [dy * g for g in saved],
            W=draw(5, 7),
        ),
        draw(5, 5),
    )


def _tables(x: Array) -> tuple[Array, Array]:
    """Rotary tables for 3 heads of 4 features, where x lives."""
    return F.rotary_tables(F.positions(9, OFFSETS, 9), 4, 100.0, x)


def _split_first(values: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    return values[0], values[1:]
