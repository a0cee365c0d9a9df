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

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.chat import assistant_spans, render_chat
from minilora.formats.tokenizer import Tokenizer
from minilora.functional import IGNORE
from minilora.training.data import Batch

TASKS = ("lm", "classify")
SPLITS = ("train", "valid", "test")
_WANTED = {
    "lm": 'the field "text", or "prompt" and "completion", or "messages"',
    "classify": 'the fields "text" and "label"',
}


@dataclass
class Example:
    """ids (T,) of one sequence; labels (T,), shifted already, or with per_sequence (1,), its class. `cut`: it was longer than allowed."""

    ids: np.ndarray
    labels: np.ndarray
    per_sequence: bool = False
    cut: bool = False


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
        return any((path / f"{split}{suffix}").is_file() for split in SPLITS for suffix in _READERS)
    return path.suffix in _READERS


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
    make = _maker(task, tokenizer, max_length, mask_prompt, labels, chat_template or tokenizer.chat_template)
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
    make = _maker(task, tokenizer, max_length, mask_prompt, labels, chat_template or tokenizer.chat_template)
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


# ---- records -------------------------------------------------------------------------------------------------------------------------


def read_records(file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, record) of a .jsonl or .csv file; empty lines are skipped. Raises ValueError when a line does not parse."""
    file = Path(file)
    if file.suffix not in _READERS:
        raise ValueError(f"{file}: wanted a .jsonl or .csv file.")
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}.")
    none = True
    for line, record in _READERS[file.suffix](file):
        none = False
        yield line, record
    if none:
        raise ValueError(f"{file} is empty: line 1 should be a record with {_WANTED['lm']}, or {_WANTED['classify']}.")


def _jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for n, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8-sig" if n == 1 else "utf-8")
            record = json.loads(line) if line.strip() else None
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}, line {n}: this is not UTF-8 text ({error.reason} at byte {error.start}).") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {n}: this is not JSON ({error}); wanted one object a line.") from None
        if not line.strip():
            continue
        if not isinstance(record, dict):
            raise ValueError(f"{file}, line {n}: wanted a JSON object, got {type(record).__name__}.")
        yield n, record


def _csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        n = raw[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {n}: this is not UTF-8 text ({error.reason}); save the file as UTF-8.") from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for row in rows:
            if row and header is None:
                header = row
                if len(set(header)) < len(header):
                    raise ValueError(f"{file}, line {line}: the header names a column twice: {', '.join(header)}.")
            elif row and header is not None:
                if len(row) != len(header):
                    raise ValueError(f"{file}, line {line}: wanted {len(header)} fields ({', '.join(header)}), got {len(row)}.")
                yield line, dict(zip(header, row, strict=True))
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{file}, line {line}: this is not CSV ({error}).") from None


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, dict[str, Any]]]]] = {".jsonl": _jsonl, ".csv": _csv}


def class_names(file: Path, records: Sequence[tuple[int, dict[str, Any]]]) -> list[str]:
    """The different labels of records, sorted: by value if all are whole numbers, else as text."""
    names = {_label(file, line, record) for line, record in records}
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
        files = [file for suffix in _READERS if (file := path / f"{split}{suffix}").is_file()]
        if len(files) > 1:
            raise ValueError(f"{path} has both {files[0].name} and {files[1].name}; keep one.")
        if files:
            found[split] = files[0]
    if not found:
        raise FileNotFoundError(f"there are no records in {path}: wanted train.jsonl (or .csv), and valid and test if there are any.")
    return found


# ---- one record as an example --------------------------------------------------------------------------------------------------------

_Maker = Callable[[Path, int, dict[str, Any]], Example]


def _examples(file: Path, records: Any, make: _Maker) -> list[Example]:
    return [make(file, line, record) for line, record in records]


def _maker(
    task: str, tokenizer: Tokenizer, max_length: int, mask_prompt: bool, labels: Sequence[str] | None, template: str | None
) -> _Maker:
    """A function (file, line, record) -> Example, that raises ValueError naming file and line."""
    classes = {str(name): i for i, name in enumerate(labels or ())}

    def classify(file: Path, line: int, record: dict[str, Any]) -> Example:
        name = _label(file, line, record)
        if name not in classes:
            raise ValueError(f"{file}, line {line}: the label {name!r} is none of the training data's: {', '.join(classes)}.")
        ids, cut = _classified(tokenizer, _text(file, line, record, "text", "classify"), max_length)
        return Example(ids, np.array([classes[name]]), per_sequence=True, cut=cut)

    def lm(file: Path, line: int, record: dict[str, Any]) -> Example:
        try:
            if "messages" in record:
                ids, learnt, cut = _conversation(tokenizer, record["messages"], template, max_length, mask_prompt)
            elif "prompt" in record and "completion" in record:
                prompt, completion = (_text(file, line, record, name, "lm") for name in ("prompt", "completion"))
                ids, learnt, cut = _completion(tokenizer, prompt, completion, max_length, mask_prompt)
            else:
                ids = _beginning(tokenizer, tokenizer.encode(_text(file, line, record, "text", "lm"), add_special=False))
                ids, cut = ids[: max_length + 1], len(ids) > max_length + 1
                learnt = np.ones(len(ids), dtype=bool)
        except _Unusable as error:
            raise ValueError(f"{file}, line {line}: {error}") from None
        if not learnt[1:].any():
            what = f"nothing to learn is left within {max_length} tokens" if cut else "there is nothing to learn from so short a text"
            raise ValueError(f"{file}, line {line}: {what}.")
        return Example(ids[:-1], np.where(learnt[1:], ids[1:], IGNORE), cut=cut)  # row t predicts token t + 1

    return classify if task == "classify" else lm


class _Unusable(ValueError):
    """What is wrong with a record, without the file and the line."""


def _completion(tokenizer: Tokenizer, prompt: str, completion: str, max_length: int, mask: bool) -> tuple[np.ndarray, np.ndarray, bool]:
    """(ids, which of them are to be learnt, was it cut) of a prompt and what follows it."""
    if not completion.strip():
        raise _Unusable("the completion is empty: there is nothing to learn.")
    ids, (n, _) = encode_pieces(tokenizer, [prompt, completion])
    head, tail = _beginning(tokenizer, ids[:n]), ids[n:]
    bos = len(head) - n
    if tokenizer.eos_id is not None and (len(tail) == 0 or tail[-1] != tokenizer.eos_id):
        tail = np.append(tail, tokenizer.eos_id)
    room = max_length + 1  # the last token is a label only
    kept = min(len(tail), max(room - len(head), room - room // 2))
    from_end = min(n, room - bos - kept)
    cut = kept < len(tail) or from_end < n
    head = np.concatenate([head[:bos], head[len(head) - from_end :]])
    return np.concatenate([head, tail[:kept]]), np.arange(len(head) + kept) >= (len(head) if mask else 0), cut


def _conversation(
    tokenizer: Tokenizer, messages: Any, template: str | None, max_length: int, mask: bool
) -> tuple[np.ndarray, np.ndarray, bool]:
    """(ids, which of them are to be learnt, was it cut) of messages: what the assistant wrote, each turn with its end token."""
    if not isinstance(messages, list) or not messages:
        raise _Unusable('"messages" must be a list of {"role", "content"} objects that is not empty.')
    bos, eos = tokenizer.token(tokenizer.bos_id), tokenizer.token(tokenizer.eos_id)
    try:
        text = render_chat(template, messages, False, bos, eos)
        answers = [message for message in messages if message["role"] == "assistant"]
        if not any(message["content"].strip() for message in answers):
            raise _Unusable("no message of the assistant has any content: there is nothing to learn.")
        spans = assistant_spans(template, messages, bos, eos)[1] if mask else [(0, len(text))]
        _check_unicode(text, "messages")
    except ValueError as error:
        raise _Unusable(str(error)) from None
    bounds = [0, *(bound for span in spans for bound in span), len(text)]
    ids, ends = encode_pieces(tokenizer, [text[a:b] for a, b in pairwise(bounds)])
    learnt = np.zeros(len(ids), dtype=bool)
    for first, past in zip(ends[::2], ends[1::2], strict=False):  # pieces alternate: read, learnt, read, ...
        learnt[first:past] = True
    room = max_length + 1
    return ids[:room], learnt[:room], len(ids) > room


def _classified(tokenizer: Tokenizer, text: str, max_length: int) -> tuple[np.ndarray, bool]:
    """(ids, was it cut): cut in the text, so that the special tokens around it stay."""
    ids = tokenizer.encode(text)
    if len(ids) <= max_length:
        return ids, False
    body = tokenizer.encode(text, add_special=False)
    before = next(i for i in range(len(ids)) if np.array_equal(ids[i : i + len(body)], body))
    after = ids[before + len(body) :]
    room = max(0, max_length - before - len(after))
    return np.concatenate([ids[:before], body[:room], after])[:max_length], True


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """(ids of the pieces joined, where each ends in them); no special tokens are added.

    A text up to the end of a piece is what a model is given when it has to write the next one. So its ids must be the beginning of the
    whole's: mostly the whole is simply encoded. Where a merge would reach across the boundary ("is " + "Paris", where " Paris"
    is one token), the next piece is encoded by itself.
    """
    ids, ends, text = np.empty(0, dtype=np.int64), [], ""
    for piece in pieces:
        text += piece
        whole = tokenizer.encode(text, add_special=False)
        clean = np.array_equal(whole[: len(ids)], ids)
        ids = whole if clean else np.concatenate([ids, tokenizer.encode(piece, add_special=False)])
        ends.append(len(ids))
    return ids, ends


def _beginning(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """ids with the begin token in front, where the tokenizer puts one."""
    return np.concatenate([[tokenizer.bos_id], ids]).astype(np.int64) if tokenizer.adds_bos else ids


def _text(file: Path, line: int, record: dict[str, Any], name: str, task: str) -> str:
    """A field that must be text. Raises ValueError naming file and line."""
    where = f"{file}, line {line}:"
    if name not in record:
        has = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"{where} wanted {_WANTED[task]}; it has {has}.")
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"{where} {name!r} must be text, got {value!r:.60}.")
    if name != "prompt" and not value.strip():
        raise ValueError(f"{where} the {name} is empty: there is nothing to learn.")
    try:
        _check_unicode(value, name)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None
    return value


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!r} holds half of a surrogate pair at character {error.start}, which is no text.") from None


def _label(file: Path, line: int, record: dict[str, Any]) -> str:
    """The label of a record, as text. Raises ValueError for a label that is missing, not a number, or neither integer nor text."""
    if "label" not in record:
        has = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"{file}, line {line}: wanted {_WANTED['classify']}; it has {has}.")
    value = record["label"]
    name = value.strip() if isinstance(value, str) else str(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or not name or name.lower() == "nan":
        raise ValueError(f"{file}, line {line}: the label must be an integer or a name, got {value!r}.")
    return name


def _check(task: str, max_length: int) -> None:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose {' or '.join(TASKS)}.")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}.")
