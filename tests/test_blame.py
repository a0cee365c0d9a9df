"""Blame: the call that is itself wrong is named, with a cause that was tested; nobody is blamed where nothing is wrong."""

import copy

import numpy as np
import pytest

import minilora as ml
from minilora import kernels as K
from minilora.checking.catalogue import catalogue
from minilora.checking.subjects import OFFSETS, shaken
from minilora.kernels import dispatch
from minilora.models.gpt2 import Block

RNG = np.random.default_rng(0)
X = RNG.standard_normal((9, 6))


def block(**options):
    rng = np.random.default_rng(1)
    return shaken(Block(6, 3, rng=rng, dtype="float64", **options), rng)


def adapted(kind="c_attn"):
    model = ml.GPT2(ml.GPT2Config(vocab_size=7, n_positions=6, n_embd=6, n_head=3, n_inner=9, n_layer=2), rng=0, dtype="float64")
    ml.inject(model, ml.LoraConfig(r=2, lora_alpha=5, target_modules=[kind]), rng=0)
    return model


def first(layer, x=X, **options):
    report = ml.gradcheck(layer, x, max_coordinates=4, **options)
    assert report.verdict == "WRONG", str(report)
    assert str(report).startswith(str(report.faults[0]))
    return report.faults[0]


def changed(monkeypatch, name, change):
    """The gradients of an operation, as its backward returns them, changed."""
    original = getattr(K, name)

    def backward(dy, *args, **options):
        return change(original(dy, *args, **options), dy, *args, **options)

    monkeypatch.setattr(K, name, backward)


CATALOGUE = {name: rest for name, *rest in catalogue(1) if not name.endswith("large")}


@pytest.mark.parametrize("name", CATALOGUE)
def test_nobody_is_blamed_where_nothing_is_wrong(name):
    layer, x, options = copy.deepcopy(CATALOGUE[name])
    report = ml.gradcheck(layer, x, by_call=True, tol=1e-6, **options)
    assert report.verdict == "ok", str(report)
    assert not report.faults


def second(g, change):
    return (g[0], change(g[1]), *g[2:])


OPERATIONS = [
    ("linear_backward", lambda g, *_: second(g, lambda dW: None if dW is None else -dW), "linear", "dW", "its sign is wrong"),
    ("linear_backward", lambda g, *_: second(g, lambda dW: None if dW is None else dW / 9), "linear", "dW", "lacks the factor 9"),
    ("layer_norm_backward", lambda g, *_: second(g, lambda d: 2 * d), "layer_norm", "dgamma", "is 2 times the true gradient"),
    ("gelu_tanh_backward", lambda g, dy, saved: g * 0, "gelu_tanh", "dx", "is zero, and the true gradient is not"),
    (
        "attention_backward_joined",
        lambda g, *_: np.hstack([g[:, :6], g[:, 6:12], -g[:, 12:]]),
        "Attention",
        "",
        "hands c_attn.backward a dy",
    ),
]


@pytest.mark.parametrize(("name", "change", "blamed", "gradient", "cause"), OPERATIONS, ids=[o[0] for o in OPERATIONS])
def test_the_operation_in_a_block(monkeypatch, name, change, blamed, gradient, cause):
    changed(monkeypatch, name, change)
    fault = first(block(), offsets=OFFSETS)
    assert (fault.name, fault.gradient) == (blamed, gradient)
    if "factor 9" not in cause:
        assert cause in fault.cause


def test_lora_in_a_model(monkeypatch):
    """The factor alpha / r is named; the second layer with the same mistake is counted, not listed."""
    changed(monkeypatch, "lora_linear_backward", lambda g, *_: (g[0], g[1] if g[1] is None else g[1] / 2.5, g[2]))
    fault = first(adapted(), np.array([1, 4, 2, 0, 3]))
    assert fault.places == ["transformer.h.0.attn.c_attn/lora_linear", "transformer.h.1.attn.c_attn/lora_linear"]
    assert (fault.gradient, fault.cause) == ("dA", "is 0.4 times the true gradient: it lacks the factor s")
    assert "functional/lora.py:" in fault.source


def test_a_term_of_a_sum_is_named(monkeypatch):
    def lost(g, dy, x, u, W, *rest):
        return (g[0] if g[0] is None else dy @ W.T, *g[1:])

    changed(monkeypatch, "lora_linear_backward", lost)
    fault = first(adapted(), np.array([1, 4, 2, 0, 3]))
    assert (fault.gradient, fault.cause) == ("dx", "lacks s (dy B^T) A^T")


def test_the_gradient_of_another_function(monkeypatch):
    monkeypatch.setattr(dispatch, "PLAIN", True)
    changed(monkeypatch, "gelu_tanh_backward", lambda g, dy, saved: ml.functional.gelu_backward(dy, saved.value))
    fault = first(block(), offsets=OFFSETS)
    assert fault.cause == "is the gradient of gelu, and forward computes gelu_tanh"


