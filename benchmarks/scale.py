"""Data parallelism over ranks: efficiency measured here on 1 and 2 processes, and by arithmetic for more workers and real networks.

    python -m benchmarks.scale [--rounds 5] [--layers 30]        the tables of docs/scale.md, then one line of JSON

Measured: SmolLM2's shape (random weights), LoRA of rank 8 on all linear layers, 4 x 256 tokens a step in two lanes, one thread a process.
In each round one process and two ranks train in turn, so that what else the machine does affects both alike. Needs mpi4py and mpiexec.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe

ROOT = Path(__file__).parent.parent
WINDOW, BATCH, STEPS = 256, 4, 3
WORKERS = (8, 64, 1024)
NETWORKS = {"1 Gbit/s": (1e9, 25e-6), "10 Gbit/s": (1e10, 25e-6), "400 Gbit/s": (4e11, 2e-6)}  # (bits a second, seconds a message)
SPEEDS = {"16 CPU cores": 16 * 1e11, "a GPU": 2e14}  # FLOP a second of one worker: docs/speed.md and docs/gpu.md
TOKENS = 2048  # of one worker in a step


@dataclass
class Size:
    """A model with LoRA of rank r on all linear layers; shapes: (in, out) of each layer of a block."""

    name: str
    parameters: float
    blocks: int
    r: int
    shapes: list[tuple[int, int]]

    @property
    def trainable(self) -> int:
        return self.blocks * self.r * sum(a + b for a, b in self.shapes)

    def seconds(self, tokens: float, speed: float) -> float:
        """Of a step's products, forward and back to the lowest adapter: 2 + 2 FLOP a parameter and token."""
        return 4 * self.parameters * tokens / speed


def _llama(d: int, kv: int, hidden: int) -> list[tuple[int, int]]:
    return [(d, d), (d, kv), (d, kv), (d, d), (d, hidden), (d, hidden), (hidden, d)]


SIZES = (
    Size("SmolLM2-135M, r 8", 134.5e6, 30, 8, _llama(576, 192, 1536)),
    Size("Llama-3.1-8B, r 16", 8.03e9, 32, 16, _llama(4096, 1024, 14336)),
)


def exchange(n: int, workers: int, network: str, message: float) -> float:
    """Seconds of a step's exchange of n float32: all-to-all and all-gather, and the meeting, whose messages rank 0 handles one by one."""
    bits, latency = NETWORKS[network]
    moved = 2 * n * 4 * 8 * (workers - 1) / workers
    return moved / bits + 2 * (workers - 1) * latency + 2 * latency + (workers - 1) * message


def pays_until(size: Size, tokens: float, speed: float, network: str, message: float, least: float) -> int:
    """The largest power of two of workers that share a step of so many tokens with this efficiency at least."""
    workers = 1
    while workers < 2**20:
        each = size.seconds(tokens / (2 * workers), speed)
        if each / (each + exchange(size.trainable, 2 * workers, network, message)) < least:
            break
        workers *= 2
    return workers


