"""Llama: a decoder with RMS norm, rotary positions, grouped key and value heads and SwiGLU. Module names as in LlamaForCausalLM.

    x_0 = embed_tokens[ids]        x_i = block_i(x_{i-1})        h = norm(x_L)        logits = h lm_head   (or h embed_tokens^T)

Qwen2 is the same model with biases on the projections of q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array, Rng, generator
from minilora.layers import Embedding, Layer, Linear, RMSNorm, Saved
from minilora.models.cache import KVCache
from minilora.models.config_file import check_pad, check_types, made, read_fields
from minilora.models.stack import Prefix, frozen_blocks, run_blocks, run_blocks_backward

Tables = tuple[Array, Array]  # cos and sin of the rotary angles, (T, head_dim / 2) each
Extend = Callable[[Array, Array], tuple[Array, Array]]  # new keys and values -> all of them, see KVCache.extend
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@dataclass
class LlamaConfig:
    """Field names as in the config.json of a published Llama or Qwen2 (`model_type` says which).

    num_key_value_heads None is num_attention_heads; head_dim None is hidden_size / num_attention_heads. attention_bias is
    Llama's, and puts biases on q, k, v and o; Qwen2 has them on q, k and v always. Raises ValueError for sizes that do not fit.
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

    def __post_init__(self) -> None:
        if self.model_type not in _CLASSES:
            raise ValueError(f"LlamaConfig: model_type is {self.model_type!r}; supported: {', '.join(_CLASSES)}.")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings"
        check_types(LlamaConfig, vars(self), "LlamaConfig", f"{sizes} rms_norm_eps rope_theta")
        check_pad(self.pad_token_id, self.vocab_size)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"LlamaConfig: hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"LlamaConfig: head_dim must be a positive even number, got {self.head_dim!r}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"LlamaConfig: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}."
            )
        if self.model_type == "qwen2" and (self.attention_bias or self.mlp_bias):
            raise ValueError("LlamaConfig: a qwen2 has biases on q, k and v and nowhere else; attention_bias and mlp_bias must be false.")

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str = "config.json") -> LlamaConfig:
        """A config.json as transformers 4 or 5 writes it. Raises ValueError, naming `where`, for what is not supported."""
        model_type = raw.get("model_type", "llama")
        if model_type not in tuple(_CLASSES):
            raise ValueError(f"{where} asks for model_type {model_type!r:.80}; supported: {', '.join(_CLASSES)}.")
        kinds = raw.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise ValueError(f"{where} asks for layer_types {kinds!r:.80}; supported: full_attention.")
        values = read_fields({**_DEFAULTS[model_type], **raw}, where, cls, _FIXED, _NEUTRAL) | {"model_type": model_type}
        name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"  # as transformers 4 and 5 call it
        rope = dict(raw.get(name) or {}) if isinstance(raw.get(name) or {}, dict) else {"rope_type": raw[name]}
        theta = rope.pop("rope_theta", values.get("rope_theta", cls.rope_theta))
        if any(key not in _ROPE or _ROPE[key] != value for key, value in rope.items()):
            raise ValueError(f"{where} asks for {name} {raw[name]!r:.80}; supported: none, or rope_type 'default' with a rope_theta.")
        return made(cls, values | {"rope_theta": theta}, where)

    def to_json(self) -> dict[str, Any]:
        """The config.json of this model, which transformers 4 and 5 read alike."""
        raw = {name: value for name, value in asdict(self).items() if value is not None or name.endswith("_id")}
        if self.model_type == "qwen2":
            del raw["attention_bias"], raw["mlp_bias"]
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        return {"architectures": [_CLASSES[self.model_type]], "hidden_act": "silu", "rope_parameters": rope, **raw}


_DEFAULTS: dict[str, dict[str, Any]] = {  # where transformers' differ from those above
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768},
}
_FIXED = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False,),
    "use_mrope": (False,),
    "use_sliding_window": (False, None),
}
_NEUTRAL = "is_decoder pretraining_tp rope_parameters rope_scaling layer_types sliding_window max_window_layers"
_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}


