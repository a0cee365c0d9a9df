"""BERT (arXiv 1810.04805), RoBERTa (1907.11692), XLM-RoBERTa (1911.02116) and DistilBERT (1910.01108): encoders of post-norm blocks.

    x_0 = LN(word[ids] + position[place] + token_type[type])        x_i = block_i(x_{i-1})        h = x_L

They differ in names (_BLOCK, _BLOCKS), in the place of the first token, and in the head (models/classifier.py, with the loss). Module names
are those of the published checkpoints, which keep weights as (out, in); they are transposed when read, as views.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import numpy as np

from minilora import kernels as K
from minilora.backend import Array, constant, get_xp
from minilora.functional.attention import Offsets, Rows
from minilora.layers import GELU, Dropout, Embedding, Layer, LayerNorm, Linear, Output, ReLU, Saved
from minilora.models.attention import SelfAttention
from minilora.models.config_file import ModelConfig
from minilora.models.stack import Body, Parts

ACTIVATIONS: dict[str, Callable[[], Layer]] = {
    "gelu": GELU,
    "gelu_new": lambda: GELU("tanh"),
    "gelu_pytorch_tanh": lambda: GELU("tanh"),
    "relu": ReLU,
}
_DEFAULTS = {  # of transformers, where they differ from BertConfig's
    "bert": {"pad_token_id": 0},
    "roberta": {"pad_token_id": 1, "vocab_size": 50265},
    "xlm-roberta": {"pad_token_id": 1},
    "distilbert": {"pad_token_id": 0},
}
# the parts of a block by their roles (BertLayer.parts), then W_q, W_k and W_v
_BERT_BLOCK = """attention.self attention.output.dense attention.output.dropout attention.output.LayerNorm
    intermediate.dense intermediate.act output.dense output.dropout output.LayerNorm query key value"""
_BLOCK = {
    "distilbert": """attention attention.out_lin attention.dropout sa_layer_norm
        ffn.lin1 ffn.act ffn.lin2 ffn.dropout output_layer_norm q_lin k_lin v_lin""",
}
_BLOCKS = {"distilbert": "transformer"}  # the module that has the list of blocks; otherwise "encoder"


@dataclass
class BertConfig(ModelConfig):
    """Field names as in the config.json of a published BERT or RoBERTa (`model_type` says which), and two more.

    problem_type: "single_label_classification" (cross-entropy), "regression" (squared error, num_labels 1), None: by num_labels.
    pooling: what the head reads; "first" is the first token, "mean" the mean over the tokens of a sequence, for sentence encoders. BERT's
    pooler has no part in the mean.
    pad_token_id: the row of the word embeddings that gets no gradient, as in torch; a default of the model_type if config.json has none,
    None for no such row. The places of RoBERTa's tokens begin after it.
    dropout: in training; the rates in the file are those of pre-training and are not used.

    Raises ValueError for what does not fit.
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
    model_type: str = "bert"

    choices: ClassVar[Any] = {
        "model_type": ("bert", "roberta", "xlm-roberta"),
        "hidden_act": tuple(ACTIVATIONS),
        "problem_type": (None, "single_label_classification", "regression"),
        "pooling": ("first", "mean"),
    }
    fixed: ClassVar[Any] = {
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "is_causal": (False,),
    }
    neutral: ClassVar[Any] = """tie_word_embeddings
        directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type"""

    def __post_init__(self) -> None:
        self.check()
        self.check_multiple("hidden_size", "num_attention_heads")
        if self.counts_from_padding and (self.pad_token_id is None or not -1 <= self.pad_token_id < self.max_position_embeddings - 1):
            raise ValueError(f"{type(self).__name__}: {self.max_position_embeddings} places begin after pad_token_id {self.pad_token_id}.")
        if self.id2label is not None and sorted(self.id2label) != list(range(self.num_labels)):
            raise ValueError(f"BertConfig: id2label must name the labels 0 to {self.num_labels - 1}, got {sorted(self.id2label)[:8]}.")
        if self.problem_type is not None and (self.problem_type == "regression") != self.regression:
            raise ValueError(f"BertConfig: problem_type {self.problem_type!r} does not go with num_labels {self.num_labels}.")

    @property
    def counts_from_padding(self) -> bool:
        """Whether the place of a sequence's first token is pad_token_id + 1, as in fairseq; otherwise it is 0."""
        return "roberta" in self.model_type

    @property
    def longest_sequence(self) -> int:
        """The number of tokens that a sequence may have."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.counts_from_padding else 0)  # type: ignore[operator]

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
        values = super().read({**_DEFAULTS.get(str(raw.get("model_type", cls.model_type)), {}), **raw}, where)
        names = values.get("id2label")
        if names is not None:
            if not isinstance(names, dict) or not all(re.fullmatch(r"[0-9]{1,9}", str(i)) for i in names):
                raise ValueError(f"{where}: id2label must be a table of labels by number, got {names!r:.80}.")
            values["id2label"] = {int(i): str(label) for i, label in names.items()}
            values.setdefault("num_labels", len(names))
        return values

    def to_json(self) -> dict[str, Any]:
        """The fields as config.json keeps them."""
        left_out = {"num_labels", "id2label", *self.fixed} | ({"pooling"} if self.pooling == "first" else set())
        names = {field: alias for alias, field in self.aliases.items()}
        result = {names.get(field, field): value for field, value in super().to_json().items()}
        labels: dict[str, Any] = {"id2label": {str(i): name for i, name in enumerate(self.class_names)}}
        labels["label2id"] = {name: i for i, name in enumerate(self.class_names)}
        return {name: value for name, value in result.items() if name not in left_out} | labels


@dataclass
class DistilBertConfig(BertConfig):
    """Field names as in BertConfig; the config.json of a published DistilBERT has other names for some."""

    model_type: str = "distilbert"
    num_hidden_layers: int = 6

    choices: ClassVar[Any] = {**BertConfig.choices, "model_type": ("distilbert",)}
    aliases: ClassVar[Any] = {
        "dim": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "hidden_dim": "intermediate_size",
        "activation": "hidden_act",
    }
    fixed: ClassVar[Any] = dict.fromkeys(("intermediate_size", "hidden_act", "layer_norm_eps", "type_vocab_size"), ())
    neutral: ClassVar[Any] = "dropout qa_dropout seq_classif_dropout sinusoidal_pos_embds tie_word_embeddings tie_weights_"


class BertSelfAttention(SelfAttention):
    """o = attention(x W_q, x W_k, x W_v), bidirectional.   x (T, d) -> o (T, d), or its `rows` (R, d).

    The bias of W_k has gradient zero: it adds the same number to all scores of a row, which softmax ignores.
    """

    causal = False

    def __init__(self, *sizes: Any, names: Any = ("query", "key", "value")) -> None:
        self.names = names
        super().__init__(*sizes)


class Names(Layer):
    """Layers under names that a checkpoint has; the layer that holds this one runs them."""

    def __init__(self, /, **layers: Any) -> None:
        vars(self).update(layers)


def put(owner: Layer, path: str, layer: Any) -> None:
    """Make `layer` the attribute at a dotted path below `owner`, with a Names for each part of the path that is not there."""
    *parents, name = path.split(".")
    for parent in parents:
        owner = vars(owner).setdefault(parent, Names())
    setattr(owner, name, layer)


class BertLayer(Layer):
    """A post-norm block, x (T, d) -> y (T, d), or the requested `rows` of it, (R, d):

        a = attention(x) W_o        z_1 = x[rows] + a        h = LN_1(z_1)
        m = gelu(h W_i) W_2         z_2 = h + m              y = LN_2(z_2)

    The norms are on the residual path: every gradient passes through both of them, and is split at each sum.
    """

    def __init__(self, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        *roles, q, k, v = _BLOCK.get(c.model_type, _BERT_BLOCK).split()
        self.find = attrgetter(*roles)

        def dense(d_in: int, d_out: int) -> Linear:
            return Linear(d_in, d_out, rng=rng, dtype=dtype)

        def norm() -> LayerNorm:
            return LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype)

        d, f, n = c.hidden_size, c.intermediate_size, c.num_attention_heads
        attention = BertSelfAttention(d, n, n, d // n, True, rng, dtype, names=(q, k, v))
        layers: list[Layer] = [attention, dense(d, d), Dropout(c.dropout), norm()]
        layers += dense(d, f), ACTIVATIONS[c.hidden_act](), dense(f, d), Dropout(c.dropout), norm()
        for path, layer in zip(roles, layers, strict=True):
            put(self, path, layer)

    def parts(self) -> Any:
        """(attn, W_o, drop_1, norm_1, W_i, act, W_2, drop_2, norm_2)."""
        return self.find(self)

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True, offsets: Offsets = None, rows: Rows = None) -> Output:
        attn, W_o, drop_1, norm_1, W_i, act, W_2, drop_2, norm_2 = self.parts()
        # The gradient is needed at each place that has something trainable at or below it.
        at_a = need_dx or any(layer.trainable for layer in attn.projections())
        at_z_1 = at_a or W_o.trainable
        at_h = at_z_1 or norm_1.trainable
        at_i = at_h or W_i.trainable
        at_z_2 = at_i or W_2.trainable

        a, s_attn = attn.forward(x, keep=keep and at_a, need_dx=need_dx, offsets=offsets, rows=rows)
        a, s_o = W_o.forward(a, keep=keep and at_z_1, need_dx=at_a)
        a, s_drop_1 = drop_1.forward(a, keep=keep and at_z_1, need_dx=at_z_1)
        h, s_norm_1 = norm_1.forward(K.add(K.take_rows(x, rows), a), keep=keep and at_h, need_dx=at_z_1)

        m, s_i = W_i.forward(h, keep=keep and at_i, need_dx=at_h)
        m, s_act = act.forward(m, keep=keep and at_i, need_dx=at_i)
        m, s_2 = W_2.forward(m, keep=keep and at_z_2, need_dx=at_i)
        m, s_drop_2 = drop_2.forward(m, keep=keep and at_z_2, need_dx=at_z_2)
        y, s_norm_2 = norm_2.forward(K.add(h, m), keep=keep, need_dx=at_z_2)

        if not keep:
            return y, None
        needs = (at_a, at_z_1, at_h, at_i, at_z_2)
        return y, self.save(need_dx, needs, rows, len(x), s_attn, s_o, s_drop_1, s_norm_1, s_i, s_act, s_2, s_drop_2, s_norm_2)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        needs, rows, T, s_attn, s_o, s_drop_1, s_norm_1, s_i, s_act, s_2, s_drop_2, s_norm_2 = self.load(saved, need_dx)
        at_a, at_z_1, at_h, at_i, at_z_2 = needs
        attn, W_o, drop_1, norm_1, W_i, act, W_2, drop_2, norm_2 = self.parts()

        dz_2: Any = norm_2.backward(dy, s_norm_2, need_dx=at_z_2)  #    y = LN_2(z_2)
        if not at_z_2:
            return None
        dm: Any = drop_2.backward(dz_2, s_drop_2)  #                    z_2 = h + m
        dm = W_2.backward(dm, s_2, need_dx=at_i)  #                     m = gelu(h W_i) W_2
        if not at_i:
            return None
        dm = act.backward(dm, s_act)
        dh: Any = W_i.backward(dm, s_i, need_dx=at_h)
        if not at_h:
            return None
        dh = K.add(dz_2, dh)  #                                         h feeds z_2 twice: directly, and through m

        dz_1: Any = norm_1.backward(dh, s_norm_1, need_dx=at_z_1)  #    h = LN_1(z_1)
        if not at_z_1:
            return None
        da: Any = drop_1.backward(dz_1, s_drop_1)  #                    z_1 = x[rows] + a
        da = W_o.backward(da, s_o, need_dx=at_a)  #                     a = attention(x) W_o
        if not at_a:
            return None
        dx = attn.backward(da, s_attn, need_dx=need_dx)
        return K.add(K.take_rows_backward(dz_1, rows, T), dx) if need_dx else None  # x feeds z_1 twice


class Bert(Body):
    """ids (T,) -> hidden states h (T, d). Heads are in models/classifier.py, BERT's pooler too."""

    def __init__(self, c: BertConfig, rng: np.random.Generator, dtype: Any) -> None:
        super().__init__(c)
        e: Any = Names()
        e.word_embeddings = Embedding(c.vocab_size, c.hidden_size, c.pad_token_id, rng=rng, dtype=dtype)
        padding = c.pad_token_id if c.counts_from_padding else None
        e.position_embeddings = Embedding(c.max_position_embeddings, c.hidden_size, padding, rng=rng, dtype=dtype)
        if c.model_type != "distilbert":
            e.token_type_embeddings = Embedding(c.type_vocab_size, c.hidden_size, rng=rng, dtype=dtype)
        e.LayerNorm, e.dropout = LayerNorm(c.hidden_size, c.layer_norm_eps, dtype=dtype), Dropout(c.dropout)
        self.embeddings = e
        self.blocks = f"{_BLOCKS.get(c.model_type, 'encoder')}.layer"
        put(self, self.blocks, [BertLayer(c, rng, dtype) for _ in range(c.num_hidden_layers)])

    def parts(self) -> Parts:
        return Parts([self.embeddings], attrgetter(self.blocks)(self))

    def embed(self, ids: Array, places: np.ndarray, keep: bool, token_types: np.ndarray | None = None) -> tuple[Array, Any]:
        """x_0 = dropout(LN(word[ids] + position[place] + token_type[type])). token_types (T,) are 0 by default."""
        (norm, drop), *tables = self.tables(ids, places, token_types)
        at_sum = any(table.trainable for table, _ in tables)
        (h, *more), s_tables = zip(*(table.forward(index, keep=keep and at_sum) for table, index in tables), strict=True)
        h, s_norm = norm.forward(sum(more, h), keep=keep, need_dx=at_sum)
        h, s_drop = drop.forward(h, keep=keep)
        return h, (at_sum, [(table, s) for (table, _), s in zip(tables, s_tables, strict=True)], (norm, s_norm), (drop, s_drop))

    def embed_backward(self, dx: Array, saved: Any) -> None:
        at_sum, tables, (norm, s_norm), (drop, s_drop) = saved
        dh = drop.backward(dx, s_drop)
        dsum = norm.backward(dh, s_norm, need_dx=at_sum)
        for table, s_table in reversed(tables) if at_sum else ():  # word + position + token_type: each gets all of it
            table.backward(dsum, s_table)

    def tables(self, ids: Array, places: np.ndarray, token_types: np.ndarray | None) -> list[tuple[Any, Any]]:
        """(LN, dropout), and each table of embeddings with the rows to take of it."""
        e = self.embeddings
        found = [(e.LayerNorm, e.dropout), (e.word_embeddings, ids), (e.position_embeddings, self.place_ids(ids, places))]
        if hasattr(e, "token_type_embeddings"):
            found.append((e.token_type_embeddings, np.zeros(len(ids), dtype=np.int64) if token_types is None else token_types))
        elif token_types is not None:
            raise ValueError(f"forward: a {self.config.model_type} has no token types.")
        return found

    def place_ids(self, ids: Array, places: np.ndarray) -> Array:
        """(T,) the rows of the table of positions. RoBERTa counts the tokens of a sequence that are not padding, from pad_token_id + 1;
        padding in a text has row pad_token_id.
        """
        c, xp = self.config, get_xp(ids)
        if not c.counts_from_padding:
            return constant(places, self.embeddings.word_embeddings.weight.data)
        counted = (ids != c.pad_token_id).astype(np.int64)
        total, first = xp.cumsum(counted), constant(np.arange(len(places)) - places, ids)  # first: that of its sequence, for each token
        return (total - total[first] + counted[first]) * counted + c.pad_token_id