def tables(message: float) -> str:
    """The arithmetic as Markdown."""
    lines = [
        f"| LoRA | worker | network | a step | exchange, 8 workers | {' | '.join(f'efficiency, {w:,}' for w in WORKERS)} | pays until |"
    ]
    lines += ["|" + "---|" * (6 + len(WORKERS))]
    for size in SIZES:
        for worker, speed in SPEEDS.items():
            alone = size.seconds(TOKENS, speed)
            for network in NETWORKS:
                took = {w: exchange(size.trainable, w, network, message) for w in WORKERS}
                shares = " | ".join(f"{alone / (alone + took[w]):.1%}" for w in WORKERS)
                most = pays_until(size, 2**20, speed, network, message, 0.5)
                lines += [f"| {size.name} | {worker} | {network} | {_time(alone)} | {_time(took[WORKERS[0]])} | {shares} | {most:,} |"]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def train_here(layers: int) -> None:
    """In one rank, or alone: seconds of the steps after the first, and of a meeting and an exchange alone, printed by rank 0 as JSON."""
    import minilora as ml
    from minilora.data.batches import random_windows
    from minilora.training.loop import train
    from minilora.training.ranks import joined

    sizes: dict[str, Any] = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    config = ml.LlamaConfig(vocab_size=49152, num_hidden_layers=layers, max_position_embeddings=2048, tie_word_embeddings=True, **sizes)
    model = ml.Llama(config, rng=0)
    ml.inject(model, ml.LoraConfig(r=8, target_modules="all-linear"), rng=0)
    optimizer = ml.AdamW(model.parameters(), lr=1e-3)
    text = np.random.default_rng(0).integers(0, 49152, 100_000)
    batches = random_windows(text, WINDOW, BATCH, np.random.default_rng(0))
    with joined() as ranks:
        steps = list(train(model, optimizer, batches, 1 + STEPS, lambda _: 1.0, threads=1, lanes=2, ranks=ranks))
        result: dict[str, Any] = {
            "steps": [s.seconds for s in steps[1:]],
            "losses": [s.loss for s in steps],
            "trainable": optimizer.flat.data.size,
        }
        if ranks is not None:
            rows = {lane: optimizer.flat.grad.copy() for lane in ranks.blocks(2)[ranks.rank]}
            result["meet"], result["add"] = [], []
            for _ in range(200):
                begun = time.perf_counter()
                ranks.meet("a meeting", {"losses": [[1.0, "<f4"]], "stop": False}, lambda all: all)
                result["meet"].append(time.perf_counter() - begun)
            for _ in range(20):
                begun = time.perf_counter()
                ranks.add(dict(rows), 2, optimizer.flat.grad)
                result["add"].append(time.perf_counter() - begun)
        if ranks is None or ranks.rank == 0:
            print(json.dumps(result))


def measure(rounds: int, layers: int) -> dict[str, Any]:
    """One process and two ranks in turn, `rounds` times."""
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if mpiexec is None:
        raise SystemExit("there is no mpiexec: pip install mpi4py mpich")
    line = [sys.executable, "-m", "benchmarks.scale", "--train", "--layers", str(layers)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    found: dict[str, list[Any]] = {"one": [], "two": []}
    for number in range(rounds):
        for name in ("one", "two") if number % 2 == 0 else ("two", "one"):
            command = line if name == "one" else [mpiexec, "-n", "2", *line]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    assert all(each["losses"] == found["one"][0]["losses"] for each in found["one"] + found["two"]), "the ranks computed something else"
    seconds = {name: [statistics.median(each["steps"]) for each in all_] for name, all_ in found.items()}
    return {
        "trainable": found["one"][0]["trainable"],
        "seconds": seconds,
        "efficiency": [one / (2 * two) for one, two in zip(seconds["one"], seconds["two"], strict=True)],
        "meet": statistics.median(t for each in found["two"] for t in each["meet"]),
        "add": statistics.median(t for each in found["two"] for t in each["add"]),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--train", action="store_true", help="a process of the measurement")
    args = parser.parse_args()
    if args.train:
        return train_here(args.layers)
    result = measure(args.rounds, args.layers)
    shares, (one, two) = result["efficiency"], (_time(statistics.median(each)) for each in result["seconds"].values())
    print(f"a step of one process {one}, of two {two}")
    print(f"efficiency of two {statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}), load {result['load']:.1f}")
    print(f"a meeting {_time(result['meet'])}, an exchange of {result['trainable'] * 4 / 1e6:.1f} MB {_time(result['add'])}\n")
    for size in SIZES:
        own = size.trainable * 4 / 1e6
        print(f"{size.name}: {size.trainable:,} numbers, {own:,.1f} MB; each of 8 workers sends {own * 7 / 4:,.1f} MB a step")
    print(f"\n{tables(result['meet'] / 2)}\n")
    print(json.dumps({"machine": describe(), **result}))


if __name__ == "__main__":
    main()
