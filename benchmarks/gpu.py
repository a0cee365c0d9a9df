"""All measurements on a GPU in one run, into benchmarks/results/gpu.json with the name of the device.

    python -m benchmarks.gpu [--only suite curves dense-bf16 ...] [--rounds 5] [--rivals eager compile half half-compile]
    python -m benchmarks.gpu --fake

suite      the GPU tests: --backend cupy -k cupy, with pytest-xdist and pytest-timeout
curves     the main job on NumPy and CuPy: losses of 200 steps, and the held-out loss with weights and activations in bfloat16
launches   the time of a step of GPT-2 small, kernel by kernel and as a CUDA graph; on a tiny batch, this is the time of Python alone
the rest   against torch and PEFT of the same dtypes, sdpa attention, eager and compiled: time per step, peak device memory
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import ROOT, Failed, options
from benchmarks.machine import describe
from benchmarks.report import summary

# batch x window tokens per step; dtype of weights and activations (float32: TF32 on both sides); labels on all or the last `labelled`
JOBS: dict[str, dict[str, Any]] = {
    "dense-bf16": {"model": "gpt2", "batch": 8, "window": 1024, "dtype": "bfloat16"},
    "dense-tf32": {"model": "gpt2", "batch": 8, "window": 1024, "dtype": "float32"},
    "snippets": {"model": "minilm", "batch": 32, "dtype": "float32"},
    "completions-bf16": {"model": "llama", "batch": 8, "window": 512, "labelled": 128, "dtype": "bfloat16"},
    "toy": {"model": "mlp", "dtype": "float32"},
}
RIVALS = ("eager", "compile", "half", "half-compile")  # half: adapters in the dtype of the model; PEFT's default is float32
SUITE = ["-k", "cupy", "-n", "12", "--dist", "worksteal", "--timeout", "120", "-p", "no:benchmark"]  # 35 s on an H100
TOLERANCE = {"bfloat16": 0.05, "float32": 5e-3}  # of the first loss: TF32 and bfloat16 round products to 1e-3 and 4e-3


# -- the sides of a job, called by benchmarks/worker.py -------------------------------------------------------------------------


def prepare(o: Namespace) -> None:
    import minilora as ml
    from benchmarks import classification, toy
    from benchmarks.completions import smollm2

    if o.model == "mlp":
        return toy.prepare(o)
    if o.model == "minilm":
        return classification.write(o)
    model: Any = ml.GPT2(ml.GPT2Config(), rng=0) if o.model == "gpt2" else smollm2(random=True)[0]
    ml.save_model(model, o.folder / "model")
    ml.inject(model, ml.LoraConfig(r=8, task_type="CAUSAL_LM"), rng=0)
    ml.save_adapter(model, o.folder / "adapter")
    np.save(o.folder / "text.npy", np.random.default_rng(0).zipf(1.3, 200_000) % model.config.vocab_size)


def windows(o: Namespace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """ids and labels (batch, window) of each step, for both sides. All labels but the last `labelled` are -100."""
    text, rng = np.load(o.folder / "text.npy"), np.random.default_rng(0)
    while True:
        starts = rng.integers(0, len(text) - o.window - 1, size=o.batch)
        ids, labels = (np.stack([text[s + k : s + k + o.window] for s in starts]) for k in (0, 1))
        labels[:, : o.window - o.labelled] = -100
        yield ids, labels


def ours(o: Namespace) -> Iterator[float]:
    os.environ["CUPY_TF32"] = "1"
    import minilora as ml
    from benchmarks import classification, toy
    from benchmarks.ours import training
    from minilora.data.batches import Batch
    from minilora.data.datasets import batches_of, endless

    if o.model == "mlp":
        return toy.ours(o, "cupy")
    model = ml.load_model(o.folder / "model", "cupy", o.dtype)
    ml.load_adapter(model, o.folder / "adapter")
    if o.model == "minilm":
        data = classification.examples(o)
        return training(model, endless(lambda rng: batches_of(data, o.batch, rng)), o)
    offsets = np.arange(o.batch + 1) * o.window
    return training(model, (Batch(ids.ravel(), labels.ravel(), offsets) for ids, labels in windows(o)), o)


def rival(o: Namespace) -> Iterator[float]:
    import torch

    from benchmarks import classification, toy
    from benchmarks.rivals import adapted, training

    torch.backends.cuda.matmul.allow_tf32 = True
    if o.model == "mlp":
        return toy.peft(o, "cuda")
    kind = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "minilm": "AutoModelForSequenceClassification"}[o.model]
    config = classification.NO_DROPOUT if o.model == "minilm" else {"use_cache": False}
    model = adapted(kind, o, device="cuda", dtype=getattr(torch, o.dtype), autocast="half" not in o.side, **config)
    if o.model == "minilm":
        return training(model, ({name: x.to("cuda") for name, x in batch.items()} for batch in classification.padded_batches(o)))

    def batches() -> Iterator[dict[str, Any]]:
        for ids, labels in windows(o):
            on_device = torch.from_numpy(labels).to("cuda")
            yield {"input_ids": torch.from_numpy(ids).to("cuda"), "labels": on_device, "shift_labels": on_device}

    return training(model, batches())


def peak_memory() -> int:  # called by benchmarks/worker.py
    """Peak device memory of this process in bytes."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        return int(sys.modules["torch"].cuda.max_memory_reserved())
    if "cupy" in sys.modules:
        from minilora.kernels.memory import peak_memory

        return peak_memory("cupy")
    return 0


