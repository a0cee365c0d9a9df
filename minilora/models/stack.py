"""What BERT, GPT-2 and Llama share below the head: embeddings, a list of blocks and, in decoders, a last norm.

    x_0 = embed(ids)        x_i = block_i(x_{i-1})        h = norm(x_L)

Nothing is saved below the lowest trainable block, and nothing runs backward there. Three more savings:

rows        the head may read only some rows: the last block computes no others
prefix      frozen blocks at the bottom return the same result for the same text every time; it can be computed once and passed in
recompute   a block saves only its input, and runs forward again in the backward pass
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array
from minilora.functional.attention import Offsets, Rows
from minilora.layers import Dropout, Layer, Linear, Output, Saved


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
    """ids (T,) -> h (T, d), the hidden states that a head reads. A model states its `parts`."""

    recompute = False  # True: less memory, more time

    def __init__(self, config: Any) -> None:
        self.config = config

    def parts(self) -> Parts:
        raise NotImplementedError(f"{type(self).__name__} has no parts.")

    def embed(self, ids: Array, places: np.ndarray, keep: bool) -> tuple[Array, Any]:
        """x_0 (T, d) and what `embed_backward` reads. places (T,): the position of each token in its sequence."""
        return self.parts().embeddings[0].forward(ids, keep=keep)

    def embed_backward(self, dx: Array, saved: Any) -> None:
        self.parts().embeddings[0].backward(dx, saved)

    def block_inputs(self, places: np.ndarray, like: Array) -> dict[str, Any]:
        """Further arguments of every block, such as Llama's rotary tables, where the activations `like` are."""
        return {}

    def places(self, tokens: int, offsets: Offsets = None) -> np.ndarray:
        """(T,) the position of each token. Raises ValueError for a sequence beyond the model's positions."""
        return F.positions(tokens, offsets, self.config.longest_sequence)

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
        needs, saves = [any(layer.trainable for layer in embeddings)], []  # needs[i]: whether the gradient of x_i is needed
        places, s_x, s_norm = self.places(len(x), offsets), None, None
        if prefix is None:
            h, s_x = self.embed(x, places, keep and needs[0], **inputs)
            prefix = Prefix(0, h)
        first, h = prefix
        taken = None  # the rows to take of the last block's output, where it has to run on all of them
        if any(layer.every_row for _, layer in blocks[-1].modules()):
            rows, taken = None, rows
        options = {"offsets": offsets, **self.block_inputs(places, h)}
        for block in blocks[first:]:
            needs.append(needs[-1] or block.trainable)
            options |= {"need_dx": needs[-2], "rows": rows if block is blocks[-1] else None}
            again = _again(block, h, dict(options)) if self.recompute and keep and needs[-1] else None
            h, s_block = block.forward(h, keep=keep and needs[-1], **options)
            saves.append(again or s_block)
            del s_block  # with `again`, before the next block runs
        h = K.take_rows(h, taken)
        if norm is not None:
            h, s_norm = norm.forward(h, keep=keep, need_dx=needs[-1])
        return h, self.save(need_dx, first, needs, (taken, len(x)), s_x, saves, s_norm) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        first, needs, taken, s_x, saves, s_norm = self.load(saved, need_dx)
        _, blocks, norm = self.parts()
        dh: Any = dy if norm is None else norm.backward(dy, s_norm, need_dx=needs[-1])  # h = norm(x_L)
        if needs[-1]:
            dh = K.take_rows_backward(dh, *taken)
        for i in reversed(range(len(saves))):
            if not needs[i + 1]:
                return
            s_block = saves[i]() if callable(saves[i]) else saves[i]
            dh = blocks[first + i].backward(dh, s_block, need_dx=needs[i])  #            x_i = block_i(x_{i-1})
            del s_block
        if needs[0]:
            self.embed_backward(dh, s_x)  #                                              x_0 = embed(ids)

    def prefix(self, ids: Array, offsets: Offsets = None) -> Prefix | None:
        """The output of the frozen blocks at the bottom for these ids, None if there are none. The last block never counts as frozen."""
        embeddings, blocks, _ = self.parts()
        n = next((i for i, block in enumerate(blocks) if block.trainable), len(blocks) - 1)
        if n == 0 or any(layer.trainable for layer in embeddings):
            return None
        places = self.places(len(ids), offsets)
        x, _ = self.embed(ids, places, keep=False)
        inputs = self.block_inputs(places, x)
        for block in blocks[:n]:
            x, _ = block.forward(x, keep=False, offsets=offsets, **inputs)
        return Prefix(n, x)


def _again(block: Layer, x: Array, options: dict[str, Any]) -> Callable[[], Saved | None]:
    """In place of what a block saves: a function that runs it forward once more, with the dropout masks of the first time.

    Afterwards the dropouts count on from where they were.
    """
    dropouts = [layer for _, layer in block.modules() if isinstance(layer, Dropout)]
    first = [dropout.calls for dropout in dropouts]

    def run() -> Saved | None:
        now = [dropout.calls for dropout in dropouts]
        for dropout, calls in zip(dropouts, first, strict=True):
            dropout.calls = calls
        _, saved = block.forward(x, keep=True, **options)
        for dropout, calls in zip(dropouts, now, strict=True):
            dropout.calls = calls
        return saved

    return run


def initialise(model: Layer, rng: np.random.Generator, std: dict[str, float] | None = None) -> None:
    """Linear layers: weights from N(0, 0.02^2), or the standard deviation that `std` has for a layer of that name, and biases zero."""
    for path, layer in model.modules():
        if isinstance(layer, Linear):
            W = layer.weight.data
            layer.weight.data = rng.normal(0, (std or {}).get(path.rpartition(".")[2], 0.02), W.shape).astype(W.dtype)
            if layer.bias is not None:
                layer.bias.data[...] = 0
