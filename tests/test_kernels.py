"""The optimised kernels against the reference implementations, on both backends, in both dtypes, on shapes that no block divides."""

from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora as ml
from minilora import functional as F
from minilora import kernels as K
from minilora.backend import forget_constants
from minilora.tuned import sizes

grouped, attention_module = (import_module(f"minilora.kernels.{name}") for name in ("grouped", "numpy.attention"))
TOLERANCE = {"float32": 2e-6, "float64": 1e-13}


@pytest.fixture(autouse=True)
def use_small_blocks(monkeypatch):
    """Use blocks so small that every loop runs more than once."""
    monkeypatch.setitem(sizes, "block", 23)
    monkeypatch.setitem(sizes, "logits", 2600)


def close(a, b, dtype):
    a, b = (None if z is None else ml.to_numpy(z) for z in (a, b))
    if a is None or b is None:
        assert a is b
        return
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    scale = max(1.0, float(np.abs(b).max(initial=0)))
    np.testing.assert_allclose(a, b, atol=TOLERANCE[dtype] * scale, rtol=0)


@pytest.fixture(params=["float32", "float64"])
def draw(request, on):
    rng = np.random.default_rng(0)
    f = lambda *shape: on(rng.standard_normal(shape), request.param)  # noqa: E731
    f.dtype = request.param
    return f


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations(name, draw, on):
    x = draw(7, 13) * 3
    x[0, :6] = on(np.array([0, -0.0, 5.59, -5.61, 40, -40.0]), draw.dtype)
    before = x.copy()
    y, saved = getattr(K, name)(x)
    close(y, getattr(F, name)(x), draw.dtype)
    dy = draw(7, 13)
    close(getattr(K, f"{name}_backward")(dy, saved), getattr(F, f"{name}_backward")(dy, x), draw.dtype)
    close(getattr(K, name)(x, keep=False)[0], y, draw.dtype)
    close(getattr(K, name)(x.T)[0], y.T, draw.dtype)  # not contiguous
    close(x, before, draw.dtype)


def test_the_gate(draw):
    g, u, dy = draw(5, 9), draw(5, 9), draw(5, 9)
    y, saved = K.swiglu(g, u)
    close(y, F.swiglu(g, u)[0], draw.dtype)
    dg, du = K.swiglu_backward(dy, saved)
    close(dg, F.silu_backward(dy * u, g), draw.dtype)
    close(du, dy * F.silu(g), draw.dtype)
    assert K.swiglu_backward(dy, saved, {"du"})[0] is None
    assert K.swiglu_backward(dy, saved, {"dg"})[1] is None
    close(K.swiglu(g, u, keep=False)[0], y, draw.dtype)