def test_a_head_is_left_out(monkeypatch):
    def lost(g, *args, **options):
        return [d * (np.arange(6) < 4) if i == 0 else d for i, d in enumerate(g)]

    changed(monkeypatch, "attention_backward", lambda g, *a, **o: tuple(lost(g)))
    fault = first(block(), offsets=OFFSETS)
    assert (fault.name, fault.gradient) == ("attention", "dq")
    assert fault.cause.endswith("all of head 2, where it is zero")


# -- wiring ---------------------------------------------------------------------------------------------------------------------------


class Wrong(Block):
    """A block whose backward each test gets wrong in one line."""

    line, becomes = "", ""

    def backward(self, dy, saved, need_dx=True):
        _, _, _, s_norm_1, s_attn, s_drop_1, s_norm_2, s_mlp, s_drop_2 = self.load(saved, need_dx)
        norm_1, attn, norm_2, mlp = self.parts()
        if self.becomes == "saved":
            s_norm_2 = s_norm_1
        dm = mlp.backward(self.drop_2.backward(dy, s_drop_2), s_mlp)
        dh = norm_2.backward(dm, s_norm_2, need_dx=self.becomes != "need_dx")
        if self.becomes == "need_dx":
            dh = 0 * dy
        dh = dh if self.becomes == "residual" else -dy + dh if self.becomes == "sign" else dy if self.becomes == "branch" else dy + dh
        da = self.drop_1.backward(dh, s_drop_1)
        if self.becomes == "never":
            return dh
        dx = norm_1.backward(attn.backward(da, s_attn), s_norm_1, need_dx=need_dx)
        if self.becomes == "accumulate":
            norm_1.bias.grad = da.sum(axis=0)
        return dh + dx if need_dx else None


WIRING = {
    "residual": "hands drop_1.backward a dy that lacks exactly dy: the gradient of a residual add is left out",
    "branch": "hands drop_1.backward a dy that lacks the gradient through ln_2",
    "saved": "hands ln_2.backward what another call saved",
    "need_dx": "calls ln_2.backward with need_dx=False, and forward with need_dx=True",
    "never": "never calls ln_1.backward",
    "sign": "hands drop_1.backward a dy that",
}


@pytest.mark.parametrize("becomes", WIRING)
def test_the_wiring_of_a_block(becomes):
    rng = np.random.default_rng(1)
    layer = shaken(Wrong(6, 3, rng=rng, dtype="float64"), rng)
    assert ml.gradcheck(layer, X, max_coordinates=4, offsets=OFFSETS).ok
    layer.becomes = becomes
    fault = first(layer, offsets=OFFSETS)
    assert (fault.place, fault.name) == ("", "Wrong")
    assert fault.cause.startswith(WIRING[becomes])
    assert "test_blame.py:" in fault.source


@pytest.mark.parametrize("rows", [9, 4])
def test_a_layer_that_is_called_twice(rows):
    """What is handed to one of its calls cannot be told apart from the other, so nothing is said of it."""

    class Twice(ml.Sequential):
        def forward(self, x, keep=True, need_dx=True):
            h, first = self.layers[0].forward(x)
            y, second = self.layers[0].forward(h[:rows])
            return y, self.save(need_dx, first, second)

        def backward(self, dy, saved, need_dx=True):
            first, second = self.load(saved, need_dx)
            dh = np.zeros((9, 6))
            dh[:rows] = 1.5 * self.layers[0].backward(dy, second)
            return self.layers[0].backward(dh, first)

    fault = first(Twice(ml.Linear(6, 6, rng=0, dtype="float64")))
    assert (fault.name, fault.gradient, fault.cause) == ("Twice", "dx", "is 1.5 times the true gradient")


def test_an_exception_names_the_innermost_call(monkeypatch):
    def raises(g, *_):
        raise KeyError("gone")

    changed(monkeypatch, "layer_norm_backward", raises)
    fault = first(block(), offsets=OFFSETS)
    assert (fault.place, fault.name) == ("ln_2/layer_norm", "layer_norm")
    assert fault.cause.startswith("raised KeyError: 'gone'")


def test_an_exception_in_forward_names_the_operation(monkeypatch):
    monkeypatch.setattr(K, "add", lambda a, b: a @ b)
    fault = first(block(), offsets=OFFSETS)
    assert (fault.place, fault.name) == ("/add", "add")
    assert fault.cause.startswith("raised ValueError")


def test_by_call_sees_what_a_zero_hides():
    """While B is zero, a wrong dA changes nothing at the root of a model with one adapter; each call is checked on its own."""
    report = ml.gradcheck(adapted("c_fc"), np.array([1, 4, 2, 0, 3]), by_call=True, tol=1e-6)
    assert report.ok
    assert {e.name.partition(": ")[0] for e in report.entries} >= {"transformer.h.0.mlp.c_fc/lora_linear", "transformer.h.1"}


def test_assert_gradients():
    ml.assert_gradients(ml.Linear(4, 3, rng=0), X[:, :4])
    wrong = Wrong(6, 3, rng=0, dtype="float64")
    wrong.becomes = "residual"
    with pytest.raises(AssertionError, match="lacks exactly dy"):
        ml.assert_gradients(wrong, X, max_coordinates=4)
