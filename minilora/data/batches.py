"""Text as batches of packed sequences, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minilora.functional import IGNORE


@dataclass
class Batch:
    """ids (T,), sequences bounded by offsets (n + 1,), and labels; all on the host.

    labels is (T,), where labels[t] is the token that row t must predict, or -100; with per_sequence it is (n,), a class for each sequence.
    ends_epoch: the last batch of a pass over the data. Raises ValueError for shapes that do not fit.
    """

    ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray
    per_sequence: bool = False
    ends_epoch: bool = False

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
        """At most n shards of whole sequences with about equal numbers of tokens; views of this batch, in order."""
        ideal = (int(self.offsets[-1]) * i / n for i in range(1, n))
        cuts = {0, len(self.offsets) - 1, *(int(np.argmin(np.abs(self.offsets - at))) for at in ideal)}  # the nearest boundaries
        return [self.sequences(a, b) for a, b in pairwise(sorted(cuts))]

    def sequences(self, a: int, b: int) -> Batch:
        """Sequences a to b, without b."""
        first, last = self.offsets[a], self.offsets[b]
        labels = self.labels[a:b] if self.per_sequence else self.labels[first:last]
        return Batch(self.ids[first:last], labels, self.offsets[a : b + 1] - first, self.per_sequence)


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
