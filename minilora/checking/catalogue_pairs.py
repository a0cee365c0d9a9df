"""The part of the catalogue that is pairs of functions (minilora/functional, and those of LoRA's variants)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array, as_like
from minilora.checking.subjects import OFFSETS, Pair
from minilora.lora.variants import dora, embedding, vera

Functions = tuple[Callable[..., Any], Callable[..., Any]]
_S = 0.7  # alpha / r


def pairs(rng: np.random.Generator) -> Iterator[tuple[Pair, np.ndarray]]:
    """(pair, x) of every functional pair that layers are made of."""

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape)

    x = draw(6, 5)
    yield Pair("linear", *_linear(), W=draw(5, 4), b=draw(4)), x
    for name in ("relu", "gelu", "gelu_tanh", "silu", "tanh", "softmax"):
        yield Pair(name, *_elementwise(name, saves_y=name in ("tanh", "softmax"))), x
    yield Pair("swiglu", F.swiglu, lambda dy, saved, g, u: F.swiglu_backward(dy, saved), u=draw(6, 5)), x
    yield Pair("layer_norm", F.layer_norm, lambda dy, s, x, g, b: F.layer_norm_backward(dy, s, g), gamma=draw(5), beta=draw(5)), x
    yield Pair("rms_norm", F.rms_norm, lambda dy, s, x, g: F.rms_norm_backward(dy, s, g), gamma=draw(5)), x
    yield Pair("dropout", lambda x: (F.dropout(x, 0.4, 11), None), lambda dy, s, x: [F.dropout_backward(dy, 0.4, 11)]), x
    ids = rng.integers(0, 6, 9)
    yield Pair("embedding", lambda E: (F.embedding(ids, E), None), lambda dy, s, E: [F.embedding_backward(dy, ids, E)]), x
    yield Pair("attention, causal", *_attention(3, OFFSETS), k=draw(9, 6), v=draw(9, 6)), draw(9, 6)
    yield Pair("attention, both ways", *_attention(3, OFFSETS, causal=False), k=draw(9, 6), v=draw(9, 6)), draw(9, 6)
    yield Pair("attention, one sequence", *_attention(3), k=draw(9, 6), v=draw(9, 6)), draw(9, 6)
    yield Pair("attention, grouped heads", *_attention(6, OFFSETS, n_kv_head=2), k=draw(9, 4), v=draw(9, 4)), draw(9, 12)
    yield Pair("rotary, halves", *_rotary(interleaved=False)), draw(9, 12)
    yield Pair("rotary, interleaved", *_rotary(interleaved=True)), draw(9, 12)
    labels = np.array([0, 3, -100, 1, 4, 4])
    yield Pair("mse", lambda x: F.mse(x, x * 0 + 0.3), lambda dy, dx, x: [dy * dx]), x
    yield Pair("cross_entropy", lambda x: F.cross_entropy(x, labels), lambda dy, dx, x: [dy * dx]), x
    yield Pair("linear_cross_entropy", *_linear_cross_entropy(labels[labels != -100]), W=draw(5, 7)), draw(5, 5)

    W, A, B = draw(5, 4), draw(5, 2), draw(2, 4)
    yield Pair("lora_linear", *_lora_linear(W), A=A, B=B), x
    yield Pair("column_norms", *_column_norms(W), A=A, B=B), x
    yield Pair("dora_linear", *_dora_linear(W), A=A, B=B, m=draw(4), c=draw(4)), x
    yield Pair("vera_linear", *_vera_linear(W, draw(5, 7), draw(7, 4)), d=draw(7), e=draw(4)), x
    yield Pair("lora_embedding", *_lora_embedding(draw(6, 5), ids), B=draw(2, 5)), draw(6, 2)


def _linear() -> Functions:
    return lambda x, W, b: (F.linear(x, W, b), None), lambda dy, s, x, W, b: F.linear_backward(dy, x, W)


def _elementwise(name: str, saves_y: bool) -> Functions:
    """A function that saves its input, or its output y."""
    f, f_backward = getattr(F, name), getattr(F, f"{name}_backward")
    return (lambda x: (y := f(x), y if saves_y else x)), lambda dy, saved, x: [f_backward(dy, saved)]


def _attention(n_head: int, offsets: Any = None, causal: bool = True, n_kv_head: int | None = None) -> Functions:
    return (
        lambda q, k, v: F.attention(q, k, v, n_head, offsets, causal, n_kv_head=n_kv_head),
        lambda dy, P, q, k, v: F.attention_backward(dy, q, k, v, P, n_head, offsets, n_kv_head=n_kv_head),
    )


def _rotary(interleaved: bool) -> Functions:
    """With 3 heads of 4 features."""

    def tables(x: Array) -> tuple[Array, Array]:
        return F.rotary_tables(F.positions(9, OFFSETS, 9), 4, 100.0, x)

    return (
        lambda x: (F.rotary(x, *tables(x), interleaved), None),
        lambda dy, s, x: [F.rotary_backward(dy, *tables(x), interleaved)],
    )


def _linear_cross_entropy(labels: np.ndarray) -> Functions:
    return lambda x, W: _first(F.linear_cross_entropy(x, W, labels, block=2)), lambda dy, grads, x, W: [dy * g for g in grads]


def _lora_linear(W: np.ndarray) -> Functions:
    return (
        lambda x, A, B: F.lora_linear(x, _like(W, x), None, A, B, _S),
        lambda dy, u, x, A, B: F.lora_linear_backward(dy, x, u, _like(W, x), A, B, _S),
    )


def _column_norms(W: np.ndarray) -> Functions:
    """It reads no x, whose gradient is zero."""

    def forward(x: Array, A: Array, B: Array) -> tuple[Array, tuple[Array, Array]]:
        c, K = dora.column_norms(_like(W, x), A, B, _S, (_like(W, x) ** 2).sum(axis=0))
        return c, (c, K)

    return forward, lambda dc, s, x, A, B: [x * 0, *dora.column_norms_backward(dc, s[0], s[1], _like(W, x), A, B, _S)]


def _dora_linear(W: np.ndarray) -> Functions:
    return (
        lambda x, A, B, m, c: _first(dora.dora_linear(x, _like(W, x), None, A, B, m, c, _S)),
        lambda dy, s, x, A, B, m, c: dora.dora_linear_backward(dy, x, s[0], s[1], _like(W, x), A, B, m, c, _S),
    )


def _vera_linear(W: np.ndarray, A: np.ndarray, B: np.ndarray) -> Functions:
    return (
        lambda x, d, e: vera.vera_linear(x, _like(W, x), None, _like(A, x), _like(B, x), d, e),
        lambda dy, u, x, d, e: vera.vera_linear_backward(dy, u, _like(W, x), _like(A, x), _like(B, x), d, e),
    )


def _lora_embedding(E: np.ndarray, ids: np.ndarray) -> Functions:
    return (
        lambda A, B: embedding.lora_embedding(ids, _like(E, A), A, B, _S),
        lambda dy, u, A, B: embedding.lora_embedding_backward(dy, ids, u, A, B, _S),
    )


def _like(W: np.ndarray, x: Array) -> Array:
    """A frozen array, where x is and in its dtype."""
    return as_like(W, x).astype(x.dtype)


def _first(values: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """(y, saved) of a function that returns y and what it saves in one tuple."""
    return values[0], values[1:]
