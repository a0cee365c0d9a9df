"""Llama: a decoder with RMS norm, rotary positions, grouped key and value heads and SwiGLU. Module names as in LlamaForCausalLM.

    x_0 = embed_tokens[ids]        x_i = block_i(x_{i-1})        h = norm(x_L)        logits = h lm_head   (or h embed_tokens^T)

Qwen2 is the same model with biases on the projections of q, k and v. Body: models/stack.py. Head, loss and generation:
models/decoder.py. The residual adds of a block: models/block.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array, Rng, generator
from minilora.layers import Embedding, Layer, Linear, Output, RMSNorm, Saved, needed
from minilora.models.attention import SelfAttention
from minilora.models.block import PreNormBlock
from minilora.models.config_file import ModelConfig
from minilora.models.decoder import Decoder
from minilora.models.stack import Body, Parts, initialise

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_DEFAULTS: dict[str, dict[str, Any]] = {  # of transformers, where they differ from LlamaConfig's
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768},
}
_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}


@dataclass
class LlamaConfig(ModelConfig):
    """Field names as in the config.json of a published Llama or Qwen2 (`model_type` says which).

    num_key_value_heads None is num_attention_heads; head_dim None is hidden_size / num_attention_heads. attention_bias is
    Llama's, and puts biases on q, k, v and o; Qwen2 always has them on q, k and v. Raises ValueError for sizes that do not fit.
    """

    model_type: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    choices: ClassVar[Any] = {"model_type": tuple(_CLASSES)}
    fixed: ClassVar[Any] = {
        **choices,
        "hidden_act": ("silu", "swish"),
        "is_causal": (True,),
        "partial_rotary_factor": (1, None),
        "rope_interleaved": (False,),
        "use_mrope": (False,),
        "use_sliding_window": (False, None),
    }
    neutral: ClassVar[Any] = "is_decoder pretraining_tp rope_parameters rope_scaling layer_types sliding_window max_window_layers"

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.check()
        if self.head_dim is None:
            self.check_multiple("hidden_size", "num_attention_heads")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"LlamaConfig: head_dim must be a positive even number, got {self.head_dim}.")
        self.check_multiple("num_attention_heads", "num_key_value_heads")
        if self.model_type == "qwen2" and (self.attention_bias or self.mlp_bias):
            raise ValueError("LlamaConfig: a qwen2 has biases on q, k and v and nowhere else; attention_bias and mlp_bias must be false.")

    @classmethod
    def read(cls, raw: dict[str, Any], where: str) -> dict[str, Any]:
        """The fields in a config.json as transformers 4 or 5 writes it, whose rotary settings have other names in each."""
        kinds = raw.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise ValueError(f"{where} has layer_types {kinds!r:.80}; supported: full_attention.")
        values = super().read({**_DEFAULTS.get(str(raw.get("model_type", "llama")), {}), **raw}, where)
        name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"  # in transformers 4 and 5
        rope = dict(raw.get(name) or {}) if isinstance(raw.get(name) or {}, dict) else {"rope_type": raw[name]}
        theta = rope.pop("rope_theta", values.get("rope_theta", cls.rope_theta))
        if any(key not in _ROPE or _ROPE[key] != value for key, value in rope.items()):
            raise ValueError(f"{where} has {name} {raw[name]!r:.80}; supported: none, or rope_type 'default' with a rope_theta.")
        return {**values, "rope_theta": theta}

    def to_json(self) -> dict[str, Any]:
        """The config.json of this model, which transformers 4 and 5 both read."""
        raw = {name: value for name, value in super().to_json().items() if value is not None or name.endswith("_id")}
        if self.model_type == "qwen2":
            del raw["attention_bias"], raw["mlp_bias"]
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        return {"architectures": [_CLASSES[self.model_type]], "hidden_act": "silu", "rope_parameters": rope, **raw}


class LlamaAttention(SelfAttention):
    """y = o W_o,   o = attention(rotary(x W_q), rotary(x W_k), x W_v).   x (T, d) -> y (T, d)."""

    names = "q_proj", "k_proj", "v_proj"

    def __init__(self, c: LlamaConfig, rng: np.random.Generator, dtype: Any) -> None:
        d, heads, head_dim = c.hidden_size, (c.num_attention_heads, c.num_key_value_heads), c.head_dim
        super().__init__(d, *heads, head_dim, c.attention_bias or c.model_type == "qwen2", rng, dtype)  # type: ignore[arg-type]
        self.o_proj = Linear(c.num_attention_heads * head_dim, d, c.attention_bias, rng=rng, dtype=dtype)  # type: ignore[operator]

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True, *args: Any, **inputs: Any) -> Output:
        at_o = need_dx or any(layer.trainable for layer in self.projections())
        o, s_o = super().forward(x, keep and at_o, need_dx, *args, **inputs)
        y, s_y = self.o_proj.forward(o, keep=keep, need_dx=at_o)
        return y, self.save(need_dx, at_o, s_o, s_y) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        at_o, s_o, s_y = self.load(saved, need_dx)
        do: Any = self.o_proj.backward(dy, s_y, need_dx=at_o)  #              y = o W_o
        return super().backward(do, s_o, need_dx=need_dx) if at_o else None  # o = attention(...)


class LlamaMLP(Layer):
    """SwiGLU (arXiv 2002.05202): y = (silu(g) * u) W_down,   g = x W_gate,   u = x W_up.   x (T, d) -> y (T, d).

    Saved, if a gradient has to pass: what K.swiglu returns for its backward, two arrays (T, intermediate_size).
    """

    def __init__(self, c: LlamaConfig, rng: np.random.Generator, dtype: Any) -> None:
        d, f, bias = c.hidden_size, c.intermediate_size, c.mlp_bias
        self.gate_proj = Linear(d, f, bias, rng=rng, dtype=dtype)
        self.up_proj = Linear(d, f, bias, rng=rng, dtype=dtype)
        self.down_proj = Linear(f, d, bias, rng=rng, dtype=dtype)

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        need = needed(dg=need_dx or self.gate_proj.trainable, du=need_dx or self.up_proj.trainable)
        g, s_gate = self.gate_proj.forward(x, keep=keep and "dg" in need, need_dx=need_dx)
        u, s_up = self.up_proj.forward(x, keep=keep and "du" in need, need_dx=need_dx)
        a, s_act = K.swiglu(g, u, keep=keep and bool(need))
        y, s_down = self.down_proj.forward(a, keep=keep, need_dx=bool(need))
        return y, self.save(need_dx, need, s_gate, s_up, s_act, s_down) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        need, s_gate, s_up, s_act, s_down = self.load(saved, need_dx)
        da = self.down_proj.backward(dy, s_down, need_dx=bool(need))  #       y = down_proj(a)
        if not need:
            return None
        dx_g: Any = None
        dx_u: Any = None
        dg, du = K.swiglu_backward(da, s_act, need)  #                        a = silu(g) * u
        if "du" in need:
            dx_u = self.up_proj.backward(du, s_up, need_dx=need_dx)  #        u = up_proj(x)
        if "dg" in need:
            dx_g = self.gate_proj.backward(dg, s_gate, need_dx=need_dx)  #    g = gate_proj(x)
        return K.add(dx_g, dx_u) if need_dx else None  #                      x feeds both


class LlamaBlock(PreNormBlock):
    """h = x + self_attn(input_layernorm(x));   y = h + mlp(post_attention_layernorm(h)).   x (T, d) -> y (T, d)."""

    def __init__(self, c: LlamaConfig, rng: np.random.Generator, dtype: Any) -> None:
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        self.self_attn = LlamaAttention(c, rng, dtype)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        self.mlp = LlamaMLP(c, rng, dtype)

    def parts(self) -> tuple[Layer, Any, Layer, Layer]:
        return self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp


class LlamaBody(Body):
    """ids (T,) -> h (T, hidden_size): everything but the head."""

    def __init__(self, c: LlamaConfig, rng: np.random.Generator, dtype: Any) -> None:
        super().__init__(c)
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.pad_token_id, rng=rng, dtype=dtype)
        self.layers = [LlamaBlock(c, rng, dtype) for _ in range(c.num_hidden_layers)]
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)

    def parts(self) -> Parts:
        return Parts([self.embed_tokens], self.layers, self.norm)

    def block_inputs(self, places: np.ndarray, like: Array) -> dict[str, Any]:
        """The rotary tables of these positions; float32 where the activations are in half precision."""
        return {"rope": F.rotary_tables(places, self.config.head_dim, self.config.rope_theta, K.upcast(like[:1]))}


class Llama(Decoder):
    """ids (T,) -> logits (T, vocab_size). Initial values, as in transformers: N(0, 0.02^2), biases zero."""

    model_type = "llama"

    def __init__(self, config: LlamaConfig, *, rng: Rng = None, dtype: Any = "float32") -> None:
        self.config = config
        rng = generator(rng)
        self.model = LlamaBody(config, rng, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, rng=rng, dtype=dtype)
        initialise(self, rng)