class LlamaAttention(Layer):
    """q, k, v = x W_q, x W_k, x W_v;   o = attention(rotary(q), rotary(k), v);   y = o W_o.   x (T, d) -> y (T, d).

    Saved, if a gradient has to pass through the attention: the rotated q and k, v, and the probabilities.
    """

    def __init__(self, config: LlamaConfig, *, rng: Rng = None, dtype: Any = "float32") -> None:
        c = config
        d, h, g = c.hidden_size, c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim  # type: ignore[operator]
        self.n_head, self.n_kv_head = c.num_attention_heads, c.num_key_value_heads
        bias = c.attention_bias or c.model_type == "qwen2"
        self.q_proj = Linear(d, h, bias, rng=rng, dtype=dtype)
        self.k_proj = Linear(d, g, bias, rng=rng, dtype=dtype)
        self.v_proj = Linear(d, g, bias, rng=rng, dtype=dtype)
        self.o_proj = Linear(h, d, c.attention_bias, rng=rng, dtype=dtype)

    def forward(  # type: ignore[override]
        self,
        x: Array,
        keep: bool = True,
        need_dx: bool = True,
        offsets: Sequence[int] | None = None,
        rows: np.ndarray | None = None,
        *,
        rope: Tables,
    ) -> tuple[Array, Saved | None]:
        need = {
            f"d{name}"
            for name, proj in (("q", self.q_proj), ("k", self.k_proj), ("v", self.v_proj))
            if need_dx or proj.trainable  # who needs the gradient of its output?
        }
        q, s_q = self.q_proj.forward(F.take_rows(x, rows), keep=keep and "dq" in need, need_dx=need_dx)
        k, s_k = self.k_proj.forward(x, keep=keep and "dk" in need, need_dx=need_dx)
        v, s_v = self.v_proj.forward(x, keep=keep and "dv" in need, need_dx=need_dx)
        rope_q = tuple(F.take_rows(table, rows) for table in rope)
        (q, r_q), (k, r_k) = K.rotary(q, *rope_q), K.rotary(k, *rope)
        o, P = K.attention(q, k, v, self.n_head, offsets, keep=keep and bool(need), n_kv_head=self.n_kv_head, rows=rows)
        y, s_o = self.o_proj.forward(o, keep=keep, need_dx=bool(need))
        if not keep:
            return y, None
        return y, self.save(need_dx, need, s_q, s_k, s_v, (q, k, v, P, offsets, rows, r_q, r_k, rope_q, rope) if need else None, s_o)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        need, s_q, s_k, s_v, inner, s_o = self.load(saved, need_dx)
        do = self.o_proj.backward(dy, s_o, need_dx=bool(need))  #            y = o_proj(o)
        if not need:
            return None
        q, k, v, P, offsets, rows, r_q, r_k, rope_q, rope = inner
        dq, dk, dv = K.attention_backward(do, q, k, v, P, self.n_head, offsets, self.n_kv_head, need, rows)  # o = attention(q, k, v)
        dx_q = dx_k = dx_v = None
        if "dq" in need:
            dq = K.rotary_backward(dq, r_q, *rope_q)
            dx_q = self.q_proj.backward(dq, s_q, need_dx=need_dx)  #                                   q = rotary(q_proj(x[rows]))
            dx_q = F.take_rows_backward(dx_q, rows, len(k)) if need_dx else None
        if "dk" in need:
            dx_k = self.k_proj.backward(K.rotary_backward(dk, r_k, *rope), s_k, need_dx=need_dx)  #         k = rotary(k_proj(x))
        if "dv" in need:
            dx_v = self.v_proj.backward(dv, s_v, need_dx=need_dx)  #                                   v = v_proj(x)
        # x feeds all three
        return K.add(K.add(dx_q, dx_k), dx_v) if need_dx else None

    def decode(self, x: Array, rope: Tables, extend: Extend) -> Array:
        """`forward` of the next tokens of one sequence; extend(k, v) puts theirs behind those of the earlier ones and returns all."""
        q, k, v = (proj.forward(x, keep=False)[0] for proj in (self.q_proj, self.k_proj, self.v_proj))
        k, v = extend(K.rotary(k, *rope)[0], v)
        last = np.arange(len(k) - len(q), len(k))
        o, _ = K.attention(K.rotary(q, *rope)[0], k, v, self.n_head, keep=False, n_kv_head=self.n_kv_head, rows=last)
        return self.o_proj.forward(o, keep=False)[0]


