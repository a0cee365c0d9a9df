"""Embedding: a table with one row for each token id."""

from __future__ import annotations

from typing import Any

from minilora import kernels as K
from minilora.backend import Array, Rng, generator
from minilora.layers.base import Layer, Output, Parameter, Saved


class Embedding(Layer):
    """y_t = weight[ids_t].   ids (T,) integers in [0, num_embeddings) -> y (T, embedding_dim).

    padding_idx: a row that gets no gradient, as in torch; a negative index counts from the end.
    Initial values: N(0, 0.02^2), as in GPT-2 and BERT. Saved: ids, if the table is trainable. There is no dx: ids are integers.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *, rng: Rng = None, dtype: Any = "float32"
    ) -> None:
        self.padding_idx = padding_idx
        self.weight = Parameter(generator(rng).normal(0, 0.02, size=(num_embeddings, embedding_dim)).astype(dtype))

    def forward(self, x: Array, keep: bool = True, need_dx: bool = False) -> Output:
        y = K.embedding(x, self.weight.data)
        return y, self.save(need_dx, x if self.weight.trainable else None) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        (ids,) = self.load(saved, need_dx)
        if self.weight.trainable:
            self.weight.add_grad(K.embedding_backward(dy, ids, self.weight.data, self.padding_idx))
