"""GPT-2 small with random weights, LoRA r 8 on c_attn or on all linear layers, batch 4 x 256, every token labelled.

python -m benchmarks.dense [--targets all] [--rounds 5] [--threads 2] [--no-compile]
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator

import numpy as np

from benchmarks.harness import RIVALS, compare

TARGETS = {"c_attn": ["c_attn"], "all": ["c_attn", "c_proj", "c_fc"]}
BATCH, WINDOW = 4, 256


def prepare(o: Namespace) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import minilora as ml

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).save_pretrained(o.folder / "model")
    model = ml.load_model(o.folder / "model", "numpy")
    ml.inject(model, ml.LoraConfig(r=8, target_modules=TARGETS[o.targets], task_type="CAUSAL_LM"), rng=0)
    ml.save_adapter(model, o.folder / "adapter")
    np.save(o.folder / "text.npy", np.random.default_rng(0).zipf(1.3, 200_000) % model.config.vocab_size)


def ours(o: Namespace) -> Iterator[float]:
    from benchmarks.ours import adapted, training
    from minilora.data.batches import random_windows

    text = np.load(o.folder / "text.npy")
    return training(adapted(o), random_windows(text, WINDOW, BATCH, np.random.default_rng(0)), o)


def rival(o: Namespace) -> Iterator[float]:
    import torch

    from benchmarks.rivals import adapted, training

    text, rng = torch.from_numpy(np.load(o.folder / "text.npy")), np.random.default_rng(0)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            starts = rng.integers(0, len(text) - WINDOW, size=BATCH)
            ids, following = (torch.stack([text[s + k : s + k + WINDOW] for s in starts]) for k in (0, 1))
            yield {"input_ids": ids, "labels": following, "shift_labels": following}  # the last token has a label too

    return training(adapted("GPT2LMHeadModel", o, use_cache=False), batches())


SIDES = {"ours": ours, **dict.fromkeys(RIVALS, rival)}

if __name__ == "__main__":
    sys.exit(compare("dense", __doc__, SIDES, steps=2, targets={"choices": list(TARGETS), "default": "c_attn"}))
