"""LoRA for an embedding: a table of V x r and a small matrix (arXiv 2106.09685, section 4.1, for a product with one-hot rows).

    y_t = E[ids_t] + s A[ids_t] B

An embedding is a product with one-hot rows, so this is `lora_linear` with x A read instead of multiplied. Initially A is zero and
B ~ N(0, 1), as in PEFT: the reverse of LoRA for a Linear, so that a token that is never read never changes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from minilora import kernels as K
from minilora.backend import Array, Rng, as_like, backend_name, generator, to_backend
from minilora.layers import Embedding, Output, Parameter, Saved, needed
from minilora.lora.layer import Adapted, check_float32, scaling

INITIALISERS = (True, False, "gaussian")


def lora_embedding(ids: Array, E: Array, A: Array, B: Array, s: float) -> tuple[Array, Array]:
    """y_t = E[ids_t] + s u_t B,   saved u_t = A[ids_t].

    Shapes: ids (T,) integers, E (V, d), A (V, r), B (r, d) -> y (T, d), u (T, r). Saved: ids for dA, u for dB.
    """
    y = K.embedding(ids, E)
    u = A[as_like(ids, A)]
    y += (s * u) @ B
    return y, u


def lora_embedding_backward(
    dy: Array,
    ids: Array,
    u: Array,
    A: Array,
    B: Array,
    s: float,
    need: Collection[str] = ("dA", "dB"),
    padding_idx: int | None = None,
) -> tuple[Array, Array]:
    """Gradients of y_t = E[ids_t] + s A[ids_t] B; E is frozen, and ids have none.

    dB = s u^T dy                                        (r, d)
    dA[v] = sum of s dy_t B^T over t with ids_t = v      (V, r)    only rows that were read, and not padding_idx
    """
    dB = (s * u).T @ dy if "dB" in need else None  # y += (s * u) @ B
    dA = K.embedding_backward(s * (dy @ B.T), ids, A, padding_idx) if "dA" in need else None  # u = A[ids]
    return dA, dB


class LoRAEmbedding(Adapted, Embedding):
    """y_t = weight[ids_t] + scaling lora_embedding_A[ids_t] lora_embedding_B,   A (num_embeddings, r), B (r, embedding_dim).

    Takes over the table of `base` and freezes it. Saved: ids if A is trained, u if B is. A head that is tied to the table uses the table
    alone. Raises ValueError for a rank below 1, half precision, or an init other than True, "gaussian" and False (both normal).
    """

    trains = ("lora_embedding_A", "lora_embedding_B")

    def __init__(
        self, base: Embedding, r: int = 8, alpha: float = 16, use_rslora: bool = False, init: bool | str = True, rng: Rng = None
    ) -> None:
        if r < 1:
            raise ValueError(f"LoRAEmbedding: rank {r} must be at least 1.")
        if init not in INITIALISERS:
            raise ValueError(f"LoRAEmbedding: init is {init!r}; choose True, 'gaussian' or False for an embedding.")
        check_float32(base.weight.data, "LoRA on an embedding")
        self.weight, self.padding_idx, rng = base.weight, base.padding_idx, generator(rng)
        self.weight.trainable = False
        self.r, self.alpha, self.scaling = r, alpha, scaling(alpha, r, use_rslora)
        (V, d), home, dtype = base.weight.data.shape, backend_name(base.weight.data), base.weight.data.dtype
        A, B = rng.standard_normal((V, r)) * (init is False), rng.standard_normal((r, d))
        self.lora_embedding_A, self.lora_embedding_B = (Parameter(to_backend(value, home, dtype)) for value in (A, B))

    @classmethod
    def of(cls, base: Embedding, config: Any, path: str, init: Any, rng: Rng = None) -> LoRAEmbedding:
        """The layer for `path` of a model, by a LoraConfig."""
        if config.init_lora_weights not in INITIALISERS:
            raise ValueError(f"init_lora_weights={config.init_lora_weights!r} is for linear layers; {path} is of type Embedding.")
        return cls(base, config.rank_of(path), config.alpha_of(path), config.use_rslora, config.init_lora_weights, rng)

    def delta(self) -> Array:
        """scaling A B, (num_embeddings, embedding_dim)."""
        return self.scaling * (self.lora_embedding_A.data @ self.lora_embedding_B.data)

    def forward(self, x: Array, keep: bool = True, need_dx: bool = False) -> Output:
        A, B = self.lora_embedding_A, self.lora_embedding_B
        if (E := self.alone(keep)) is not None:
            return K.embedding(x, E), self.save(need_dx, None, None) if keep else None
        y, u = lora_embedding(x, self.weight.data, A.data, B.data, self.scaling)
        return y, self.save(need_dx, x if A.trainable else None, u if B.trainable else None) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = False) -> None:
        ids, u = self.load(saved, need_dx)
        A, B = self.lora_embedding_A, self.lora_embedding_B
        need = needed(dA=ids is not None, dB=u is not None)
        dA, dB = lora_embedding_backward(dy, ids, u, A.data, B.data, self.scaling, need, self.padding_idx)
        A.add_grad(dA)
        B.add_grad(dB)
