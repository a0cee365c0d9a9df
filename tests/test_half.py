"""Frozen weights in half precision: half the memory, products to rounding, gradients of any magnitude, and a run that matches float32."""

import sys

import numpy as np
import pytest

import minilora as ml
from minilora.quantization.half import Half
from minilora.runs.finetune import finetune
from minilora.runs.recipe import Recipe

EPS = {"float16": 2**-11, "bfloat16": 2**-8}
KINDS = list(EPS)


def arrays(*shape, on, seed=0, scale=1.0):
    return on(scale * np.random.default_rng(seed).standard_normal(shape), "float32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e6])
def test_products_are_right_to_rounding_whatever_the_size(kind, scale, on, monkeypatch):
    monkeypatch.setattr("minilora.kernels.half.CHUNK", 20)
    W, x, dy = arrays(12, 7, on=on), arrays(5, 12, on=on, seed=1, scale=scale), arrays(5, 7, on=on, seed=2, scale=scale)
    H = Half.of(W, kind)
    assert (H.shape, H.T.shape, H.nbytes, H.size, str(H.dtype)) == ((12, 7), (7, 12), 168, 84, "float32")
    for got, wanted in ((x @ H, x @ W), (dy @ H.T, dy @ W.T), (H @ dy.T, W @ dy.T)):
        assert got.dtype == np.float32
        error = np.abs(ml.to_numpy(got) - ml.to_numpy(wanted)).max()
        assert error <= 12 * EPS[kind] * scale * 3
    np.testing.assert_allclose(ml.to_numpy(H), ml.to_numpy(W), rtol=EPS[kind])
    np.testing.assert_allclose(ml.to_numpy(H.column_squares()), (ml.to_numpy(W) ** 2).sum(axis=0), rtol=4 * EPS[kind])


def test_large_sums_do_not_overflow(on):
    W, x = np.full((1024, 1), 0.5), np.ones((1, 1024))
    assert ml.to_numpy(on(x, "float32") @ Half.of(on(W, "float32"), "float16"))[0, 0] == pytest.approx(512, rel=1e-3)
    assert (on(x[:0], "float32") @ Half.of(on(W, "float32"), "float16")).shape == (0, 1)


def test_zeros_stay_zeros(on):
    H = Half.of(arrays(6, 4, on=on), "float16")
    assert not ml.to_numpy(on(np.zeros((3, 6)), "float32") @ H).any()


def test_what_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="65504"):
        Half.of(np.full((2, 2), 1e5, "float32"), "float16")
    assert ml.to_numpy(Half.of(np.full((2, 2), 1e5, "float32"), "bfloat16")).max() == pytest.approx(1e5, rel=1e-2)
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        Half.of(np.ones((2, 2), "float32"), "float8")
    with pytest.raises(ValueError, match="choose 'nf4', 'float16', 'bfloat16'"):
        ml.quantize_model(ml.MLP([2, 2]), "int8")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"minilora\[bf16\]"):
        Half.of(np.ones((2, 2), "float32"), "bfloat16")


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_gradients_are_those_of_the_rounded_weights(options, on, backend):
    """On NumPy only W is rounded, so the gradients equal those of a model with rounded weights."""
    models = []
    for packed in (True, False):
        model = ml.MLP([6, 5, 4], rng=0)
        if packed:
            ml.quantize_model(model, "float16")
        else:
            for layer in (model.layers[0], model.layers[2]):
                layer.weight.data = layer.weight.data.astype("float16").astype("float32")
        ml.inject(model, ml.LoraConfig(r=2, **options), rng=1)
        model.to(backend)
        _, saved = model.forward(arrays(3, 6, on=on))
        model.backward(arrays(3, 4, on=on, seed=1), saved)
        models.append({path: ml.to_numpy(p.grad) for path, p in model.parameters() if p.trainable})
    for path, grad in models[0].items():
        np.testing.assert_allclose(grad, models[1][path], atol=3e-3 if backend == "cupy" else 2e-6, err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_where_that_on_float32_does(kind, tmp_path):
    """Held-out loss within 1 % after the same steps."""
    ends = {}
    for quantize in ("", kind):
        small = {"steps": 12, "batch_size": 4, "window": 64, "eval_bytes": 4096, "sample_bytes": 0, "threads": 1}
        recipe = Recipe(quantize=quantize, backend="numpy", **small)
        ends[quantize] = finetune(recipe, tmp_path / f"run{quantize}", say=lambda line: None)["after"]["loss"]
        again = ml.load_model("pydoc", "numpy", quantize=quantize)
        ml.load_adapter(again, tmp_path / f"run{quantize}" / "adapter")
    assert ends[kind] == pytest.approx(ends[""], rel=0.01)
    assert (ends[kind] == ends[""]) == (kind == "float16")  # the bundled model's file is float16: nothing is rounded


def test_half_of_the_memory():
    dense, packed = ml.load_model("pydoc", "numpy"), ml.load_model("pydoc", "numpy", quantize="float16")
    linear = [path for path, layer in dense.modules() if isinstance(layer, ml.Linear)]
    of = {path: p.data.nbytes for path, p in dense.parameters()}
    for path, p in packed.parameters():
        assert p.data.nbytes * (2 if path.removesuffix(".weight") in linear and path.endswith("weight") else 1) == of[path]
