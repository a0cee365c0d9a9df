"""Encoders with a classifier: pooling, head, loss, and sentence embeddings. Module names as in transformers' ...ForSequenceClassification.

    logits = p W_c + b_c        p = tanh(f W_p + b_p), f the first row of each sequence of h, or the mean of its rows

In BERT, tanh(f W_p + b_p) is the pooler; sentence encoders leave it out, and p is the mean. DistilBERT has ReLU in place of tanh, and
ModernBERT p = LN(gelu(f W_p)).
"""

from operator import attrgetter
from typing import Any

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array, Rng, as_like, generator
from minilora.functional.attention import Offsets
from minilora.layers import Dropout, Layer, Linear, Output, ReLU, Saved, Sequential, Tanh
from minilora.models.bert import ACTIVATIONS, Bert, BertConfig, put
from minilora.models.modernbert import ModernBert, ModernBertConfig, norm
from minilora.models.stack import Body, Prefix, initialise

# The body, and the layers of the head in order, by their names in the checkpoint. The last part of a name says what a layer is.
_ROBERTA = "roberta", "dropout classifier.dense classifier.tanh dropout classifier.out_proj"
_NAMES = {
    "bert": ("bert", "bert.pooler.dense bert.pooler.tanh dropout classifier"),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": ("distilbert", "pre_classifier relu dropout classifier"),
    "modernbert": ("model", "head.dense head.act head.norm dropout classifier"),
}


class BertClassifier(Layer):
    """ids (T,), offsets of n sequences -> logits (n, num_labels). Initial values (BERT's): N(0, 0.02^2), biases zero."""

    weights_are_in_out = False
    output_head = "classifier"

    def __init__(self, config: BertConfig, *, rng: Rng = None, dtype: Any = "float32") -> None:
        self.config, self.model_type = config, config.model_type
        rng, (body, names) = generator(rng), _NAMES[self.model_type]
        made: dict[str, Any] = {"tanh": Tanh, "relu": ReLU, "dropout": lambda: Dropout(config.dropout)}
        self.names, d = tuple(names.split()), config.hidden_size
        if isinstance(config, ModernBertConfig):
            setattr(self, body, ModernBert(config, rng, dtype))
            made |= {"act": ACTIVATIONS[config.classifier_activation], "norm": lambda: norm(config, dtype)}
            made["dense"] = lambda: Linear(d, d, config.classifier_bias, rng=rng, dtype=dtype)
        else:
            setattr(self, body, Bert(config, rng, dtype))
        for name in self.names:
            n = config.num_labels if name == self.names[-1] else d
            put(self, name, made.get(name.rpartition(".")[2], lambda n=n: Linear(d, n, rng=rng, dtype=dtype))())
        initialise(self, rng)

    @property
    def body(self) -> Body:
        """The attribute that is a Body."""
        return getattr(self, _NAMES[self.model_type][0])

    @property
    def top(self) -> Sequential:
        """The layers of the head, one after the other; for the mean of BERT's tokens, those after its pooler."""
        bare = self.model_type == "bert" and self.config.pooling == "mean"
        return Sequential(*attrgetter(*self.names[2 * bare :])(self))

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

        Where the head reads the first row of each sequence, the last block computes no others. prefix: the result of `body.prefix`.
        """
        embeddings, blocks, last = self.body.parts()
        at_h = any(layer.trainable for layer in (*embeddings, *blocks, *([last] if last else ())))
        bounds, mean = F.bounds_of(offsets, len(x)), self.config.pooling == "mean"
        rows = None if mean else bounds[:-1]
        f, s_body = self.body.forward(x, keep and at_h, offsets=offsets, rows=rows, prefix=prefix, token_types=token_types)
        f = K.product(_averages(bounds, f), f) if mean else f
        logits, s_head = self.top.forward(f, keep=keep, need_dx=at_h)
        return logits, self.save(need_dx, at_h, bounds, s_body, s_head) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        at_h, bounds, s_body, s_head = self.load(saved, need_dx)
        df = self.top.backward(dy, s_head, need_dx=at_h)  #        logits = top(f)
        if not at_h:
            return
        if self.config.pooling == "mean":
            df = K.product(_averages(bounds, df).T, df)  #         f = mean of each sequence of h; otherwise its first rows
        self.body.backward(df, s_body)  #                          h = body(ids)

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
        h, _ = self.body.forward(ids, keep=False, offsets=offsets)
        return K.product(_averages(F.bounds_of(offsets, len(ids)), h), h)


def _averages(bounds: np.ndarray, like: Array) -> Array:
    """The matrix (n, T) of which row i is 1 / length in the tokens of sequence i: its product with h (T, d) is the mean of each."""
    lengths = np.diff(bounds)
    M = (np.arange(len(lengths))[:, None] == np.repeat(np.arange(len(lengths)), lengths)) / lengths[:, None]
    return as_like(M.astype(like.dtype), like)
