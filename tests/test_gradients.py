"""Every gradient of the project against finite differences, and the checker against wrong gradients."""

import copy
from importlib.util import find_spec

import numpy as np
import pytest

import minilora as ml
from minilora import functional as F
from minilora.checking.catalogue import catalogue
from minilora.checking.subjects import OFFSETS
from minilora.layers import Layer, Parameter

LIVE = find_spec("torch") is not None  # the long run
CATALOGUE = {name: rest for name, *rest in catalogue()}


@pytest.mark.parametrize("name", CATALOGUE)
def test_gradient(name, backend):
    if backend != "numpy" and not LIVE and name.replace(",", ".loss,", 1) in CATALOGUE.keys() - {name}:
        pytest.skip("the same model is checked with its loss; this runs with: pip install 'minilora[oracle]'")
    layer, x, options = copy.deepcopy(CATALOGUE[name])
    x = ml.to_backend(x, backend) if x.dtype.kind == "f" else x
    most = 25 if backend == "numpy" and x.size < 1000 else 6
    if x.dtype.kind != "f" and not LIVE:  # a model: a random direction covers the coordinates that are not sampled
        most = 2 if backend == "numpy" else 1
    report = ml.gradcheck(layer.to(backend), x, tol=1e-7, max_coordinates=most, **options)
    assert report.ok, str(report)
    assert len(report.entries) > 1


def test_every_coordinate_of_a_tiny_gpt2():
    config = ml.GPT2Config(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=2, n_inner=3)
    model = ml.GPT2(config, rng=0, dtype="float64")
    ml.inject(model, ml.LoraConfig(r=1), rng=0)
    report = ml.gradcheck(model, np.array([0, 4, 2, 1, 3]), max_coordinates=10**6, offsets=[0, 3, 5])
    assert report.ok, str(report)


# -- wrong backward passes: each must be caught and the wrong gradient named --------------------------------------------


class Dense(Layer):
    """y = s (x W) + b + x with a correct backward that each test breaks in one place."""

    s = 0.5

    def __init__(self):
        rng = np.random.default_rng(0)
        self.W, self.b = Parameter(rng.standard_normal((4, 4))), Parameter(rng.standard_normal(4))

    def forward(self, x, keep=True):
        return self.s * (x @ self.W.data) + self.b.data + x, x

    def backward(self, dy, saved, need_dx=True):
        self.add_W(self.s * saved.T @ dy)
        self.add_b(dy.sum(axis=0))
        return self.s * (dy @ self.W.data.T) + dy if need_dx else None

    def add_W(self, g):
        self.W.grad = g if self.W.grad is None else self.W.grad + g

    def add_b(self, g):
        self.b.grad = g if self.b.grad is None else self.b.grad + g


class FactorLost(Dense):
    def add_W(self, g):
        super().add_W(g / self.s)


class Transposed(Dense):
    def add_W(self, g):
        super().add_W(g.T)


class UnsummedBroadcast(Dense):
    def backward(self, dy, saved, need_dx=True):
        dx = super().backward(dy, saved, need_dx)
        self.b.grad = dy
        return dx


class ResidualMissing(Dense):
    def backward(self, dy, saved, need_dx=True):
        dx = super().backward(dy, saved, need_dx)
        return dx - dy if need_dx else None


class StaleCache(Dense):
    def forward(self, x, keep=True):
        self.x = x
        return super().forward(x, keep)

    def backward(self, dy, saved, need_dx=True):
        return super().backward(dy, self.x, need_dx)


class MeanInsteadOfSum(Dense):
    def add_b(self, g):
        super().add_b(g / 5)


class SignWrong(Dense):
    def add_b(self, g):
        super().add_b(-g)


class NoGradient(Dense):
    def add_W(self, g):
        pass


class Assigns(Dense):
    def add_W(self, g):
        self.W.grad = g


class WritesIntoDy(Dense):
    def backward(self, dy, saved, need_dx=True):
        dx = super().backward(dy, saved, need_dx)
        dy *= 2
        return dx


class OneColumnForgotten(Dense):
    def add_W(self, g):
        g = g.copy()
        g[:, 1] = 0
        super().add_W(g)


class Raises(Dense):
    def backward(self, dy, saved, need_dx=True):
        return dy @ self.W.data[:3]


