"""`minilora doctor --tune`: measure what suits this processor, and keep it (tuned.py). About two minutes on two idle cores.

First OpenBLAS's kernels, each in its own process: the speed of products with the shapes of small models. Then, with the best of these, the
sizes of tuned.py: a step of a small GPT-2, each size in turn against the usual one. Another value has to gain 2 % to be taken.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from minilora import tuned
from minilora.formats.atomic import write_json
from minilora.runs import Say, silent

KERNELS = ("", "Haswell", "Zen", "SkylakeX", "Cooperlake", "SapphireRapids")  # "": OpenBLAS's own choice
SHAPES = ((768, 768, 3072), (768, 3072, 768), (512, 384, 1536), (512, 1536, 384), (768, 576, 2048))  # (m, k, n)
SIZES = {"shard": (384, 512, 1152, 1536), "block": (2**15, 2**16, 2**18), "logits": (2**18, 2**19, 2**21)}
GAIN, ROUNDS = 0.98, 7


def tune(say: Say = silent) -> dict[str, Any]:
    """Measure, write the file, and return what is in it. An interruption leaves the file as it was. ValueError if it cannot be one."""
    if tuned.path().exists() and not tuned.path().is_file():
        raise ValueError(f"{tuned.path()} is not a file, so nothing can be kept there: unset MINILORA_TUNED first.")
    speeds: dict[str, list[float]] = {}  # by the kernels that a name leads to, FLOP/s of each round
    names: dict[str, str] = {}
    for _ in range(2):
        for name in KERNELS:
            architecture, speed = _in_a_process("kernels", name)
            names.setdefault(architecture, name)
            speeds.setdefault(architecture, []).append(speed)
    first = next(iter(speeds))
    fastest = max(speeds, key=lambda architecture: max(speeds[architecture]))
    gain = max(speeds[first]) / max(speeds[fastest])
    kernels = names[fastest] if gain < GAIN else ""
    for architecture, each in speeds.items():
        say(f"products   {max(each) / 1e9:.0f} GFLOP/s a thread with kernels for {architecture or 'an unknown BLAS'}")
    sizes, ratios = dict(tuned.SIZES), dict[str, list[tuple[int, float]]]()
    for name in SIZES:
        ratios[name] = _in_a_process(name, kernels)
        best, ratio = min(ratios[name], key=lambda pair: pair[1])
        sizes[name] = best if ratio < GAIN else sizes[name]
        times = ", ".join(f"{size:,} {ratio:.3f}" for size, ratio in ratios[name])
        say(f"{name:10} {sizes[name]:,}; times of a step over that with {tuned.SIZES[name]:,}: {times}")
    speed = {architecture: max(each) for architecture, each in speeds.items()}
    found: dict[str, Any] = {
        "processor": tuned.processor(),
        "kernels": kernels,
        "sizes": sizes,
        "measured": {"flops": speed, "ratios": ratios},
    }
    write_json(tuned.path(), found)
    say(f"written to {tuned.path()}; runs that begin from now on use it")
    return found


def _in_a_process(what: str, kernels: str) -> Any:
    """The JSON that `main` prints, with these kernels and the usual sizes."""
    env = os.environ | {"MINILORA_TUNED": os.devnull, "OPENBLAS_CORETYPE": kernels}
    if not kernels:
        del env["OPENBLAS_CORETYPE"]
    done = subprocess.run([sys.executable, "-m", "minilora.runs.tune", what], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {what} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout)


def product_speed() -> tuple[str, float]:
    """(the kernels in use, FLOP/s of one thread: the harmonic mean over SHAPES, with W and W^T)."""
    from threadpoolctl import threadpool_info, threadpool_limits

    rng, flops, seconds = np.random.default_rng(0), 0, 0.0
    with threadpool_limits(1, "blas"):
        for m, k, n in SHAPES:
            x, dy, W = (rng.random(shape, dtype="float32") for shape in ((m, k), (m, n), (k, n)))
            for a, b in ((x, W), (dy, W.T)):
                y = a @ b
                seconds += min(_seconds(lambda a=a, b=b, y=y: np.matmul(a, b, out=y)) for _ in range(15))
                flops += 2 * m * k * n
    architectures = [info.get("architecture") or "" for info in threadpool_info() if info["user_api"] == "blas"]
    return next(iter(architectures), ""), flops / seconds


def size_ratios(name: str) -> list[tuple[int, float]]:
    """(size, time of a step over that with the usual size), medians of ROUNDS, of a GPT-2 of width 384."""
    from minilora.data.batches import random_windows
    from minilora.lora import LoraConfig, inject
    from minilora.models import GPT2, GPT2Config
    from minilora.optim.flat import FlatBuffer
    from minilora.runs.recipe import threads_for
    from minilora.training.replicas import Replicas

    threads = threads_for(None)
    model = GPT2(GPT2Config(vocab_size=16384, n_positions=256, n_embd=384, n_layer=2, n_head=6), rng=0)
    inject(model, LoraConfig(r=8), rng=0)
    text = np.random.default_rng(0).integers(0, 16384, 10_000)
    batch = next(random_windows(text, 256, 6 * threads, np.random.default_rng(0)))
    flat, times = FlatBuffer(model.parameters()), dict[int, list[float]]()
    for r in range(-1, ROUNDS):
        for size in (tuned.SIZES[name], *SIZES[name])[:: 1 if r % 2 else -1]:
            with tuned.using({name: size}), Replicas(model, flat, threads) as replicas:
                seconds = _seconds(lambda replicas=replicas: replicas.gradients([batch], (0, 0)))
            times.setdefault(size, []).extend([seconds] if r >= 0 else [])  # the first round fills caches
    usual = times[tuned.SIZES[name]]
    return [(size, statistics.median(a / b for a, b in zip(times[size], usual, strict=True))) for size in SIZES[name]]


def _seconds(f: Any) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(product_speed() if sys.argv[1] == "kernels" else size_ratios(sys.argv[1])))
