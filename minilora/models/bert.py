"""BERT: an encoder of post-norm blocks (arXiv 1810.04805). Module names as in BertForSequenceClassification.

    x_0 = LN(word[ids] + position[place] + token_type[type])        x_i = block_i(x_{i-1})        h = x_L

The classifier and its loss: models/classifier.py. The published checkpoint keeps its weights as (out, in); they are transposed when
it is read, as views.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from minilora import kernels as K
from minilora.backend import Array, constant
from minilora.functional.attention import Offsets, Rows
from minilora.layers import GELU, Dropout, Embedding, Layer, LayerNorm, Linear, Output, ReLU, Saved, Tanh
from minilora.models.attention import SelfAttention
from minilora.models.config_file import ModelConfig
from minilora.models.stack import Body, Parts

_ACTIVATIONS: dict[str, Callable[[], Layer]] = {
    "gelu": GELU,
    "gelu_new": lambda: GELU("tanh"),
    "gelu_pytorch_tanh": lambda: GELU("tanh"),
    "relu": ReLU,
}


@dataclass
class BertConfig(ModelConfig):
    """Field names as in the config.json of a published BERT, and two more. Raises ValueError for what does not fit.

    problem_type: "single_label_classification" (cross-entropy), "regression" (squared error, num_labels 1), None: by num_labels.
    pooling: what the classifier reads; "first" is BERT's pooler, "mean" the mean over the tokens of a sequence, for sentence encoders.
    pad_token_id: the row of the word embeddings that gets no gradient, as in torch; 0 if config.json has none, None for no such row.
    dropout: in training; the rates in the file are those of pre-training and are not used.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    num_labels: int = 2
    id2label: dict[int, str] | None = None
    problem_type: str | None = None
    pooling: str = "first"
    pad_token_id: int | None = None
    dropout: float = 0.0

    choices: ClassVar[Any] = {
        "hidden_act": tuple(_ACTIVATIONS),
        "problem_type": (None, "single_label_classification", "regression"),
        "pooling": ("first", "mean"),
    }
    fixed: ClassVar[Any] = {"position_embedding_type": ("absolute",), "is_decoder": (False,), "is_causal": (False,)}
    neutral: ClassVar[Any] = """tie_word_embeddings
        directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type"""

    def __post_init__(self) -> None:
        self.check()
        self.check_multiple("hidden_size", "num_attention_heads")
        if self.id2label is not None and sorted(self.id2label) != list(range(self.num_labels)):
            raise ValueError(f"BertConfig: id2label must name the labels 0 to {self.num_labels - 1}, got {sorted(self.id2label)[:8]}.")
        if self.problem_type is not None and (self.problem_type == "regression") != self.regression:
            raise ValueError(f"BertConfig: problem_type {self.problem_type!r} does not go with num_labels {self.num_labels}.")

    @property
    def regression(self) -> bool:
        """Whether the label is a number. As in transformers, it is one where num_labels is 1."""
        return self.num_labels == 1

    @property
    def class_names(self) -> list[str]:
        """The names of the labels in order; as in transformers LABEL_0, LABEL_1, ... where config.json has none."""
        return [(self.id2label or {}).get(i, f"LABEL_{i}") for i in range(self.num_labels)]

    @classmethod
    def read(cls, raw: dict[str, Any], where: str) -> dict[str, Any]:
        """The fields in a config.json, whose id2label says how many labels there are."""
        values = super().read({"pad_token_id": 0, **raw}, where)
        names = values.get("id2label")
        if names is not None:
            if not isinstance(names, dict) or not all(re.fullmatch(r"[0-9]{1,9}", str(i)) for i in names):
                raise ValueError(f"{where}: id2label must be a table of labels by number, got {names!r:.80}.")
            values["id2label"] = {int(i): str(label) for i, label in names.items()}
            values.setdefault("num_labels", len(names))
        return values

    def to_json(self) -> dict[str, Any]:
        """The fields as config.json keeps them."""
        left_out = {"num_labels", "id2label"} | ({"pooling"} if self.pooling == "first" else set())
        result = {name: value for name, value in super().to_json().items() if name not in left_out}
        labels = {"id2label": {str(i): name for i, name in enumerate(self.class_names)}}
        return {"model_type": "bert", **result, **labels, "label2id": {name: i for i, name in enumerate(self.class_names)}}


