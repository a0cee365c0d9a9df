"""Weights in half precision beside other dtypes: products, and the message for what `quantize` took before."""

import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import minilora as ml
from minilora import kernels as K
from minilora.quantization.quantize import half_dtype, to_half_precision

KINDS = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e6])
def test_products_are_those_of_the_rounded_weight(kind, scale, on):
    rng = np.random.default_rng(0)
    W = on(rng.standard_normal((12, 7)).astype(KINDS[kind]))
    x, dy = (on(scale * rng.standard_normal(shape), "float32") for shape in ((5, 12), (5, 7)))
    dense = W.astype("float32")
    y, saved = K.linear(x, W)
    dx, _, _ = K.linear_backward(dy, saved, None, W, {"dx"})
    for result, expected in ((y, x @ dense), (dx, dy @ dense.T), (K.product(dy, W.T), dy @ dense.T)):
        assert result.dtype == np.float32
        np.testing.assert_allclose(ml.to_numpy(result), ml.to_numpy(expected), rtol=1e-5, atol=1e-5 * scale)
    assert not ml.to_numpy(K.product(x[:0], W)).size


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_upcast_a_block_at_a_time(kind):
    """The logits of a block and the block itself exist in float32, never the head."""
    x, W = np.ones((256, 32), KINDS[kind]), np.ones((32, 100_000), KINDS[kind])
    tracemalloc.start()
    K.linear_cross_entropy(x, W, np.zeros(256, np.int64), None, {"dx"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * W.size


def test_mismatched_operands_are_refused(monkeypatch):
    model = ml.MLP([2, 2])
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        to_half_precision(model, "float8")
    with pytest.raises(ValueError, match="choose 'nf4', or '' for none"):
        ml.quantize_model(model, "int8")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"minilora\[bf16\]"):
        half_dtype("bfloat16")


@pytest.mark.parametrize("kind", KINDS)
def test_quantize_names_the_dtype_that_took_its_place(kind):
    for call in (lambda: ml.quantize_model(ml.MLP([2, 2]), kind), lambda: ml.load_model("pydoc", "numpy", quantize=kind)):
        with pytest.raises(ValueError, match=f"quantize='{kind}' is no longer supported; use dtype='{kind}'"):
            call()
