"""An MLP 64-128-128-10, batch 64, LoRA r 8 on all three layers: against PEFT, and against plain torch with LoRA written by hand.

python -m benchmarks.toy [--rounds 5] [--threads 2] [--no-compile]
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.harness import RIVALS, compare

SIZES, BATCH, R, ALPHA, LR = [64, 128, 128, 10], 64, 8, 16, 1e-3
LINEAR = ["layers.0", "layers.2", "layers.4"]


def prepare(o: Namespace) -> None:
    """Write weights and adapters in PyTorch layout, and 16 batches labelled by a random linear map."""
    import minilora as ml

    model = ml.MLP(SIZES, rng=0)
    ml.inject(model, ml.LoraConfig(r=R, lora_alpha=ALPHA), rng=1)
    tensors = {path: np.ascontiguousarray(p.data.T) for path, p in model.parameters()}
    rng = np.random.default_rng(2)
    x = rng.normal(size=(16, BATCH, SIZES[0])).astype("float32")
    tensors |= {"x": x, "labels": (x @ rng.normal(size=(SIZES[0], SIZES[-1]))).argmax(axis=-1)}
    save_file(tensors, o.folder / "toy.safetensors")


def ours(o: Namespace, backend: str = "numpy") -> Iterator[float]:
    from threadpoolctl import threadpool_limits

    import minilora as ml

    threadpool_limits(1, "blas")  # as in training: products this small gain nothing from threads
    tensors = load_file(o.folder / "toy.safetensors")
    model = ml.MLP(SIZES)
    ml.inject(model, ml.LoraConfig(r=R, lora_alpha=ALPHA))
    for path, p in model.parameters():
        p.data[...] = tensors[path].T
    model.to(backend)
    tensors["x"] = ml.to_backend(tensors["x"], backend)
    optimizer = ml.AdamW(model.parameters(), LR)
    if backend == "cupy":
        yield from _replayed(model, optimizer, tensors)
    for x, labels in cycle(zip(tensors["x"], tensors["labels"], strict=True)):
        logits, saved = model.forward(x, need_dx=False)
        loss, dlogits = ml.cross_entropy(logits, labels)
        model.backward(dlogits, saved, need_dx=False)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss)


def _replayed(model: Any, optimizer: Any, tensors: dict[str, Any]) -> Iterator[float]:
    """The same steps on a GPU: everything before AdamW is captured once as a CUDA graph and replayed."""
    import minilora as ml
    from minilora.functional import Labelled
    from minilora.kernels.cuda.replay import Replay

    def work(x: Any, labels: Any) -> tuple[Any, ...]:
        optimizer.zero_grad()
        logits, saved = model.forward(x, need_dx=False)
        loss, dlogits = ml.cross_entropy(logits, Labelled(None, labels, BATCH))
        model.backward(dlogits, saved, need_dx=False)
        return (loss,)

    replay, labels = Replay(), ml.to_backend(tensors["labels"], "cupy")
    for i in cycle(range(len(labels))):
        (loss,) = replay("step", work, [tensors["x"][i], labels[i]])
        optimizer.flat.claim()
        optimizer.step()
        yield float(loss)


def peft(o: Namespace, device: str = "cpu") -> Iterator[float]:
    from peft import LoraConfig, get_peft_model

    tensors = _tensors(o)
    model = get_peft_model(_mlp(tensors), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0", "2", "4"]))
    for name, p in model.named_parameters():
        if ".lora_" in name:  # base_model.model.0.lora_A.default.weight
            part, ab = name.split(".")[2:4]
            p.data = tensors[f"layers.{part}.{ab}"]
    return _training(model.to(device), {name: x.to(device) for name, x in tensors.items()}, o)


def plain(o: Namespace) -> Iterator[float]:
    import torch

    class LoRA(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear, A: torch.Tensor, B: torch.Tensor) -> None:
            super().__init__()
            self.base, self.A, self.B = base, torch.nn.Parameter(A), torch.nn.Parameter(B)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            linear = torch.nn.functional.linear
            return self.base(x) + linear(linear(x, self.A), self.B) * (ALPHA / R)

    tensors = _tensors(o)
    model = _mlp(tensors).requires_grad_(False)
    for i in (0, 2, 4):
        model[i] = LoRA(model[i], tensors[f"layers.{i}.lora_A"], tensors[f"layers.{i}.lora_B"])
    return _training(model, tensors, o)


def _tensors(o: Namespace) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(o.folder / "toy.safetensors")


def _mlp(tensors: dict[str, Any]) -> Any:
    from torch import nn

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    model.load_state_dict({f"{i}.{part}": tensors[f"layers.{i}.{part}"] for i in (0, 2, 4) for part in ("weight", "bias")})
    return model


def _training(model: Any, tensors: dict[str, Any], o: Namespace) -> Iterator[float]:
    import torch

    from benchmarks.rivals import adamw

    torch.set_num_threads(o.threads)
    optimizer = adamw(model.train(), LR)
    run = torch.compile(model) if "compile" in o.side else model
    for x, labels in cycle(zip(tensors["x"], tensors["labels"], strict=True)):
        loss = torch.nn.functional.cross_entropy(run(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


SIDES = {"ours": ours, **dict.fromkeys(RIVALS, peft), "plain": plain, "plain-compile": plain}

if __name__ == "__main__":
    sys.exit(compare("toy", __doc__, SIDES, steps=300, warmup=50))
