"""VeRA: one random A and B for the whole model, frozen; each layer trains two vectors (arXiv 2310.11454).

    y = x W + b + lambda_b * ((lambda_d * (x A)) B)        lambda_d (r,), lambda_b (out,); * is element by element

All layers read the same two matrices, each as many rows of A and columns of B as it has features. They are drawn from a seed, as PEFT draws
them, so that a file may leave them out. Initially lambda_d is d_initial and lambda_b zero: the model computes what it did before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from minilora import kernels as K
from minilora.backend import Array, Rng, backend_name, generator, to_backend, to_numpy
from minilora.layers import Layer, Linear, Parameter, needed
from minilora.lora.config import LoraConfig
from minilora.lora.layer import AdaptedLinear, check_float32
from minilora.lora.targets import find_targets

_OF_LORA = """lora_alpha lora_dropout use_rslora use_dora init_lora_weights eva_config lora_ga_config loftq_config rank_pattern
    alpha_pattern exclude_modules""".split()


def vera_linear(
    x: Array, W: Array, b: Array | None, A: Array, B: Array, d: Array, e: Array, mask: Array | None = None
) -> tuple[Array, Array]:
    """y = x W + b + ((u * d) B) * e,   saved u = x A: LoRA with B' = diag(d) B diag(e) in place of B.

    Shapes: x (T, m), W (m, n), b and e (n,), A (m, r), B (r, n), d (r,) -> y (T, n), u (T, r). d is lambda_d, e is lambda_b.
    `mask` (T, m) is the dropout on what A reads. Saved: u, for both vectors.
    """
    return K.lora_linear(x, W, b, A, d[:, None] * B * e, 1.0, mask)


def vera_linear_backward(
    dy: Array,
    u: Array,
    W: Array,
    A: Array,
    B: Array,
    d: Array,
    e: Array,
    mask: Array | None = None,
    need: Collection[str] = ("dx", "dd", "de"),
) -> tuple[Array, Array, Array]:
    """Gradients of y = x W + b + u B' with u = x A and B'_kj = d_k B_kj e_j; W, A and B are frozen and get none.

    dB' = u^T dy                      (r, n)    both vectors read it:
    dd_k = sum_j dB'_kj B_kj e_j      (r,)
    de_j = sum_k dB'_kj B_kj d_k      (n,)      zero as long as d is
    dx = dy W^T + (dy B'^T) A^T       (T, m)
    """
    lora_need = {"dx"} & set(need) | ({"dB"} if {"dd", "de"} & set(need) else set())
    dx, _, dB = K.lora_linear_backward(dy, None, u, W, A, d[:, None] * B * e, 1.0, mask, lora_need)
    if dB is None:
        return dx, None, None
    M = dB * B  # B' = d[:, None] * B * e
    return dx, M @ e if "dd" in need else None, d @ M if "de" in need else None


@dataclass
class VeraConfig(LoraConfig):
    """VeRA, for `inject`. Names, defaults and meaning are those of PEFT's VeraConfig; LoRA's own fields of LoraConfig have no meaning here.

    r                     rank of the shared A and B; it may be beyond min(in, out), as it costs r numbers a layer
    projection_prng_key   the seed of A and B
    save_projection       write A and B into the file, so that a reader need not draw them
    vera_dropout          probability of dropping what A reads, in training
    d_initial             the initial value of lambda_d
    init_weights          False: lambda_d ~ N(0, 1) and lambda_b one, for tests
    bias                  "none", "all" or "vera_only"
    """

    peft_type: ClassVar[str] = "VERA"
    not_in_file: ClassVar[tuple[str, ...]] = tuple(_OF_LORA)
    choices: ClassVar[dict[str, tuple[Any, ...]]] = LoraConfig.choices | {"bias": ("none", "all", "vera_only")}
    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        usual = LoraConfig()
        for name in self.not_in_file:
            if getattr(self, name) != getattr(usual, name):
                raise ValueError(f"VeraConfig: {name} and VeRA exclude each other; {name} is LoRA's.")
        if not 0 <= self.vera_dropout < 1:
            raise ValueError(f"VeraConfig: vera_dropout is {self.vera_dropout}; it must be at least 0 and below 1.")
        if not isinstance(self.projection_prng_key, int) or not 0 <= self.projection_prng_key < 2**32:
            raise ValueError(f"VeraConfig: projection_prng_key is {self.projection_prng_key!r}; it must be an integer from 0 to 2^32 - 1.")
        if not isinstance(self.d_initial, (int, float)) or not math.isfinite(self.d_initial):
            raise ValueError(f"VeraConfig: d_initial is {self.d_initial!r}; it must be a number.")

    def targets(self, model: Layer, strict: bool = True) -> dict[str, Any]:
        return find_targets(model, self, strict)  # the rank may be beyond min(in, out)

    def adapters(self, model: Layer, targets: dict[str, Any], rng: Any, train_step: Callable[[], Any] | None) -> tuple[Any, dict[str, Any]]:
        classes = {path: self.layer_class(layer) for path, layer in targets.items()}
        m, n = (max(layer.weight.data.shape[i] for layer in targets.values()) for i in (0, 1))
        shared = Projections.drawn(m, n, self.r, self.projection_prng_key)
        return self, {path: kind(targets[path], self, shared, rng) for path, kind in classes.items()}

    def classes(self) -> dict[str, Any]:
        return {"Linear": VeRALinear}

    @property
    def method(self) -> str:
        return "VeRA"


class Projections:
    """The A (m, r) and B (r, n) that all layers of a model share; converted once for each backend and dtype."""

    def __init__(self, A: np.ndarray, B: np.ndarray) -> None:
        self.A, self.B = A, B
        self._there: dict[tuple[str, str], tuple[Array, Array]] = {}

    @classmethod
    def drawn(cls, m: int, n: int, r: int, key: int) -> Projections:
        """Kaiming-uniform numbers from a Mersenne twister, to the bit those of PEFT: A^T (r, m), and then B^T (n, r)."""
        twister = np.random.RandomState(key)

        def uniform(rows: int, columns: int) -> np.ndarray:
            bound = np.float32(math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns)))
            bits = np.frombuffer(twister.bytes(4 * rows * columns), "<u4") & np.uint32(2**24 - 1)
            x = bits * 2.0**-24 * (bound + bound) - float(bound)  # in float64, and rounded once: torch's fused multiply-add
            return x.astype(np.float32).reshape(rows, columns)

        A = uniform(r, m)
        return cls(A.T, uniform(n, r).T)

    def like(self, x: Array, m: int, n: int) -> tuple[Array, Array]:
        """The first m rows of A and n columns of B, on the device of x and in its dtype."""
        home = backend_name(x), str(x.dtype)
        if home not in self._there:
            self._there[home] = to_backend(self.A, *home), to_backend(self.B, *home)
        A, B = self._there[home]
        return A[:m], B[:, :n]

    def __deepcopy__(self, memo: Any) -> Projections:
        return self  # it is never written to


class VeRALinear(AdaptedLinear):
    """y = x W + b + vera_lambda_b * ((vera_lambda_d * (x A)) B); see above. Saved: x A, if one of the vectors is trained.

    Raises ValueError for half-precision weights.
    """

    trains = ("vera_lambda_b", "vera_lambda_d")

    def __init__(self, base: Linear, config: VeraConfig, projections: Projections, rng: Rng = None) -> None:
        check_float32(base.weight.data, "VeRA")
        super().__init__(base, config.vera_dropout)
        self.projections, self.saves_projections = projections, config.save_projection
        home, dtype, self.r = backend_name(base.weight.data), base.weight.data.dtype, config.r
        e, d = np.zeros(base.out_features), np.full(self.r, config.d_initial)
        if not config.init_weights:
            e, d = e + 1, generator(rng).standard_normal(self.r)
        self.vera_lambda_b, self.vera_lambda_d = (Parameter(to_backend(value, home, dtype)) for value in (e, d))

    def shared(self) -> dict[str, Array]:
        """vera_A (r, m) and vera_B (n, r), transposed as in PEFT's files, unless the file leaves them out."""
        return {"vera_A": self.projections.A.T, "vera_B": self.projections.B.T} if self.saves_projections else {}

    def share(self, arrays: dict[str, Array]) -> None:
        self.projections.A, self.projections.B = (to_numpy(arrays[name]).T for name in ("vera_A", "vera_B"))
        self.projections._there.clear()

    def matrices(self) -> tuple[Array, Array, Array, Array]:
        """A, B, lambda_d, lambda_b."""
        d, e = self.vera_lambda_d.data, self.vera_lambda_b.data
        return *self.projections.like(d, self.in_features, self.out_features), d, e

    def delta(self) -> Array:
        """(A * lambda_d) B * lambda_b, in the shape of the weight."""
        A, B, d, e = self.matrices()
        return ((A * d) @ B) * e

    def adapted_forward(self, x: Array, b: Array | None, mask: Array | None) -> tuple[Array, tuple[Any, ...]]:
        y, u = vera_linear(x, self.weight.data, b, *self.matrices(), mask)
        trained = self.vera_lambda_d.trainable or self.vera_lambda_b.trainable
        return y, (u if trained else u._replace(value=None),)

    def adapted_backward(self, dy: Array, saved: list[Any], mask: Array | None, need_dx: bool) -> Array | None:
        (u,), d, e = saved, self.vera_lambda_d, self.vera_lambda_b
        need = needed(dx=need_dx, dd=d.trainable, de=e.trainable)
        dx, dd, de = vera_linear_backward(dy, u, self.weight.data, *self.matrices(), mask, need)
        d.add_grad(dd)
        e.add_grad(de)
        return dx