class BertSelfAttention(SelfAttention):
    """o = attention(x W_q, x W_k, x W_v), bidirectional.   x (T, d) -> o (T, d), or its `rows` (R, d).

    The bias of `key` has gradient zero: it adds the same number to all scores of a row, which softmax ignores.
    """

    causal = False
    names = "query", "key", "value"


class Names(Layer):
    """Layers under names that a checkpoint has; the layer that holds this one runs them."""

    def __init__(self, /, **layers: Any) -> None:
        vars(self).update(layers)


class BertLayer(Layer):
    """A post-norm block, x (T, d) -> y (T, d), or the requested `rows` of it, (R, d):

        a = attention(x) W_o        z_1 = x[rows] + a        h = LN_1(z_1)
        m = gelu(h W_i) W_2         z_2 = h + m              y = LN_2(z_2)

    The norms are on the residual path: every gradient passes through both of them, and is split at each sum.
    """

    def __init__(self, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        def dense(d_in: int, d_out: int) -> Linear:
            return Linear(d_in, d_out, rng=rng, dtype=dtype)

        def into_residual(d_in: int) -> Names:
            norm = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype)
            return Names(dense=dense(d_in, c.hidden_size), LayerNorm=norm, dropout=Dropout(c.dropout))

        d, n = c.hidden_size, c.num_attention_heads
        attention = BertSelfAttention(d, n, n, d // n, True, rng, dtype)
        self.attention: Any = Names(self=attention, output=into_residual(c.hidden_size))
        self.intermediate: Any = Names(dense=dense(c.hidden_size, c.intermediate_size), act=_ACTIVATIONS[c.hidden_act]())
        self.output: Any = into_residual(c.intermediate_size)

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True, offsets: Offsets = None, rows: Rows = None) -> Output:
        attn, out_1, inter, out_2 = self.attention.self, self.attention.output, self.intermediate, self.output
        # The gradient is needed at each place that has something trainable at or below it.
        at_a = need_dx or attn.trainable
        at_z_1 = at_a or out_1.dense.trainable
        at_h = at_z_1 or out_1.LayerNorm.trainable
        at_i = at_h or inter.trainable
        at_z_2 = at_i or out_2.dense.trainable

        a, s_attn = attn.forward(x, keep=keep and at_a, need_dx=need_dx, offsets=offsets, rows=rows)
        a, s_dense_1 = out_1.dense.forward(a, keep=keep and at_z_1, need_dx=at_a)
        a, s_drop_1 = out_1.dropout.forward(a, keep=keep and at_z_1, need_dx=at_z_1)
        h, s_ln_1 = out_1.LayerNorm.forward(K.add(K.take_rows(x, rows), a), keep=keep and at_h, need_dx=at_z_1)

        m, s_dense_i = inter.dense.forward(h, keep=keep and at_i, need_dx=at_h)
        m, s_act = inter.act.forward(m, keep=keep and at_i, need_dx=at_i)
        m, s_dense_2 = out_2.dense.forward(m, keep=keep and at_z_2, need_dx=at_i)
        m, s_drop_2 = out_2.dropout.forward(m, keep=keep and at_z_2, need_dx=at_z_2)
        y, s_ln_2 = out_2.LayerNorm.forward(K.add(h, m), keep=keep, need_dx=at_z_2)

        if not keep:
            return y, None
        needs = (at_a, at_z_1, at_h, at_i, at_z_2)
        saves = (s_attn, s_dense_1, s_drop_1, s_ln_1, s_dense_i, s_act, s_dense_2, s_drop_2, s_ln_2)
        return y, self.save(need_dx, needs, rows, len(x), *saves)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        needs, rows, T, s_attn, s_dense_1, s_drop_1, s_ln_1, s_dense_i, s_act, s_dense_2, s_drop_2, s_ln_2 = self.load(saved, need_dx)
        at_a, at_z_1, at_h, at_i, at_z_2 = needs
        attn, out_1, inter, out_2 = self.attention.self, self.attention.output, self.intermediate, self.output

        dz_2: Any = out_2.LayerNorm.backward(dy, s_ln_2, need_dx=at_z_2)  # y = LN_2(z_2)
        if not at_z_2:
            return None
        dm: Any = out_2.dropout.backward(dz_2, s_drop_2)  #             z_2 = h + m
        dm = out_2.dense.backward(dm, s_dense_2, need_dx=at_i)  #       m = gelu(h W_i) W_2
        if not at_i:
            return None
        dm = inter.act.backward(dm, s_act)
        dh: Any = inter.dense.backward(dm, s_dense_i, need_dx=at_h)
        if not at_h:
            return None
        dh = K.add(dz_2, dh)  #                                         h feeds z_2 twice: directly, and through m

        dz_1: Any = out_1.LayerNorm.backward(dh, s_ln_1, need_dx=at_z_1)  # h = LN_1(z_1)
        if not at_z_1:
            return None
        da: Any = out_1.dropout.backward(dz_1, s_drop_1)  #             z_1 = x[rows] + a
        da = out_1.dense.backward(da, s_dense_1, need_dx=at_a)  #       a = attention(x) W_o
        if not at_a:
            return None
        dx = attn.backward(da, s_attn, need_dx=need_dx)
        return K.add(K.take_rows_backward(dz_1, rows, T), dx) if need_dx else None  # x feeds z_1 twice


