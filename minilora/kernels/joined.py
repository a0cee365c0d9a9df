"""The gradients of queries, keys and values as one array, as the backward pass of a fused projection reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import flash
from minilora.kernels.attention import attention_backward


def attention_backward_joined(
    do: Array, q: Array, k: Array, v: Array, saved: Any, n_head: int, offsets: Sequence[int] | None = None, rows: np.ndarray | None = None
) -> Array:
    """[dq dk dv] (T, 3 d) of attention with as many heads of keys as of queries, q (R, d), k and v (T, d); dq is 0 outside of `rows`.

    The kernels of cuda/flash.cu write their columns of it; elsewhere three arrays are concatenated.
    """
    xp, (T, d) = get_xp(do), k.shape
    if not isinstance(saved, flash.Saved) or rows is not None:
        dq, dk, dv = attention_backward(do, q, k, v, saved, n_head, offsets, rows=rows)
        return xp.concatenate([F.take_rows_backward(dq, rows, T), dk, dv], axis=1)
    joined = xp.empty((T, 3 * d), dtype=k.dtype)
    into = joined[:, :d], joined[:, d : 2 * d], joined[:, 2 * d :]
    flash.attention_backward(do, q, k, v, saved, n_head, n_head, offsets, ("dq", "dk", "dv"), rows, into)
    return joined
