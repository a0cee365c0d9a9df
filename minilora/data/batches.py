"""Text as batches of packed sequences, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minilora.functional import IGNORE


@dataclass
class Batch:
    """Packed sequences and their labels, all on the host. Raises ValueError for shapes that do not fit."""

    ids: np.ndarray  # (T,)
    labels: np.ndarray  # (T,), the token that each row must predict, or -100; with per_sequence (n,), a class for each sequence
    offsets: np.ndarray  # (n + 1,), the bounds of the sequences
    per_sequence: bool = False
    ends_epoch: bool = False  # the last batch of a pass over the data

    def __post_init__(self) -> None:
        expected = len(self.offsets) - 1 if self.per_sequence else len(self.ids)
        if self.labels.shape != (expected,) or self.offsets[0] != 0 or self.offsets[-1] != len(self.ids):
            what = f"{len(self.ids)} ids, offsets {self.offsets[0]} to {self.offsets[-1]}, labels of shape {self.labels.shape}"
            raise ValueError(f"Batch: {what} do not fit; expected offsets from 0 to the number of ids, and {expected} labels.")

    @property
    def labelled(self) -> int:
        """The number of rows, or with per_sequence of sequences, that have a label."""
        return int((self.labels != IGNORE).sum())

    def split(self, n: int) -> list[Batch]:
        """At most n shards of whole sequences, as even as possible, since a lane waits for the longest: in order, cut at the boundary
        nearest to each n-th; or the longest sequences first, each to the shard with the fewest tokens so far, where that is more even."""
        lengths = np.diff(self.offsets)
        ideal = (int(self.offsets[-1]) * i / n for i in range(1, n))
        cuts = {0, len(lengths), *(int(np.argmin(np.abs(self.offsets - at))) for at in ideal)}
        in_order = [list(range(a, b)) for a, b in pairwise(sorted(cuts))]
        dealt, tokens = [list[int]() for _ in range(n)], [0] * n
        for i in np.argsort(-lengths, kind="stable"):
            least = tokens.index(min(tokens))
            dealt[least].append(int(i))
            tokens[least] += int(lengths[i])
        even = len(in_order) == n and max(int(lengths[members].sum()) for members in in_order) <= max(tokens)
        return [self.sequences(sorted(members)) for members in (in_order if even else dealt) if members]

    def sequences(self, members: Sequence[int]) -> Batch:
        """Some of the sequences, in this order."""
        at = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in members])
        labels = self.labels[members] if self.per_sequence else self.labels[at]
        return Batch(self.ids[at], labels, np.cumsum([0, *np.diff(self.offsets)[members]]), self.per_sequence)


def windows(text: np.ndarray, starts: np.ndarray, length: int) -> Batch:
    """Windows of `length` tokens from `starts`; the label of a token is the next token of the text."""
    at = (starts[:, None] + np.arange(length)).ravel()
    return Batch(text[at].astype(np.int64), text[at + 1].astype(np.int64), np.arange(len(starts) + 1) * length)


def random_windows(text: np.ndarray, length: int, batch_size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Endless batches of windows that start anywhere in the text. Raises ValueError when the text is shorter than one window."""
    check_length(text, length)
    while True:
        yield windows(text, rng.integers(0, len(text) - length, size=batch_size), length)


def held_out_windows(text: np.ndarray, length: int, batch_size: int, most: int | None = None) -> Iterator[Batch]:
    """The text in consecutive windows, the last one shorter: every token but the first is predicted once.

    most: the number of full windows at most, evenly spread.
    """
    starts = np.arange(0, len(text) - length, length)
    rest = len(text) - 1 - len(starts) * length
    if most is not None and most < len(starts):
        starts, rest = starts[np.linspace(0, len(starts) - 1, most).astype(int)], 0
    for i in range(0, len(starts), batch_size):
        yield windows(text, starts[i : i + batch_size], length)
    if rest > 0:
        yield windows(text, np.array([len(text) - 1 - rest]), rest)


def check_length(text: np.ndarray, length: int, what: str = "the text") -> None:
    """Raise ValueError, naming `what`, unless one window and the token after it fit into the text."""
    if len(text) <= length:
        raise ValueError(f"{what} has {len(text)} tokens: too short for one window of {length} and the token after it.")
