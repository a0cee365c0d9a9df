"""The reference implementations against their definitions, and the errors that they raise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minilora as ml
from minilora import functional as F
from minilora.functional.gelu import erf


def test_erf_is_exact_to_rounding(on):
    x = np.concatenate([np.linspace(-7, 7, 2001), [0.0, -0.0, 1e-300, 30.0, -1e10]])
    expected = np.array([math.erf(v) for v in x])
    assert np.abs(ml.to_numpy(erf(on(x))) - expected).max() < 1e-15
    assert np.abs(ml.to_numpy(erf(on(x.astype(np.float32)))) - expected).max() < 3e-7


def test_everything_is_stable_in_float32_at_large_logits(xp, on):
    x = on(np.array([[3e4, -3e4, 0, 1e4], [-3e4, -3e4, -3e4, -3e4]], dtype=np.float32))
    labels = np.array([1, 2])
    y = F.softmax(x)
    loss, dx = ml.cross_entropy(x, labels)
    blocked, dx_b, _ = F.linear_cross_entropy(x, on(np.eye(4, dtype=np.float32)), labels, block=3)
    expected = (6e4 + math.log(4)) / 2
    for value in (float(loss), float(blocked)):
        assert value == pytest.approx(expected, rel=1e-6)
    for array in (
        y,
        dx,
        dx_b,
        F.silu(x),
        F.gelu(x),
        F.gelu_tanh(x),
        F.silu_backward(x, x),
        F.gelu_backward(x, x),
        F.gelu_tanh_backward(x, x),
    ):
        assert array.dtype == np.float32
        assert bool(xp.isfinite(array).all())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(2, 9), st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_blocked_cross_entropy_equals_the_plain_one(T, d, V, block, seed):
    rng = np.random.default_rng(seed)
    x, W, labels = rng.standard_normal((T, d)), 3 * rng.standard_normal((d, V)), rng.integers(0, V, T)
    loss, dz = ml.cross_entropy(x @ W, labels)
    blocked, dx, dW = F.linear_cross_entropy(x, W, labels, block=block)
    assert float(blocked) == pytest.approx(float(loss), rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(dx, dz @ W.T, atol=1e-12)
    np.testing.assert_allclose(dW, x.T @ dz, atol=1e-12)


def test_the_logits_of_a_complete_batch_are_never_formed(monkeypatch):
    """With blocks of 8 vocabulary entries, no product has more than 8 columns of logits."""
    shapes = []

    class Watched(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
            out = getattr(ufunc, method)(*(np.asarray(i) for i in inputs), **kwargs)
            if ufunc is np.matmul:
                shapes.append(out.shape)
            return out.view(Watched) if isinstance(out, np.ndarray) else out

    rng = np.random.default_rng(0)
    x, W = rng.standard_normal((50, 4)).view(Watched), rng.standard_normal((4, 64))
    F.linear_cross_entropy(x, W, rng.integers(0, 64, 50), block=8, need=("dx",))
    assert (50, 8) in shapes
    assert max(shape[1] for shape in shapes if shape[0] == 50) == 8


def test_rows_labelled_minus_100_do_not_count(on):
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((5, 3)), np.array([0, -100, 2, -100, 1])
    kept = labels != -100
    loss, d = ml.cross_entropy(on(logits), labels)
    expected, d_kept = ml.cross_entropy(on(logits[kept]), labels[kept])
    assert float(loss) == pytest.approx(float(expected))
    d = ml.to_numpy(d)
    np.testing.assert_allclose(d[kept], ml.to_numpy(d_kept))
    assert not d[~kept].any()


def test_packed_attention_equals_one_sequence_at_a_time(on):
    rng = np.random.default_rng(0)
    q, k, v = (on(rng.standard_normal((9, 6))) for _ in range(3))
    together, _ = F.attention(q, k, v, 3, [0, 3, 4, 9])
    separate = [F.attention(q[a:b], k[a:b], v[a:b], 3)[0] for a, b in ((0, 3), (3, 4), (4, 9))]
    np.testing.assert_allclose(ml.to_numpy(together), np.concatenate([ml.to_numpy(o) for o in separate]), rtol=1e-13)


def test_causal_attention_does_not_look_ahead(on):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((6, 4)) for _ in range(3))
    before, _ = F.attention(on(q), on(k), on(v), 2)
    k[4:], v[4:] = 9, -9
    after, _ = F.attention(on(q), on(k), on(v), 2)
    np.testing.assert_array_equal(ml.to_numpy(before)[:4], ml.to_numpy(after)[:4])
    assert np.abs(ml.to_numpy(before)[4:] - ml.to_numpy(after)[4:]).min() > 0


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_dropout_zeroes_a_share_p_and_keeps_the_mean(p, xp):
    mask = ml.to_numpy(F.dropout_mask(xp.empty(0), (400, 500), p, 12345))
    assert (mask == 0).mean() == pytest.approx(p, abs=3e-3)
    assert mask.mean() == pytest.approx(1, abs=6e-3)
    np.testing.assert_allclose(np.unique(mask), sorted({0, 1 / (1 - p)} if p else {1.0}))


def test_dropout_masks_of_different_keys_are_independent(xp):
    a, b = (ml.to_numpy(F.dropout_mask(xp.empty(0), (400, 500), 0.5, key)).ravel() - 1 for key in (1, 2**63 + 1))
    assert abs(np.mean(a * b)) < 0.01
    assert abs(np.mean(a[:-1] * a[1:])) < 0.01


def test_gradients_of_repeated_embedding_rows_accumulate(on):
    ids = np.array([2, 0, 2])
    dE = F.embedding_backward(on(np.array([[1.0], [10.0], [100.0]])), ids, on(np.zeros((4, 1))))
    assert ml.to_numpy(dE).ravel().tolist() == [10, 0, 101, 0]


REFUSED = {
    "x and W do not fit": (lambda: F.linear(np.ones((2, 3)), np.ones((4, 5))), r"x has shape \(2, 3\) but W \(4, 5\)"),
    "W in PyTorch's orientation": (lambda: F.linear(np.ones((2, 3)), np.ones((4, 3))), "looks transposed"),
    "a batch axis": (lambda: F.linear(np.ones((2, 7, 3)), np.ones((3, 5))), r"x.reshape\(-1, 3\)"),
    "bias too long": (lambda: F.linear(np.ones((2, 3)), np.ones((3, 5)), np.ones(4)), r"b has shape \(4,\)"),
    "A and B do not fit": (
        lambda: F.lora_linear(np.ones((2, 3)), np.ones((3, 5)), None, np.ones((2, 3)), np.ones((2, 5)), 1),
        r"A \(3, r\)",
    ),
    "id too large": (lambda: F.embedding(np.array([0, 7]), np.ones((5, 2))), "id 7 at position 1 is outside 0 to 4"),
    "id negative": (lambda: F.embedding(np.array([-1]), np.ones((5, 2))), "id -1 at position 0"),
    "label too large": (lambda: ml.cross_entropy(np.ones((2, 3)), np.array([0, 3])), "id 3 at position 1 is outside 0 to 2"),
    "no label": (lambda: ml.cross_entropy(np.ones((1, 3)), np.array([-100])), "no row is labelled"),
    "labels too many": (lambda: ml.cross_entropy(np.ones((2, 3)), np.array([0, 1, 2])), r"labels \(3,\)"),
    "mse of two shapes": (lambda: ml.mse(np.ones((2, 3)), np.ones(3)), r"target \(3,\)"),
    "heads": (lambda: F.attention(*[np.ones((4, 6))] * 3, 4), "columns for 4 heads"),
    "offsets": (lambda: F.attention(*[np.ones((4, 6))] * 3, 2, [0, 2, 2, 4]), "no empty sequence"),
    "offsets too short": (lambda: F.attention(*[np.ones((4, 6))] * 3, 2, [0, 3]), "number of tokens, 4"),
    "dropout of everything": (lambda: F.dropout(np.ones(3), 1.0, 0), "p is 1.0"),
    "gamma": (lambda: F.rms_norm(np.ones((2, 3)), np.ones(2)), r"gamma \(2,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_one_clear_sentence(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [np.array([0.0]), np.array([[1]])])
def test_ids_must_be_a_vector_of_integers(ids):
    with pytest.raises(TypeError, match="one-dimensional integer array"):
        F.embedding(ids, np.ones((5, 2)))