SIDES = {"ours": ours, **dict.fromkeys(RIVALS, rival)}


# -- the other measurements --------------------------------------------------------------------------------------------------------


def suite() -> dict[str, Any]:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--backend", "cupy", "-q", "-rs", *SUITE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return {"exit_code": done.returncode, "seconds": time.perf_counter() - start, "end": done.stdout.splitlines()[-30:]}


def curves(steps: int = 200, bfloat16_on: str = "cupy") -> dict[str, Any]:
    """Goals: losses within 1e-4 of each other, and the held-out loss in bfloat16 within 1 %."""
    from minilora.runs.finetune import finetune
    from minilora.runs.recipe import Recipe

    ends, losses = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, fields in {"numpy": {}, "cupy": {}, "bfloat16": {"dtype": "bfloat16"}}.items():
            backend = {"numpy": "numpy", "cupy": "cupy", "bfloat16": bfloat16_on}[name]
            recipe = Recipe(backend=backend, steps=steps, sample_bytes=0, **fields)
            ends[name] = finetune(recipe, Path(folder) / name, say=lambda line: None)["after"]["loss"]
            losses[name] = [json.loads(line)["loss"] for line in (Path(folder) / name / "metrics.jsonl").read_text().splitlines()]
    apart = float(np.abs(np.array(losses["numpy"]) - losses["cupy"]).max())
    return {"losses_apart": apart, "held_out": ends, "bfloat16_beyond_float32": ends["bfloat16"] / ends["cupy"] - 1}


def curves_on_fake_cupy(steps: int = 200) -> dict[str, Any]:
    """Without a GPU: the CuPy code and kernels on the fake CuPy of the tests; bfloat16 on NumPy, since emulated tensor cores are slow."""
    sys.path.insert(0, str(ROOT / "tests"))
    import fakecupy

    sys.modules |= fakecupy.modules
    return curves(steps, bfloat16_on="numpy")


