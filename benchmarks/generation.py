"""Tokens per second: SmolLM2-135M generates 64 tokens greedily after a prompt of 32, with a cache of keys and values.

    python -m benchmarks.generation [--random] [--rounds 5] [--threads 2] [--no-compile]

A step is one token, and the tokens of all sides must be equal. The compiled rival uses a static cache; otherwise it would recompile
at every token. --random: a Llama of SmolLM2's shape with random weights, which needs no download.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator

import numpy as np

from benchmarks.completions import RANDOM, smollm2
from benchmarks.harness import RIVALS, compare

PROMPT, NEW = 32, 64
TEXT = "The language reference describes the exact syntax and semantics of Python, and the library reference manual describes the "
TEXT += "standard library that is distributed with it. Both are written for people who would like to"


def prepare(o: Namespace) -> None:
    import minilora as ml

    model, encode = smollm2(o.random)
    ml.save_model(model, o.folder / "model")
    ids = encode(TEXT) if encode else np.random.default_rng(1).integers(0, model.config.vocab_size, PROMPT)
    np.save(o.folder / "prompt.npy", np.array(ids)[:PROMPT])


def ours(o: Namespace) -> Iterator[float]:
    import minilora as ml
    from minilora.models.generate import generate

    model, prompt = ml.load_model(o.folder / "model", "numpy"), np.load(o.folder / "prompt.npy")
    while True:
        yield from generate(model, prompt, NEW, temperature=0)


def rival(o: Namespace) -> Iterator[float]:
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(o.threads)
    model = LlamaForCausalLM.from_pretrained(o.folder / "model", attn_implementation="sdpa", dtype=torch.float32).eval()
    ids = torch.from_numpy(np.load(o.folder / "prompt.npy"))[None]
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    if "compile" in o.side:
        model.forward = torch.compile(model.forward)
        options["cache_implementation"] = "static"
    while True:
        with torch.inference_mode():
            new = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, PROMPT:]
        yield from new.tolist()


SIDES = {"ours": ours, **dict.fromkeys(RIVALS, rival)}

if __name__ == "__main__":
    sys.exit(compare("generation", __doc__, SIDES, steps=NEW, warmup=NEW, tolerance=0.0, words=("token", "tokens"), random=RANDOM))
