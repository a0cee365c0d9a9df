"""Many epochs on little data: 200 snippets of film reviews, 20 epochs, LoRA r 8 in the top two layers of MiniLM, head trained.

    python -m benchmarks.epochs [--epochs 20] [--rounds 5] [--threads 2] [--no-compile]

A round is a complete run from the same initial weights with a new optimizer. Whatever a side caches between epochs must be recomputed
in each round.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from itertools import chain, repeat

from benchmarks.classification import BATCH, NO_DROPOUT, examples, padded_batches, write
from benchmarks.harness import RIVALS, compare

SENTENCES, TOP_LAYERS = 200, [4, 5]
STEPS = -(-SENTENCES // BATCH)  # per epoch


def prepare(o: Namespace) -> None:
    write(o, SENTENCES, TOP_LAYERS)


def runs(o: Namespace) -> Iterator[int]:
    """The number of steps of each run: the warm-up, then every round."""
    return chain([o.warmup], repeat(o.steps))


def ours(o: Namespace) -> Iterator[float]:
    from benchmarks.ours import adapted, training
    from minilora.data.datasets import batches_of, endless

    data, model = examples(o), adapted(o)
    start = [(p, p.data.copy()) for _, p in model.parameters() if p.trainable]
    for steps in runs(o):
        for p, value in start:
            p.data[...] = value
        yield from training(model, endless(lambda rng: batches_of(data, BATCH, rng)), o, steps)


def rival(o: Namespace) -> Iterator[float]:
    from benchmarks.rivals import adapted, training

    model = adapted("AutoModelForSequenceClassification", o, **NO_DROPOUT)
    start = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    for steps in runs(o):
        for p, value in start:
            p.data.copy_(value)
        yield from training(model, padded_batches(o), steps)


SIDES = {"ours": ours, **dict.fromkeys(RIVALS, rival)}

if __name__ == "__main__":
    sys.exit(compare("epochs", __doc__, SIDES, steps=20 * STEPS, warmup=2 * STEPS))