class LlamaMLP(Layer):
    """SwiGLU (arXiv 2002.05202): y = (silu(g) * u) W_down,   g = x W_gate,   u = x W_up.   x (T, d) -> y (T, d).

    Saved, if a gradient has to pass through: what K.swiglu saves, two arrays (T, intermediate_size).
    """

    def __init__(self, config: LlamaConfig, *, rng: Rng = None, dtype: Any = "float32") -> None:
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(d, f, bias, rng=rng, dtype=dtype)
        self.up_proj = Linear(d, f, bias, rng=rng, dtype=dtype)
        self.down_proj = Linear(f, d, bias, rng=rng, dtype=dtype)

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> tuple[Array, Saved | None]:
        at_g, at_u = need_dx or self.gate_proj.trainable, need_dx or self.up_proj.trainable
        below = at_g or at_u
        g, s_gate = self.gate_proj.forward(x, keep=keep and at_g, need_dx=need_dx)
        u, s_up = self.up_proj.forward(x, keep=keep and at_u, need_dx=need_dx)
        a, gate = K.swiglu(g, u, keep=keep and below)
        y, s_down = self.down_proj.forward(a, keep=keep, need_dx=below)
        if not keep:
            return y, None
        return y, self.save(need_dx, at_g, at_u, s_gate, s_up, gate if below else None, s_down)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        at_g, at_u, s_gate, s_up, gate, s_down = self.load(saved, need_dx)
        da = self.down_proj.backward(dy, s_down, need_dx=gate is not None)  # y = down_proj(a)
        if gate is None:
            return None
        dx_g = dx_u = None
        need = {name for name, at in (("dg", at_g), ("du", at_u)) if at}
        dg, du = K.swiglu_backward(da, gate, need)  #                          a = silu(g) * u
        if at_u:
            dx_u = self.up_proj.backward(du, s_up, need_dx=need_dx)  #         u = up_proj(x)
        if at_g:
            dx_g = self.gate_proj.backward(dg, s_gate, need_dx=need_dx)  #     g = gate_proj(x)
        # x feeds both
        return K.add(dx_g, dx_u) if need_dx else None


