"""Records from files as examples to learn from: texts, prompts with completions, conversations, texts with a class.

    a folder     {train,valid,test}.jsonl or .csv; without valid, a tenth of train is held out
    a file       .jsonl or .csv: a tenth of it is held out

    {"text": ...}                             every token is learnt; write the end token into the text if it is to be learnt too
    {"prompt": ..., "completion": ...}        the completion and the end token after it are learnt, the prompt is read
    {"messages": [{"role", "content"}, ...]}  what the assistant wrote is learnt, the rest is read
    {"text": ..., "label": ...}               one class for each text (task "classify")

Other fields are ignored. What cannot be used is a ValueError that names the file and the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.tokenizer import Tokenizer
from minilora.training.data import Batch
from minilora.training.examples import Example, Maker, example_maker, label_of
from minilora.training.records import READERS, read_records

TASKS = ("lm", "classify")
SPLITS = ("train", "valid", "test")


@dataclass
class Dataset:
    """The splits, and for classification the names of the classes: labels[i] is class i."""

    train: list[Example] = field(default_factory=list)
    valid: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    labels: list[str] | None = None

    def describe(self) -> str:
        """One line: sequences, tokens, and how many sequences were cut."""
        told = []
        for name in SPLITS:
            if examples := getattr(self, name):
                cut = sum(example.cut for example in examples)
                told.append(
                    f"{name} {len(examples):,} sequences of {sum(len(e.ids) for e in examples):,} tokens"
                    + (f", {cut:,} cut" if cut else "")
                )
        classes = "" if self.labels is None else f"; {len(self.labels)} classes: {', '.join(self.labels)}"
        return "; ".join(told) + classes


def is_dataset(path: str | Path) -> bool:
    """Is this a .jsonl or .csv file, or a folder with {train,valid,test} of that kind? (Else it may be plain text.)"""
    path = Path(path)
    if path.is_dir():
        return any((path / f"{split}{suffix}").is_file() for split in SPLITS for suffix in READERS)
    return path.suffix in READERS


def load_dataset(
    path: str | Path,
    task: str,
    tokenizer: Tokenizer,
    max_length: int,
    mask_prompt: bool = True,
    *,
    labels: Sequence[str] | None = None,
    chat_template: str | None = None,
    seed: int = 0,
) -> Dataset:
    """Read a folder or a file of records for `task`: "lm" or "classify".

    No example has more than max_length tokens. Longer texts and conversations lose their end; of a prompt and completion, the prompt
    loses its beginning, down to half of max_length, then the completion its end. `Example.cut` tells which.
    mask_prompt=False learns from prompts and users' turns too. `labels`: the classes of a model that is there already; by default
    those of the training data (of a single file: of all of it), sorted, numbers by value.
    What is split here is shuffled by `seed`, and equal sequences stay on one side.
    Raises FileNotFoundError, or ValueError naming file and line.
    """
    _check(task, max_length)
    path = Path(path)
    files = _files(path)
    records = {split: list(read_records(file)) for split, file in files.items()}
    if task == "classify" and labels is None:
        if "train" not in files:
            raise FileNotFoundError(f"{path} has no train.jsonl or train.csv: without it the classes are not known.")
        labels = class_names(files["train"], records["train"])
    make = example_maker(task, tokenizer, max_length, mask_prompt, labels, chat_template or tokenizer.chat_template)
    dataset = Dataset(labels=list(labels) if task == "classify" and labels is not None else None)
    for split, file in files.items():
        setattr(dataset, split, _examples(file, records[split], make))
    if "train" in files and "valid" not in files:
        dataset.train, dataset.valid = hold_out(dataset.train, files["train"], seed)
    return dataset


def load_examples(
    file: str | Path,
    task: str,
    tokenizer: Tokenizer,
    max_length: int,
    mask_prompt: bool = True,
    *,
    labels: Sequence[str] | None = None,
    chat_template: str | None = None,
) -> list[Example]:
    """All of one .jsonl or .csv file, in order: `load_dataset` without a split. task "classify" needs the names of the classes."""
    _check(task, max_length)
    if task == "classify" and labels is None:
        raise ValueError(f"{file}: the model does not name its classes; give a folder that has train.jsonl or train.csv too.")
    file = Path(file)
    make = example_maker(task, tokenizer, max_length, mask_prompt, labels, chat_template or tokenizer.chat_template)
    return _examples(file, read_records(file), make)


def hold_out(examples: list[Example], path: str | Path, seed: int = 0, fraction: float = 0.1) -> tuple[list[Example], list[Example]]:
    """(to train on, held out): a shuffled `fraction` of the different sequences, at least one. Equal sequences stay on one side."""
    keys = [e.ids.tobytes() + (b"" if e.per_sequence else e.labels.tobytes()) for e in examples]
    different = list(dict.fromkeys(keys))
    if len(different) < 2:
        raise ValueError(f"{path} has one record only: there is nothing to hold out; give a folder with train.jsonl and valid.jsonl.")
    order = np.random.default_rng(seed).permutation(len(different))
    held = {different[i] for i in order[: max(1, round(fraction * len(different)))]}
    both = list(zip(keys, examples, strict=True))
    return [e for key, e in both if key not in held], [e for key, e in both if key in held]


# ---- batches -------------------------------------------------------------------------------------------------------------------------


def packed_batches(examples: Sequence[Example], tokens_per_batch: int, rng: np.random.Generator | None = None) -> Iterator[Batch]:
    """One epoch: every example once, in batches of about equal token counts, at most tokens_per_batch unless one sequence is longer.

    Each example goes into the batch that has fewest tokens so far, long ones first: short ones then level the batches out. With `rng`,
    which examples meet in a batch, and the order of the batches, are drawn; without, they are always the same.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}.")
    lengths = np.array([len(example.ids) for example in examples])
    size = lengths if rng is None else lengths * rng.uniform(0.5, 1, len(lengths))  # roughly by length, and new in every epoch
    bins: list[list[int]] = [[] for _ in range(-(-int(lengths.sum()) // tokens_per_batch))]
    load = np.zeros(len(examples) + len(bins), dtype=np.int64)  # there is room for a bin for each
    for i in np.argsort(-size, kind="stable"):
        k = int(load[: len(bins)].argmin())
        if load[k] and load[k] + lengths[i] > tokens_per_batch:  # it fits nowhere
            k = len(bins)
            bins.append([])
        bins[k].append(int(i))
        load[k] += lengths[i]
    order = np.arange(len(bins)) if rng is None else rng.permutation(len(bins))
    for k in order:
        if bins[k]:
            yield collate([examples[i] for i in bins[k]])


def batches_of(examples: Sequence[Example], batch_size: int, rng: np.random.Generator | None = None) -> Iterator[Batch]:
    """One epoch in batches of `batch_size` sequences, the last one smaller; shuffled by `rng`, without it in order."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    order = np.arange(len(examples)) if rng is None else rng.permutation(len(examples))
    for first in range(0, len(order), batch_size):
        yield collate([examples[i] for i in order[first : first + batch_size]])


def endless(epoch: Callable[[np.random.Generator], Iterator[Batch]], seed: int = 0) -> Iterator[Batch]:
    """Epoch after epoch, the k-th drawn by a generator of (seed, k): endless(lambda rng: packed_batches(train, 2048, rng), seed)."""
    for k in count():
        empty = True
        for batch in epoch(np.random.default_rng((seed, k))):
            empty = False
            yield batch
        if empty:
            raise ValueError("there is nothing to train on: the training split has no examples.")


def collate(examples: Sequence[Example]) -> Batch:
    """Examples end to end as one batch; per_sequence when their labels are classes."""
    offsets = np.concatenate([[0], np.cumsum([len(example.ids) for example in examples])])
    labels = np.concatenate([example.labels for example in examples])
    return Batch(np.concatenate([example.ids for example in examples]), labels, offsets, examples[0].per_sequence)


# ---- files and classes --------------------------------------------------------------------------------------------------------------


def class_names(file: Path, records: Sequence[tuple[int, dict[str, Any]]]) -> list[str]:
    """The different labels of records, sorted: by value if all are whole numbers, else as text."""
    names = {label_of(file, line, record) for line, record in records}
    if len(names) < 2:
        raise ValueError(f"{file}: all {len(records)} records have the label {next(iter(names))!r}; classification needs two classes.")
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def _files(path: Path) -> dict[str, Path]:
    """{split: file} of a dataset's folder, or {"train": file}."""
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"there is no file or folder {path}.")
        return {"train": path}
    found: dict[str, Path] = {}
    for split in SPLITS:
        files = [file for suffix in READERS if (file := path / f"{split}{suffix}").is_file()]
        if len(files) > 1:
            raise ValueError(f"{path} has both {files[0].name} and {files[1].name}; keep one.")
        if files:
            found[split] = files[0]
    if not found:
        raise FileNotFoundError(f"there are no records in {path}: wanted train.jsonl (or .csv), and valid and test if there are any.")
    return found


def _examples(file: Path, records: Any, make: Maker) -> list[Example]:
    return [make(file, line, record) for line, record in records]


def _check(task: str, max_length: int) -> None:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose {' or '.join(TASKS)}.")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}.")
