"""Memory and time of one training step, by count and measured: which models a laptop can adapt.

    python -m benchmarks.footprint [--only qwen3-0.6b ...] [--dtypes nf4 ...] [--sequences 1 2] [--rounds 1] [--threads 2] [--recompute]
    python -m benchmarks.footprint --write              only the tables of docs/what-fits.md and README.md, from what was measured

Random weights, LoRA of rank 8 on all linear layers, sequences of 512 tokens, every token labelled. Each point has its own process. A model
is built where it stays, a block of rows at a time; NF4 codes are drawn at random, so that no weight is ever held in float32. The count,
benchmarks/footprint_count.py, is made first: a point that does not fit into the free memory is not run. Results are kept by processor in
benchmarks/results/.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.completions import SHAPES
from benchmarks.footprint_count import Count, count
from benchmarks.footprint_tables import DTYPES, LENGTH, RANK, THREADS, tables
from benchmarks.harness import ROOT, Failed, Worker, options
from benchmarks.machine import busy_cores, describe, slug
from benchmarks.report import DISTURBED

SHOWN = {  # from the smallest
    "minilm": "MiniLM-L6",
    "gpt2": "GPT-2 small",
    "smollm2-135m": "SmolLM2-135M",
    "gemma3-270m": "Gemma-3-270M",
    "qwen3-0.6b": "Qwen3-0.6B",
    "llama-3.2-1b": "Llama-3.2-1B",
    "llama-3.1-8b": "Llama-3.1-8B",
}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536, "pooling": "mean"}
BLOCK = 2**22  # random numbers drawn at a time


def configuration(name: str) -> Any:
    """The configuration of one of SHOWN."""
    import minilora as ml
    from minilora.models.bert import BertConfig

    if name == "gpt2":
        return ml.GPT2Config()
    return BertConfig(**MINILM) if name == "minilm" else ml.LlamaConfig(**{"tie_word_embeddings": True, **SHAPES[name]})


def build(config: Any, dtype: str) -> Any:
    """A frozen model with random weights, in float32, bfloat16 or NF4, without a copy of them in another dtype."""
    from minilora.formats.fitting import FAMILIES, Blank
    from minilora.layers import Linear
    from minilora.quantization.quantize import half_dtype

    rng = np.random.default_rng(0)
    model = FAMILIES[getattr(config, "model_type", "gpt2")].model(config, rng=Blank())
    head = getattr(model, "output_head", "-")
    owners = {f"{path}.weight": layer for path, layer in model.modules() if isinstance(layer, Linear)}
    for path, p in model.parameters():
        p.trainable, shape = False, p.data.shape
        if p.data.ndim == 1:
            p.data = p.data.copy()
        elif dtype == "nf4" and path in owners and not path.partition(".")[0].endswith(head):
            p.data = random_nf4(shape, rng)
        else:
            stored = shape if path not in owners or model.weights_are_in_out else shape[::-1]  # as its file has it
            W = np.empty(stored, half_dtype(dtype) if dtype == "bfloat16" else np.float32)
            step = max(1, BLOCK // stored[1])
            for a in range(0, stored[0], step):
                W[a : a + step] = rng.standard_normal(W[a : a + step].shape, np.float32) * np.float32(0.02)
            p.data = W if stored == shape else W.T
    return model


def random_nf4(shape: tuple[int, int], rng: np.random.Generator) -> Any:
    """Random codes, with magnitudes of blocks of about 0.04."""
    from minilora.quantization.nf4 import BLOCK, NESTED, NF4

    blocks = -(-shape[0] * shape[1] // BLOCK)
    codes, absmax = (np.frombuffer(bytearray(rng.bytes(n)), np.uint8) for n in (-(-shape[0] * shape[1] // 2), blocks))
    return NF4(shape, codes, absmax, np.full(-(-blocks // NESTED), 0.01, np.float32), 0.04)


def lora_config(config: Any) -> Any:
    """LoRA on all linear layers; a classifier's head is fully trained."""
    import minilora as ml

    kind = "SEQ_CLS" if hasattr(config, "num_labels") else "CAUSAL_LM"
    return ml.LoraConfig(r=RANK, target_modules="all-linear", task_type=kind)


def ours(o: Namespace) -> Iterator[float]:
    import minilora as ml
    from benchmarks.ours import training
    from minilora.data.batches import Batch

    config = configuration(o.model)
    model = build(config, o.dtype)
    ml.inject(model, lora_config(config), rng=0)
    model.body.recompute = o.recompute
    rng, bounds = np.random.default_rng(0), np.arange(o.sequences + 1) * LENGTH
    classes = getattr(config, "num_labels", 0)

    def batches() -> Iterator[Batch]:
        while True:
            ids, following = rng.integers(1, config.vocab_size, size=(2, bounds[-1]))
            labels = rng.integers(0, classes, size=o.sequences) if classes else following
            yield Batch(ids, labels, bounds, per_sequence=bool(classes))

    return training(model, batches(), o)


SIDES = {"ours": ours}


def point(name: str, dtype: str, sequences: int, args: Any) -> dict[str, Any]:
    """What a step of one point takes. Its first steps are measured too: later ones differ by the page faults of the first."""
    chosen = {"model": name, "dtype": dtype, "sequences": sequences, "recompute": args.recompute}
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker("footprint", "ours", {**chosen, "threads": args.threads, "folder": folder, "warmup": 0, "steps": 1})
        for _ in range(args.rounds):
            worker.round()
        worker.stop()
    m = worker.measured
    found = {"peak_memory_bytes": m.memory, "built_bytes": m.loaded, "loss": m.losses[0], "busy_cores": max(m.others, default=0.0)}
    return {**chosen, "threads": args.threads, "seconds": m.seconds, **found}


