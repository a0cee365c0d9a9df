"""A LoRA step against a full fine-tuning step, both minilora: GPT-2 small with random weights, batch 4 x 256, every token labelled.

python -m benchmarks.full_vs_lora_step [--targets all] [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.dense import BATCH, TARGETS, WINDOW
from benchmarks.harness import compare


def prepare(o: Namespace) -> None:
    import minilora as ml

    ml.save_model(ml.GPT2(ml.GPT2Config(), rng=0), o.folder / "model")


def lora(o: Namespace) -> Iterator[float]:
    import minilora as ml

    model = ml.load_model(o.folder / "model", "numpy")
    ml.inject(model, ml.LoraConfig(r=8, target_modules=TARGETS[o.targets]), rng=0)
    return _training(model, o)


def full(o: Namespace) -> Iterator[float]:
    import minilora as ml

    return _training(ml.load_model(o.folder / "model", "numpy").unfreeze(), o)


def _training(model: Any, o: Namespace) -> Iterator[float]:
    from benchmarks.ours import training
    from minilora.data.batches import random_windows

    text = np.random.default_rng(0).zipf(1.3, 200_000) % model.config.vocab_size
    return training(model, random_windows(text, WINDOW, BATCH, np.random.default_rng(0)), o)


SIDES = {"lora": lora, "full": full}

if __name__ == "__main__":
    targets = {"choices": list(TARGETS), "default": "c_attn", "help": "the matrices that LoRA adapts"}
    sys.exit(compare("full_vs_lora_step", __doc__, SIDES, steps=2, tolerance=None, targets=targets))
