"""The operations that layers call, each with its implementations: one table. The mathematics is in functional/, under the same names.

dispatch.py chooses the first implementation of a row that takes the arrays; the reference is the last. Kernels agree with the reference to
rounding (tests/test_kernels.py). MINILORA_KERNELS=plain runs references only; `minilora info --kernels` prints what a model uses, and why.
"""

import operator
from functools import partial
from typing import Any

from minilora import functional as F
from minilora.backend import Array, get_xp
from minilora.kernels import cuda
from minilora.kernels.cuda import attention as cu_attention
from minilora.kernels.cuda import flash
from minilora.kernels.cuda import linear as cu_linear
from minilora.kernels.cuda import losses as cu_losses
from minilora.kernels.cuda import norm as cu_norm
from minilora.kernels.cuda import pointwise as cu_pointwise
from minilora.kernels.dispatch import ANY, function, kernel, operation
from minilora.kernels.dispatch import TABLE as TABLE
from minilora.kernels.half import upcast as upcast
from minilora.kernels.numpy import attention as np_attention
from minilora.kernels.numpy import lora as np_lora
from minilora.kernels.numpy import losses as np_losses
from minilora.kernels.numpy import norm as np_norm
from minilora.kernels.numpy import pointwise as np_pointwise


def _adamw_in_place(w: Array, g: Array, m: Array, v: Array, *rest: Any) -> None:
    w[...], m[...], v[...] = F.adamw(w, g, m, v, *rest)


NUMPY, CUDA = partial(kernel, "numpy"), partial(kernel, "cuda", dtypes=ANY)
DERIVATIVE = "f(x) and f'(x) in one pass; backward is one product"
DTYPES = "the dtypes of the arguments agree"

# fmt: off
# operation | NumPy and CUDA modules that have it under its own name, as functional/ has the reference: gain, condition, the same in words
relu, relu_backward = operation("relu", saves="x", dtypes=ANY)
tanh, tanh_backward = operation("tanh", saves="y", dtypes=ANY)
gelu, gelu_backward = operation("gelu",
    NUMPY(np_pointwise, DERIVATIVE, dtypes=("float32",), when="x is of float32"), CUDA(cu_pointwise, DERIVATIVE), saves="x")
gelu_tanh, gelu_tanh_backward = operation("gelu_tanh", NUMPY(np_pointwise, DERIVATIVE), CUDA(cu_pointwise, DERIVATIVE), saves="x")
silu, silu_backward = operation("silu", NUMPY(np_pointwise, DERIVATIVE), CUDA(cu_pointwise, DERIVATIVE), saves="x")
swiglu, swiglu_backward = operation("swiglu",
    NUMPY(np_pointwise, DERIVATIVE), CUDA(cu_pointwise, DERIVATIVE, fits=cu_pointwise.of_one_shape, when=DTYPES),
    saves="saved", activations=(0, 1))
linear, linear_backward = operation("linear",
    CUDA(cu_linear, "cuBLAS reads transposed factors in place", fits=cu_linear.fits, when=DTYPES))
lora_linear, lora_linear_backward = operation("lora_linear",
    NUMPY(np_lora, "the update is added block by block, with the bias", fits=np_lora.fits, when="x and y hold at least 2^17 numbers"),
    CUDA(cu_linear, "scale and sum are part of products", fits=cu_linear.fits, when=DTYPES), saves="u")
layer_norm, layer_norm_backward = operation("layer_norm",
    NUMPY(np_norm, "blocks of rows that stay in the cache"), CUDA(cu_norm, "one launch", fits=cuda.real, when=DTYPES), saves="saved")
rms_norm, rms_norm_backward = operation("rms_norm",
    NUMPY(np_norm, "blocks of rows that stay in the cache"), CUDA(cu_norm, "one launch", fits=cuda.real, when=DTYPES), saves="saved")
rotary, rotary_backward = operation("rotary", CUDA(cu_pointwise, "one launch", fits=cuda.real, when=DTYPES))
dropout, dropout_backward = operation("dropout", CUDA(cu_pointwise, "the mask is drawn and applied in one launch"))
attention, attention_backward = operation("attention",
    NUMPY(np_attention, "many short sequences at once, half of a causal square"),
    CUDA(flash, "tensor cores, without scores in memory",
         fits=flash.fits, when="half precision, or float32 with CUPY_TF32=1; heads of 32, 64 or 128"),
    CUDA(cu_attention, "many short sequences at once", fits=cuda.agree(3), when=DTYPES), saves="saved", activations=(0, 1, 2))
# without a backward pass; the reference is given
add = function("add", operator.add, CUDA(cu_pointwise, "16 bytes a thread", fits=cu_pointwise.of_two, when=DTYPES), dtypes=ANY)
multiply = function("multiply", operator.mul, CUDA(cu_pointwise, "16 bytes a thread", fits=cu_pointwise.of_two, when=DTYPES), dtypes=ANY)
cross_entropy = function("cross_entropy", F.cross_entropy)
linear_cross_entropy = function("linear_cross_entropy", F.linear_cross_entropy,
    NUMPY(np_losses, "one buffer, every step in place", fits=np_losses.fits, when="the head is frozen", dtypes=ANY),
    CUDA(cu_losses, "one launch for each block of the vocabulary", fits=cuda.agree(2), when=DTYPES))
dropout_mask = function("dropout_mask", F.dropout_mask, CUDA(cu_pointwise, "one launch"))
adamw = function("adamw", _adamw_in_place,
    NUMPY(np_pointwise, "in place, in blocks that stay in the cache"), CUDA(cu_pointwise, "one launch", fits=cuda.alike, when=DTYPES))
# fmt: on
take_rows, take_rows_backward = F.take_rows, F.take_rows_backward  # these two copy rows: the reference is all there is
embedding, embedding_backward = F.embedding, F.embedding_backward


def product(x: Array, W: Array) -> Array:
    """x @ W, for x (T, m) and W (m, n)."""
    return linear(x, W)[0]


def attention_backward_joined(do: Array, q: Array, k: Array, v: Array, saved: Any, n_head: int, offsets: Any, rows: Any) -> Array:
    """[dq dk dv] (T, 3 d), as the backward pass of a fused projection reads them; dq is 0 outside of `rows`.

    The flash kernels write their columns of it; other implementations return three arrays, which are concatenated.
    """
    xp, (T, d) = get_xp(do), k.shape
    if saved.by.backward is flash.attention_backward and rows is None:
        joined = xp.empty((T, 3 * d), dtype=k.dtype)
        into = joined[:, :d], joined[:, d : 2 * d], joined[:, 2 * d :]
        attention_backward(do, q, k, v, saved, n_head, offsets, into=into)
        return joined
    dq, dk, dv = attention_backward(do, q, k, v, saved, n_head, offsets, rows=rows)
    return xp.concatenate([take_rows_backward(dq, rows, T), dk, dv], axis=1)
