"""BottleneckLinear: a frozen projection with a small trainable network after it (Houlsby et al., arXiv 1902.00751, section 2.1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from minilora.backend import Array, Rng, backend_name, generator
from minilora.layers import GELU, Activation, Linear, Saved
from minilora.lora.adapted import trained_dtype


class BottleneckLinear(Linear):
    """h = x W + b;   y = h + f(h D + b_1) U + b_2.   x (T, m) -> h, y (T, n); D (n, d), b_1 (d,), U (d, n), b_2 (n,).

    Takes over the weight and bias of `base`, a projection into the residual stream (their paths stay those of the checkpoint), and
    freezes them; adds the layers `down` and `up`, 2 n d + d + n numbers. y - h is added before the residual sum, where the paper has it.

        da  = dy U^T         dU = a^T dy,   db_2 = sum dy         a = f(z)
        dz  = da f'(z)       dD = h^T dz,   db_1 = sum dz         z = h D + b_1
        dh  = dy + dz D^T    h feeds y twice: directly, and through the bottleneck
        dx  = dh W^T

    Saved: h (T, n), z (or a) and a (T, d). D and U start near zero, so y starts near h: not on it, or else neither could move.
    Unlike LoRA's update this one is not linear in x: it cannot be folded into W, and it costs time at inference.
    """

    def __init__(
        self, base: Linear, size: int, act: Activation | None = None, init_std: float = 1e-2, *, rng: Rng = None, dtype: Any = None
    ) -> None:
        rng, n = generator(rng), base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.freeze()
        self.down, self.act, self.up = Linear(n, size, rng=rng), act or GELU(), Linear(size, n, rng=rng)
        for layer in (self.down, self.up):
            layer.weight.data = truncated_normal(rng, layer.weight.data.shape, init_std)
            layer.bias.data = np.zeros(layer.out_features)  # type: ignore[union-attr]
            layer.to(backend_name(base.weight.data), dtype or trained_dtype(base.weight.data))
        self.enabled = True

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> tuple[Array, Saved | None]:
        at_h = need_dx or self.weight.trainable or (self.bias is not None and self.bias.trainable)
        h, s_h = super().forward(x, keep=keep and at_h, need_dx=need_dx)
        if not self.enabled:
            return h, self.save(need_dx, at_h, s_h, None, None, None) if keep else None
        z, s_down = self.down.forward(h, keep=keep, need_dx=at_h)
        a, s_act = self.act.forward(z, keep=keep)
        y, s_up = self.up.forward(a, keep=keep)
        y += h
        return y.astype(h.dtype, copy=False), self.save(need_dx, at_h, s_h, s_down, s_act, s_up) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        at_h, s_h, s_down, s_act, s_up = self.load(saved, need_dx)
        dh = dy  #                                                y = h + up(a)
        if s_up is not None:
            da = self.up.backward(dy, s_up)
            dz = self.act.backward(da, s_act)  #                  a = f(z)
            dh = self.down.backward(dz, s_down, need_dx=at_h)  #  z = down(h)
            if at_h:
                dh += dy
        return super().backward(dh, s_h, need_dx) if at_h else None  # h = x W + b


def truncated_normal(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    """N(0, std^2) without what is further than 2 std from 0: that is drawn again. float64, on the host."""
    x = rng.standard_normal(shape)
    while (far := np.abs(x) > 2).any():
        x[far] = rng.standard_normal(int(far.sum()))
    return std * x
