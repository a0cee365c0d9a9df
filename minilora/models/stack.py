"""The blocks of a model, one after the other: what runs forward, what is saved, and what runs backward.

    x_i = block_i(x_{i-1})        dx_{i-1} = block_i'(dx_i)

Nothing is saved below the lowest trainable block, and nothing runs backward there. Of the last block only some rows may be asked
for, those that the head reads. The frozen blocks at the bottom give the same for the same text every time: what they gave may be
passed in, see `Prefix`. With `recompute`, a block saves its input alone, and runs forward once more in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minilora import functional as F
from minilora.backend import Array
from minilora.layers import Dropout, Layer, Saved


class Prefix(NamedTuple):
    """x (T, d), what the first `blocks` blocks of a model gave."""

    blocks: int
    x: Array


class Ran(NamedTuple):
    """What backward needs of a run: needs[i] tells whether the gradient of the input of block i is needed."""

    needs: list[bool]
    saves: list[Any]
    taken: tuple[np.ndarray, int] | None  # the rows that were taken of the last block's T, where it ran on all of them


class Again(NamedTuple):
    """In place of what a block saves: how to run it again."""

    x: Array
    options: dict[str, Any]
    calls: list[int]  # of its dropouts, so that the same masks are drawn


def frozen_blocks(blocks: Sequence[Layer], embeddings_trainable: bool) -> int:
    """How many blocks at the bottom have nothing to train, at or below them; the last block is never counted."""
    if embeddings_trainable:
        return 0
    return next((i for i, block in enumerate(blocks) if block.trainable), len(blocks) - 1)


def run_blocks(
    blocks: Sequence[Layer],
    x: Array,
    need_dx: bool,
    keep: bool,
    first: int = 0,
    rows: np.ndarray | None = None,
    recompute: bool = False,
    **options: Any,
) -> tuple[Array, Ran]:
    """x (T, d) through blocks[first:] -> y (T, d), or its `rows` (R, d). need_dx: will the gradient of the first input be needed?"""
    needs: list[bool] = [need_dx]
    saves: list[Any] = []
    taken = None
    if rows is not None and any(layer.every_row for _, layer in blocks[-1].modules()):
        taken, rows = (rows, len(x)), None
    for i, block in enumerate(blocks):
        needs.append(needs[-1] or block.trainable)
        if i < first:
            saves.append(None)
            continue
        given = {"need_dx": needs[i], "rows": rows if i == len(blocks) - 1 else None, **options}
        again = Again(x, given, [d.calls for d in _dropouts(block)]) if recompute and keep and needs[-1] else None
        x, saved = block.forward(x, keep=keep and needs[-1], **given)
        saves.append(again or saved)
    if taken is not None:
        x = F.take_rows(x, taken[0])
    return x, Ran(needs, saves, taken)


def run_blocks_backward(blocks: Sequence[Layer], dy: Array, ran: Ran) -> Array | None:
    """dx of the input of the lowest block, or None where nobody needs it."""
    if ran.taken is not None and ran.needs[-1]:
        dy = F.take_rows_backward(dy, *ran.taken)
    for i in reversed(range(len(blocks))):
        if not ran.needs[i + 1]:
            return None
        saved = ran.saves[i]
        if isinstance(saved, Again):
            saved = _run_again(blocks[i], saved)
        dy = blocks[i].backward(dy, saved, need_dx=ran.needs[i])
    return dy if ran.needs[0] else None


def _run_again(block: Layer, again: Again) -> Saved | None:
    now = [d.calls for d in _dropouts(block)]
    for dropout, calls in zip(_dropouts(block), again.calls, strict=True):
        dropout.calls = calls
    _, saved = block.forward(again.x, keep=True, **again.options)
    for dropout, calls in zip(_dropouts(block), now, strict=True):
        dropout.calls = calls
    return saved


def _dropouts(block: Layer) -> list[Dropout]:
    return [layer for _, layer in block.modules() if isinstance(layer, Dropout)]
