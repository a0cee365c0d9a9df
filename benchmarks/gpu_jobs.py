"""Training on a GPU against torch and PEFT of the same dtypes, with sdpa attention, eager and compiled: time per step, peak device memory.

`measure` runs one job of JOBS for benchmarks/gpu.py; benchmarks/worker.py calls `prepare` and the sides. In a dry run (benchmarks/gpu.py)
models are tiny, CuPy is the fake one of the tests where there is no GPU, and the rivals run on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.harness import ROOT, Failed, Worker
from benchmarks.report import summary

# batch x window tokens per step; dtype of weights and activations (float32: TF32 on both sides); labels on all or the last `labelled`
JOBS: dict[str, dict[str, Any]] = {
    "dense-bf16": {"model": "gpt2", "batch": 8, "window": 1024, "dtype": "bfloat16"},
    "dense-tf32": {"model": "gpt2", "batch": 8, "window": 1024, "dtype": "float32"},
    "snippets": {"model": "minilm", "batch": 32, "dtype": "float32"},
    "completions-bf16": {"model": "llama", "batch": 8, "window": 512, "labelled": 128, "dtype": "bfloat16"},
    "toy": {"model": "mlp", "dtype": "float32"},
}
RIVALS = ("eager", "half", "compile", "half-compile")  # half: adapters in the dtype of the model; PEFT's default is float32
TOLERANCE = {"bfloat16": 0.05, "float32": 5e-3}  # of the first loss: TF32 and bfloat16 round products to 1e-3 and 4e-3
Keep = Callable[[dict[str, Any]], None]


def measure(name: str, rivals: Sequence[str], rounds: int, dry: bool, keep: Keep) -> dict[str, Any]:
    """The job against those of the rivals that it has. What has been measured so far is given to `keep` after every round.

    Raises Failed when our side cannot be set up.
    """
    job = {"labelled": JOBS[name].get("window", 0), **JOBS[name]}
    rivals = [rival for rival in rivals if "half" not in rival or job["dtype"] != "float32"]
    steps = {"steps": 200 if name == "toy" and not dry else 10, "warmup": 10}  # training reads its losses every ten steps
    if dry:
        steps = {"steps": 4, "warmup": 5}
        job |= {"batch": 1, "window": 8, "labelled": min(job["labelled"], 4)} if "window" in job else {}
    with tempfile.TemporaryDirectory() as folder:
        settings = {"rounds": rounds, "threads": 1, "folder": folder, "dry": dry, **steps, **job}
        harness.prepare("gpu_jobs", settings)
        return turns(["ours", *rivals], settings, keep)


def turns(names: Sequence[str], settings: dict[str, Any], keep: Keep) -> dict[str, Any]:
    """As harness.turns, but for a rival that fails, then or later: it is left out, and the result says why."""
    workers: list[Worker] = []
    left_out: dict[str, str] = {}

    def result() -> dict[str, Any]:
        about = {"left_out": left_out, **{file.stem: json.loads(file.read_text()) for file in Path(settings["folder"]).glob("how_*.json")}}
        sides = [worker.measured for worker in workers]
        if not sides or not sides[0].seconds:
            return {"ready": {worker.measured.side: worker.start for worker in workers}, **about}
        return summary(sides, settings["steps"], TOLERANCE[settings["dtype"]]) | about

    for name in names:
        try:
            workers.append(Worker("gpu_jobs", name, settings))
        except Failed as failed:
            if name == names[0]:
                raise
            left_out[name] = str(failed)
        keep(result())
    for i in range(settings["rounds"]):
        for worker in workers[:: 1 if i % 2 == 0 else -1]:
            try:
                worker.round()
            except Failed as failed:
                if worker is workers[0]:
                    raise
                left_out[worker.measured.side] = str(failed)
                workers = [w for w in workers if w is not worker]
        keep(result())
    for worker in workers:
        worker.stop()
    return result()


# -- the sides of a job, called by benchmarks/worker.py -------------------------------------------------------------------------


def fake_cupy(always: bool = False) -> None:
    """Let `import cupy` return the fake CuPy of the tests, where there is no GPU."""
    from minilora.backend import import_cupy

    try:
        if not always:
            import_cupy()
            return
    except (ImportError, RuntimeError):
        pass
    sys.path.insert(0, str(ROOT / "tests"))
    import fakecupy

    sys.modules |= fakecupy.modules


def prepare(o: Namespace) -> None:
    import minilora as ml
    from benchmarks import toy

    if o.model == "mlp":
        return toy.prepare(o)
    if o.model == "minilm":
        return _prepare_snippets(o)
    model = _decoder(o)
    ml.save_model(model, o.folder / "model")
    ml.inject(model, ml.LoraConfig(r=8, task_type="CAUSAL_LM"), rng=0)
    ml.save_adapter(model, o.folder / "adapter")
    np.save(o.folder / "text.npy", np.random.default_rng(0).zipf(1.3, 200_000) % model.config.vocab_size)


def _decoder(o: Namespace) -> Any:
    """GPT-2 small or a Llama of SmolLM2-135M's shape, with random weights."""
    import minilora as ml
    from benchmarks.completions import SHAPES

    if o.model == "gpt2":
        small = {"vocab_size": 96, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2} if o.dry else {}
        return ml.GPT2(ml.GPT2Config(**small), rng=0)
    shape = dict(SHAPES["smollm2-135m"])
    if o.dry:
        shape |= {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return ml.Llama(ml.LlamaConfig(**shape, tie_word_embeddings=True), rng=0).freeze()


def _prepare_snippets(o: Namespace) -> None:
    """MiniLM and film snippets; where these cannot be had, random weights of its shape, and random ids in texts of like lengths."""
    from benchmarks import classification

    how = {"weights": "random", "texts": "random ids, 5 to 63 a text"}
    if not o.dry:
        os.environ |= {"PIP_RETRIES": "0", "PIP_DEFAULT_TIMEOUT": "5"}  # a machine without a network need not wait for it
        try:
            classification.write(o)
            how = {"weights": "all-MiniLM-L6-v2", "texts": "film snippets"}
        except Exception as error:
            how["why"] = " ".join(str(error).split())[:200]
    if "why" in how or o.dry:
        _random_snippets(o)
    (o.folder / "how_data.json").write_text(json.dumps(how))


def _random_snippets(o: Namespace) -> None:
    from tokenizers import Tokenizer, models

    import minilora as ml

    size = {"vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    if o.dry:
        size |= {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ml.BertClassifier(ml.BertConfig(**size, num_labels=2), rng=0)
    ml.save_model(model, o.folder / "model")
    Tokenizer(models.WordLevel({"[PAD]": 0}, unk_token="[PAD]")).save(str(o.folder / "model" / "tokenizer.json"))
    ml.inject(model, ml.LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"), rng=0)
    ml.save_adapter(model, o.folder / "adapter")
    rng = np.random.default_rng(0)
    lengths = rng.gamma(5.4, 5.0, 400).clip(5, 6 if o.dry else 63).astype(int)  # 27 on average, as of the snippets
    records = [{"ids": rng.integers(1, size["vocab_size"], n).tolist(), "label": int(rng.integers(2))} for n in lengths]
    (o.folder / "records.json").write_text(json.dumps(records))


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
    if o.dry:
        fake_cupy()
    import minilora as ml
    from benchmarks import classification, toy
    from benchmarks.ours import training
    from minilora.data.batches import Batch
    from minilora.data.datasets import batches_of, endless

    if o.model == "mlp":
        return noted(toy.ours(o, "cupy"), o)
    model = ml.load_model(o.folder / "model", "cupy", o.dtype)
    ml.load_adapter(model, o.folder / "adapter")
    if o.model == "minilm":
        data = classification.examples(o)
        return noted(training(model, endless(lambda rng: batches_of(data, o.batch, rng)), o), o)
    offsets = np.arange(o.batch + 1) * o.window
    return noted(training(model, (Batch(ids.ravel(), labels.ravel(), offsets) for ids, labels in windows(o)), o), o)


def noted(steps: Iterator[float], o: Namespace) -> Iterator[float]:
    """The steps. After the warm-up it is written down whether products go by cuBLAS, and whether a CUDA graph is being replayed."""
    said: list[str] = []
    warnings.showwarning = lambda message, *_, **__: said.append(str(message))
    for i, loss in enumerate(steps):
        if i + 1 == o.warmup:
            (o.folder / "how_ours.json").write_text(json.dumps(how_it_runs() | {"warnings": said}))
        yield loss


def how_it_runs() -> dict[str, Any]:
    from minilora.kernels.cuda import blas
    from minilora.kernels.memory import POOL_OWNERS

    return {"products": "CuPy" if blas.bindings() is None else "cuBLAS", "tf32": blas.tf32(), "graph": bool(POOL_OWNERS)}


def rival(o: Namespace) -> Iterator[float]:
    import torch

    from benchmarks import classification, toy
    from benchmarks.rivals import adapted, training

    torch.backends.cuda.matmul.allow_tf32 = True
    device = "cpu" if o.dry else "cuda"
    if o.model == "mlp":
        return toy.peft(o, device)
    kind = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "minilm": "AutoModelForSequenceClassification"}[o.model]
    config = classification.NO_DROPOUT if o.model == "minilm" else {"use_cache": False}
    model = adapted(kind, o, device=device, dtype=getattr(torch, o.dtype), autocast="half" not in o.side, **config)
    if o.model == "minilm":
        return training(model, ({name: x.to(device) for name, x in batch.items()} for batch in classification.padded_batches(o)))

    def batches() -> Iterator[dict[str, Any]]:
        for ids, labels in windows(o):
            on_device = torch.from_numpy(labels).to(device)
            yield {"input_ids": torch.from_numpy(ids).to(device), "labels": on_device, "shift_labels": on_device}

    return training(model, batches())


def peak_memory() -> int:  # called by benchmarks/worker.py
    """Peak device memory of this process in bytes."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        return int(sys.modules["torch"].cuda.max_memory_reserved())
    if "cupy" in sys.modules:
        from minilora.kernels.memory import peak_memory

        return peak_memory("cupy")
    return 1  # a rival of a dry run


SIDES = {"ours": ours, **dict.fromkeys(RIVALS, rival)}