@pytest.mark.parametrize("need", [("dx", "dgamma", "dbeta"), ("dx",), ("dgamma",), ("dbeta",)])
def test_norms(need, draw):
    x, gamma, beta, dy = draw(9, 7) + 2, draw(7), draw(7), draw(9, 7)
    for kernel, reference in (
        (K.layer_norm(x, gamma, beta), F.layer_norm(x, gamma, beta)),
        (K.rms_norm(x, gamma), F.rms_norm(x, gamma)),
    ):
        for a, b in zip((kernel[0], *kernel[1].value), (reference[0], *reference[1]), strict=True):
            close(a, b, draw.dtype)
    for name, parameters in (("layer_norm", (gamma, beta)), ("rms_norm", (gamma,))):
        saved = {module: getattr(module, name)(x, *parameters)[1] for module in (F, K)}
        expected = getattr(F, f"{name}_backward")(dy, saved[F], gamma)
        for module in (F, K):
            got = getattr(module, f"{name}_backward")(dy, saved[module], gamma, need)
            for which, a, e in zip(("dx", "dgamma", "dbeta"), got, expected, strict=False):
                close(a, e if which in need else None, draw.dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("need", [("dx", "dA", "dB"), ("dx",), ("dA",), ("dB",), ("dx", "dB")])
def test_lora(bias, need, draw, on):
    x, W, b, A, B, dy = draw(11, 6), draw(6, 5), draw(5), draw(6, 2), draw(2, 5), draw(11, 5)
    b = b if bias else None
    mask = on((np.arange(66) % 3 > 0).reshape(11, 6) * 1.5, draw.dtype)
    for m in (None, mask):
        y, saved = K.lora_linear(x, W, b, A, B, 0.7, m)
        for a, e in zip((y, saved.value), F.lora_linear(x, W, b, A, B, 0.7, m), strict=True):
            close(a, e, draw.dtype)
        u = (x if m is None else x * m) @ A
        expected = F.lora_linear_backward(dy, x, u, W, A, B, 0.7, m)
        read = x if "dA" in need else None  # values that are not needed are not saved
        u, saved = (u, saved) if "dB" in need else (None, saved._replace(value=None))
        for f, inner in ((K.lora_linear_backward, saved), (F.lora_linear_backward, u)):
            for name, a, e in zip(("dx", "dA", "dB"), f(dy, read, inner, W, A, B, 0.7, m, need), expected, strict=True):
                close(a, e if name in need else None, draw.dtype)
    with pytest.raises(ValueError, match="asks for A"):
        K.lora_linear(x, W, b, A.T, B, 1.0)


@pytest.mark.parametrize("need", [("dx",), (), ("dx", "dW")])
def test_the_loss_over_the_vocabulary(need, draw):
    x, W, labels = draw(10, 6), draw(6, 517) * 3, np.random.default_rng(1).integers(0, 517, 10)
    labels[0] = 516
    for count in (None, 17):
        for a, b in zip(K.linear_cross_entropy(x, W, labels, count, need), F.linear_cross_entropy(x, W, labels, count, need), strict=True):
            close(a, b, draw.dtype)
    far = x * 1e4  # logits of 1e5: nothing overflows
    loss, dx, _ = K.linear_cross_entropy(far, W, labels, None, ("dx",))
    assert np.isfinite(float(loss))
    assert np.isfinite(ml.to_numpy(dx)).all()


# -- attention: groups, blocks and rows ---------------------------------------------------------------------------------------


def check_attention(lengths, heads, causal, rows, need, draw, d=3, window=None):
    H, G = heads
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    T = int(offsets[-1])
    R = T if rows is None else len(rows)
    q, k, v, do = draw(R, H * d), draw(T, G * d), draw(T, G * d), draw(R, H * d)
    wide = draw(T, 2 * G * d)
    wide[:, : G * d] = k
    k = wide[:, : G * d]  # columns of a fused projection: not contiguous
    options = {"n_kv_head": G, "rows": rows}
    o, saved = K.attention(q, k, v, H, offsets, causal, **options, window=window)
    expected, P = F.attention(q, k, v, H, offsets, causal, **options, window=window)
    close(o, expected, draw.dtype)
    close(K.attention(q, k, v, H, offsets, causal, keep=False, **options, window=window)[0], expected, draw.dtype)
    expected = F.attention_backward(do, q, k, v, P, H, offsets, **options)
    for f, kept in ((K.attention_backward, saved), (F.attention_backward, P)):
        for name, a, e in zip(("dq", "dk", "dv"), f(do, q, k, v, kept, H, offsets, need=need, **options), expected, strict=True):
            close(a, e if name in need else None, draw.dtype)


@pytest.mark.parametrize(("causal", "heads"), [(True, (2, 2)), (False, (4, 2)), (True, (3, 1))])
@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [1, 7, 3, 7, 6, 1, 12], [40, 9]])
@pytest.mark.parametrize("limits", [(128, 2**21, 512), (3, 2**21, 512), (4, 60, 512), (5, 2**21, 4)])
def test_attention(causal, heads, lengths, limits, draw, monkeypatch):
    for name, value in zip(("QUERIES", "SCORES", "KEPT"), limits, strict=True):
        monkeypatch.setattr(grouped, name, value)
    forget_constants()
    T = sum(lengths)
    last = np.cumsum(lengths) - 1
    some = np.flatnonzero(np.random.default_rng(2).random(T) < 0.4)
    for rows in (None, last, some if len(some) else last, np.array([T - 1])):
        for window in (None, 1, 3):
            check_attention(lengths, heads, causal, rows, ("dq", "dk", "dv"), draw, window=window)
    for need in (("dq",), ("dk",), ("dv",), ("dq", "dv")):
        check_attention(lengths, heads, causal, some if len(some) else last, need, draw)
    forget_constants()


def test_the_gradient_of_the_values_alone_skips_the_softmax(draw, monkeypatch):
    q, k, v, do = (draw(7, 4) for _ in range(4))
    for f, module, name in (
        (F, import_module("minilora.functional.attention"), "softmax_backward"),
        (K, attention_module, "through_softmax"),
    ):
        monkeypatch.setattr(module, name, None)
        _, saved = f.attention(q, k, v, 2, [0, 4, 7])
        assert f.attention_backward(do, q, k, v, saved, 2, [0, 4, 7], need=("dv",))[:2] == (None, None)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_derivatives_of_large_arguments_are_zero_and_one(name, on, draw):
    x = on(np.array([-1e5, -1e3, -40.0, 40.0, 1e3, 1e5]), draw.dtype)
    y, saved = getattr(K, name)(x)
    np.testing.assert_allclose(ml.to_numpy(y), np.maximum(ml.to_numpy(x), 0), rtol=0, atol=1e-12)
    derivative = getattr(K, f"{name}_backward")(on(np.ones(6), draw.dtype), saved)
    np.testing.assert_allclose(ml.to_numpy(derivative), [0, 0, 0, 1, 1, 1], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.booleans(), st.none() | st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_attention_of_any_batch(lengths, causal, window, seed):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    draw.dtype = "float64"
    rows = np.flatnonzero(rng.random(sum(lengths)) < 0.5)
    check_attention(lengths, (4, 2), causal, rows if len(rows) else None, ("dq", "dk", "dv"), draw, window=window)


def test_attention_is_stable_at_large_scores(draw):
    q, k, v = draw(9, 6) * 1e4, draw(9, 6) * 1e4, draw(9, 6)
    o, saved = K.attention(q, k, v, 2, [0, 4, 9])
    assert np.isfinite(ml.to_numpy(o)).all()
    for g in K.attention_backward(v, q, k, v, saved, 2, [0, 4, 9]):
        assert np.isfinite(ml.to_numpy(g)).all()