class LlamaBlock(Layer):
    """h = x + self_attn(input_layernorm(x));   y = h + mlp(post_attention_layernorm(h)).   x (T, d) -> y (T, d).

    Each residual add sends the gradient both ways, as in `layers/block.py`. `rows`: those of y that are asked for, (R, d).
    """

    def __init__(self, config: LlamaConfig, *, rng: Rng = None, dtype: Any = "float32") -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = LlamaAttention(config, rng=rng, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = LlamaMLP(config, rng=rng, dtype=dtype)

    def forward(  # type: ignore[override]
        self,
        x: Array,
        keep: bool = True,
        need_dx: bool = True,
        offsets: Sequence[int] | None = None,
        rows: np.ndarray | None = None,
        *,
        rope: Tables,
    ) -> tuple[Array, Saved | None]:
        # Who needs a gradient? Each part that has something trainable at or below it.
        at_a = need_dx or self.input_layernorm.trainable
        at_h = at_a or self.self_attn.trainable
        at_m = at_h or self.post_attention_layernorm.trainable
        at_y = at_m or self.mlp.trainable

        a, s_norm_1 = self.input_layernorm.forward(x, keep=keep and at_a, need_dx=need_dx)
        a, s_attn = self.self_attn.forward(a, keep=keep and at_h, need_dx=at_a, offsets=offsets, rows=rows, rope=rope)
        h = K.add(F.take_rows(x, rows), a)

        m, s_norm_2 = self.post_attention_layernorm.forward(h, keep=keep and at_m, need_dx=at_h)
        m, s_mlp = self.mlp.forward(m, keep=keep and at_y, need_dx=at_m)
        y = K.add(h, m)

        needs = (at_a, at_h, at_m, at_y)
        return y, self.save(need_dx, needs, rows, len(x), s_norm_1, s_attn, s_norm_2, s_mlp) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        needs, rows, T, s_norm_1, s_attn, s_norm_2, s_mlp = self.load(saved, need_dx)
        at_a, at_h, at_m, at_y = needs

        if not at_y:
            return None
        dm = self.mlp.backward(dy, s_mlp, need_dx=at_m)  #                     y = h + m
        if not at_m:
            return None
        dh = self.post_attention_layernorm.backward(dm, s_norm_2, need_dx=at_h)
        if not at_h:
            return None
        dh = K.add(dy, dh)  #                                                   h feeds y twice: directly, and through the norm and mlp

        da = self.self_attn.backward(dh, s_attn, need_dx=at_a)  #              h = x[rows] + a
        if not at_a:
            return None
        dx = self.input_layernorm.backward(da, s_norm_1, need_dx=need_dx)
        return K.add(F.take_rows_backward(dh, rows, T), dx) if need_dx else None  #  x feeds h twice

    def decode(self, x: Array, rope: Tables, extend: Extend) -> Array:
        """`forward` of the next tokens of one sequence, see LlamaAttention.decode."""
        h = x + self.self_attn.decode(self.input_layernorm.forward(x, keep=False)[0], rope, extend)
        return h + self.mlp.forward(self.post_attention_layernorm.forward(h, keep=False)[0], keep=False)[0]


class LlamaDecoder(Layer):
    """ids (T,) -> h (T, hidden_size): everything but the head."""

    def __init__(self, config: LlamaConfig, *, rng: Rng = None, dtype: Any = "float32") -> None:
        c = self.config = config
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size, c.pad_token_id, rng=rng, dtype=dtype)
        self.layers = [LlamaBlock(c, rng=rng, dtype=dtype) for _ in range(c.num_hidden_layers)]
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, dtype=dtype)
        self.recompute = False  # save less, compute more: models/stack.py

    def forward(
        self,
        x: Array,
        keep: bool = True,
        need_dx: bool = False,
        offsets: Sequence[int] | None = None,
        rows: np.ndarray | None = None,
        prefix: Prefix | None = None,
    ) -> tuple[Array, Saved | None]:
        """x are token ids; `offsets` bound the sequences laid end to end in them. There is no dx: ids are integers.

        rows: the rows of h that are asked for, all by default. prefix: what `self.prefix` gave for these ids.
        """
        at_x, s_embed = self.embed_tokens.trainable, None
        if prefix is None:
            h, s_embed = self.embed_tokens.forward(x, keep=keep and at_x)
            prefix = Prefix(0, h)
        rope = self.tables(F.positions(len(x), offsets, self.config.max_position_embeddings), prefix.x)
        h, ran = run_blocks(self.layers, prefix.x, at_x, keep, prefix.blocks, rows, self.recompute, offsets=offsets, rope=rope)
        h, s_norm = self.norm.forward(h, keep=keep, need_dx=ran.needs[-1])
        return h, self.save(need_dx, s_embed, ran, s_norm) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        s_embed, ran, s_norm = self.load(saved, need_dx)
        dh: Array = self.norm.backward(dy, s_norm, need_dx=ran.needs[-1])
        dx = run_blocks_backward(self.layers, dh, ran)
        if dx is not None:
            self.embed_tokens.backward(dx, s_embed)

    def prefix(self, ids: Array, offsets: Sequence[int] | None = None) -> Prefix | None:
        """What the frozen blocks at the bottom give for these ids, None where there are none."""
        n = frozen_blocks(self.layers, self.embed_tokens.trainable)
        if n == 0:
            return None
        x, _ = self.embed_tokens.forward(ids, keep=False)
        rope = self.tables(F.positions(len(ids), offsets, self.config.max_position_embeddings), x)
        return Prefix(n, run_blocks(self.layers[:n], x, False, False, offsets=offsets, rope=rope)[0])

    def decode(self, ids: Array, cache: KVCache) -> Array:
        """h (t, hidden_size) of the next t tokens of the sequence in the cache."""
        total = cache.length + len(ids)
        places = F.positions(total, None, self.config.max_position_embeddings)[cache.length :]
        h, _ = self.embed_tokens.forward(ids, keep=False)
        rope = self.tables(places, h)
        for i, block in enumerate(self.layers):
            h = block.decode(h, rope, partial(cache.extend, i))
        cache.length = total
        return self.norm.forward(h, keep=False)[0]

    def tables(self, positions: np.ndarray, like: Array) -> Tables:
        """cos and sin for these positions, where the activations `like` live; beside 16 bits they are of float32."""
        return F.rotary_tables(positions, self.config.head_dim, self.config.rope_theta, K.upcast(like[:1]))  # type: ignore[arg-type]


