"""MiniLM on snippets of film reviews, batch 32, LoRA r 8 on query and value, head trained; the rival pads dynamically.

python -m benchmarks.classification [--rounds 5] [--threads 2] [--no-compile]
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.harness import RIVALS, compare

BATCH = 32
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def prepare(o: Namespace) -> None:
    write(o)


def write(o: Namespace, count: int | None = None, layers: list[int] | None = None) -> None:
    """Write MiniLM with a head, an adapter in `layers` (default: all), and the first `count` snippets as token ids and class."""
    import minilora as ml
    from minilora.formats.tokenizer import load_tokenizer
    from tests.assets import minilm, movie_snippets

    model = ml.load_model(minilm(), "numpy", labels=2)
    ml.save_model(model, o.folder / "model")
    config = ml.LoraConfig(r=8, target_modules=["query", "value"], layers_to_transform=layers, task_type="SEQ_CLS")
    ml.inject(model, config, rng=0)
    ml.save_adapter(model, o.folder / "adapter")
    tokenizer = load_tokenizer(minilm(), model.config.vocab_size)
    snippets = movie_snippets()
    chosen = np.random.default_rng(0).permutation(len(snippets))[:count]
    records = [{"ids": tokenizer.encode(snippets[i][0]).tolist(), "label": snippets[i][1]} for i in chosen]
    (o.folder / "records.json").write_text(json.dumps(records))


def examples(o: Namespace) -> list[Any]:
    """The records as minilora examples."""
    from minilora.data.examples import Example

    records = json.loads((o.folder / "records.json").read_text())
    return [Example(np.array(r["ids"]), np.array([r["label"]]), per_sequence=True) for r in records]


def padded_batches(o: Namespace) -> Iterator[dict[str, Any]]:
    """The records as batches of the transformers collator, each padded to its longest sequence."""
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

    from benchmarks.rivals import shuffled

    records = [{"input_ids": r["ids"], "labels": r["label"]} for r in json.loads((o.folder / "records.json").read_text())]
    collate = DataCollatorWithPadding(PreTrainedTokenizerFast(tokenizer_file=str(o.folder / "model" / "tokenizer.json"), pad_token="[PAD]"))
    for numbers in shuffled(len(records), BATCH):
        yield collate([records[i] for i in numbers])


def ours(o: Namespace) -> Iterator[float]:
    from benchmarks.ours import adapted, training
    from minilora.data.datasets import batches_of, endless

    data = examples(o)
    return training(adapted(o), endless(lambda rng: batches_of(data, BATCH, rng)), o)


def rival(o: Namespace) -> Iterator[float]:
    from benchmarks.rivals import adapted, training

    return training(adapted("AutoModelForSequenceClassification", o, **NO_DROPOUT), padded_batches(o))


SIDES = {"ours": ours, **dict.fromkeys(RIVALS, rival)}

if __name__ == "__main__":
    sys.exit(compare("classification", __doc__, SIDES, steps=8, warmup=4))
