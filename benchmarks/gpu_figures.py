"""What is measured on a GPU without a rival. benchmarks/gpu.py runs each function in a process of its own.

versions   the device, the libraries, and whether products go by cuBLAS or by CuPy's own calls
launches   the time of a step of GPT-2 small, kernel by kernel and as a CUDA graph; on a tiny batch, this is the time of Python alone
suite      the GPU tests: --backend cupy -k cupy, with pytest-xdist and pytest-timeout where they are installed
profile    the device time of a step of the main job by kernel, and by the file that the kernel comes from
logits     the time of the head and its loss by how many logits exist at a time: those of training, and as many as fit in L2
memcheck   NVIDIA's compute-sanitizer over the attention kernels in bfloat16: addresses out of bounds
racecheck  the same: shared memory that is read and written without a barrier in between
curves     the main job on NumPy and CuPy: losses of 200 steps, and the held-out loss with weights and activations in bfloat16
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_jobs import Keep, how_it_runs
from benchmarks.harness import ROOT
from benchmarks.machine import describe

# o.dry: tiny sizes on the fake CuPy; o.seconds: the time that there is; o.steps: of `curves`; keep: takes what has been measured so far
Figure = Callable[[Namespace, Keep], dict[str, Any]]


def versions(o: Namespace, keep: Keep) -> dict[str, Any]:
    from minilora.backend import import_cupy

    cupy = import_cupy()
    about, runtime = cupy.cuda.runtime.getDeviceProperties(0), cupy.cuda.runtime
    machine = {**describe(), "device": about["name"].decode(), "memory": int(about["totalGlobalMem"]), "cupy": cupy.__version__}
    machine |= {"driver": runtime.driverGetVersion(), "cuda": runtime.runtimeGetVersion()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        how = how_it_runs()
    more = {"compute_capability": cupy.cuda.Device().compute_capability, "l2_bytes": int(about["l2CacheSize"]), "products": how["products"]}
    return {"machine": machine, **more, "warnings": [str(w.message) for w in said]}


def launches(o: Namespace, keep: Keep) -> dict[str, Any]:
    """Milliseconds per step of GPT-2 small with LoRA, kernel by kernel and as a CUDA graph, for 8 x 1024 and 1 x 16 tokens.

    With 1 x 16 tokens the device has little to do: the time is that of Python and of the launches.
    """
    from minilora.backend import synchronize

    result: dict[str, Any] = {"ms_a_step": {}, **how_it_runs(), "graph": {}}
    for (batch, window), graph in product(((2, 8), (1, 4)) if o.dry else ((8, 1024), (1, 16)), (False, True)):
        name, captured, seconds = f"{batch} x {window}{', graph' * graph}", False, []
        for step in _steps(o, batch, window, 12 if o.dry else 40, graph):
            seconds.append(step.seconds)
            captured = captured or how_it_runs()["graph"]
        result["ms_a_step"][name] = 1e3 * float(np.median(seconds[10:]))  # the first ten steps compile the kernels and capture the graph
        result["graph"][name] = captured
        synchronize("cupy")
        keep(result)
    return result


def _steps(o: Namespace, batch: int, window: int, steps: int, graph: bool, dtype: str = "float32", **options: Any) -> Iterable[Any]:
    """Steps of GPT-2 small with LoRA on all linear layers."""
    import minilora as ml
    from minilora.data.batches import random_windows
    from minilora.quantization.quantize import to_half_precision
    from minilora.training.loop import train

    config = ml.GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=1, n_head=2) if o.dry else ml.GPT2Config()
    model = ml.GPT2(config, rng=0)
    if dtype != "float32":
        to_half_precision(model, dtype)
    model.to("cupy")
    ml.inject(model, ml.LoraConfig(r=8), rng=0)
    text = np.random.default_rng(0).zipf(1.3, 200_000) % config.vocab_size
    batches = random_windows(text, window, batch, np.random.default_rng(0))
    return train(model, ml.AdamW(model.parameters(), 1e-3), batches, steps, lambda step: 1.0, cuda_graph=graph, **options)


def profile(o: Namespace, keep: Keep) -> dict[str, Any]:
    """Milliseconds of the device a step: GPT-2 small, 8 x 1024 tokens, bfloat16. torch.profiler sees the kernels of all libraries."""
    if find_spec("torch") is None:
        return {"left_out": "torch is not installed, whose profiler names the kernels"}
    import torch
    from torch.profiler import ProfilerActivity

    steps = 3
    if not o.dry:
        torch.zeros(1, device="cuda")
    run = iter(_steps(o, *((2, 8) if o.dry else (8, 1024)), 5 + steps, False, "bfloat16", check_every=1))
    list(islice(run, 5))
    with torch.profiler.profile(activities=[ProfilerActivity.CPU if o.dry else ProfilerActivity.CUDA]) as profiler:
        list(run)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    return by_kernel(events, steps)


def by_kernel(events: Iterable[dict[str, Any]], steps: int) -> dict[str, Any]:
    """The kernels and copies of a trace: launches and milliseconds a step of each, the longest first, and their sums by source."""
    ours = {
        name: file.name
        for file in (ROOT / "minilora" / "kernels" / "cuda").glob("*.cu")
        for name in re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(", file.read_text())
    }
    launched, time, sums = Counter[str](), Counter[str](), Counter[str]()
    for event in events:
        kind, name = event.get("cat", ""), str(event.get("name", ""))
        if kind not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        launched[name] += 1
        time[name] += event["dur"] / 1e3 / steps
        product = re.search(r"gemm|gemv|cutlass|xmma|nvjet|splitK", name, re.IGNORECASE)
        of = ours.get(name) or ("copies" if kind != "kernel" else "products" if product else "CuPy")
        sums[of] += event["dur"] / 1e3 / steps
    kernels = [{"kernel": name[:120], "launches": launched[name] / steps, "ms": round(ms, 4)} for name, ms in time.most_common(60)]
    by_source = {name: round(ms, 4) for name, ms in sums.most_common()}
    return {"ms_a_step": sum(time.values()), "launches_a_step": sum(launched.values()) / steps, "by_source": by_source, "kernels": kernels}


def logits(o: Namespace, keep: Keep) -> dict[str, Any]:
    """Milliseconds of the head of GPT-2 small and its loss, 8 x 1024 tokens, bfloat16, as a CUDA graph, by rows x columns at a time.

    A logit takes 6 bytes, of float32 and of bfloat16, and half of L2 is taken for them.
    """
    from minilora.backend import import_cupy, synchronize
    from minilora.kernels.cuda import losses
    from minilora.kernels.cuda.replay import Replay
    from minilora.quantization.quantize import half_dtype

    cupy, rng = import_cupy(), np.random.default_rng(0)
    T, d, V = (16, 32, 3000) if o.dry else (8192, 768, 50257)
    x, head = (cupy.asarray(rng.standard_normal((n, d)).astype(half_dtype("bfloat16"))) for n in (T, V))
    labels = cupy.asarray(rng.integers(0, V, T))
    l2, usual = int(cupy.cuda.runtime.getDeviceProperties(0)["l2CacheSize"]), losses.LOGITS
    result: dict[str, Any] = {"ms": {}, "l2_bytes": l2, **how_it_runs()}
    for rows, losses.LOGITS in product((T, T // 2, T // 4), (usual, 2**24, l2 // 12)):
        parts, replay, seconds = [slice(i, i + rows) for i in range(0, T, rows)], Replay(), []

        def work(x: Any, labels: Any) -> tuple[Any, ...]:
            done = [losses.linear_cross_entropy(x[part], head.T, labels[part], T, {"dx"}) for part in parts]  # noqa: B023
            return sum(loss for loss, *_ in done), *(dx for _, dx, _ in done)

        for _ in range(3 if o.dry else 20):
            start = time.perf_counter()
            replay("logits", work, [x, labels])
            synchronize("cupy")
            seconds.append(time.perf_counter() - start)
        result["graph"] = replay.captured is not None
        replay.close()
        result["ms"][f"{rows} x {min(V, max(256, losses.LOGITS // rows))}"] = 1e3 * float(np.median(seconds[len(seconds) // 2 :]))
        keep(result)
    losses.LOGITS = usual
    return result


def suite(o: Namespace, keep: Keep) -> dict[str, Any]:
    # on an H100, 12 processes take 50 s
    options = {"xdist": ["-n", "12", "--dist", "worksteal"], "pytest_timeout": ["--timeout", "120"]}
    more = [word for name, words in options.items() if find_spec(name) and not o.dry for word in words]
    missing = [name for name in options if not find_spec(name)]
    chosen = ["tests/test_blas.py", "-k", f"{_backend(o)} and empty"] if o.dry else ["-k", "cupy"]
    return _pytest([], [*chosen, *more], o) | ({"not_installed": missing} if missing else {})


def memcheck(o: Namespace, keep: Keep) -> dict[str, Any]:
    return _sanitized("memcheck", o)


def racecheck(o: Namespace, keep: Keep) -> dict[str, Any]:
    return _sanitized("racecheck", o)


def _sanitized(tool: str, o: Namespace) -> dict[str, Any]:
    places = [*Path("/usr/local").glob("cuda*/bin/compute-sanitizer"), *Path("/opt").glob("nvidia/**/compute-sanitizer")]
    program = shutil.which("compute-sanitizer") or next(map(str, places), None)
    if program is None and not o.dry:
        return {"left_out": "compute-sanitizer is not installed"}
    before = [] if o.dry else [str(program), "--tool", tool, "--error-exitcode", "9"]
    chosen = f"{_backend(o)} and bfloat16{' and 32 and short' * o.dry}"
    # CuPy's memory pool would hide accesses beyond the end of an array from the tool
    return _pytest(before, ["tests/test_flash.py", "-k", chosen, "-p", "benchmarks.gpu_figures"], o)


def pytest_sessionstart(session: Any) -> None:
    """As a plugin of pytest: memory comes from the driver, array by array."""
    if session.config.getoption("backend") == "cupy":
        import cupy

        cupy.cuda.set_allocator(None)


def _backend(o: Namespace) -> str:
    return "fake" if o.dry and "fakecupy" in sys.modules else "cupy"


def _pytest(before: list[str], chosen: list[str], o: Namespace) -> dict[str, Any]:
    """Tests in their own process, up to the time that there is: the exit code (None: cut off), failures, and the last lines."""
    command = [*before, sys.executable, "-m", "pytest", "--backend", _backend(o), "-q", "-rfE", "-p", "no:cacheprovider", *chosen]
    no_network = {"PIP_RETRIES": "0", "PIP_DEFAULT_TIMEOUT": "5"}  # tests that need files are skipped soon, not late
    start, code = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as output:
        try:
            limit = max(o.seconds - 5, 1)
            run = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False, timeout=limit, env={**os.environ, **no_network}
            )
            code = run.returncode
        except subprocess.TimeoutExpired:
            pass
        output.seek(0)
        lines = output.read().splitlines()
    result = {"exit_code": code, "seconds": time.perf_counter() - start, "command": " ".join(["python", *command[len(before) + 1 :]])}
    result |= {"failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:50], "end": lines[-3:]}
    if before:
        said = [line for line in lines if line.startswith("=========")]
        result |= {"summary": [line for line in said if "SUMMARY" in line], "errors": said[:40]}
    return result


def curves(o: Namespace, keep: Keep) -> dict[str, Any]:
    """Goals: losses within 1e-4 of each other, and the held-out loss in bfloat16 within 1 %.

    In a dry run bfloat16 runs on NumPy, since emulated tensor cores are slow.
    """
    from minilora.runs.finetune import finetune
    from minilora.runs.recipe import Recipe

    ends, losses = {}, {}
    size = {"steps": o.steps} | ({"window": 16, "batch_size": 2, "eval_bytes": 64, "threads": 1} if o.steps < 10 else {})
    with tempfile.TemporaryDirectory() as folder:
        for name, fields in {"numpy": {}, "cupy": {}, "bfloat16": {"dtype": "bfloat16"}}.items():
            backend = {"numpy": "numpy", "cupy": "cupy", "bfloat16": "numpy" if o.dry else "cupy"}[name]
            recipe = Recipe(backend=backend, sample_bytes=0, **size, **fields)  # type: ignore[arg-type]
            ends[name] = finetune(recipe, Path(folder) / name, say=lambda line: None)["after"]["loss"]
            losses[name] = [json.loads(line)["loss"] for line in (Path(folder) / name / "metrics.jsonl").read_text().splitlines()]
            keep({"held_out": ends})
    apart = float(np.abs(np.array(losses["numpy"]) - losses["cupy"]).max())
    return {"losses_apart": apart, "held_out": ends, "bfloat16_beyond_float32": ends["bfloat16"] / ends["cupy"] - 1, **how_it_runs()}


FIGURES: dict[str, Figure] = {f.__name__: f for f in (versions, launches, suite, profile, logits, memcheck, racecheck, curves)}