class Llama(Layer):
    """ids (T,) -> logits (T, vocab_size). For training use `loss` and `loss_backward`, which hold the logits of a block at a time.

    Initial values, as in transformers: N(0, 0.02^2), biases zero.
    """

    model_type = "llama"
    output_head = "lm_head"  # what "all-linear" leaves out
    weights_are_in_out = False  # the file keeps Linear weights as (out, in)

    def __init__(self, config: LlamaConfig, *, rng: Rng = None, dtype: Any = "float32") -> None:
        self.config = config
        rng = generator(rng)
        self.model = LlamaDecoder(config, rng=rng, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, rng=rng, dtype=dtype)
        for path, p in self.parameters():
            if path.endswith(("_proj.weight", "lm_head.weight")):
                p.data = rng.normal(0, 0.02, p.data.shape).astype(dtype)
            elif path.endswith("bias"):
                p.data[...] = 0

    def forward(
        self, x: Array, keep: bool = True, need_dx: bool = False, offsets: Sequence[int] | None = None
    ) -> tuple[Array, Saved | None]:
        h, s_h = self.model.forward(x, keep=keep, offsets=offsets)
        if self.config.tie_word_embeddings:
            logits, s_head = K.product(h, self.head), h if self.model.embed_tokens.weight.trainable else None
        else:
            logits, s_head = self.lm_head.forward(h, keep=keep, need_dx=self.model.trainable)
        return logits, self.save(need_dx, s_head, s_h) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        s_head, s_h = self.load(saved, need_dx)
        if not self.config.tie_word_embeddings:
            dh = self.lm_head.backward(dy, s_head, need_dx=self.model.trainable)  # logits = lm_head(h)
        else:
            E = self.model.embed_tokens.weight
            if E.trainable:
                E.add_grad(dy.T @ s_head)  #                                        logits = h @ E^T
            dh = K.product(dy, E.data)
        if self.model.trainable:
            self.model.backward(dh, s_h)

    def loss(
        self,
        ids: Array,
        labels: np.ndarray | F.Labelled,
        offsets: Sequence[int] | None = None,
        count: int | None = None,
        keep: bool = True,
        prefix: Prefix | None = None,
    ) -> tuple[Array, Saved | None]:
        """The sum over labelled rows of -log p(labels_t | what precedes), divided by `count` (default: their number).

        ids (T,); labels (T,) on the host: labels[t] is the token that row t has to predict (shifted already), or -100.
        Or F.Labelled: the rows that have one, and their labels, which may be on a device.
        The last block, the head and the softmax run on labelled rows only, the latter two in blocks of the vocabulary (all of it
        at once where the head is not a plain Linear). With keep=True the gradient of h is computed along; `loss_backward(saved)`
        goes on from there. prefix: what `prefix(ids, offsets)` gave.
        Raises ValueError when no row is labelled and no `count` was given.
        """
        rows, targets, _ = F.labelled(labels)
        if targets.size == 0 and count is None:
            raise ValueError("loss: no row is labelled.")
        h, s_h = self.model.forward(ids, keep=keep, offsets=offsets, rows=rows, prefix=prefix)
        W, dz, s_head = self.head, None, None
        if W is not None:
            owner = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
            need = {name for name, wanted in (("dx", self.model.trainable), ("dW", owner.weight.trainable)) if wanted and keep}
            loss, dh, dW = K.linear_cross_entropy(h, W, targets, count, need)
        else:
            dh = dW = None
            z, s_head = self.lm_head.forward(h, keep=keep, need_dx=self.model.trainable)
            loss, dz = z.sum(), z  # of no rows at all
            if len(z):
                loss, dz = K.cross_entropy(z, F.Labelled(None, targets, len(z)), len(z) / (count or len(z)))
        return loss, self.save(False, dh, dW, dz, s_head, s_h) if keep else None

    def loss_backward(self, saved: Saved | None) -> None:
        """Add the gradients of `loss` to the trainable parameters."""
        dh, dW, dz, s_head, s_h = self.load(saved, False)
        if dz is not None:
            dh = self.lm_head.backward(dz, s_head, need_dx=self.model.trainable)  # z = lm_head(h)
        elif dW is not None and self.config.tie_word_embeddings:
            self.model.embed_tokens.weight.add_grad(dW.T)  # the head is embed_tokens^T
        elif dW is not None:
            self.lm_head.weight.add_grad(dW)
        if dh is not None:  # None: only the head is trained
            self.model.backward(dh, s_h)

    def prefix(self, ids: Array, offsets: Sequence[int] | None = None) -> Prefix | None:
        """What the frozen blocks at the bottom give for these ids: the same in every epoch (models/stack.py). None: there are none."""
        return self.model.prefix(ids, offsets)

    def decode(self, ids: Array, cache: KVCache) -> Array:
        """The logits (vocab_size,) of what follows `ids` (t,), which follow the tokens in the cache and are added to it.

        Raises ValueError for a sequence beyond max_position_embeddings, and leaves the cache's length as it was.
        """
        h = self.model.decode(ids, cache)[-1:]
        W = self.head
        return (K.product(h, W) if W is not None else self.lm_head.forward(h, keep=False)[0])[0]

    @property
    def head(self) -> Array | None:
        """The head's weight (hidden_size, vocab_size), or None where lm_head is more than a weight: an adapted layer."""
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.weight.data.T
        return self.lm_head.weight.data if type(self.lm_head) is Linear else None
