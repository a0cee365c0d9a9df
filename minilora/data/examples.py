"""One record as a training example: token ids, and which of them are learnt.

    {"text": ...}                             every token is learnt; write the end token into the text if it is to be learnt too
    {"prompt": ..., "completion": ...}        the completion and the end token after it are learnt, the prompt is read
    {"messages": [{"role", "content"}, ...]}  the assistant's turns are learnt, the rest is read; also "tools" and "documents"
    {"text": ..., "label": ...}               one class for each text (task "classify"), or a value for a model with one output

The ids spell the record exactly: no space is added, no token doubled.

A published head keeps its own classes in their own order. Otherwise the classes are those of the training data: integers by value, then
everything else as text. The result depends neither on the order of the records nor on the machine.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from minilora.data import TASKS
from minilora.data.records import Record, field_of, listed
from minilora.formats.chat import assistant_spans, marks_answers
from minilora.formats.tokenizer import Tokenizer
from minilora.functional import IGNORE

_WHOLE = re.compile(r"-?\d+", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)  # in decimal notation
_DIGITS = 4000  # Python does not convert longer integers; they are sorted as text


@dataclass
class Example:
    """One sequence and what is learnt from it."""

    ids: np.ndarray  # (T,)
    labels: np.ndarray  # (T,), already shifted; with per_sequence (1,), its class
    per_sequence: bool = False
    cut: bool = False  # it was shortened


def example_maker(
    task: str, tokenizer: Tokenizer, max_length: int, mask_prompt: bool, labels: Sequence[str] | None, template: str | None
) -> Callable[[Record], Example]:
    """A function record -> Example, which raises ValueError for a record that cannot be used.

    Raises ValueError itself for an unknown task, a max_length below 2, and labels of which two are one.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose {' or '.join(TASKS)}.")
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}.")
    label = reader(labels or ())

    def make(record: Record) -> Example:
        if task == "classify":
            ids, cut = _classified(tokenizer, _text(record, "text", task), max_length)
            return Example(ids, np.array([label(record)]), per_sequence=True, cut=cut)
        if "messages" in record:
            extra = {name: record[name] for name in ("tools", "documents") if record.get(name) is not None}
            ids, learnt, cut = _conversation(tokenizer, record["messages"], template, max_length, mask_prompt, extra)
        elif "prompt" in record and "completion" in record:
            pair = _text(record, "prompt", task), _text(record, "completion", task)
            ids, learnt, cut = _completion(tokenizer, *pair, max_length, mask_prompt)
        else:
            ids = tokenizer.encode_prompt(_text(record, "text", task))
            ids, cut = ids[: max_length + 1], len(ids) > max_length + 1
            learnt = np.ones(len(ids), dtype=bool)
        if not learnt[1:].any():
            what = f"nothing to learn is left within {max_length} tokens" if cut else "there is nothing to learn from so short a text"
            raise ValueError(f"{what}.")
        return Example(ids[:-1], np.where(learnt[1:], ids[1:], IGNORE), cut=cut)  # row t predicts token t + 1

    return make


