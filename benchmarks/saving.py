"""What it costs to lose nothing: the lock, a line of metrics a step, a checkpoint every 100 steps; SmolLM2's shape.

    python -m benchmarks.saving [--steps 10] [--layers 30]

One process trains (random weights, LoRA of rank 8 on all linear layers, 4 x 256 tokens a step, two threads). After every step it writes the
record and a whole checkpoint, as a run does, so that step and writing alternate on the same machine: their medians give the share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

import minilora as ml
from benchmarks.machine import describe
from minilora.data.batches import random_windows
from minilora.runs import checkpoint
from minilora.runs.folder import Lines
from minilora.runs.interrupt import locked
from minilora.training.loop import train

EVERY = 100  # steps between two checkpoints


def measure(steps: int, layers: int, run: Path) -> dict[str, Any]:
    sizes: dict[str, Any] = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    config = ml.LlamaConfig(vocab_size=49152, num_hidden_layers=layers, max_position_embeddings=2048, tie_word_embeddings=True, **sizes)
    model = ml.Llama(config, rng=0)
    ml.inject(model, ml.LoraConfig(r=8, target_modules="all-linear"), rng=0)
    optimizer = ml.AdamW(model.parameters(), lr=1e-3)
    batches = random_windows(np.random.default_rng(0).integers(0, 49152, 100_000), 256, 4, np.random.default_rng(0))
    took: dict[str, list[float]] = {"step": [], "record": [], "checkpoint": []}
    begun = time.perf_counter()
    with locked(run), closing(Lines(run / "metrics.jsonl", [])) as records:
        locking = time.perf_counter() - begun
        for s in train(model, optimizer, batches, 1 + steps, lambda _: 1.0, threads=2, lanes=2):
            marks = [time.perf_counter()]
            records.add({"step": s.step, "loss": s.loss, "lr": s.lr, "grad_norm": s.grad_norm, "tokens": s.tokens})
            marks.append(time.perf_counter())
            about = {"step": s.step, "base": "", "data": "", "before": {}, "method": checkpoint.method_of(model)}
            state = checkpoint.capture(model, optimizer, None, **about)
            assert state is not None
            records.sync()
            checkpoint.write(run, state)
            marks.append(time.perf_counter())
            if s.step > 1:
                for name, seconds in zip(took, (s.seconds, *np.diff(marks).tolist()), strict=True):
                    took[name].append(seconds)
    medians = {name: statistics.median(each) for name, each in took.items()}
    share = (medians["record"] + (medians["checkpoint"] + locking) / EVERY) / medians["step"]
    return {**medians, "lock": locking, "share": share, "checkpoint_bytes": sum(f.stat().st_size for f in run.rglob("*") if f.is_file())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(args.steps, args.layers, Path(name) / "run")
    print(f"a step {result['step']:.3g} s, a record {result['record'] * 1e6:.0f} us, a checkpoint {result['checkpoint'] * 1e3:.0f} ms")
    print(f"one every {EVERY} steps, with records and the lock: {result['share']:.2%} of the time")
    print(json.dumps({"machine": describe(), **result}))


if __name__ == "__main__":
    main()
