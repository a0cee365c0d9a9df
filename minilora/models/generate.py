"""Sampling from a decoder, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from minilora.backend import to_numpy
from minilora.models.gpt2 import GPT2


def generate(model: GPT2, prompt: np.ndarray, n: int, temperature: float = 0.8, rng: np.random.Generator | int = 0) -> Iterator[int]:
    """n token ids that follow the prompt (T,), as they are drawn. temperature 0 takes the likeliest.

    p = softmax(logits / temperature). When the text outgrows the model's positions, the oldest tokens are forgotten.
    Raises ValueError for an empty prompt or a negative temperature.
    """
    if len(prompt) == 0:
        raise ValueError("generate: the prompt is empty; give at least one token.")
    if not temperature >= 0:
        raise ValueError(f"generate: temperature is {temperature}; it must be at least 0.")
    rng = np.random.default_rng(rng)
    ids = np.asarray(prompt, dtype=np.int64)
    for _ in range(n):
        ids = ids[-model.config.n_positions :]
        h, _ = model.transformer.forward(ids, keep=False)
        logits = to_numpy(h[-1:] @ model.head)[0].astype(np.float64)
        if temperature == 0:
            token = int(logits.argmax())
        else:
            p = np.exp((logits - logits.max()) / temperature)
            token = int(rng.choice(len(p), p=p / p.sum()))
        yield token
        ids = np.append(ids, token)