class Bert(Body):
    """ids (T,) -> hidden states h (T, d). The pooler is here as in the checkpoint; the classifier runs its layers."""

    def __init__(self, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        super().__init__(c)
        self.embeddings: Any = Names(
            word_embeddings=Embedding(c.vocab_size, c.hidden_size, c.pad_token_id, rng=rng, dtype=dtype),
            position_embeddings=Embedding(c.max_position_embeddings, c.hidden_size, rng=rng, dtype=dtype),
            token_type_embeddings=Embedding(c.type_vocab_size, c.hidden_size, rng=rng, dtype=dtype),
            LayerNorm=LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype),
            dropout=Dropout(c.dropout),
        )
        self.encoder: Any = Names(layer=[BertLayer(c, rng, dtype) for _ in range(c.num_hidden_layers)])
        self.pooler: Any = Names(dense=Linear(c.hidden_size, c.hidden_size, rng=rng, dtype=dtype), act=Tanh())

    def parts(self) -> Parts:
        return Parts([self.embeddings], self.encoder.layer)

    def embed(self, ids: Array, places: np.ndarray, keep: bool, token_types: np.ndarray | None = None) -> tuple[Array, Any]:
        """x_0 = dropout(LN(word[ids] + position[place] + token_type[type])). token_types (T,) are 0 by default."""
        e, types = self.embeddings, np.zeros(len(ids), dtype=np.int64) if token_types is None else token_types
        at_sum = e.word_embeddings.trainable or e.position_embeddings.trainable or e.token_type_embeddings.trainable
        w, s_word = e.word_embeddings.forward(ids, keep=keep and at_sum)
        p, s_place = e.position_embeddings.forward(constant(places, w), keep=keep and at_sum)
        t, s_type = e.token_type_embeddings.forward(types, keep=keep and at_sum)
        h, s_ln = e.LayerNorm.forward(w + p + t, keep=keep, need_dx=at_sum)
        h, s_drop = e.dropout.forward(h, keep=keep)
        return h, (at_sum, s_word, s_place, s_type, s_ln, s_drop)

    def embed_backward(self, dx: Array, saved: Any) -> None:
        e, (at_sum, s_word, s_place, s_type, s_ln, s_drop) = self.embeddings, saved
        dh = e.dropout.backward(dx, s_drop)
        dsum = e.LayerNorm.backward(dh, s_ln, need_dx=at_sum)
        if at_sum:  # word + position + token_type: all three get all of it
            e.token_type_embeddings.backward(dsum, s_type)
            e.position_embeddings.backward(dsum, s_place)
            e.word_embeddings.backward(dsum, s_word)
