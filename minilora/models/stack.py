"""What BERT, GPT-2 and Llama share below the head: embeddings, a list of blocks and, in decoders, a last norm.

    x_0 = embed(ids)        x_i = block_i(x_{i-1})        h = norm(x_L)

Nothing is saved below the lowest trainable block, and nothing runs backward there. Three more savings:

rows        the head may read only some rows: the last block computes no others
prefix      frozen blocks at the bottom return the same result for the same text every time; it can be computed once and passed in
recompute   a block saves only its input, and runs forward again in the backward pass
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array
from minilora.layers import Dropout, Layer, Saved
from minilora.layers.block import Offsets, Output, Rows


class Parts(NamedTuple):
    """Which layers of a body have which role. The names of their attributes are those of the published checkpoint."""

    embeddings: Sequence[Any]  # the first one is the table of token embeddings
    blocks: Sequence[Any]
    norm: Layer | None = None


class Prefix(NamedTuple):
    """x (T, d): the output of the first `blocks` blocks of a model."""

    blocks: int
    x: Array


class Body(Layer):
    """ids (T,) -> h (T, d), the hidden states that a head reads. A model states `parts`, `embed` and `embed_backward`."""

    recompute = False  # True: less memory, more time

    def __init__(self, config: Any) -> None:
        self.config = config

    def parts(self) -> Parts:
        raise NotImplementedError(f"{type(self).__name__} has no parts.")

    def embed(self, ids: Array, places: np.ndarray, keep: bool, **inputs: Any) -> tuple[Array, Any]:
        """x_0 (T, d) and what `embed_backward` reads. places (T,): the position of each token in its sequence."""
        raise NotImplementedError(f"{type(self).__name__} has no embed.")

    def embed_backward(self, dx: Array, saved: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__} has no embed_backward.")

    def block_inputs(self, places: np.ndarray, like: Array) -> dict[str, Any]:
        """Further arguments of every block, such as Llama's rotary tables, where the activations `like` are."""
        return {}

    def places(self, tokens: int, offsets: Offsets = None) -> np.ndarray:
        """(T,) the position of each token. Raises ValueError for a sequence beyond max_position_embeddings."""
        return F.positions(tokens, offsets, self.config.max_position_embeddings)

    def forward(
        self,
        x: Array,
        keep: bool = True,
        need_dx: bool = False,
        offsets: Offsets = None,
        rows: Rows = None,
        prefix: Prefix | None = None,
        **inputs: Any,
    ) -> Output:
        """x are token ids of packed sequences, `offsets` their bounds. There is no dx: ids are integers.

        rows: the rows of h to return, by default all. prefix: the result of `self.prefix` for these ids. inputs: for `embed`.
        """
        embeddings, blocks, norm = self.parts()
        at_x, s_x, s_norm = any(layer.trainable for layer in embeddings), None, None
        places = self.places(len(x), offsets)
        if prefix is None:
            h, s_x = self.embed(x, places, keep and at_x, **inputs)
            prefix = Prefix(0, h)
        first, h = prefix
        h, ran = run_blocks(blocks[first:], h, at_x, keep, rows, self.recompute, offsets=offsets, **self.block_inputs(places, h))
        if norm is not None:
            h, s_norm = norm.forward(h, keep=keep, need_dx=ran.needs[-1])
        return h, self.save(need_dx, first, s_x, ran, s_norm) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        first, s_x, ran, s_norm = self.load(saved, need_dx)
        _, blocks, norm = self.parts()
        dh: Any = dy if norm is None else norm.backward(dy, s_norm, need_dx=ran.needs[-1])  # h = norm(x_L)
        dx = run_blocks_backward(blocks[first:], dh, ran)  #                                  x_i = block_i(x_{i-1})
        if dx is not None:
            self.embed_backward(dx, s_x)  #                                                   x_0 = embed(ids)

    def prefix(self, ids: Array, offsets: Offsets = None) -> Prefix | None:
        """The output of the frozen blocks at the bottom for these ids, None if there are none. The last block never counts as frozen."""
        embeddings, blocks, _ = self.parts()
        n = next((i for i, block in enumerate(blocks) if block.trainable), len(blocks) - 1)
        if n == 0 or any(layer.trainable for layer in embeddings):
            return None
        places = self.places(len(ids), offsets)
        x, _ = self.embed(ids, places, keep=False)
        return Prefix(n, run_blocks(blocks[:n], x, False, False, offsets=offsets, **self.block_inputs(places, x))[0])


class Ran(NamedTuple):
    """What backward reads of a run: needs[i] says whether the gradient of the input of block i is needed."""

    needs: list[bool]
    saves: list[Any]
    taken: tuple[np.ndarray, int] | None  # (rows, T) where the last block ran on all T rows, and some were taken of its output


class Again(NamedTuple):
    """In place of what a block saves: how to run it again."""

    x: Array
    options: dict[str, Any]
    calls: list[int]  # of its dropouts, so that they draw the same masks


def run_blocks(
    blocks: Sequence[Layer], x: Array, need_dx: bool, keep: bool, rows: Rows = None, recompute: bool = False, **inputs: Any
) -> tuple[Array, Ran]:
    """x (T, d) through all blocks -> y (T, d), or its `rows` (R, d). need_dx: whether the gradient of x will be needed."""
    needs: list[bool] = [need_dx]
    saves: list[Any] = []
    taken = None
    if rows is not None and any(layer.every_row for _, layer in blocks[-1].modules()):
        taken, rows = (rows, len(x)), None
    for i, block in enumerate(blocks):
        needs.append(needs[-1] or block.trainable)
        options = {"need_dx": needs[i], "rows": rows if i == len(blocks) - 1 else None, **inputs}
        again = Again(x, options, [d.calls for d in _dropouts(block)]) if recompute and keep and needs[-1] else None
        x, saved = block.forward(x, keep=keep and needs[-1], **options)
        saves.append(again or saved)
    if taken is not None:
        x = K.take_rows(x, taken[0])
    return x, Ran(needs, saves, taken)


def run_blocks_backward(blocks: Sequence[Layer], dy: Array, ran: Ran) -> Array | None:
    """dx of the input of the lowest block, or None where it is not needed."""
    if ran.taken is not None and ran.needs[-1]:
        dy = K.take_rows_backward(dy, *ran.taken)
    for i in reversed(range(len(blocks))):
        if not ran.needs[i + 1]:
            return None
        saved = ran.saves[i]
        if isinstance(saved, Again):
            saved = _run_again(blocks[i], saved)
        dy = blocks[i].backward(dy, saved, need_dx=ran.needs[i])  # x_i = block_i(x_{i-1})
    return dy if ran.needs[0] else None


def _run_again(block: Layer, again: Again) -> Saved | None:
    """Forward once more, with the dropout masks of the first time; afterwards the dropouts count on from where they were."""
    dropouts = _dropouts(block)
    now = [d.calls for d in dropouts]
    for dropout, calls in zip(dropouts, again.calls, strict=True):
        dropout.calls = calls
    _, saved = block.forward(again.x, keep=True, **again.options)
    for dropout, calls in zip(dropouts, now, strict=True):
        dropout.calls = calls
    return saved


def _dropouts(block: Layer) -> list[Dropout]:
    return [layer for _, layer in block.modules() if isinstance(layer, Dropout)]
