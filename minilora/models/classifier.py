"""BERT with a classifier: pooling, head, loss, and sentence embeddings. Module names as in BertForSequenceClassification.

    logits = p W_c + b_c        p = tanh(f W_p + b_p), f the first row of each sequence of h; or p the mean of its rows

The first is BERT's pooler, the second what sentence encoders use.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array, Rng, as_like, generator
from minilora.functional.attention import Offsets
from minilora.layers import Dropout, Layer, Linear, Output, Saved
from minilora.models.bert import Bert, BertConfig
from minilora.models.stack import Prefix, initialise


class BertClassifier(Layer):
    """ids (T,), offsets of n sequences -> logits (n, num_labels). Initial values (BERT's): N(0, 0.02^2), biases zero."""

    model_type = "bert"
    weights_are_in_out = False
    output_head = "classifier"

    def __init__(self, config: BertConfig, *, rng: Rng = None, dtype: Any = "float32") -> None:
        self.config = config
        rng = generator(rng)
        self.bert = Bert(config, rng, dtype)
        self.dropout = Dropout(config.dropout)
        self.classifier = Linear(config.hidden_size, config.num_labels, rng=rng, dtype=dtype)
        initialise(self, rng)

    def forward(
        self,
        x: Array,
        keep: bool = True,
        need_dx: bool = False,
        offsets: Offsets = None,
        token_types: np.ndarray | None = None,
        prefix: Prefix | None = None,
    ) -> Output:
        """x are token ids of packed sequences, `offsets` their bounds. There is no dx: ids are integers.

        BERT's pooler reads the first row of each sequence, so the last block computes no others. prefix: the result of `prefix`.
        """
        pooler = self.bert.pooler if self.config.pooling == "first" else None
        at_h = self.bert.embeddings.trainable or self.bert.encoder.trainable
        at_p = at_h or (pooler is not None and pooler.trainable)
        bounds = F.bounds_of(offsets, len(x))

        rows = None if pooler is None else bounds[:-1]
        h, s_bert = self.bert.forward(x, keep and at_h, offsets=offsets, rows=rows, prefix=prefix, token_types=token_types)
        if pooler is None:
            p, s_pool = K.product(_averages(bounds, h), h), None
        else:
            z, s_dense = pooler.dense.forward(h, keep=keep and at_p, need_dx=at_h)
            p, s_act = pooler.act.forward(z, keep=keep and at_p)
            s_pool = s_dense, s_act
        p, s_drop = self.dropout.forward(p, keep=keep and at_p)
        logits, s_classifier = self.classifier.forward(p, keep=keep, need_dx=at_p)
        return logits, self.save(need_dx, at_h, at_p, bounds, s_bert, s_pool, s_drop, s_classifier) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        at_h, at_p, bounds, s_bert, s_pool, s_drop, s_classifier = self.load(saved, need_dx)
        dp: Any = self.classifier.backward(dy, s_classifier, need_dx=at_p)  # logits = p W_c + b_c
        if not at_p:
            return
        dp = self.dropout.backward(dp, s_drop)
        if s_pool is None:
            dh = K.product(_averages(bounds, dp).T, dp)  #               p = mean of each sequence
        else:
            s_dense, s_act = s_pool
            dz = self.bert.pooler.act.backward(dp, s_act)  #             p = tanh(z)
            dh = self.bert.pooler.dense.backward(dz, s_dense, need_dx=at_h)  # z = f W_p + b_p, f the first rows of h
        if at_h:
            self.bert.backward(dh, s_bert)  #                            h = bert(ids)

    def prefix(self, ids: Array, offsets: Offsets = None) -> Prefix | None:
        """The output of the frozen blocks at the bottom, the same in every epoch (models/stack.py); None if there are none."""
        return self.bert.prefix(ids, offsets)

    def loss(
        self,
        ids: Array,
        labels: np.ndarray,
        offsets: Offsets = None,
        count: int | None = None,
        keep: bool = True,
        prefix: Prefix | None = None,
    ) -> Output:
        """The sum over labelled sequences of -log p(label), in regression of (logit - label)^2, over `count` (default: their number).

        ids (T,); labels (n,) on the host, one for each sequence: integers, or numbers in regression; -100 means no label.
        Raises ValueError when there is not one label for each sequence, or when no sequence is labelled and no `count` is given.
        """
        n = len(F.bounds_of(offsets, len(ids))) - 1
        if labels.shape != (n,):
            raise ValueError(f"loss: labels have shape {labels.shape}, but there are {n} sequences; one label a sequence is needed.")
        rows = np.flatnonzero(labels != F.IGNORE)
        if rows.size == 0 and count is None:
            raise ValueError("loss: no sequence is labelled.")
        logits, saved = self.forward(ids, keep=keep, offsets=offsets, prefix=prefix)
        N = rows.size if count is None else count
        if self.config.regression or rows.size == 0:  # without a label, every error is 0
            z = K.upcast(logits)
            error = (z - as_like(labels[:, None].astype(z.dtype), z)) * as_like((labels != F.IGNORE)[:, None], z)
            loss, dlogits = (error * error).sum() / N, (error * (2 / N)).astype(logits.dtype, copy=False)
        else:
            loss, dlogits = K.cross_entropy(logits, labels, times=rows.size / N)
        return loss, self.save(False, dlogits, saved) if keep else None

    def loss_backward(self, saved: Saved | None) -> None:
        """Add the gradients of `loss` to the trainable parameters."""
        dlogits, s_logits = self.load(saved, False)
        self.backward(dlogits, s_logits)

    def embed(self, ids: Array, offsets: Offsets = None) -> Array:
        """(n, d): the mean of the hidden states of each sequence, as in sentence encoders. Inference only; not normalised."""
        h, _ = self.bert.forward(ids, keep=False, offsets=offsets)
        return K.product(_averages(F.bounds_of(offsets, len(ids)), h), h)


def _averages(bounds: np.ndarray, like: Array) -> Array:
    """The matrix (n, T) of which row i is 1 / length in the tokens of sequence i: its product with h (T, d) is the mean of each."""
    lengths = np.diff(bounds)
    M = (np.arange(len(lengths))[:, None] == np.repeat(np.arange(len(lengths)), lengths)) / lengths[:, None]
    return as_like(M.astype(like.dtype), like)
