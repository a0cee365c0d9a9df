"""ModernBERT (arXiv 2412.13663): an encoder of pre-norm blocks. Module names as in ModernBertForSequenceClassification.

    x_0 = LN(tok[ids])        x_i = block_i(x_{i-1})        h = LN(x_L)

Queries and keys are rotated. Every third layer is global; in the others a token sees only those near it on both sides, and the rotation
has another base. The first block has no norm before its attention. Classifier and loss: models/classifier.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array, get_xp
from minilora.layers import Dropout, Embedding, Layer, LayerNorm, Linear, Output, Saved
from minilora.models.attention import Attention
from minilora.models.bert import ACTIVATIONS, Bert, BertConfig, Names
from minilora.models.block import PreNormBlock
from minilora.models.config_file import fits
from minilora.models.stack import Body, Parts

GLOBAL, LOCAL = "full_attention", "sliding_attention"
_THETAS = {GLOBAL: "global_rope_theta", LOCAL: "local_rope_theta"}


@dataclass
class ModernBertConfig(BertConfig):
    """Field names as in the config.json of a published ModernBERT, in which transformers 5 has `rope_parameters` for the two thetas.

    layer_types None: every global_attn_every_n_layers-th layer, beginning with the first, is global. local_attention: a token sees those
    that are at most half as far away. Raises ValueError for what does not fit.
    """

    model_type: str = "modernbert"
    vocab_size: int = 50368
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    pooling: str = "cls"
    pad_token_id: int | None = 50283
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    local_attention: int = 128
    global_attn_every_n_layers: int = 3
    layer_types: list[str] | None = None
    global_rope_theta: float = 160000.0
    local_rope_theta: float = 10000.0

    choices: ClassVar[Any] = {
        **BertConfig.choices,
        "model_type": ("modernbert",),
        "pooling": ("cls", "mean"),
        "classifier_activation": BertConfig.choices["hidden_act"],
    }
    aliases: ClassVar[Any] = {
        "hidden_activation": "hidden_act",
        "norm_eps": "layer_norm_eps",
        "classifier_pooling": "pooling",
    }
    fixed: ClassVar[Any] = dict.fromkeys(("hidden_act", "pooling", "type_vocab_size"), ())
    neutral: ClassVar[Any] = """tie_word_embeddings position_embedding_type rope_parameters rope_scaling initializer_cutoff_factor
        cls_token_id embedding_dropout mlp_dropout decoder_bias deterministic_flash_attn sparse_prediction sparse_pred_ignore_index
        reference_compile repad_logits_with_grad"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (kinds := self.layer_types) is not None and (len(kinds) != self.num_hidden_layers or not {*kinds} <= {GLOBAL, LOCAL}):
            raise ValueError(f"ModernBertConfig: layer_types must be {self.num_hidden_layers} of {GLOBAL} and {LOCAL}, got {kinds!r:.80}.")
        if (d := self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(f"ModernBertConfig: a head has {d} features; they are rotated in pairs, so their number must be even.")

    def kind(self, i: int) -> str:
        """Whether layer i is GLOBAL or LOCAL."""
        return self.layer_types[i] if self.layer_types else LOCAL if i % self.global_attn_every_n_layers else GLOBAL

    @classmethod
    def read(cls, raw: dict[str, Any], where: str) -> dict[str, Any]:
        """The fields in a config.json as transformers 4 or 5 writes it. Some files have a layer_norm_eps too, which nothing reads."""
        values = super().read({name: value for name, value in raw.items() if name != "layer_norm_eps"}, where)
        rope = raw.get("rope_parameters") or {}
        odd = bool(raw.get("rope_scaling")) or not fits(rope, dict[str, dict[str, Any] | None])
        for kind, part in () if odd else rope.items():
            theta = (part := dict(part or {})).pop("rope_theta", None)
            odd |= kind not in _THETAS or part not in ({}, {"rope_type": "default"})
            values |= {} if odd or theta is None else {_THETAS[kind]: theta}
        if odd:
            raise ValueError(f"{where} has rotary settings {raw.get('rope_scaling') or rope!r:.80}; supported: rope_type 'default'.")
        return values


class ModernBertAttention(Attention):
    """As Attention, in both directions, with the rotation and the window of layer i."""

    names = "Wqkv", "Wo"

    def __init__(self, c: ModernBertConfig, i: int, rng: np.random.Generator, dtype: Any) -> None:
        super().__init__(c.hidden_size, c.num_attention_heads, causal=False, bias=c.attention_bias, rng=rng, dtype=dtype)
        self.kind = c.kind(i)
        self.window = c.local_attention // 2 + 1 if self.kind == LOCAL else None

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True, *args: Any, **inputs: Any) -> Output:
        """inputs: "rope" is {kind of layer: its rotary tables}."""
        return super().forward(x, keep, need_dx, *args, **{**inputs, "rope": inputs["rope"][self.kind]})


