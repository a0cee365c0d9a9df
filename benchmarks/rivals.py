"""The rivals' side of the benchmarks: PyTorch, transformers and PEFT, set up for speed."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel

LR, CLIP = 3e-3, 1.0


def adapted(kind: str, o: Namespace, device: str = "cpu", dtype: torch.dtype = torch.float32, autocast: bool = True, **config: Any) -> Any:
    """The model of class `kind` with the adapter of the folder, compiled if the side requests it. `config` overrides config.json.

    autocast: the adapter stays in float32 in a half-precision model, the default of PEFT.
    """
    torch.set_num_threads(o.threads)
    model = getattr(transformers, kind).from_pretrained(o.folder / "model", attn_implementation="sdpa", dtype=dtype, **config)
    model = PeftModel.from_pretrained(model, o.folder / "adapter", is_trainable=True, autocast_adapter_dtype=autocast)
    model = model.train().to(device)
    return torch.compile(model) if "compile" in o.side else model


def adamw(model: Any, lr: float = LR) -> torch.optim.Optimizer:
    """The fastest AdamW on a CPU, over the trainable parameters."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True)


def training(model: Any, batches: Iterator[dict[str, torch.Tensor]], steps: int | None = None) -> Iterator[float]:
    """Train with AdamW and clipping; yield the loss of each step. A batch holds the keyword arguments of the model."""
    optimizer = adamw(model)
    trained = optimizer.param_groups[0]["params"]
    for batch in islice(batches, steps):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def shuffled(count: int, size: int, seed: int = 0) -> Iterator[list[int]]:
    """Endless batches of example numbers, in the order of minilora's `endless(batches_of)`."""
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(count)
        yield from (order[i : i + size].tolist() for i in range(0, count, size))
        epoch += 1
