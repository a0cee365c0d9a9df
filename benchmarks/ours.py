"""minilora's side of the benchmarks: the public training loop, as `minilora finetune` runs it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import minilora as ml
from minilora.data.batches import Batch
from minilora.training.loop import train
from minilora.training.prefix import PrefixCache

LR, CLIP = 3e-3, 1.0


def adapted(o: Namespace) -> Any:
    """The model with the adapter of the folder."""
    model = ml.load_model(o.folder / "model", "numpy")
    ml.load_adapter(model, o.folder / "adapter")
    return model


def training(model: Any, batches: Iterator[Batch], o: Namespace, steps: int = 10**9) -> Iterator[float]:
    """Train with AdamW and clipping; yield the loss of each step."""
    optimizer = ml.AdamW(model.parameters(), LR)
    for step in train(model, optimizer, batches, steps, lambda step: 1.0, clip=CLIP, threads=o.threads, prefix=PrefixCache()):
        yield step.loss