class ModernBertMLP(Layer):
    """[a b] = x Wi;   y = (gelu(a) * b) Wo.   x (T, d) -> y (T, d). Saved, if a gradient has to pass: gelu(a), b and what gelu saves."""

    def __init__(self, c: ModernBertConfig, rng: np.random.Generator, dtype: Any) -> None:
        self.Wi = Linear(c.hidden_size, 2 * c.intermediate_size, c.mlp_bias, rng=rng, dtype=dtype)
        self.act = ACTIVATIONS[c.hidden_act]()
        self.Wo = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias, rng=rng, dtype=dtype)

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        through = need_dx or self.Wi.trainable
        ab, s_i = self.Wi.forward(x, keep=keep and through, need_dx=need_dx)
        a, b = ab[:, : ab.shape[1] // 2], ab[:, ab.shape[1] // 2 :]
        g, s_act = self.act.forward(a, keep=keep and through)
        y, s_o = self.Wo.forward(g * b, keep=keep, need_dx=through)
        return y, self.save(need_dx, s_i, (g, b, s_act) if through else None, s_o) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        s_i, through, s_o = self.load(saved, need_dx)
        dm: Any = self.Wo.backward(dy, s_o, need_dx=through is not None)  # y = (g * b) Wo
        if through is None:
            return None
        g, b, s_act = through
        da = self.act.backward(dm * b, s_act)  #                             g = gelu(a)
        dab = get_xp(dm).concatenate([da, dm * g], axis=1)
        return self.Wi.backward(dab, s_i, need_dx=need_dx)  #               [a b] = x Wi


class ModernBertLayer(PreNormBlock):
    """h = x + attn(attn_norm(x));   y = h + mlp(mlp_norm(h)).   x (T, d) -> y (T, d). Layer i of a model."""

    def __init__(self, c: ModernBertConfig, i: int, rng: np.random.Generator, dtype: Any) -> None:
        self.attn_norm = norm(c, dtype) if i else Dropout(0.0)  # the identity
        self.attn, self.drop_1 = ModernBertAttention(c, i, rng, dtype), Dropout(c.dropout)
        self.mlp_norm = norm(c, dtype)
        self.mlp, self.drop_2 = ModernBertMLP(c, rng, dtype), Dropout(c.dropout)

    def parts(self) -> tuple[Layer, Any, Layer, Layer]:
        return self.attn_norm, self.attn, self.mlp_norm, self.mlp


def norm(c: ModernBertConfig, dtype: Any) -> LayerNorm:
    """A norm over the features of a token."""
    return LayerNorm(c.hidden_size, c.layer_norm_eps, bias=c.norm_bias, dtype=dtype)


class ModernBert(Bert):
    """ids (T,) -> hidden states h (T, d)."""

    def __init__(self, c: ModernBertConfig, rng: np.random.Generator, dtype: Any) -> None:
        Body.__init__(self, c)
        table = Embedding(c.vocab_size, c.hidden_size, c.pad_token_id, rng=rng, dtype=dtype)
        self.embeddings = Names(tok_embeddings=table, norm=norm(c, dtype), drop=Dropout(c.dropout))
        self.layers = [ModernBertLayer(c, i, rng, dtype) for i in range(c.num_hidden_layers)]
        self.final_norm = norm(c, dtype)

    def parts(self) -> Parts:
        return Parts([self.embeddings], self.layers, self.final_norm)

    def tables(self, ids: Array, places: np.ndarray, token_types: np.ndarray | None) -> list[tuple[Any, Any]]:
        if token_types is not None:
            raise ValueError("forward: a modernbert has no token types.")
        return [(self.embeddings.norm, self.embeddings.drop), (self.embeddings.tok_embeddings, ids)]

    def block_inputs(self, places: np.ndarray, like: Array) -> dict[str, Any]:
        """The rotary tables of these positions for both kinds of layer; float32 where the activations are in half precision."""
        c, like = self.config, K.upcast(like[:1])
        d = c.hidden_size // c.num_attention_heads
        return {"rope": {kind: F.rotary_tables(places, d, getattr(c, name), like) for kind, name in _THETAS.items()}}
