"""Llama: a decoder with RMS norm, rotary positions, grouped key and value heads and SwiGLU. Module names as in LlamaForCausalLM.

    x_0 = embed_tokens[ids]        x_i = block_i(x_{i-1})        h = norm(x_L)        logits = h lm_head   (or h embed_tokens^T)

Mistral, Qwen2, Qwen3, SmolLM3 and Gemma 3 are the same model with other settings: models/llama_config.py. Body: models/stack.py. Head, loss
and generation: models/decoder.py. The residual adds of a block: models/block.py.
"""

import math
from typing import Any

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array, Rng, constant, generator
from minilora.layers import Embedding, Layer, Linear, Output, RMSNorm, Saved, needed
from minilora.models.attention import HeadNorm, SelfAttention
from minilora.models.block import PreNormBlock
from minilora.models.decoder import Decoder
from minilora.models.llama_config import LlamaConfig
from minilora.models.stack import Body, Parts, initialise


class LlamaAttention(SelfAttention):
    """y = o W_o,   o = attention(rotary(q_norm(x W_q)), rotary(k_norm(x W_k)), x W_v) of layer i.   x (T, d) -> y (T, d).

    The norms are those of Qwen3 and Gemma; other models have none.
    """

    names = "q_proj", "k_proj", "v_proj"

    def __init__(self, c: LlamaConfig, i: int, rng: np.random.Generator, dtype: Any) -> None:
        d, heads, head_dim = c.hidden_size, (c.num_attention_heads, c.num_key_value_heads), c.head_dim
        super().__init__(d, *heads, head_dim, c.attention_bias or c.variant.qkv_bias, rng, dtype)  # type: ignore[arg-type]
        self.o_proj = Linear(c.num_attention_heads * head_dim, d, c.attention_bias, rng=rng, dtype=dtype)  # type: ignore[operator]
        self.window, self.kind = c.window(i), c.rotary(i)
        self.q_scale = math.sqrt(head_dim / (c.query_pre_attn_scalar or head_dim))  # type: ignore[operator]
        if c.variant.head_norms:
            self.q_norm, self.k_norm = (HeadNorm(head_dim, c.rms_norm_eps, int(c.variant.gemma), dtype=dtype) for _ in "qk")  # type: ignore

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True, *args: Any, **inputs: Any) -> Output:
        """inputs: "rope" has the rotary tables of each kind of layer. This one is of kind `self.kind`; None: it is not rotated."""
        inputs["rope"] = inputs["rope"].get(self.kind)
        at_o = need_dx or any(layer.trainable for layer in (*self.projections(), self.q_norm, self.k_norm) if layer)
        o, s_o = super().forward(x, keep and at_o, need_dx, *args, **inputs)
        y, s_y = self.o_proj.forward(o, keep=keep, need_dx=at_o)
        return y, self.save(need_dx, at_o, s_o, s_y) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        at_o, s_o, s_y = self.load(saved, need_dx)
        do: Any = self.o_proj.backward(dy, s_y, need_dx=at_o)  #              y = o W_o
        return super().backward(do, s_o, need_dx=need_dx) if at_o else None  # o = attention(...)


class LlamaMLP(Layer):
    """SwiGLU (arXiv 2002.05202): y = (silu(g) * u) W_down,   g = x W_gate,   u = x W_up.   x (T, d) -> y (T, d). In Gemma gelu_tanh.

    Saved, if a gradient has to pass: what K.swiglu returns for its backward, two arrays (T, intermediate_size); or three.
    """

    def __init__(self, c: LlamaConfig, rng: np.random.Generator, dtype: Any) -> None:
        d, f, bias = c.hidden_size, c.intermediate_size, c.mlp_bias
        self.gate_proj = Linear(d, f, bias, rng=rng, dtype=dtype)
        self.up_proj = Linear(d, f, bias, rng=rng, dtype=dtype)
        self.down_proj = Linear(f, d, bias, rng=rng, dtype=dtype)
        self.gelu = c.variant.gemma

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        need = needed(dg=need_dx or self.gate_proj.trainable, du=need_dx or self.up_proj.trainable)
        g, s_gate = self.gate_proj.forward(x, keep=keep and "dg" in need, need_dx=need_dx)
        u, s_up = self.up_proj.forward(x, keep=keep and "du" in need, need_dx=need_dx)
        if self.gelu:
            h, s_h = K.gelu_tanh(g, keep=keep and "dg" in need)
            a, s_act = K.multiply(h, u), (h if "du" in need else None, u if "dg" in need else None, s_h)
        else:
            a, s_act = K.swiglu(g, u, keep=keep and bool(need))
        y, s_down = self.down_proj.forward(a, keep=keep, need_dx=bool(need))
        return y, self.save(need_dx, need, s_gate, s_up, s_act, s_down) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        need, s_gate, s_up, s_act, s_down = self.load(saved, need_dx)
        da = self.down_proj.backward(dy, s_down, need_dx=bool(need))  #       y = down_proj(a)
        if not need:
            return None
        dx_g = dx_u = None
        if self.gelu:
            h, u, s_h = s_act
            dg = K.gelu_tanh_backward(K.multiply(da, u), s_h) if "dg" in need else None  # a = gelu_tanh(g) * u
            du = K.multiply(da, h) if "du" in need else None
        else:
            dg, du = K.swiglu_backward(da, s_act, need)  #                    a = silu(g) * u
        if "du" in need:
            dx_u = self.up_proj.backward(du, s_up, need_dx=need_dx)  #        u = up_proj(x)
        if "dg" in need:
            dx_g = self.gate_proj.backward(dg, s_gate, need_dx=need_dx)  #    g = gate_proj(x)
        return K.add(dx_g, dx_u) if need_dx else None  #                      x feeds both


