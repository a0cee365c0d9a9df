"""Records as examples to train and to measure on: the splits of a folder or a file, and batches of them.

    a folder     {train,valid,test} as record files; without valid, a tenth of train is held out
    a file       a tenth of it is held out

data/records.py reads the formats, data/examples.py defines the kinds of records, docs/data.md documents both.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappush, heapreplace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from minilora.data.batches import Batch
from minilora.data.examples import Example, NoClass, at_line, class_names, example_maker
from minilora.data.records import SPLITS, listed, note, read_records, split_files
from minilora.formats.tokenizer import Tokenizer

_USED = {"lm": ("text", "prompt", "completion", "messages", "tools", "documents"), "classify": ("text", "label")}
_REFUSED = ("text_pair", "weight", "weights", "sample_weight")  # ignoring these would change the result


@dataclass
class Dataset:
    """The splits, and for classification the names of the classes: labels[i] is class i."""

    train: list[Example] = field(default_factory=list)
    valid: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    labels: list[str] | None = None

    def describe(self) -> str:
        """One line: sequences, tokens and cut sequences of each split, the classes, and those that a split lacks."""
        parts = []
        for name in SPLITS:
            if examples := getattr(self, name):
                cut = sum(example.cut for example in examples)
                part = f"{name} {len(examples):,} sequences of {sum(len(e.ids) for e in examples):,} tokens" + f", {cut:,} cut" * (cut > 0)
                if self.labels is not None and (absent := _absent(examples, self.labels)):
                    part += f", none of class {listed(absent)}"
                parts.append(part)
        if self.labels is not None:
            parts.append(f"{len(self.labels)} classes: {listed(self.labels, 40)}")
        return "; ".join(parts)


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
    encoding: str = "utf-8",
    drawn_at: tuple[int, bool] | None = None,
) -> Dataset:
    """Read a folder or a file of records for `task`: "lm" or "classify".

    max_length   tokens of an example at most. Longer texts and conversations lose their end; a prompt loses its beginning, down to half
                 of max_length, then the completion its end. `Example.cut` marks them
    mask_prompt  False: train on prompts and users' turns too
    labels       the classes of an existing head, in its order (one class: labels are values); default: those of the training data, or of
                 a single file, see data/examples.py
    seed         draws the tenth that is held out where there is no validation data, see `hold_out`
    drawn_at     (max_length, mask_prompt) of the run that held them out, if it read the records otherwise

    Raises FileNotFoundError, or ValueError naming file and line.
    """
    files = split_files(path, quiet=False)
    if task == "classify" and labels is None:
        if "train" not in files:
            raise FileNotFoundError(f"{path} has no training split: without it the classes are not known.")
        labels = class_names(files["train"], list(read_records(files["train"], encoding)))
    options: dict[str, Any] = {"labels": labels, "chat_template": chat_template, "encoding": encoding}
    splits = {split: load_examples(file, task, tokenizer, max_length, mask_prompt, **options) for split, file in files.items()}
    if "train" in files and "valid" not in files:
        alike = None
        if drawn_at is not None and drawn_at != (max_length, mask_prompt):
            alike = load_examples(files["train"], task, tokenizer, *drawn_at, **options)
        splits["train"], splits["valid"] = hold_out(splits["train"], files["train"], seed, alike=alike)
    dataset = Dataset(**splits, labels=list(labels) if task == "classify" and labels is not None and len(labels) > 1 else None)
    trained = {_key(example) for example in dataset.train}
    for split in ("valid", "test"):
        measured = getattr(dataset, split)
        if both := sum(_key(example) in trained for example in measured):
            note(f"{path}: {both:,} of the {len(measured):,} sequences of {split} are in train too.")
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
    encoding: str = "utf-8",
) -> list[Example]:
    """All records of one file, in order, as examples; unused fields are named on standard error. Task "classify" needs `labels`.

    Raises ValueError, naming file and line, also for fields that must not be ignored.
    """
    file = Path(file)
    if task == "classify" and labels is None:
        raise ValueError(f"{file}: the classes are not known; give a folder that has a training split too.")
    make = example_maker(task, tokenizer, max_length, mask_prompt, labels, chat_template or tokenizer.chat_template)
    examples: list[Example] = []
    unused: dict[str, None] = {}
    try:
        for line, record in read_records(file, encoding):
            with at_line(file, line):
                if odd := next((name for name in _REFUSED if name in record), None):
                    raise ValueError(f"{odd!r} is not supported, and would be ignored; remove it.")
                forms = [name for name in ("text", "prompt", "messages") if name in record] if task == "lm" else []
                if len(forms) > 1:
                    raise ValueError(f"the record has {forms[0]!r} and {forms[1]!r}; keep the one that is to be learnt.")
                unused |= dict.fromkeys(name for name in record if name not in _USED[task])
                examples.append(make(record))
    except NoClass as error:
        names = sorted({str(record.get("label")).strip() for _, record in read_records(file, encoding)})
        raise ValueError(f"{error} The data have {listed(names, 40)}; rename them, or make a head with finetune --new-head.") from None
    if unused:
        names = [repr(name) if name else "a column without a name" for name in unused]
        note(f"{file}: {listed(names)} {'is' if len(names) == 1 else 'are'} not used.")
    return examples


def hold_out(
    examples: list[Example], path: str | Path, seed: int = 0, fraction: float = 0.1, alike: list[Example] | None = None
) -> tuple[list[Example], list[Example]]:
    """(to train on, held out): a `fraction` of the distinct sequences, at least one, drawn by `seed`. Equal sequences stay on one side.

    Each class gives its share, as near to `fraction` as whole sequences allow, and keeps at least one for training. alike: the same
    records as they were read when the held-out ones were drawn. Raises ValueError when there is nothing to hold out.
    """
    keys = [_key(e) for e in alike or examples]
    first = dict(zip(reversed(keys), reversed(alike or examples), strict=True))  # of equal ones the first
    distinct = list(dict.fromkeys(keys))
    drawn = sample([first[key] for key in distinct], max(1, round(fraction * len(distinct))), seed, spare=1)
    if not drawn:
        raise ValueError(f"{path} has too few records to hold one out; give a folder with a training and a validation split.")
    held, both = {distinct[i] for i in drawn}, list(zip(keys, examples, strict=True))
    return [e for key, e in both if key not in held], [e for key, e in both if key in held]


def _key(example: Example) -> bytes:
    """Equal for equal sequences; the last token of a text is in its labels only."""
    return example.ids.tobytes() + (b"" if example.per_sequence else example.labels.tobytes())


def sample(examples: Sequence[Example], size: int, seed: int, spare: int = 0) -> list[int]:
    """Indices, in order, of `size` examples drawn without replacement, of each class its share. `spare` of each class are never drawn.

    Shares are rounded down; the remaining draws go to the largest remainders, in random order among equal ones.
    """
    rng = np.random.default_rng(seed)
    classes: dict[float, list[int]] = {}
    for i in rng.permutation(len(examples)):
        e = examples[i]
        classes.setdefault(int(e.labels[0]) if e.per_sequence and e.labels.dtype.kind == "i" else 0, []).append(int(i))
    groups = [classes[c] for c in sorted(classes)]
    exact = [min(size / max(1, len(examples)), 1.0) * len(group) for group in groups]
    share = [min(int(x), len(group) - spare) for x, group in zip(exact, groups, strict=True)]
    missing = size - sum(share)
    for k in sorted(rng.permutation(len(groups)), key=lambda k: share[k] - exact[k]):
        if missing > 0 and share[k] < len(groups[k]) - spare:
            share[k], missing = share[k] + 1, missing - 1
    return sorted(i for group, n in zip(groups, share, strict=True) for i in group[:n])


def few(examples: Sequence[Example], size: int, labels: Sequence[str], seed: int = 0) -> list[Example]:
    """At most `size` of the examples, drawn without replacement; a smaller draw is part of a larger one.

    Raises ValueError when a class has no example left.
    """
    chosen = [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))[:size]]
    if absent := _absent(chosen, labels):
        raise ValueError(f"among the {size} examples drawn there is none of class {absent[0]!r}; use a larger train_size or another seed.")
    return chosen


def pack(examples: Sequence[Example], tokens_per_batch: int, rng: np.random.Generator | None = None) -> list[list[int]]:
    """[indices of the examples of a batch, ...]: every example once, in batches of about equal token counts.

    A batch exceeds tokens_per_batch only with a single sequence. Each example goes into the batch with the fewest tokens so far, long
    ones first. `rng` draws which examples meet in a batch, and the order of the batches; without it they are always the same.
    """
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}.")
    lengths = np.array([len(example.ids) for example in examples], dtype=np.int64)
    size = lengths if rng is None else lengths * rng.uniform(0.5, 1, len(lengths))  # roughly by length, different in every epoch
    bins: list[list[int]] = [[] for _ in range(-(-int(lengths.sum()) // tokens_per_batch))]
    loads = [(0, k) for k in range(len(bins))]  # a heap: the batch with the fewest tokens first
    for i in np.argsort(-size, kind="stable"):
        n, (load, k) = int(lengths[i]), loads[0]
        if load and load + n > tokens_per_batch:  # it fits nowhere
            heappush(loads, (n, len(bins)))
            bins.append([int(i)])
        else:
            heapreplace(loads, (load + n, k))
            bins[k].append(int(i))
    order = np.arange(len(bins)) if rng is None else rng.permutation(len(bins))
    return [bins[k] for k in order if bins[k]]


def packed_batches(examples: Sequence[Example], tokens_per_batch: int, rng: np.random.Generator | None = None) -> Iterator[Batch]:
    """One epoch of batches by `pack`."""
    yield from (collate([examples[i] for i in batch]) for batch in pack(examples, tokens_per_batch, rng))


def batches_of(examples: Sequence[Example], batch_size: int, rng: np.random.Generator | None = None) -> Iterator[Batch]:
    """One epoch in batches of `batch_size` sequences, the last one smaller; shuffled by `rng`, without it in order."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    order = np.arange(len(examples)) if rng is None else rng.permutation(len(examples))
    for first in range(0, len(order), batch_size):
        yield collate([examples[i] for i in order[first : first + batch_size]])


def endless(epoch: Callable[[np.random.Generator], Iterator[Batch]], seed: int = 0) -> Iterator[Batch]:
    """Epoch after epoch, the k-th drawn by a generator of (seed, k): endless(lambda rng: packed_batches(train, 2048, rng), seed).

    The last batch of an epoch is marked: a step never takes batches of two epochs (training/loop.py).
    """
    for k in count():
        held = None
        for batch in epoch(np.random.default_rng((seed, k))):
            if held is not None:
                yield held
            held = batch
        if held is None:
            raise ValueError("there is nothing to train on: the training split has no examples.")
        yield replace(held, ends_epoch=True)


def collate(examples: Sequence[Example]) -> Batch:
    """Examples concatenated to one batch; per_sequence when their labels are classes."""
    offsets = np.concatenate([[0], np.cumsum([len(example.ids) for example in examples])])
    labels = np.concatenate([example.labels for example in examples])
    return Batch(np.concatenate([example.ids for example in examples]), labels, offsets, examples[0].per_sequence)


def _absent(examples: Sequence[Example], labels: Sequence[str]) -> list[str]:
    seen = {int(example.labels[0]) for example in examples}
    return [name for i, name in enumerate(labels) if i not in seen]