def _completion(tokenizer: Tokenizer, prompt: str, completion: str, max_length: int, mask: bool) -> tuple[np.ndarray, np.ndarray, bool]:
    """(ids, mask of those to learn, whether it was cut) of a prompt and its completion."""
    ids, n = encode_pair(tokenizer, prompt, completion)
    begun, bos = tokenizer.begin(ids), len(tokenizer.prefix)
    n += len(begun) - len(ids)
    head, tail = begun[:n], begun[n:]
    if tokenizer.eos_id is not None and (len(tail) == 0 or tail[-1] != tokenizer.eos_id):
        tail = np.append(tail, tokenizer.eos_id)
    room = max_length + 1  # the last token is a label only
    kept = min(len(tail), max(room - n, room - room // 2))
    from_end = min(max(n - bos, 0), room - bos - kept)
    cut = kept < len(tail) or from_end < n - bos
    head = np.concatenate([head[:bos], head[n - from_end :]])
    return np.concatenate([head, tail[:kept]]), np.arange(len(head) + kept) >= (len(head) if mask else 0), cut


def _conversation(
    tokenizer: Tokenizer, messages: Any, template: str | None, max_length: int, mask: bool, extra: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, bool]:
    """(ids, mask of those to learn, whether it was cut) of messages: the assistant's turns are learnt, each with its end token.

    extra: tools and documents. The ids are those of the whole text, as from apply_chat_template in transformers. A token that starts
    before an answer and reaches into it is learnt; one that reaches out of it into the next turn is not, unless the template itself
    marks the answer. Turns that start after the first max_length tokens are ignored.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list of {"role", "content"} objects that is not empty.')
    room = max_length + 1
    text, spans = assistant_spans(template, messages, ends=list(tokenizer.added), **tokenizer.special_tokens, **extra)
    answers = [message for message in messages if message["role"] == "assistant"]
    if not any((message.get("content") or "").strip() or message.get("tool_calls") for message in answers):
        raise ValueError("no message of the assistant has any content: there is nothing to learn.")
    if not mask and any(message.get(name) in (0, False) for message in answers for name in ("weight", "train")):
        raise ValueError('a message that is not to be learnt ("weight", "train") needs the mask: leave out --no-mask-prompt.')
    ids = tokenizer.encode(text, add_special=False)
    learnt = np.full(min(len(ids), room), not mask)
    first, past = tokenizer.offsets(text)[:room].T  # of each token, in characters
    for start, end in spans if mask else ():
        if start >= past.max(initial=0):
            break
        reaches = np.flatnonzero((first < end) & (past > start) & ((past <= end) | marks_answers(template)))
        learnt[reaches.min(initial=len(ids)) : reaches.max(initial=-1) + 1] = True
    return ids[:room], learnt, len(ids) > room


def _classified(tokenizer: Tokenizer, text: str, max_length: int) -> tuple[np.ndarray, bool]:
    """(ids, whether they were cut): the text is cut, the special tokens around it stay."""
    ids = tokenizer.encode(text)
    if len(ids) <= max_length:
        return ids, False
    body = tokenizer.encode(text, add_special=False)
    before = len(tokenizer.prefix)
    after = ids[before + len(body) :]
    room = max(0, max_length - before - len(after))
    return np.concatenate([ids[:before], body[:room], after])[:max_length], True


def encode_pair(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[np.ndarray, int]:
    """(ids of prompt and completion, the number of the prompt's); no special tokens are added.

    In inference the model reads the prompt alone, so the ids must start with the prompt's: usually those of the whole text do. Where
    a merge crosses the boundary ("is " + "Paris", where " Paris" is one token), the prompt's ids stay, and the completion is encoded
    so that both together spell the whole text: alone or, if the tokenizer puts a space before a text, after a character that is then
    removed. If neither spells it (a normalizer composes characters across the boundary), the ids are those of the whole text, and the
    token on the boundary belongs to the completion.
    """
    ids, whole = (tokenizer.encode(text, add_special=False) for text in (prompt, prompt + completion))
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, ids, strict=False)))
    if alike < len(ids):
        spelled, joined = tokenizer.decode(whole), (np.concatenate([ids, tail]) for tail in _continued(tokenizer, completion))
        if (found := next((both for both in joined if tokenizer.decode(both) == spelled), None)) is not None:
            return found, len(ids)
    return whole, alike


def _continued(tokenizer: Tokenizer, piece: str) -> Iterator[np.ndarray]:
    """Encodings of a text that follows another: alone, and without what a tokenizer puts before the first word."""
    yield tokenizer.encode(piece, add_special=False)
    for guard in "\n|0a":
        alone, both = (tokenizer.encode(text, add_special=False) for text in (guard, guard + piece))
        if np.array_equal(both[: len(alone)], alone):
            yield both[len(alone) :]


def _text(record: Record, name: str, task: str) -> str:
    """A field that must be text. Raises ValueError."""
    value = field_of(record, name, task)
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, got {value!r:.60}.")
    if name != "prompt" and not value.strip():
        raise ValueError(f"the {name} is empty: there is nothing to learn.")
    return value


class NoClass(ValueError):
    """A label that is not a class of the head."""


@contextmanager
def at_line(file: Path, line: int) -> Iterator[None]:
    """Name the file and the line in a ValueError."""
    try:
        yield
    except ValueError as error:
        kind = NoClass if isinstance(error, NoClass) else ValueError
        raise kind(f"{file}, line {line}: {error}") from None


def class_names(file: Path, records: Sequence[tuple[int, Record]]) -> list[str]:
    """The distinct labels of records: integers first, by value, equal ones ("1", "01") as text; then names as text."""
    names = set()
    for line, record in records:
        with at_line(file, line):
            names.add(label_of(record))
    if len(names) < 2:
        raise ValueError(f"{file}: all {len(records)} records have the label {next(iter(names))!r}; classification needs two classes.")
    integers = {name: int(name) for name in names if _WHOLE.fullmatch(name) and len(name) <= _DIGITS}
    return sorted(names, key=lambda name: (name not in integers, integers.get(name, 0), name))


def label_of(record: Record) -> str:
    """The class of a record, as text without white space around it. Raises ValueError unless it is an integer or a name."""
    value = field_of(record, "label", "classify")
    name = str(value).strip()
    if type(value) not in (int, str) or name.lower() in ("", "nan"):
        advice = '; write "true" or "false" as text' if isinstance(value, bool) else ""
        raise ValueError(f"the label must be an integer or a name, got {value!r:.60}{advice}.")
    if _NUMBER.fullmatch(name) and not _WHOLE.fullmatch(name):
        raise ValueError(f"the label {name!r:.60} is a score; classes are integers or names, scores need a model with one output.")
    return name


def reader(names: Sequence[str]) -> Callable[[Record], float]:
    """A function record -> the index of the class in `names`; for one name (a model with one output), the value.

    A label is looked up by its name. If no name is a number, an integer is the index itself, as in transformers.
    The function raises ValueError for any other label.
    """
    if len(names) == 1:
        return _value
    index = {name.strip(): i for i, name in enumerate(names)}
    if len(index) < len(names):
        raise ValueError(f"the model names a class twice: {', '.join(names)}; a label does not say which one it means.")
    if not any(_NUMBER.fullmatch(name) for name in names):
        index |= {str(i): i for i in range(len(names))}

    def read(record: Record) -> float:
        label = record.get("label")
        name = label.strip() if isinstance(label, str) and label.strip() in index else label_of(record)
        if name not in index:
            raise NoClass(f"the label {name!r:.60} is none of the classes: {listed(names, 40)}.")
        return index[name]

    return read


def _value(record: Record) -> float:
    """The label of a record as a value. Raises ValueError unless it is a finite number other than -100, which means "no label"."""
    label = field_of(record, "label", "classify")
    value = float(label) if isinstance(label, str) and _NUMBER.fullmatch(label.strip()) else label
    if type(value) not in (int, float) or not math.isfinite(value) or value == IGNORE:
        raise ValueError(f"this model has one output, so the label must be a number (not -100), got {label!r:.60}.")
    return float(value)
