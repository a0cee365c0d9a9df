"""BERT: an encoder of post-norm blocks (arXiv 1810.04805), with a classifier. Module names as in BertForSequenceClassification.

    x_0 = LN(word[ids] + position[place] + token_type[type])        x_i = block_i(x_{i-1})
    logits = tanh(f W_p + b_p) W_c + b_c,   f the first row of each sequence of x_L

The published checkpoint keeps its weights as (out, in); formats/checkpoint.py turns them, as views.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array, Rng, as_like, constant, generator
from minilora.layers import GELU, Dropout, Embedding, Layer, LayerNorm, Linear, ReLU, Saved, Tanh
from minilora.models.config_file import check_pad, check_types, made, read_fields
from minilora.models.stack import Prefix, frozen_blocks, run_blocks, run_blocks_backward

_ACTIVATIONS: dict[str, Callable[[], Layer]] = {
    "gelu": GELU,
    "gelu_new": lambda: GELU("tanh"),
    "gelu_pytorch_tanh": lambda: GELU("tanh"),
    "relu": ReLU,
}
_TASKS = (None, "single_label_classification", "regression")


@dataclass
class BertConfig:
    """Field names as in the config.json of a published BERT, and two more. Raises ValueError for what does not fit.

    problem_type: "single_label_classification" (cross-entropy), "regression" (squared error, num_labels 1), None: as num_labels says.
    pooling: what the classifier reads; "first" is BERT's pooler, "mean" the mean over the tokens of a sequence, for sentence encoders.
    pad_token_id: the row of the word embeddings that gets no gradient, as in torch; 0 where a config.json does not say, None is none.
    dropout: in training; the rates in the file are those of its pre-training and are not taken over.
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

    def __post_init__(self) -> None:
        sizes = [field.name for field in fields(self) if field.type == "int"]
        check_types(BertConfig, vars(self), "BertConfig", " ".join([*sizes, "layer_norm_eps"]))
        check_pad(self.pad_token_id, self.vocab_size)
        if self.hidden_size % self.num_attention_heads:
            heads = self.num_attention_heads
            raise ValueError(f"BertConfig: hidden_size {self.hidden_size} is not a multiple of num_attention_heads {heads}.")
        for name, allowed in (("hidden_act", tuple(_ACTIVATIONS)), ("problem_type", _TASKS), ("pooling", ("first", "mean"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"BertConfig: {name} is {getattr(self, name)!r}; supported: {', '.join(map(str, allowed))}.")
        if self.id2label is not None and sorted(self.id2label) != list(range(self.num_labels)):
            raise ValueError(f"BertConfig: id2label must name the labels 0 to {self.num_labels - 1}, got {sorted(self.id2label)[:8]}.")
        if self.problem_type is not None and (self.problem_type == "regression") != self.regression:
            raise ValueError(f"BertConfig: problem_type {self.problem_type!r} does not go with num_labels {self.num_labels}.")

    @property
    def regression(self) -> bool:
        """Is the label a number? As in transformers, one label means so."""
        return self.num_labels == 1

    @property
    def class_names(self) -> list[str]:
        """The names of the labels in order, as transformers has them: LABEL_0, LABEL_1, ... where config.json names none."""
        return [(self.id2label or {}).get(i, f"LABEL_{i}") for i in range(self.num_labels)]

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> BertConfig:
        """The configuration in a config.json; `where` is its name for messages. Raises ValueError for what is not supported."""
        values = read_fields({"pad_token_id": 0, **raw}, where, cls, _FIXED, _NEUTRAL)
        names = values.get("id2label")
        if names is not None:
            if not isinstance(names, dict) or not all(re.fullmatch(r"[0-9]{1,9}", str(i)) for i in names):
                raise ValueError(f"{where}: id2label must be a table of labels by number, got {names!r:.80}.")
            values["id2label"] = {int(i): str(label) for i, label in names.items()}
            values.setdefault("num_labels", len(names))
        return made(cls, values, where)

    def to_json(self) -> dict[str, Any]:
        """The fields as config.json keeps them."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("num_labels", "id2label", "dropout", "pooling")}
        if self.pooling != "first":
            told["pooling"] = self.pooling
        names = list(enumerate(self.class_names))
        labels = {"id2label": {str(i): name for i, name in names}, "label2id": {name: i for i, name in names}}
        return {"model_type": "bert", **told, **labels}


_FIXED = {"position_embedding_type": ("absolute",), "is_decoder": (False,), "is_causal": (False,)}
_NEUTRAL = """tie_word_embeddings
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type"""


class BertEmbeddings(Layer):
    """x = LN(word[ids] + position[place in its sequence] + token_type[type]).   ids (T,) -> x (T, d). Dropout follows."""

    def __init__(self, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        self.word_embeddings = Embedding(c.vocab_size, c.hidden_size, c.pad_token_id, rng=rng, dtype=dtype)
        self.position_embeddings = Embedding(c.max_position_embeddings, c.hidden_size, rng=rng, dtype=dtype)
        self.token_type_embeddings = Embedding(c.type_vocab_size, c.hidden_size, rng=rng, dtype=dtype)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype)
        self.dropout = Dropout(c.dropout)

    def forward(
        self,
        x: Array,
        keep: bool = True,
        need_dx: bool = False,
        offsets: Sequence[int] | None = None,
        token_types: np.ndarray | None = None,
    ) -> tuple[Array, Saved | None]:
        """x are token ids, token_types (T,) are 0 unless given. There is no dx: ids are integers."""
        places = F.positions(len(x), offsets, self.position_embeddings.weight.data.shape[0])
        types = np.zeros(len(x), dtype=np.int64) if token_types is None else token_types
        at_sum = self.word_embeddings.trainable or self.position_embeddings.trainable or self.token_type_embeddings.trainable
        w, s_word = self.word_embeddings.forward(x, keep=keep and at_sum)
        p, s_place = self.position_embeddings.forward(constant(places, w), keep=keep and at_sum)
        t, s_type = self.token_type_embeddings.forward(types, keep=keep and at_sum)
        h, s_ln = self.LayerNorm.forward(w + p + t, keep=keep, need_dx=at_sum)
        h, s_drop = self.dropout.forward(h, keep=keep)
        return h, self.save(need_dx, at_sum, s_word, s_place, s_type, s_ln, s_drop) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        at_sum, s_word, s_place, s_type, s_ln, s_drop = self.load(saved, need_dx)
        dh = self.dropout.backward(dy, s_drop)
        dsum = self.LayerNorm.backward(dh, s_ln, need_dx=at_sum)
        if at_sum:  # word + position + token_type: all three get all of it
            self.token_type_embeddings.backward(dsum, s_type)
            self.position_embeddings.backward(dsum, s_place)
            self.word_embeddings.backward(dsum, s_word)


class BertSelfAttention(Layer):
    """q = x W_q,  k = x W_k,  v = x W_v;   o = attention(q, k, v), in both directions.   x (T, d) -> o (T, d), or its `rows` (R, d).

    Saved, if a gradient has to pass: q, k, v and the probabilities. The bias of `key` has gradient zero: it adds the same
    number to all scores of a row, and softmax does not see that.
    """

    def __init__(self, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        self.n_head = c.num_attention_heads
        self.query = Linear(c.hidden_size, c.hidden_size, rng=rng, dtype=dtype)
        self.key = Linear(c.hidden_size, c.hidden_size, rng=rng, dtype=dtype)
        self.value = Linear(c.hidden_size, c.hidden_size, rng=rng, dtype=dtype)

    def forward(
        self, x: Array, keep: bool = True, need_dx: bool = True, offsets: Sequence[int] | None = None, rows: np.ndarray | None = None
    ) -> tuple[Array, Saved | None]:
        need = {
            f"d{name}"
            for name, dense in (("q", self.query), ("k", self.key), ("v", self.value))
            if need_dx or dense.trainable  # who needs the gradient of its output?
        }
        q, s_q = self.query.forward(F.take_rows(x, rows), keep=keep and "dq" in need, need_dx=need_dx)
        k, s_k = self.key.forward(x, keep=keep and "dk" in need, need_dx=need_dx)
        v, s_v = self.value.forward(x, keep=keep and "dv" in need, need_dx=need_dx)
        o, P = K.attention(q, k, v, self.n_head, offsets, causal=False, keep=keep and bool(need), rows=rows)
        if not keep:
            return o, None
        return o, self.save(need_dx, need, (q, k, v, P, offsets, rows) if need else None, s_q, s_k, s_v)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        need, through, s_q, s_k, s_v = self.load(saved, need_dx)
        if not need:
            return None
        q, k, v, P, offsets, rows = through
        dq, dk, dv = K.attention_backward(dy, q, k, v, P, self.n_head, offsets, need=need, rows=rows)  # o = attention(q, k, v)
        dx_q = dx_k = dx_v = None
        if "dv" in need:
            dx_v = self.value.backward(dv, s_v, need_dx=need_dx)  # v = x W_v
        if "dk" in need:
            dx_k = self.key.backward(dk, s_k, need_dx=need_dx)  #   k = x W_k
        if "dq" in need:
            dx_q = self.query.backward(dq, s_q, need_dx=need_dx)  # q = x[rows] W_q
        # x feeds all three
        return K.add(K.add(F.take_rows_backward(dx_q, rows, len(k)), dx_k), dx_v) if need_dx else None


class BertProjection(Layer):
    """Names only: the dense layer into the residual stream, its dropout and the norm after the sum. BertLayer runs them."""

    def __init__(self, d_in: int, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        self.dense = Linear(d_in, c.hidden_size, rng=rng, dtype=dtype)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype)
        self.dropout = Dropout(c.dropout)


class BertAttention(Layer):
    """Names only: self-attention and what takes it into the residual stream. BertLayer runs them."""

    def __init__(self, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        self.self = BertSelfAttention(c, rng, dtype)
        self.output = BertProjection(c.hidden_size, c, rng, dtype)


class BertIntermediate(Layer):
    """Names only: the dense layer into the wide part, and its non-linearity. BertLayer runs them."""

    def __init__(self, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        self.dense = Linear(c.hidden_size, c.intermediate_size, rng=rng, dtype=dtype)
        self.act = _ACTIVATIONS[c.hidden_act]()


class BertLayer(Layer):
    """A post-norm block, x (T, d) -> y (T, d), or the `rows` of it that are asked for, (R, d):

        a = attention(x) W_o        z_1 = x[rows] + a        h = LN_1(z_1)
        m = gelu(h W_i) W_2         z_2 = h + m              y = LN_2(z_2)

    The norms lie on the residual path: every gradient passes through both of them, and is split at each sum.
    """

    def __init__(self, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        self.attention = BertAttention(c, rng, dtype)
        self.intermediate = BertIntermediate(c, rng, dtype)
        self.output = BertProjection(c.intermediate_size, c, rng, dtype)

    def forward(
        self, x: Array, keep: bool = True, need_dx: bool = True, offsets: Sequence[int] | None = None, rows: np.ndarray | None = None
    ) -> tuple[Array, Saved | None]:
        attn, out_1, inter, out_2 = self.attention.self, self.attention.output, self.intermediate, self.output
        # Who needs a gradient? Each part that has something trainable at or below it.
        at_a = need_dx or attn.trainable
        at_z_1 = at_a or out_1.dense.trainable
        at_h = at_z_1 or out_1.LayerNorm.trainable
        at_i = at_h or inter.trainable
        at_z_2 = at_i or out_2.dense.trainable

        a, s_attn = attn.forward(x, keep=keep and at_a, need_dx=need_dx, offsets=offsets, rows=rows)
        a, s_dense_1 = out_1.dense.forward(a, keep=keep and at_z_1, need_dx=at_a)
        a, s_drop_1 = out_1.dropout.forward(a, keep=keep and at_z_1, need_dx=at_z_1)
        h, s_ln_1 = out_1.LayerNorm.forward(K.add(F.take_rows(x, rows), a), keep=keep and at_h, need_dx=at_z_1)

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

        dz_2: Array = out_2.LayerNorm.backward(dy, s_ln_2, need_dx=at_z_2)  # y = LN_2(z_2)
        if not at_z_2:
            return None
        dm = out_2.dropout.backward(dz_2, s_drop_2)  #                  z_2 = h + m
        dm = out_2.dense.backward(dm, s_dense_2, need_dx=at_i)  #       m = gelu(h W_i) W_2
        if not at_i:
            return None
        dm = inter.act.backward(dm, s_act)
        dh = inter.dense.backward(dm, s_dense_i, need_dx=at_h)
        if not at_h:
            return None
        dh = K.add(dz_2, dh)  #                                          h feeds z_2 twice: directly, and through m

        dz_1: Array = out_1.LayerNorm.backward(dh, s_ln_1, need_dx=at_z_1)  # h = LN_1(z_1)
        if not at_z_1:
            return None
        da = out_1.dropout.backward(dz_1, s_drop_1)  #                  z_1 = x[rows] + a
        da = out_1.dense.backward(da, s_dense_1, need_dx=at_a)  #       a = attention(x) W_o
        if not at_a:
            return None
        dx = attn.backward(da, s_attn, need_dx=need_dx)
        return K.add(F.take_rows_backward(dz_1, rows, T), dx) if need_dx else None  # x feeds z_1 twice


class BertEncoder(Layer):
    """y = block_L(... block_1(x)).   x (T, d) -> y (T, d). Nothing below the lowest trainable block is saved or runs backward."""

    def __init__(self, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        self.layer = [BertLayer(c, rng, dtype) for _ in range(c.num_hidden_layers)]
        self.recompute = False  # save less, compute more: models/stack.py

    def forward(
        self,
        x: Array,
        keep: bool = True,
        need_dx: bool = True,
        offsets: Sequence[int] | None = None,
        rows: np.ndarray | None = None,
        first: int = 0,
    ) -> tuple[Array, Saved | None]:
        """`first`: x is the input of this block."""
        y, ran = run_blocks(self.layer, x, need_dx, keep, first, rows, self.recompute, offsets=offsets)
        return y, self.save(need_dx, ran) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        (ran,) = self.load(saved, need_dx)
        return run_blocks_backward(self.layer, dy, ran)


class BertPooler(Layer):
    """p = tanh(f W_p + b_p).   f (n, d), the first row of each sequence -> p (n, d). Saved: p, and f if W_p is trained."""

    def __init__(self, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        self.dense = Linear(c.hidden_size, c.hidden_size, rng=rng, dtype=dtype)
        self.act = Tanh()

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> tuple[Array, Saved | None]:
        z, s_dense = self.dense.forward(x, keep=keep, need_dx=need_dx)
        p, s_act = self.act.forward(z, keep=keep)
        return p, self.save(need_dx, s_dense, s_act) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        s_dense, s_act = self.load(saved, need_dx)
        dz = self.act.backward(dy, s_act)  #                      p = tanh(z)
        return self.dense.backward(dz, s_dense, need_dx=need_dx)  # z = f W_p + b_p


class Bert(Layer):
    """ids (T,) -> hidden states (T, d). The pooler is kept here, as in the checkpoint, and run by the classifier."""

    def __init__(self, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        self.embeddings = BertEmbeddings(c, rng, dtype)
        self.encoder = BertEncoder(c, rng, dtype)
        self.pooler = BertPooler(c, rng, dtype)

    def forward(
        self,
        x: Array,
        keep: bool = True,
        need_dx: bool = False,
        offsets: Sequence[int] | None = None,
        token_types: np.ndarray | None = None,
        rows: np.ndarray | None = None,
        prefix: Prefix | None = None,
    ) -> tuple[Array, Saved | None]:
        """rows: the rows of h that are asked for, all by default. prefix: what `self.prefix` gave for these ids."""
        at_x, s_emb = self.embeddings.trainable, None
        if prefix is None:
            h, s_emb = self.embeddings.forward(x, keep=keep and at_x, offsets=offsets, token_types=token_types)
            prefix = Prefix(0, h)
        h, s_enc = self.encoder.forward(prefix.x, keep=keep, need_dx=at_x, offsets=offsets, rows=rows, first=prefix.blocks)
        return h, self.save(need_dx, at_x, s_emb, s_enc) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        at_x, s_emb, s_enc = self.load(saved, need_dx)
        dx = self.encoder.backward(dy, s_enc, need_dx=at_x)
        if at_x:
            self.embeddings.backward(dx, s_emb)

    def prefix(self, ids: Array, offsets: Sequence[int] | None = None) -> Prefix | None:
        """What the frozen blocks at the bottom give for these ids, None where there are none."""
        blocks = self.encoder.layer[: frozen_blocks(self.encoder.layer, self.embeddings.trainable)]
        if not blocks:
            return None
        x, _ = self.embeddings.forward(ids, keep=False, offsets=offsets)
        return Prefix(len(blocks), run_blocks(blocks, x, False, False, offsets=offsets)[0])


class BertClassifier(Layer):
    """ids (T,), offsets of n sequences -> logits (n, num_labels).

    Initial values (BERT's): N(0, 0.02^2), biases zero.
    """

    model_type = "bert"
    weights_are_in_out = False
    output_head = "classifier"

    def __init__(self, config: BertConfig, *, rng: Rng = None, dtype: Any = "float32") -> None:
        self.config = config
        rng = generator(rng)
        self.bert = Bert(config, rng, dtype)
        self.dropout = Dropout(config.dropout)
        self.classifier = Linear(config.hidden_size, config.num_labels, rng=rng, dtype=dtype)
        for _, layer in self.modules():
            if isinstance(layer, Linear) and layer.bias is not None:
                layer.weight.data = rng.normal(0, 0.02, layer.weight.data.shape).astype(dtype)
                layer.bias.data[...] = 0

    def forward(
        self,
        x: Array,
        keep: bool = True,
        need_dx: bool = False,
        offsets: Sequence[int] | None = None,
        token_types: np.ndarray | None = None,
        prefix: Prefix | None = None,
    ) -> tuple[Array, Saved | None]:
        """x are token ids; `offsets` bound the sequences laid end to end in them. There is no dx: ids are integers.

        BERT's pooler reads the first row of each sequence, so the last block computes no others. prefix: what `prefix` gave.
        """
        pooler = self.bert.pooler if self.config.pooling == "first" else None
        at_h = self.bert.embeddings.trainable or self.bert.encoder.trainable
        at_p = at_h or (pooler is not None and pooler.trainable)
        bounds = _bounds(offsets, len(x))

        rows = None if pooler is None else bounds[:-1]
        h, s_bert = self.bert.forward(x, keep=keep and at_h, offsets=offsets, token_types=token_types, rows=rows, prefix=prefix)
        s_pool = None
        if pooler is None:
            p = _means(h, bounds)
        else:
            p, s_pool = pooler.forward(h, keep=keep and at_p, need_dx=at_h)
        p, s_drop = self.dropout.forward(p, keep=keep and at_p)
        logits, s_classifier = self.classifier.forward(p, keep=keep, need_dx=at_p)
        return logits, self.save(need_dx, at_h, at_p, bounds, s_bert, s_pool, s_drop, s_classifier) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        at_h, at_p, bounds, s_bert, s_pool, s_drop, s_classifier = self.load(saved, need_dx)
        dp = self.classifier.backward(dy, s_classifier, need_dx=at_p)  # logits = p W_c + b_c
        if not at_p:
            return
        dp = self.dropout.backward(dp, s_drop)
        dh: Array
        if s_pool is None:
            dh = _means_backward(dp, bounds)  #                          p = mean of each sequence
        else:
            dh = self.bert.pooler.backward(dp, s_pool, need_dx=at_h)  #  p = pooler(h), h the first rows alone
        if at_h:
            self.bert.backward(dh, s_bert)

    def prefix(self, ids: Array, offsets: Sequence[int] | None = None) -> Prefix | None:
        """What the frozen blocks at the bottom give for these ids: the same in every epoch (models/stack.py). None: there are none."""
        return self.bert.prefix(ids, offsets)

    def loss(
        self,
        ids: Array,
        labels: np.ndarray,
        offsets: Sequence[int] | None = None,
        count: int | None = None,
        keep: bool = True,
        prefix: Prefix | None = None,
    ) -> tuple[Array, Saved | None]:
        """The sum over labelled sequences of -log p(label), in regression of (logit - label)^2, by `count` (default: their number).

        ids (T,); labels (n,) on the host, one a sequence: integers, or numbers in regression; -100 is none.
        Raises ValueError when the labels are not as many as the sequences, or when none counts and no `count` was given.
        """
        n = len(_bounds(offsets, len(ids))) - 1
        if labels.shape != (n,):
            raise ValueError(f"loss: labels have shape {labels.shape}, but there are {n} sequences; one label a sequence is wanted.")
        rows = np.flatnonzero(labels != F.IGNORE)
        if rows.size == 0 and count is None:
            raise ValueError("loss: no sequence is labelled.")
        logits, saved = self.forward(ids, keep=keep, offsets=offsets, prefix=prefix)
        N = rows.size if count is None else count
        if rows.size == 0:
            loss, dlogits = logits.sum() * 0, logits * 0
        elif self.config.regression:
            loss, dlogits = _squares(K.upcast(logits), labels, rows, N)
            dlogits = dlogits.astype(logits.dtype, copy=False)
        else:
            loss, dlogits = K.cross_entropy(logits, labels, rows.size / N)
        return loss, self.save(False, dlogits, saved) if keep else None

    def loss_backward(self, saved: Saved | None) -> None:
        """Add the gradients of `loss` to the trainable parameters."""
        dlogits, s_logits = self.load(saved, False)
        self.backward(dlogits, s_logits)

    def embed(self, ids: Array, offsets: Sequence[int] | None = None) -> Array:
        """(n, d): the mean of the hidden states of each sequence, as sentence encoders have it. Inference only; not normalised."""
        h, _ = self.bert.forward(ids, keep=False, offsets=offsets)
        return _means(h, _bounds(offsets, len(ids)))


def _bounds(offsets: Sequence[int] | None, tokens: int) -> np.ndarray:
    """The offsets as an array; None is one sequence. Raises ValueError when they do not fit."""
    F.check_offsets(offsets, tokens)
    return np.array([0, tokens] if offsets is None else offsets, dtype=np.int64)


def _means(h: Array, bounds: np.ndarray) -> Array:
    """p_i = mean of the rows of sequence i.   h (T, d) -> p (n, d), as one product with an (n, T) matrix of 1 / length."""
    lengths = np.diff(bounds)
    M = (np.arange(len(lengths))[:, None] == np.repeat(np.arange(len(lengths)), lengths)) / lengths[:, None]
    return K.product(as_like(M.astype(h.dtype), h), h)


def _means_backward(dp: Array, bounds: np.ndarray) -> Array:
    """dh_t = dp_i / length_i for every token t of sequence i."""
    lengths = np.diff(bounds)
    each = as_like((1 / lengths[:, None]).astype(dp.dtype), dp)
    return (dp * each)[as_like(np.repeat(np.arange(len(lengths)), lengths), dp)]


def _squares(logits: Array, labels: np.ndarray, rows: np.ndarray, N: int) -> tuple[Array, Array]:
    """loss = sum over `rows` of (logit - label)^2 / N, and its gradient (n, 1)."""
    counts = np.zeros((len(labels), 1), dtype=logits.dtype)
    counts[rows] = 1
    error = (logits - as_like(labels[:, None].astype(logits.dtype), logits)) * as_like(counts, logits)
    return (error * error).sum() / N, error * (2 / N)
