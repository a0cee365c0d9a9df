"""From process start to the end of the first training step: MiniLM, 32 snippets of film reviews, LoRA r 8, head trained.

    python -m benchmarks.start [--rounds 5] [--threads 2]

Each side does what a script would: import, read the model and its tokenizer, build the batch, adapt, take a step of AdamW. The time
includes the interpreter and the imports; the files are in the page cache. torch.compile, which takes time before the first step, is
left out.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator

from benchmarks.harness import RIVALS, compare

BATCH, TARGETS = 32, ["query", "value"]


def prepare(o: Namespace) -> None:
    """Write the model with a head, and the texts with their classes."""
    import minilora as ml
    from tests.assets import minilm, movie_snippets

    ml.save_model(ml.load_model(minilm(), "numpy", labels=2), o.folder / "model")
    (o.folder / "snippets.json").write_text(json.dumps(movie_snippets()[:BATCH]))


def ours(o: Namespace) -> Iterator[float]:
    import numpy as np

    import minilora as ml
    from minilora.data.datasets import collate
    from minilora.data.examples import Example
    from minilora.formats.tokenizer import load_tokenizer
    from minilora.training.loop import train

    model = ml.load_model(o.folder / "model", "numpy")
    tokenizer = load_tokenizer(o.folder / "model", model.config.vocab_size)
    ml.inject(model, ml.LoraConfig(r=8, target_modules=TARGETS, task_type="SEQ_CLS"))
    optimizer = ml.AdamW(model.parameters(), 1e-3)
    snippets = json.loads((o.folder / "snippets.json").read_text())
    batch = collate([Example(tokenizer.encode(text), np.array([label]), per_sequence=True) for text, label in snippets])
    for step in train(model, optimizer, iter([batch]), 1, lambda step: 1.0, threads=o.threads):
        yield step.loss


def rival(o: Namespace) -> Iterator[float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(o.threads)
    model = AutoModelForSequenceClassification.from_pretrained(o.folder / "model", attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(o.folder / "model")
    model = get_peft_model(model, LoraConfig(r=8, target_modules=TARGETS, task_type="SEQ_CLS")).train()
    for module in model.modules():  # minilora's model has no dropout here
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3, weight_decay=0.0, fused=True)
    texts, labels = zip(*json.loads((o.folder / "snippets.json").read_text()), strict=True)
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    loss = model(**batch, labels=torch.tensor(labels)).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    yield loss.item()


SIDES = {"ours": ours, **{name: rival for name in RIVALS if name != "compile"}}

if __name__ == "__main__":
    sys.exit(compare("start", __doc__, SIDES, steps=1, warmup=1, fresh=True))
