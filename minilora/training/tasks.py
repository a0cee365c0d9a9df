"""What there is to learn, and how to tell whether it was learnt: text in windows, records of text, texts with a class."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import to_numpy
from minilora.formats.tokenizer import ByteTokenizer, Tokenizer
from minilora.functional import cross_entropy, mse
from minilora.kernels import wide
from minilora.training.data import Batch, check_length, held_out_windows, random_windows
from minilora.training.datasets import Dataset, Example, batches_of, endless, is_dataset, load_dataset, load_examples, packed_batches
from minilora.training.evaluate import evaluate, share_out
from minilora.training.metrics import classification_metrics, pearson, perplexity
from minilora.training.text import read_text, split_text, stdlib_source


@dataclass
class Task:
    """Training batches without end, held-out batches, and the name of the figure that is told first.

    train: a function of the seed by which they are drawn; what: the data in words; per_epoch: batches an epoch, None where an epoch
    means nothing; labels: the names of the classes.
    """

    what: str
    headline: str
    held_out: list[Batch]
    train: Callable[[int], Iterator[Batch]] | None = None
    per_epoch: int | None = None
    labels: list[str] | None = None

    def batches(self, seed: int) -> Iterator[Batch]:
        """Those to train on. Raises ValueError for a task that is only measured."""
        if self.train is None:
            raise ValueError(f"there is nothing to train on: {self.what}")
        return self.train(seed)


def text_task(data: str | None, tokenizer: Tokenizer, window: int, batch_size: int, most: int) -> Task:
    """Plain text in windows that start anywhere: a file, a folder of them, or, without `data`, the standard library's source."""
    if data is None:
        texts = stdlib_source(held_out=False), stdlib_source(held_out=True)
        what = f"Python source of the standard library {sys.version_info.major}.{sys.version_info.minor}"
    else:
        texts, what = split_text(read_text(data)), str(data)
    train, held_out = (tokens_of(text, tokenizer) for text in texts)
    for part in (train, held_out):
        check_length(part, window)
    unit = "bytes" if isinstance(tokenizer, ByteTokenizer) else "tokens"
    kept = list(held_out_windows(held_out, window, 4, most))
    what += f": {len(train):,} {unit} to train on, {sum(b.labelled for b in kept):,} of {len(held_out):,} held out to measure on"
    return Task(what, _headline(tokenizer), kept, lambda seed: random_windows(train, window, batch_size, np.random.default_rng(seed)))


def records_task(data: str, tokenizer: Tokenizer, max_length: int, tokens_per_batch: int, mask_prompt: bool, seed: int) -> Task:
    """Texts, prompts with completions, or conversations: packed by length into batches of about equal numbers of tokens."""
    dataset = load_dataset(data, "lm", tokenizer, max_length, mask_prompt, seed=seed)
    _check_splits(dataset, data)
    epoch = list(packed_batches(dataset.train, tokens_per_batch))
    held_out = list(packed_batches(dataset.valid, tokens_per_batch))

    def train(seed: int) -> Iterator[Batch]:
        return endless(lambda rng: packed_batches(dataset.train, tokens_per_batch, rng), seed)

    return Task(dataset.describe(), _headline(tokenizer), held_out, train, len(epoch))


def classify_task(dataset: Dataset, data: str, batch_size: int) -> Task:
    """Texts with a class. The data is read before the model is, as it says how many classes there are."""
    _check_splits(dataset, data)

    def train(seed: int) -> Iterator[Batch]:
        return endless(lambda rng: batches_of(dataset.train, batch_size, rng), seed)

    per_epoch = -(-len(dataset.train) // batch_size)
    return Task(dataset.describe(), "accuracy", list(batches_of(dataset.valid, batch_size)), train, per_epoch, dataset.labels)


def held_out_task(data: str, task: str, tokenizer: Tokenizer, window: int, labels: list[str] | None, mask_prompt: bool = True) -> Task:
    """What `evaluate` measures on: of a folder the test split, or valid; of a file, all of it."""
    if task == "lm" and not is_dataset(data):
        tokens = tokens_of(read_text(data), tokenizer)
        window = min(window, len(tokens) - 1)
        check_length(tokens, max(1, window))
        return Task(str(data), _headline(tokenizer), list(held_out_windows(tokens, window, 4)))
    if Path(data).is_dir():
        dataset = load_dataset(data, task, tokenizer, window, mask_prompt, labels=labels)
        examples: list[Example] = dataset.test or dataset.valid
        labels = dataset.labels
        if not examples:
            raise ValueError(f"{data} has no test or valid split to evaluate on.")
    else:
        examples = load_examples(data, task, tokenizer, window, mask_prompt, labels=labels)
    batches = batches_of(examples, 16) if task == "classify" else packed_batches(examples, 4096)
    headline = "accuracy" if task == "classify" else _headline(tokenizer)
    return Task(f"{len(examples):,} sequences of {data}", headline, list(batches), labels=labels)


def measure(model: Any, task: Task, threads: int = 1) -> dict[str, float]:
    """{"loss": nats a label, "tokens": how many were read, and the task's own figures} on the held-out batches."""
    tokens = sum(len(b.ids) for b in task.held_out)
    if not task.held_out[0].per_sequence:
        loss, labelled = evaluate(model, task.held_out, threads)
        told = {"loss": loss, "tokens": tokens, "labelled_tokens": labelled, "perplexity": perplexity(loss)}
        return told | ({"bits_per_byte": loss / math.log(2)} if task.headline == "bits_per_byte" else {})
    logits = np.concatenate(share_out(model, task.held_out, _logits, threads))
    labels = np.concatenate([b.labels for b in task.held_out])
    if logits.shape[1] == 1:
        return {"loss": float(mse(logits[:, 0], labels)[0]), "tokens": tokens, "pearson": pearson(logits[:, 0], labels)}
    told = {"loss": float(cross_entropy(logits, labels)[0]), "tokens": tokens, "sequences": len(labels)}
    return told | classification_metrics(logits.argmax(axis=1), labels, logits.shape[1])


def _logits(model: Any, batch: Batch) -> np.ndarray:
    return to_numpy(wide(model.forward(batch.ids, keep=False, offsets=batch.offsets)[0]))


def tokens_of(text: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Bytes as token ids; a model of bytes takes them as they are."""
    if isinstance(tokenizer, ByteTokenizer):
        return text
    return tokenizer.encode(text.tobytes().decode("utf-8", errors="replace"))


def _headline(tokenizer: Tokenizer) -> str:
    return "bits_per_byte" if isinstance(tokenizer, ByteTokenizer) else "perplexity"


def _check_splits(dataset: Dataset, data: str) -> None:
    for split in ("train", "valid"):
        if not getattr(dataset, split):
            raise ValueError(f"{data} has no examples to {'train on' if split == 'train' else 'hold out'} (split {split}).")
