"""Sampling from a decoder, one token at a time, with a cache of keys and values."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from minilora.backend import to_numpy
from minilora.models.attention import KVCache
from minilora.models.decoder import Decoder


def generate(
    model: Any,
    prompt: np.ndarray,
    n: int,
    temperature: float = 0.8,
    rng: np.random.Generator | int = 0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Up to n token ids that continue the prompt (T,), one by one as they are drawn; ends before a token in `stop`.

    temperature, top_k and top_p as in `draw`. When the text outgrows the model's positions, the older half is forgotten.
    Raises ValueError for a model that is not a Decoder, an empty prompt, or values out of range.
    """
    if not isinstance(model, Decoder):
        raise ValueError(f"{type(model).__name__} does not generate text: it is not a decoder.")
    if n < 0:
        raise ValueError(f"generate: n is {n}; it must be at least 0.")
    if len(prompt) == 0:
        raise ValueError("generate: the prompt is empty; give at least one token.")
    rng = np.random.default_rng(rng)
    limit = model.config.longest_sequence
    ids = np.asarray(prompt, dtype=np.int64)[-limit:]
    cache, new = KVCache(), ids
    for _ in range(n):
        if cache.length + len(new) > limit:
            ids = ids[-max(1, limit // 2) :]
            cache, new = KVCache(), ids
        token = draw(to_numpy(model.decode(new, cache)), temperature, top_k, top_p, rng)
        if token in stop:
            return
        yield token
        new = np.array([token])
        ids = np.append(ids, token)


def generate_text(
    model: Any,
    tokenizer: Any,
    ids: np.ndarray,
    n: int,
    temperature: float = 0.8,
    rng: np.random.Generator | int = 0,
    *,
    stop: Sequence[str] = (),
    show: Callable[[str], None] = lambda piece: None,
    **limits: Any,
) -> dict[str, Any]:
    """Continue the prompt `ids` (T,), from `tokenizer.encode_prompt`, and show each piece of text as soon as it is certain.

    Ends after n tokens, before one of the tokenizer's stop_ids, or before a text in `stop`, no part of which is ever shown.
    temperature, rng and `limits`, top_k and top_p, as in `generate`.
    Returns {"text": the continuation, "tokens": how many were drawn, "ended": "stop" or "length"}. Raises ValueError as `generate`,
    and for a stop text that is empty, or holds a special token among others.
    """
    ends, marks = set(tokenizer.stop_ids), [mark for mark in stop if mark not in tokenizer.added]
    ends |= {tokenizer.added[mark] for mark in stop if mark in tokenizer.added}
    if "" in stop:
        raise ValueError("generate: a text to stop at (--stop) is empty; give at least one character.")
    if wrong := [mark for mark in marks if tokenizer.special_ids.intersection(tokenizer.encode(mark, add_special=False).tolist())]:
        raise ValueError(f"generate: the text to stop at {wrong[0]!r} holds a special token; give that token alone.")
    drawn: list[int] = []

    def counted() -> Iterator[int]:
        for token in generate(model, ids, n, temperature, rng, stop=ends, **limits):
            drawn.append(token)
            yield token

    text, shown = "", 0
    for piece in tokenizer.stream(counted(), skip_special=True, after=ids):
        text += piece
        if found := [at for mark in marks if (at := text.find(mark, shown)) >= 0]:
            text = text[: min(found)]
            show(text[shown:])
            return {"text": text, "tokens": len(drawn), "ended": "stop"}
        held = max((k for mark in marks for k in range(1, len(mark)) if text.endswith(mark[:k])), default=0)
        if len(text) - held > shown:
            show(text[shown : len(text) - held])
            shown = len(text) - held
    show(text[shown:])
    return {"text": text, "tokens": len(drawn), "ended": "stop" if len(drawn) < n else "length"}


def draw(logits: np.ndarray, temperature: float, top_k: int, top_p: float, rng: np.random.Generator) -> int:
    """One token from logits (V,), drawn from p = softmax(logits / temperature); temperature 0 takes the likeliest.

    top_k keeps the k likeliest (0: all); top_p keeps the smallest set of likeliest tokens whose probabilities reach it (arXiv 1904.09751).
    """
    if not temperature >= 0:
        raise ValueError(f"generate: temperature is {temperature}; it must be at least 0.")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate: top_k is {top_k} and top_p {top_p}; they must be at least 0, and above 0 up to 1.")
    logits = logits.astype(np.float64)
    if temperature == 0:
        return int(logits.argmax())
    p = np.exp((logits - logits.max()) / max(temperature, 1e-300))
    order = np.argsort(-p, kind="stable")[: top_k or None]
    p = p[order] / p[order].sum()
    kept = int(np.searchsorted(np.cumsum(p), top_p)) + 1  # including the token that reaches top_p
    p = p[:kept]
    return int(order[rng.choice(len(p), p=p / p.sum())])
