"""GPT-2: a decoder of pre-norm blocks with learned positions and a tied head. Module names as in GPT2LMHeadModel.

    x_0 = wte[ids] + wpe[position]        x_i = block_i(x_{i-1})        h = ln_f(x_L)        logits = h wte^T

The residual adds of a block: models/block.py. Attention: models/attention.py. Body: models/stack.py. Head, loss and generation:
models/decoder.py. The published checkpoint keeps its "Conv1D" weights as (in, out), which is the orientation used here.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from minilora.backend import Array, Rng, constant, generator
from minilora.layers import GELU, Dropout, Embedding, Layer, LayerNorm, Linear, Output, Saved
from minilora.models.attention import Attention
from minilora.models.block import PreNormBlock
from minilora.models.config_file import ModelConfig
from minilora.models.decoder import Decoder
from minilora.models.stack import Body, Parts, initialise


@dataclass
class GPT2Config(ModelConfig):
    """Field names as in the config.json of a published GPT-2. n_inner None is 4 n_embd. Raises ValueError for sizes that do not fit."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0

    fixed: ClassVar[Any] = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "is_causal": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
    }
    neutral: ClassVar[Any] = "pad_token_id n_ctx is_decoder reorder_and_upcast_attn"
    aliases: ClassVar[Any] = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __post_init__(self) -> None:
        self.check()
        self.check_multiple("n_embd", "n_head")

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    def to_json(self) -> dict[str, Any]:
        """The fields as config.json keeps them."""
        rates = {"resid_pdrop": self.dropout, "embd_pdrop": self.dropout, "attn_pdrop": 0.0}  # transformers' default is 0.1
        return {"model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": True, **super().to_json(), **rates}


class FeedForward(Layer):
    """y = gelu(x W_fc) W_proj.   x (T, d) -> y (T, d), with n_inner features in between."""

    def __init__(self, d_model: int, n_inner: int, *, rng: Rng = None, dtype: Any = "float32") -> None:
        self.c_fc = Linear(d_model, n_inner, rng=rng, dtype=dtype)
        self.act = GELU("tanh")
        self.c_proj = Linear(n_inner, d_model, rng=rng, dtype=dtype)

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        below = need_dx or self.c_fc.trainable
        h, s_fc = self.c_fc.forward(x, keep=keep and below, need_dx=need_dx)
        a, s_act = self.act.forward(h, keep=keep and below)
        y, s_proj = self.c_proj.forward(a, keep=keep, need_dx=below)
        return y, self.save(need_dx, below, s_fc, s_act, s_proj) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        below, s_fc, s_act, s_proj = self.load(saved, need_dx)
        da = self.c_proj.backward(dy, s_proj, need_dx=below)  # y = c_proj(a)
        if not below:
            return None
        dh = self.act.backward(da, s_act)  #                    a = gelu(h)
        return self.c_fc.backward(dh, s_fc, need_dx=need_dx)  # h = c_fc(x)


class Block(PreNormBlock):
    """GPT-2's block: layer norm, attention with a fused projection, GELU, and dropout before each residual add."""

    def __init__(
        self,
        d_model: int,
        n_head: int,
        n_inner: int | None = None,
        eps: float = 1e-5,
        dropout: float = 0.0,
        *,
        rng: Rng = None,
        dtype: Any = "float32",
    ) -> None:
        self.ln_1 = LayerNorm(d_model, eps, dtype=dtype)
        self.attn = Attention(d_model, n_head, rng=rng, dtype=dtype)
        self.drop_1 = Dropout(dropout)
        self.ln_2 = LayerNorm(d_model, eps, dtype=dtype)
        self.mlp = FeedForward(d_model, n_inner or 4 * d_model, rng=rng, dtype=dtype)
        self.drop_2 = Dropout(dropout)

    def parts(self) -> tuple[Layer, Any, Layer, Layer]:
        return self.ln_1, self.attn, self.ln_2, self.mlp


class GPT2Body(Body):
    """ids (T,) -> h (T, n_embd): everything but the head."""

    def __init__(self, c: GPT2Config, rng: np.random.Generator, dtype: Any) -> None:
        super().__init__(c)
        self.wte = Embedding(c.vocab_size, c.n_embd, rng=rng, dtype=dtype)
        self.wpe = Embedding(c.n_positions, c.n_embd, rng=rng, dtype=dtype)
        self.drop = Dropout(c.dropout)
        self.h = [Block(c.n_embd, c.n_head, c.n_inner, c.layer_norm_epsilon, c.dropout, rng=rng, dtype=dtype) for _ in range(c.n_layer)]
        self.ln_f = LayerNorm(c.n_embd, c.layer_norm_epsilon, dtype=dtype)

    def parts(self) -> Parts:
        return Parts([self.wte, self.wpe], self.h, self.ln_f)

    def embed(self, ids: Array, places: np.ndarray, keep: bool) -> tuple[Array, Any]:
        w, s_wte = self.wte.forward(ids, keep=keep)
        p, s_wpe = self.wpe.forward(constant(places, w), keep=keep)
        x, s_drop = self.drop.forward(w + p, keep=keep)
        return x, (s_wte, s_wpe, s_drop)

    def embed_backward(self, dx: Array, saved: Any) -> None:
        s_wte, s_wpe, s_drop = saved
        dsum: Any = self.drop.backward(dx, s_drop)
        self.wpe.backward(dsum, s_wpe)  # wte[ids] + wpe[position]: both get all of it
        self.wte.backward(dsum, s_wte)


class GPT2(Decoder):
    """ids (T,) -> logits (T, vocab_size).

    Initial values (GPT-2, section 2.3): N(0, 0.02^2), biases zero, and 0.02 / sqrt(2 n_layer) for the projections into the residual stream.
    """

    model_type = "gpt2"
    weights_are_in_out = True

    def __init__(self, config: GPT2Config, *, rng: Rng = None, dtype: Any = "float32") -> None:
        self.config = config
        rng = generator(rng)
        self.transformer = GPT2Body(config, rng, dtype)
        initialise(self, rng, {"c_proj": 0.02 / math.sqrt(2 * config.n_layer)})
