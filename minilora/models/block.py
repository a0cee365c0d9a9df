"""A pre-norm transformer block, written out by hand, for any attention and feed-forward layer."""

from typing import Any

from minilora import kernels as K
from minilora.backend import Array
from minilora.functional.attention import Offsets, Rows
from minilora.layers import Dropout, Layer, Output, Saved


class PreNormBlock(Layer):
    """h = x + attn(norm_1(x));   y = h + mlp(norm_2(h)).   x (T, d) -> y (T, d), or the requested `rows` of it, (R, d).

    Each residual add sends the gradient both ways: dh = dy + (the gradient through mlp and norm_2), and so on.
    A subclass names its four layers as its checkpoint does, and returns them from `parts`. drop_1 and drop_2 follow attn and mlp: dropout,
    or Gemma's norms.
    """

    drop_1: Layer = Dropout(0.0)
    drop_2: Layer = Dropout(0.0)

    def parts(self) -> tuple[Layer, Any, Layer, Layer]:
        """(norm_1, attn, norm_2, mlp)."""
        raise NotImplementedError(f"{type(self).__name__} has no parts.")

    def forward(
        self, x: Array, keep: bool = True, need_dx: bool = True, offsets: Offsets = None, rows: Rows = None, **inputs: Any
    ) -> Output:
        """inputs: further arguments of the attention."""
        norm_1, attn, norm_2, mlp = self.parts()
        # The gradient is needed at each place that has something trainable at or below it.
        at_a = need_dx or norm_1.trainable
        at_h = at_a or attn.trainable
        at_d = at_h or self.drop_1.trainable
        at_m = at_d or norm_2.trainable
        at_y = at_m or mlp.trainable
        at_e = at_y or self.drop_2.trainable

        a, s_norm_1 = norm_1.forward(x, keep=keep and at_a, need_dx=need_dx)
        a, s_attn = attn.forward(a, keep=keep and at_h, need_dx=at_a, offsets=offsets, rows=rows, **inputs)
        a, s_drop_1 = self.drop_1.forward(a, keep=keep and at_d, need_dx=at_h)
        h = K.add(K.take_rows(x, rows), a)

        m, s_norm_2 = norm_2.forward(h, keep=keep and at_m, need_dx=at_d)
        m, s_mlp = mlp.forward(m, keep=keep and at_y, need_dx=at_m)
        m, s_drop_2 = self.drop_2.forward(m, keep=keep and at_e, need_dx=at_y)
        y = K.add(h, m)

        if not keep:
            return y, None
        needs = (at_a, at_h, at_d, at_m, at_y, at_e)
        return y, self.save(need_dx, needs, rows, len(x), s_norm_1, s_attn, s_drop_1, s_norm_2, s_mlp, s_drop_2)

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        needs, rows, T, s_norm_1, s_attn, s_drop_1, s_norm_2, s_mlp, s_drop_2 = self.load(saved, need_dx)
        at_a, at_h, at_d, at_m, at_y, at_e = needs
        norm_1, attn, norm_2, mlp = self.parts()

        if not at_e:
            return None
        dm: Any = self.drop_2.backward(dy, s_drop_2, need_dx=at_y)  #  y = h + m
        if not at_y:
            return None
        dm = mlp.backward(dm, s_mlp, need_dx=at_m)
        if not at_m:
            return None
        dh: Any = norm_2.backward(dm, s_norm_2, need_dx=at_d)
        if not at_d:
            return None
        dh = K.add(dy, dh)  #                                          h feeds y twice: directly, and through norm_2 and mlp

        da: Any = self.drop_1.backward(dh, s_drop_1, need_dx=at_h)  #  h = x[rows] + a
        if not at_h:
            return None
        da = attn.backward(da, s_attn, need_dx=at_a)
        if not at_a:
            return None
        dx = norm_1.backward(da, s_norm_1, need_dx=need_dx)
        return K.add(K.take_rows_backward(dh, rows, T), dx) if need_dx else None  # x feeds h twice