WRONG = [
    (FactorLost, "W", "2 times"),
    (Transposed, "W", "transposed"),
    (UnsummedBroadcast, "b", "the sum over axis 0 is left out"),
    (ResidualMissing, "dx", "residual"),
    (StaleCache, "W", "kept in the layer"),
    (MeanInsteadOfSum, "b", "0.2 times"),
    (SignWrong, "b", "-1 times"),
    (NoGradient, "W", "no gradient"),
    (Assigns, "W", "+= is missing"),
    (WritesIntoDy, "dy", "wrote into its argument"),
    (OneColumnForgotten, "W", "coordinates are wrong"),
    (Raises, "backward", "raised ValueError"),
]


def test_the_unbroken_layer_passes():
    x = np.random.default_rng(1).standard_normal((5, 4))
    assert ml.gradcheck(Dense(), x).ok


@pytest.mark.parametrize(("broken", "name", "remark"), WRONG, ids=[w[0].__name__ for w in WRONG])
def test_wrong_backward_is_caught_and_named(broken, name, remark):
    x = np.random.default_rng(1).standard_normal((5, 4))
    report = ml.gradcheck(broken(), x)
    assert not report.ok
    failed = {entry.name: entry.remark for entry in report.failures}
    assert name in failed
    assert remark in failed[name]
    assert set(failed) <= {name, "(all, one direction)"}  # correct gradients pass
    assert "WRONG" in str(report)


def test_a_wrong_gradient_behind_a_zero_is_caught():
    """dA is zero while B = 0, so a wrong dA would pass: the checker moves B away from zero."""

    class Wrong(ml.LoRALinear):
        def backward(self, dy, saved, need_dx=True):
            dx = super().backward(dy, saved, need_dx)
            self.lora_A.grad *= 1.5
            return dx

    report = ml.gradcheck(Wrong(ml.Linear(4, 3, rng=0), r=2, rng=0), np.random.default_rng(0).standard_normal((5, 4)))
    assert "lora_A" in [entry.name for entry in report.failures]


def test_a_frozen_parameter_with_a_gradient_is_caught():
    class Eager(Dense):
        def __init__(self):
            super().__init__()
            self.W.trainable = False

    report = ml.gradcheck(Eager(), np.random.default_rng(1).standard_normal((5, 4)))
    assert ("W", "is frozen but has a gradient") in [(e.name, e.remark) for e in report.failures]


def test_a_kink_is_skipped_and_reported():
    x = np.random.default_rng(0).standard_normal((3, 4))
    x[1, 2] = 1e-7  # closer to ReLU's kink than the step
    report = ml.gradcheck(ml.ReLU(), x)
    assert report.ok
    assert "left out 1 of 12: at a kink" in str(report)


def test_any_object_with_the_contract_can_be_checked():
    class Square:  # no base class
        def forward(self, x, keep=True):
            return x * x, x

        def backward(self, dy, saved, need_dx=True):
            return 2 * dy * saved if need_dx else None

        def parameters(self):
            return []

    assert ml.gradcheck(Square(), np.random.default_rng(0).standard_normal((2, 3))).ok


def test_the_layer_is_unchanged():
    layer = ml.Linear(3, 2, rng=0)
    before = layer.weight.data.copy()
    ml.gradcheck(layer, np.ones((2, 3)))
    assert layer.weight.grad is None
    assert layer.weight.data.dtype == np.float32
    np.testing.assert_array_equal(layer.weight.data, before)


def test_a_cotangent_of_ones_would_test_nothing_for_softmax(xp, on):
    """The reason for random cotangents: the outputs of a softmax sum to one for all x."""
    x = on(np.random.default_rng(0).standard_normal((3, 5)))
    dx = F.softmax_backward(xp.ones_like(x), F.softmax(x))
    assert float(abs(dx).max()) < 1e-15


def test_offsets_separate_the_sequences(on):
    """No gradient flows from one sequence to another."""
    rng = np.random.default_rng(0)
    q, k, v = (on(rng.standard_normal((9, 6))) for _ in range(3))
    do = on(np.concatenate([np.ones((3, 6)), np.zeros((6, 6))]))
    _, P = F.attention(q, k, v, 2, OFFSETS)
    for g in F.attention_backward(do, q, k, v, P, 2, OFFSETS):
        assert float(abs(g[3:]).max()) == 0
        assert float(abs(g[:3]).max()) > 0 or g is None
