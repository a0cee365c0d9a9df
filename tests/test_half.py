"""Weights in half precision beside other dtypes: products, and the message for what `quantize` took before."""

import sys

import ml_dtypes
import numpy as np
import pytest

import minilora as ml
from minilora.kernels.half import Upcast
from minilora.quantization.quantize import half_dtype, to_half_precision

KINDS = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e6])
def test_products_are_those_of_the_rounded_weight(kind, scale, on):
    rng = np.random.default_rng(0)
    W = on(rng.standard_normal((12, 7)).astype(KINDS[kind]))
    x, dy = (on(scale * rng.standard_normal(shape), "float32") for shape in ((5, 12), (5, 7)))
    H, dense = Upcast(W), W.astype("float32")
    assert (H.shape, H.T.shape, H.size, str(H.dtype)) == ((12, 7), (7, 12), 84, "float32")
    for result, expected in ((x @ H, x @ dense), (dy @ H.T, dy @ dense.T), (H @ dy.T, dense @ dy.T)):
        assert result.dtype == np.float32
        np.testing.assert_allclose(ml.to_numpy(result), ml.to_numpy(expected), rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_array_equal(ml.to_numpy(H), ml.to_numpy(dense))
    np.testing.assert_array_equal(ml.to_numpy(H.T[2:5]), ml.to_numpy(dense.T[2:5]))
    assert not ml.to_numpy(x[:0] @ H).size


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