def launches(steps: int = 40) -> dict[str, Any]:
    """Milliseconds per step of GPT-2 small with LoRA, kernel by kernel and as a CUDA graph, for 8 x 1024 and 1 x 16 tokens.

    With 1 x 16 tokens the device has little to do: the time is that of Python and of the launches.
    """
    import minilora as ml
    from minilora.backend import synchronize
    from minilora.data.batches import random_windows
    from minilora.training.loop import train

    times = {}
    for (batch, window), record in product(((8, 1024), (1, 16)), (False, True)):
        model = ml.GPT2(ml.GPT2Config(), rng=0).to("cupy")
        ml.inject(model, ml.LoraConfig(r=8), rng=0)
        text = np.random.default_rng(0).zipf(1.3, 200_000) % 50257
        batches = random_windows(text, window, batch, np.random.default_rng(0))
        run = train(model, ml.AdamW(model.parameters(), 1e-3), batches, steps, lambda step: 1.0, cuda_graph=record)
        seconds = [step.seconds for step in run][10:]  # the first ten steps compile the kernels and capture the graph
        times[f"{batch} x {window}{', recorded' * record}"] = 1e3 * float(np.median(seconds))
        synchronize("cupy")
    return {"ms_a_step": times}


def against_rivals(name: str, args: Namespace) -> dict[str, Any]:
    job = {"labelled": JOBS[name].get("window", 0), **JOBS[name]}
    half = job["dtype"] != "float32"
    names = ["ours", *(r for r in args.rivals if half or "half" not in r)]
    with tempfile.TemporaryDirectory() as folder:
        settings = {"steps": 200 if name == "toy" else 10, "warmup": 10, "rounds": args.rounds, "threads": 1, "folder": folder, **job}
        harness.prepare("gpu", settings)
        measured = harness.turns("gpu", names, settings)
    return summary(measured, settings["steps"], TOLERANCE[job["dtype"]])


FIGURES = ("suite", "curves", "launches")  # functions above, each run in its own process


def in_a_process(name: str) -> dict[str, Any]:
    """Run a function of FIGURES in its own process: CuPy reads CUPY_TF32 at its first matrix product only."""
    run = f"import json; from benchmarks import gpu; print(json.dumps(gpu.{name}()))"
    env = {**os.environ, "CUPY_TF32": "1" if name == "launches" else "0"}
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(" ".join(done.stderr.split())[-500:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    from minilora.backend import import_cupy

    names = [*FIGURES, *JOBS]
    args = options(
        __doc__,
        **{
            "fake": {"action": "store_true", "help": "only the curves, on the fake CuPy of the tests; needs no GPU"},
            "only": {"nargs": "+", "choices": names, "default": names, "help": "measurements to run"},
            "rivals": {"nargs": "+", "choices": RIVALS, "default": RIVALS, "help": "rivals to run; half has adapters in half precision"},
            "out": {"type": Path, "default": ROOT / "benchmarks" / "results" / "gpu.json", "help": "the file to write"},
        },
    )
    if args.fake:
        print(json.dumps(curves_on_fake_cupy(), indent=1))
        return 0
    try:
        cupy = import_cupy()
    except (ImportError, RuntimeError) as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 1
    about = cupy.cuda.runtime.getDeviceProperties(0)
    machine = {**describe(), "device": about["name"].decode(), "memory": int(about["totalGlobalMem"]), "cupy": cupy.__version__}
    machine |= {"driver": cupy.cuda.runtime.driverGetVersion(), "cuda": cupy.cuda.runtime.runtimeGetVersion()}
    print(json.dumps(machine), flush=True)
    before = json.loads(args.out.read_text()) if args.out.is_file() else {}
    results: dict[str, Any] = before["results"] if before.get("machine") == machine else {}  # drop results of another machine
    failed = []
    for name in args.only:
        try:
            results[name] = in_a_process(name) if name in FIGURES else against_rivals(name, args)
        except Exception as error:  # a failure must not cost the other measurements
            results[name] = {"failed": f"{type(error).__name__}: {error}"}
        failed += [name] if "failed" in results[name] or results[name].get("exit_code") or results[name].get("ok") is False else []
        print(f"{name}: {json.dumps(results[name])[:2000]}", flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    print(f"{args.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
