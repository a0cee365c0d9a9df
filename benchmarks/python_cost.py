"""The cost of a step of GPT-2 small without arithmetic: kernel launches and the time of Python. Needs no GPU.

    python -m benchmarks.python_cost

launches   per step, counted by the fake CuPy of the tests: kernel by kernel, and as a replayed CUDA graph
           (minilora/kernels/cuda/replay.py). In bfloat16, heads have 32 features: attention takes one launch forward and two backward
           (minilora/kernels/cuda/flash.py)
python     milliseconds per step of twelve blocks of width 12 and 16 tokens, where arithmetic takes almost no time: on NumPy, which
           runs the same Python with its own calls in place of CuPy's; and of a replayed step on the fake CuPy, with a graph that does
           nothing
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np

from benchmarks.harness import ROOT

sys.path.insert(0, str(ROOT / "tests"))
STEPS = 60


def step_times(backend: str, record: bool, after: Any = lambda: None, steps: int = STEPS, **changed: Any) -> list[float]:
    """Seconds of each step after the first ten, when `after` is called. changed: sizes of the model, or its dtype."""
    import minilora as ml
    from minilora.data.batches import random_windows
    from minilora.quantization.quantize import to_half_precision
    from minilora.training.loop import train

    dtype = changed.pop("dtype", None)
    config = ml.GPT2Config(vocab_size=50, n_positions=16, n_head=12, n_layer=12, **{"n_embd": 12, **changed})
    model = ml.GPT2(config, rng=0)
    if dtype is not None:
        to_half_precision(model, dtype)
    model.to(backend)
    ml.inject(model, ml.LoraConfig(r=8), rng=0)
    batches = random_windows(np.random.default_rng(0).integers(0, 50, 1000), 16, 1, np.random.default_rng(0))
    times = []
    start = time.perf_counter()
    for step in train(model, ml.AdamW(model.parameters(), 1e-3), batches, steps, lambda step: 1.0, check_every=1, cuda_graph=record):
        times.append(time.perf_counter() - start)
        if step.step == 10:
            after()
        if step.step == steps:
            break  # before the forward pass that checks the result
        start = time.perf_counter()
    return times[10:]


def main() -> int:
    import fakecupy
    from fakecupy.graph import Graph

    result: dict[str, Any] = {"python, kernel by kernel, ms": 1e3 * float(np.median(step_times("numpy", False)))}
    sys.modules |= fakecupy.modules
    for record in (False, True):
        with fakecupy.count() as counts:
            step_times("cupy", record, after=lambda counts=counts: setattr(counts, "launches", 0))
        result[f"launches{', replayed' * record}"] = round(counts.launches / (STEPS - 10), 1)
    with fakecupy.count() as counts:
        step_times("cupy", False, lambda: setattr(counts, "launches", 0), 12, n_embd=384, dtype="bfloat16")
    result["launches, bfloat16"] = round(counts.launches / 2, 1)
    nothing = lambda: setattr(Graph, "launch", lambda self, stream=None: None)  # noqa: E731
    result["python, replayed, ms"] = 1e3 * float(np.median(step_times("cupy", True, after=nothing)))
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
