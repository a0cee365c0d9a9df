"""DoRA: LoRA for the direction of each column of a weight, a number for its magnitude (arXiv 2402.09353).

    V = W + s A B,   c_j = ||column j of V||,   y = (x V) m / c + b        initially m_j = ||column j of W||

c depends on A and B. The paper (section 4.3) and PEFT treat it as a constant in backward, which is cheaper but not the gradient of what is
computed: finite differences disagree by design. Here use_dora=True does the same, and use_dora="exact" adds the gradient of c. Neither ever
holds an array of W's size.
"""

from collections.abc import Collection
from typing import Any

from minilora import kernels as K
from minilora.backend import Array, Rng, get_xp
from minilora.layers import Linear, Parameter, needed
from minilora.lora.layer import LoRALinear, check_float32
from minilora.quantization.residual import column_squares, dense


def column_norms(W: Array, A: Array, B: Array, s: float, squares: Array) -> tuple[Array, Array]:
    """c_j = ||column j of V||,   saved A^T V,   with V = W + s A B.

        c_j^2 = sum_i W_ij^2 + s sum_k B_kj (A^T W + A^T V)_kj,      A^T V = A^T W + s (A^T A) B

    Shapes: W (m, n), A (m, r), B (r, n) -> c (n,), A^T V (r, n). `squares` (n,) are those of W's columns, which do not change.
    """
    AtW = A.T @ W
    AtV = AtW + s * (A.T @ A) @ B
    return get_xp(A).sqrt(squares + s * (B * (AtW + AtV)).sum(axis=0)), AtV


def column_norms_backward(dc: Array, c: Array, AtV: Array, W: Array, A: Array, B: Array, s: float) -> tuple[Array, Array]:
    """Gradients of c = ||V||, column by column: dV = V diag(dc / c), and V = W + s A B.

    dA = s V (B diag(dc / c))^T      (m, r)
    dB = s A^T V diag(dc / c)        (r, n)
    """
    H = B * (dc / c)
    return s * (W @ H.T + s * A @ (B @ H.T)), s * AtV * (dc / c)


