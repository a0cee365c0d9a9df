"""GPT-2: a decoder of pre-norm blocks with learned positions and a tied head. Module names as in GPT2LMHeadModel.

    x_0 = wte[ids] + wpe[position]        h_i = block_i(h_{i-1})        h = ln_f(h_L)        logits = h wte^T

The published checkpoint keeps its "Conv1D" weights as (in, out), which is the orientation used here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from minilora import functional as F
from minilora import kernels as K
from minilora.backend import Array, Rng, constant, generator
from minilora.layers import Block, Dropout, Embedding, Layer, LayerNorm, Saved
from minilora.models.cache import KVCache
from minilora.models.config_file import check_types, made, read_fields
from minilora.models.stack import Prefix, frozen_blocks, run_blocks, run_blocks_backward


@dataclass
class GPT2Config:
    """Field names as in the config.json of a published GPT-2. n_inner None is 4 n_embd. Raises ValueError for sizes that do not fit."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    layer_norm_epsilon: float = 1e-5
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_types(GPT2Config, vars(self), "GPT2Config", "vocab_size n_positions n_embd n_layer n_head n_inner layer_norm_epsilon")
        if self.n_embd % self.n_head:
            raise ValueError(f"GPT2Config: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}.")

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> GPT2Config:
        """The configuration in a config.json; `where` is its name for messages. Raises ValueError for what is not supported."""
        return made(cls, read_fields(raw, where, cls, _FIXED, "pad_token_id n_ctx is_decoder reorder_and_upcast_attn", _ALIASES), where)

    def to_json(self) -> dict[str, Any]:
        """The fields as config.json keeps them."""
        told = {key: value for key, value in asdict(self).items() if key != "dropout"}
        told |= {"resid_pdrop": self.dropout, "embd_pdrop": self.dropout, "attn_pdrop": 0.0}  # else transformers takes 0.1
        return {"model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": True, **told}


_FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "is_causal": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
}
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


class Decoder(Layer):
    """ids (T,) -> h (T, n_embd): everything but the head."""

    def __init__(self, config: GPT2Config, rng: np.random.Generator, dtype: Any) -> None:
        c = config
        self.wte = Embedding(c.vocab_size, c.n_embd, rng=rng, dtype=dtype)
        self.wpe = Embedding(c.n_positions, c.n_embd, rng=rng, dtype=dtype)
        self.drop = Dropout(c.dropout)
        self.h = [Block(c.n_embd, c.n_head, c.n_inner, c.layer_norm_epsilon, c.dropout, rng=rng, dtype=dtype) for _ in range(c.n_layer)]
        self.ln_f = LayerNorm(c.n_embd, c.layer_norm_epsilon, dtype=dtype)
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
        at_x = self.wte.trainable or self.wpe.trainable
        s_wte = s_wpe = s_drop = None
        if prefix is None:
            tokens, s_wte = self.wte.forward(x, keep=keep and at_x)
            places, s_wpe = self.wpe.forward(constant(self._positions(len(x), offsets), tokens), keep=keep and at_x)
            h, s_drop = self.drop.forward(tokens + places, keep=keep and at_x)
            prefix = Prefix(0, h)
        h, ran = run_blocks(self.h, prefix.x, at_x, keep, prefix.blocks, rows, self.recompute, offsets=offsets)
        h, s_ln_f = self.ln_f.forward(h, keep=keep, need_dx=ran.needs[-1])
        return h, self.save(need_dx, s_wte, s_wpe, s_drop, ran, s_ln_f) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        s_wte, s_wpe, s_drop, ran, s_ln_f = self.load(saved, need_dx)
        dh: Array = self.ln_f.backward(dy, s_ln_f, need_dx=ran.needs[-1])
        dx = run_blocks_backward(self.h, dh, ran)
        if dx is not None:
            dx = self.drop.backward(dx, s_drop)
            self.wpe.backward(dx, s_wpe)  # x_0 = wte[ids] + wpe[position]: both get all of it
            self.wte.backward(dx, s_wte)

    def prefix(self, ids: Array, offsets: Sequence[int] | None = None) -> Prefix | None:
        """What the frozen blocks at the bottom give for these ids, None where there are none."""
        n = frozen_blocks(self.h, self.wte.trainable or self.wpe.trainable)
        if n == 0:
            return None
        x = self.wte.forward(ids, keep=False)[0]
        x = x + self.wpe.forward(constant(self._positions(len(ids), offsets), x), keep=False)[0]
        return Prefix(n, run_blocks(self.h[:n], x, False, False, offsets=offsets)[0])

    def decode(self, ids: Array, cache: KVCache) -> Array:
        """h (t, n_embd) of the next t tokens of the sequence in the cache."""
        total = cache.length + len(ids)
        h = self.wte.forward(ids, keep=False)[0] + self.wpe.forward(self._positions(total, None)[cache.length :], keep=False)[0]
        for i, block in enumerate(self.h):
            h = h + block.attn.decode(block.ln_1.forward(h, keep=False)[0], partial(cache.extend, i))
            h = h + block.mlp.forward(block.ln_2.forward(h, keep=False)[0], keep=False)[0]
        cache.length = total
        return self.ln_f.forward(h, keep=False)[0]

    def _positions(self, tokens: int, offsets: Sequence[int] | None) -> np.ndarray:
        return F.positions(tokens, offsets, self.wpe.weight.data.shape[0])