class LlamaBlock(PreNormBlock):
    """h = x + self_attn(input_layernorm(x));   y = h + mlp(post_attention_layernorm(h)).   x (T, d) -> y (T, d). Layer i of a model."""

    def __init__(self, c: LlamaConfig, i: int, rng: np.random.Generator, dtype: Any) -> None:
        self.input_layernorm = norm(c, dtype)
        self.self_attn = LlamaAttention(c, i, rng, dtype)
        self.post_attention_layernorm = norm(c, dtype)
        self.mlp = LlamaMLP(c, rng, dtype)

    def parts(self) -> tuple[Layer, Any, Layer, Layer]:
        return self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp


class GemmaBlock(LlamaBlock):
    """As LlamaBlock, with norms also after each part: h = x + post_attention_layernorm(self_attn(input_layernorm(x))), and y likewise."""

    def __init__(self, c: LlamaConfig, i: int, rng: np.random.Generator, dtype: Any) -> None:
        super().__init__(c, i, rng, dtype)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(c, dtype), norm(c, dtype)

    drop_1 = property(lambda self: self.post_attention_layernorm)
    drop_2 = property(lambda self: self.post_feedforward_layernorm)

    def parts(self) -> tuple[Layer, Any, Layer, Layer]:
        return self.input_layernorm, self.self_attn, self.pre_feedforward_layernorm, self.mlp


def norm(c: LlamaConfig, dtype: Any) -> RMSNorm:
    """A norm over the features of a token."""
    return RMSNorm(c.hidden_size, c.rms_norm_eps, int(c.variant.gemma), dtype=dtype)


class LlamaBody(Body):
    """ids (T,) -> h (T, hidden_size): everything but the head."""

    def __init__(self, c: LlamaConfig, rng: np.random.Generator, dtype: Any) -> None:
        super().__init__(c)
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.pad_token_id, rng=rng, dtype=dtype)
        block = GemmaBlock if c.variant.gemma else LlamaBlock
        self.layers = [block(c, i, rng, dtype) for i in range(c.num_hidden_layers)]
        self.norm = norm(c, dtype)

    def parts(self) -> Parts:
        return Parts([self.embed_tokens], self.layers, self.norm)

    def embed(self, ids: Array, places: np.ndarray, keep: bool) -> tuple[Array, Any]:
        x, saved = super().embed(ids, places, keep)
        return (x * self._scale(x) if self.config.variant.gemma else x), saved

    def embed_backward(self, dx: Array, saved: Any) -> None:
        super().embed_backward(dx * self._scale(dx) if self.config.variant.gemma else dx, saved)  # x = sqrt(d) embed_tokens[ids]

    def _scale(self, x: Array) -> Array:
        """sqrt(d) (1,), in the dtype of x."""
        return constant(np.full(1, math.sqrt(self.config.hidden_size)).astype(x.dtype), x)

    def block_inputs(self, places: np.ndarray, like: Array) -> dict[str, Any]:
        """The rotary tables of these positions for each kind of layer; float32 where the activations are in half precision."""
        tables, like = {}, K.upcast(like[:1])
        for kind in {block.self_attn.kind for block in self.layers} - {None}:
            f, factor = self.config.frequencies(kind)
            tables[kind] = F.rotary_tables(places, self.config.head_dim, f, like, factor)
        return {"rope": tables}


class Llama(Decoder):
    """ids (T,) -> logits (T, vocab_size). Initial values, as in transformers: N(0, 0.02^2), biases zero."""

    def __init__(self, config: LlamaConfig, *, rng: Rng = None, dtype: Any = "float32") -> None:
        self.config, self.model_type = config, config.model_type
        rng = generator(rng)
        self.model = LlamaBody(config, rng, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, rng=rng, dtype=dtype)
        initialise(self, rng)