def speed(threads: int) -> float:
    """FLOP a second of products of 512 x 2048 by 2048 x 8192, one in each thread."""
    from threadpoolctl import threadpool_limits

    x, W, times = np.ones((LENGTH, 2048), np.float32), np.ones((2048, 8192), np.float32), 12

    def run(_: int) -> None:
        for _ in range(times):
            x @ W

    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads) as pool:
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(run, range(threads)))
            seconds.append(time.perf_counter() - start)
    return 2 * LENGTH * 2048 * 8192 * times * threads / min(seconds)


def free_memory() -> int:
    """Bytes that can be allocated; 2^62 where /proc does not say."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text()) if info.is_file() else None
    return int(found[1]) * 1024 if found else 2**62


def results_file() -> Path:
    """benchmarks/results/footprint-<processor>.json."""
    return ROOT / "benchmarks" / "results" / f"footprint-{slug()}.json"


def write(results: dict[str, Any]) -> int:
    """Write the tables of docs/what-fits.md and README.md, between <!-- name --> and <!-- /name -->."""
    for page in (ROOT / "docs" / "what-fits.md", ROOT / "README.md"):
        text = page.read_text()
        for name, table in tables(results, {shape: configuration(shape) for shape in SHOWN}, SHOWN).items():
            begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            if begin in text:
                text = text[: text.index(begin)] + f"{begin}\n\n{table}\n\n" + text[text.index(end) :]
        page.write_text(text)
    return 0


def key_of(found: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(found[name] for name in ("model", "dtype", "sequences", "threads", "recompute"))


def main() -> int:
    more: dict[str, dict[str, Any]] = {"only": {"nargs": "+", "choices": list(SHOWN), "default": list(SHOWN), "help": "models"}}
    more["dtypes"] = {"nargs": "+", "choices": [*DTYPES], "default": [*DTYPES], "help": "of the frozen weights"}
    more["sequences"] = {"nargs": "+", "type": int, "default": [1, 2], "help": f"of {LENGTH} tokens in a step, one a thread at most"}
    more["recompute"] = {"action": "store_true", "help": "keep only the input of each block"}
    more["count"] = {"action": "store_true", "help": "count, and measure nothing"}
    more["write"] = {"action": "store_true", "help": "write the tables, and measure nothing"}
    args = options(__doc__, rounds=1, threads=THREADS, **more)
    if not 1 <= min(args.sequences) <= max(args.sequences) <= args.threads:
        print(f"benchmarks.footprint: --sequences must be from 1 to the number of threads, {args.threads}.", file=sys.stderr)
        return 2
    machine = describe()
    file = results_file()
    if args.write:
        if not file.is_file():
            print(f"benchmarks.footprint: there is no {file}; measure first, without --write.", file=sys.stderr)
            return 1
        return write(json.loads(file.read_text()))
    kept = json.loads(file.read_text()) if file.is_file() else {"points": []}
    if not args.count:
        busy = busy_cores(1.0) or 0.0
        if busy <= DISTURBED or "speed" not in kept:  # a busy machine does not replace what an idle one measured
            kept |= {"machine": machine, "busy_cores": busy}
            kept["speed"] = {str(n): speed(n) for n in sorted({1, THREADS, *args.sequences})}
        print("products: " + ", ".join(f"{each / 1e9:.0f} GFLOP/s on {n} threads" for n, each in kept["speed"].items()))
    print(f"{'':14}{'':9} tokens {'counted':>9}{'measured':>10}{'':7}{'TFLOP':>8}{'floor':>9}{'step':>9}")
    for name in args.only:
        for dtype in args.dtypes:
            for sequences in args.sequences:
                counted = count(configuration(name), dtype, sequences, LENGTH, args.threads, args.recompute, RANK)
                print(f"{name:14}{dtype:9}{sequences:3} x {LENGTH}{counted.total / 1e6:10,.0f}", end="", flush=True)
                if args.count or counted.total * 1.1 > free_memory():
                    print("" if args.count else "  does not fit into the free memory")
                    continue
                try:
                    found = point(name, dtype, sequences, args)
                except Failed as failed:
                    print(f"\nbenchmarks.footprint: {failed}", file=sys.stderr)
                    return 1
                for before in (p for p in kept["points"] if key_of(p) == key_of(found)):
                    if before["busy_cores"] <= DISTURBED < found["busy_cores"]:
                        found |= {name: before[name] for name in ("seconds", "busy_cores")}
                kept["points"] = [p for p in kept["points"] if key_of(p) != key_of(found)] + [found]
                file.write_text(json.dumps(kept, indent=1) + "\n")
                print(line(found, counted, kept["speed"]), flush=True)
    return 0


def line(found: dict[str, Any], counted: Count, speeds: dict[str, float]) -> str:
    peak, floor = found["peak_memory_bytes"], counted.flops / speeds[str(counted.lanes)]
    return f"{peak / 1e6:10,.0f}{counted.total / peak - 1:+7.1%}{counted.flops / 1e12:8.2f}{floor:7.2f} s{min(found['seconds']):7.2f} s"


if __name__ == "__main__":
    sys.exit(main())