class GPT2(Layer):
    """ids (T,) -> logits (T, vocab_size). For training use `loss` and `loss_backward`, which never hold the logits.

    Initial values (GPT-2, section 2.3): N(0, 0.02^2), biases zero, and 0.02 / sqrt(2 n_layer) for the projections into the residual stream.
    """

    model_type = "gpt2"
    weights_are_in_out = True
    output_head = "lm_head"  # tied: it is wte; named so that "all-linear" can leave it out

    def __init__(self, config: GPT2Config, *, rng: Rng = None, dtype: Any = "float32") -> None:
        self.config = config
        rng = generator(rng)
        self.transformer = Decoder(config, rng, dtype)
        for path, p in self.parameters():
            if path.endswith("c_proj.weight"):
                p.data = rng.normal(0, 0.02 / math.sqrt(2 * config.n_layer), p.data.shape).astype(dtype)
            elif path.endswith(("c_attn.weight", "c_fc.weight")):
                p.data = rng.normal(0, 0.02, p.data.shape).astype(dtype)
            elif path.endswith("bias"):
                p.data[...] = 0

    @property
    def head(self) -> Array:
        """The head's weight (n_embd, vocab_size): the embedding, transposed, as a view."""
        return self.transformer.wte.weight.data.T

    def forward(
        self, x: Array, keep: bool = True, need_dx: bool = False, offsets: Sequence[int] | None = None
    ) -> tuple[Array, Saved | None]:
        h, s_h = self.transformer.forward(x, keep=keep, offsets=offsets)
        logits = K.product(h, self.head)
        return logits, self.save(need_dx, h if self.transformer.wte.weight.trainable else None, s_h) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        h, s_h = self.load(saved, need_dx)
        if h is not None:
            self.transformer.wte.weight.add_grad(dy.T @ h)  # logits = h @ wte^T
        self.transformer.backward(K.product(dy, self.head.T), s_h)

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
        The last block, the head and the softmax run on labelled rows only, the latter two in blocks of the vocabulary. With
        keep=True the gradient of h is computed along (it costs one product) and `loss_backward(saved)` goes on from there.
        prefix: what `prefix(ids, offsets)` gave.
        Raises ValueError when no row is labelled and no `count` was given.
        """
        rows, targets, _ = F.labelled(labels)
        if targets.size == 0 and count is None:
            raise ValueError("loss: no row is labelled.")
        h, s_h = self.transformer.forward(ids, keep=keep, offsets=offsets, rows=rows, prefix=prefix)
        need = ({"dx", "dW"} if self.transformer.wte.weight.trainable else {"dx"}) if keep else set()
        loss, dh, dW = K.linear_cross_entropy(h, self.head, targets, count, need)
        return loss, self.save(False, dh, dW, s_h) if keep else None

    def loss_backward(self, saved: Saved | None) -> None:
        """Add the gradients of `loss` to the trainable parameters."""
        dh, dW, s_h = self.load(saved, False)
        if dW is not None:
            self.transformer.wte.weight.add_grad(dW.T)  # the head is wte^T
        self.transformer.backward(dh, s_h)

    def prefix(self, ids: Array, offsets: Sequence[int] | None = None) -> Prefix | None:
        """What the frozen blocks at the bottom give for these ids: the same in every epoch (models/stack.py). None: there are none."""
        return self.transformer.prefix(ids, offsets)

    def decode(self, ids: Array, cache: KVCache) -> Array:
        """The logits (vocab_size,) of what follows `ids` (t,), which follow the tokens in the cache and are added to it.

        Raises ValueError for a sequence beyond n_positions, and leaves the cache's length as it was.
        """
        return K.product(self.transformer.decode(ids, cache)[-1:], self.head)[0]