def dora_linear(
    x: Array, W: Array, b: Array | None, A: Array, B: Array, m: Array, c: Array, s: float, mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """y = u m / c + b,   saved z = x A and u = x V = x W + s z B.

    Shapes: x (T, m), W (m, n), b, m and c (n,), A (m, r), B (r, n) -> y (T, n), z (T, r), u (T, n).
    With dropout, what is added to the base layer reads x' = x mask:  y = x W + (x' V m / c - x' W) + b, at two products with W.
    Saved: x for dA, z for dB, u for dm (T n numbers; recomputing it costs the product with W again).
    """
    dropped = x if mask is None else x * mask
    u, z = K.lora_linear(dropped, W, None, A, B, s)
    y = u * (m / c)
    if mask is not None:
        y += K.product(x - dropped, W)
    if b is not None:
        y += b
    return y, z, u


def dora_linear_backward(
    dy: Array,
    x: Array,
    z: Array,
    u: Array,
    W: Array,
    A: Array,
    B: Array,
    m: Array,
    c: Array,
    s: float,
    mask: Array | None = None,
    need: Collection[str] = ("dx", "dA", "dB", "dm", "dc"),
) -> tuple[Array, Array, Array, Array, Array]:
    """Gradients of y = u m / c + b, with c held; each formed only if `need` names it, else None.

        dm = sum_t dy_t u_t / c,   dc = - dm m / c               (n,)
        du = dy m / c                                            (T, n)
        dB = s z^T du,   dA = s x^T (du B^T)                     (r, n), (m, r)
        dx = du W^T + s (du B^T) A^T                             (T, m)

    x may be None without "dA", u without "dm" and "dc".
    """
    dm = dc = None
    if {"dm", "dc"} & set(need):
        dm = (dy * u).sum(axis=0) / c  # y = u * (m / c)
        dc = -dm * m / c if "dc" in need else None
    du = dy * (m / c)
    dropped = x if x is None or mask is None else x * mask
    dx, dA, dB = K.lora_linear_backward(du, dropped, z, W, A, B, s, None, {"dx", "dA", "dB"} & set(need))  # u = lora_linear(x * mask)
    if dx is not None and mask is not None:
        dx = dx * mask + K.product(dy, W.T) * (1 - mask)  # y += (x - x * mask) @ W
    return dx, dA, dB, dm if "dm" in need else None, dc


class DoRALinear(LoRALinear):
    """LoRALinear whose columns of W + scaling A B have the magnitudes `lora_magnitude_vector` (n,); see above.

    exact: with the gradient of the column norms, too. Saved: x, z and u as far as needed, c, and if exact A^T V.
    Raises ValueError for half-precision weights, and when a column of the weight is zero: it has no direction.
    """

    trains = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(self, base: Linear, *args: Any, exact: bool = False, rng: Rng = None, dtype: Any = None, **kwargs: Any) -> None:
        check_float32(base.weight.data, "DoRA")
        super().__init__(base, *args, rng=rng, dtype=dtype, **kwargs)
        self.exact = exact
        self.squares: tuple[Array, Array] | None = None  # the weight, and the squares of its columns' norms
        c, _ = self.norms()
        if not bool((c > 0).all()):
            raise ValueError("DoRA: a column of the weight is zero, so that it has no direction; leave this layer out.")
        self.lora_magnitude_vector = Parameter(c.astype(self.lora_A.data.dtype))

    @classmethod
    def of(cls, base: Linear, config: Any, path: str, init: Any, **options: Any) -> LoRALinear:
        return super().of(base, config, path, init, exact=config.use_dora == "exact", **options)

    def norms(self) -> tuple[Array, Array]:
        """c and A^T V of `column_norms`. The squares of W's columns are computed once for each array that W is kept in."""
        W = self.W
        if self.squares is None or self.squares[0] is not self.weight.data:
            self.squares = self.weight.data, column_squares(W)
        return column_norms(W, self.lora_A.data, self.lora_B.data, self.scaling, self.squares[1])

    def delta(self) -> Array:
        """V m / c - W, in the shape of the weight."""
        W = dense(self.weight.data)
        return (W + super().delta()) * (self.lora_magnitude_vector.data / self.norms()[0]) - W

    def adapted_forward(self, x: Array, b: Array | None, mask: Array | None) -> tuple[Array, tuple[Any, ...]]:
        A, B, m = self.lora_A, self.lora_B, self.lora_magnitude_vector
        c, AtV = self.norms()
        y, z, u = dora_linear(x, self.W, b, A.data, B.data, m.data, c, self.scaling, mask)
        moves = self.exact and (A.trainable or B.trainable)
        x, z = x if A.trainable else None, z if B.trainable else z._replace(value=None)
        return y, (x, z, u if m.trainable or moves else None, c, AtV if moves else None)

    def adapted_backward(self, dy: Array, saved: list[Any], mask: Array | None, need_dx: bool) -> Array | None:
        x, z, u, c, AtV = saved
        A, B, m, s = self.lora_A, self.lora_B, self.lora_magnitude_vector, self.scaling
        need = needed(dx=need_dx, dA=A.trainable, dB=B.trainable, dm=m.trainable, dc=AtV is not None)
        dx, dA, dB, dm, dc = dora_linear_backward(dy, x, z, u, self.W, A.data, B.data, m.data, c, s, mask, need)  # y = u m / c + b
        if dc is not None:
            more = column_norms_backward(dc, c, AtV, self.W, A.data, B.data, s)  # c = ||W + s A B||
            dA, dB = (g if g is None else g + h for g, h in zip((dA, dB), more, strict=True))
        for p, g in ((A, dA), (B, dB), (m, dm)):
            p.add_grad(g)
        return dx
