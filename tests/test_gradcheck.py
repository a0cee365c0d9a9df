"""The gradient checker: right gradients pass, wrong ones fail, and undecidable ones are reported as such."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import minilora as ml
from minilora import functional as F
from minilora.checking.catalogue import catalogue
from minilora.checking.check import Check
from minilora.checking.subjects import LossOf
from minilora.cli import main
from minilora.layers import Parameter

X = np.random.default_rng(1).standard_normal((5, 4))


class P:
    """The minimal interface of a parameter."""

    def __init__(self, data):
        self.data, self.grad = data, None


class Dense:
    """y = x W + x with the three documented methods and nothing else. Each test breaks it in one place."""

    def __init__(self):
        self.W = P(np.random.default_rng(2).standard_normal((4, 4)))

    def forward(self, x):
        return x @ self.W.data + x, x

    def backward(self, dy, saved):
        self.add(self.W, saved.T @ dy)
        return dy @ self.W.data.T + dy

    def parameters(self):
        return [("W", self.W)]

    def add(self, p, g):
        p.grad = g if p.grad is None else p.grad + g


def failures(layer, x=X, **options):
    """{name: (verdict, remark)} of all results that are not ok."""
    report = ml.gradcheck(layer, x, **options)
    assert report.ok == (not report.failures) == (report.verdict == "ok")
    return {e.name: (e.verdict(report.tol), e.remark) for e in report.failures}


def broken(**methods):
    """A Dense with replaced methods."""
    return type("Broken", (Dense,), methods)()


def gradient(change, **methods):
    """A Dense with a changed dW."""
    return broken(add=lambda self, p, g: Dense.add(self, p, change(g)), **methods)


def test_a_layer_with_the_three_documented_methods_is_right():
    report = ml.gradcheck(Dense(), X)
    assert report.ok, str(report)
    assert [e.name for e in report.entries] == ["dx", "W", "(all, one direction)"]


def test_inputs_parameters_and_cotangents_are_distinct():
    """If x were the cotangent, a backward that confuses the two would pass."""
    for seed in (0, 1):
        for name, layer, x, options in catalogue(seed):
            check = Check(layer, x, 1e-7, seed, 1, options)
            check.analyse()
            parameters = {p.data.tobytes(): p.data for p in check.params.values()}  # replicas share arrays
            arrays = [check.c, *parameters.values(), *([check.x] if check.floating else [])]
            numbers = np.concatenate([np.unique(a) for a in arrays])
            numbers = numbers[(numbers != 0) & (numbers != 1)]
            assert len(np.unique(numbers)) == len(numbers), name


# -- non-finite values --------------------------------------------------------------------------------------------------


def non_finite(value, at):
    def change(g):
        g = g.copy()
        g[at] = value
        return g

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_non_finite_gradient_is_wrong(value):
    for at, count, place in (((2, 1), 1, "[2, 1]"), (slice(None), 16, "[0, 0]")):
        expected = f"{count} of 16 values are NaN or infinite, the first at {place}"
        assert failures(gradient(non_finite(value, at))) == {"W": ("WRONG", expected)}
        assert failures(gradient(non_finite(value, at)), max_coordinates=1)["W"] == ("WRONG", expected)


def test_a_non_finite_dx_is_wrong():
    layer = broken(backward=lambda self, dy, saved: Dense.backward(self, dy, saved) * np.nan)
    assert failures(layer)["dx"] == ("WRONG", "20 of 20 values are NaN or infinite, the first at [0, 0]")


def test_a_non_finite_second_gradient_is_wrong():
    """NaN compares false with everything, so it passed every "is the difference too large?"."""

    def add(self, p, g):
        p.grad = g if p.grad is None else p.grad * np.nan

    assert failures(broken(add=add)) == {"W": ("WRONG", "two backward passes do not add up")}

    def backward(self, dy, saved):
        dx = Dense.backward(self, dy, saved)
        dy[0, 0] = np.nan
        return dx

    assert failures(broken(backward=backward)) == {"dy": ("WRONG", "backward wrote into its argument")}


class Root:
    """y = sqrt(x), which is NaN below 0."""

    def forward(self, x):
        return np.sqrt(x), x

    def backward(self, dy, saved):
        return dy / (2 * np.sqrt(saved))

    def parameters(self):
        return []


def test_a_non_finite_forward_never_passes():
    x = 1 + np.arange(6.0).reshape(2, 3)
    assert ml.gradcheck(Root(), x).ok
    x[1, 1] = 1e-9  # closer to 0 than any step
    assert failures(Root(), x) == {"dx": ("inconclusive", "y is NaN or infinite within a step from here; choose another x")}
    x[1, 1] = -1
    assert failures(Root(), x) == {"y": ("inconclusive", "1 of 6 values are NaN or infinite, the first at [1, 1]; nothing can be compared")}


# -- errors while running -----------------------------------------------------------------------------------------------


def test_errors_of_forward_or_backward_are_reported_with_their_place():
    def fails(self, *args):
        raise KeyError("gone")

    line = fails.__code__.co_firstlineno + 1
    for method in ("forward", "backward"):
        assert failures(broken(**{method: fails})) == {method: ("WRONG", f"raised KeyError: 'gone' ({__file__}:{line})")}


def test_a_type_error_of_the_layer_is_reported():
    """It does not mean that the layer lacks need_dx."""

    def backward(self, dy, saved, need_dx=True):
        if not need_dx:
            raise TypeError("unexpected need_dx")
        return Dense.backward(self, dy, saved)

    verdict, remark = failures(broken(backward=backward))["backward"]
    assert verdict == "WRONG"
    assert remark.startswith(f"raised TypeError: unexpected need_dx ({__file__}:")


@pytest.mark.parametrize(
    ("y", "verdict", "remark"),
    [
        (lambda x: x, "WRONG", "returned ndarray instead of the pair (y, saved)"),
        (lambda x: (x.astype("float32"), x), "inconclusive", "returned y of float32; a check needs an array of float64"),
        (lambda x: (1.0, x), "inconclusive", "returned y of float; a check needs an array of float64"),
    ],
)
def test_invalid_results_of_forward(y, verdict, remark):
    found = failures(broken(forward=lambda self, x: y(x)))["forward"]
    assert found[0] == verdict
    assert found[1].startswith(remark)


@pytest.mark.parametrize("x", [[1, 2], X + 0j, np.array(["a"]), X > 0])
def test_an_invalid_x_is_refused(x):
    with pytest.raises(ValueError, match="gradcheck: x is of"):
        ml.gradcheck(Dense(), x)
    with pytest.raises(ValueError, match="max_coordinates is 0"):
        ml.gradcheck(Dense(), X, max_coordinates=0)


def test_a_forward_that_draws_random_numbers_is_named():
    draw = np.random.default_rng(0)
    layer = broken(forward=lambda self, x: (x @ self.W.data + x + draw.standard_normal(), x))
    assert failures(layer) == {"forward": ("WRONG", "returns another y for the same x: it draws random numbers, or keeps state")}


def test_nothing_to_check_is_reported():
    model = ml.GPT2(ml.GPT2Config(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=2), rng=0).freeze()
    report = ml.gradcheck(model, np.array([1, 2, 3]))
    assert (report.ok, report.verdict, report.failures) == (False, "nothing to check", [])
    assert "WRONG" not in str(report)
    assert "nan" not in str(report)
    assert "no parameter is trainable. Set p.trainable = True" in str(report)
    model.transformer.wte.weight.trainable = True
    assert ml.gradcheck(model, np.array([1, 2, 3])).ok


def test_a_constant_loss_proves_nothing_but_a_gradient_of_it_is_wrong():
    """A batch without a label: loss and gradient are zero."""
    model = ml.BertClassifier(ml.BertConfig(7, 6, 1, 3, 9, 6, num_labels=2), rng=0, dtype="float64")
    loss = LossOf(model, np.array([-100]), count=1)
    assert loss.forward(np.array([1, 2]))[0] == 0
    report = ml.gradcheck(loss, np.array([1, 2]), max_coordinates=2)
    assert report.verdict == "inconclusive"
    assert "every gradient is zero here" in str(report)
    model.loss_backward = lambda saved: model.classifier.bias.add_grad(np.ones(2))
    report = ml.gradcheck(loss, np.array([1, 2]), max_coordinates=2)
    assert [e.remark for e in report.failures if e.name == "classifier.bias"] == ["is not zero, and the true gradient is"]


# -- remarks: true, or none ---------------------------------------------------------------------------------------------


class Wide(Dense):
    """y = x W + b, W (4, 3), b (3,)."""

    def __init__(self):
        rng = np.random.default_rng(2)
        self.W, self.b = P(rng.standard_normal((4, 3))), P(rng.standard_normal(3))

    def forward(self, x):
        return x @ self.W.data + self.b.data, x

    def backward(self, dy, saved):
        self.dW(saved.T @ dy)
        self.db(dy)
        return dy @ self.W.data.T

    def parameters(self):
        return [("W", self.W), ("b", self.b)]

    def dW(self, g):
        self.add(self.W, g)

    def db(self, dy):
        self.add(self.b, dy.sum(axis=0))


def wide(**methods):
    return type("Broken", (Wide,), methods)()


NOISE = np.random.default_rng(3).standard_normal((4, 4))

REMARKS = [
    (gradient(lambda g: 2 * g), "W", "is 2 times the true gradient"),
    (gradient(lambda g: -g), "W", "is -1 times the true gradient"),
    (gradient(lambda g: g * (1 + 2e-5)), "W", "is 1.00002 times the true gradient"),
    (gradient(lambda g: g * (1 + 4e-7)), "W", ""),  # six digits of this value are 1
    (gradient(lambda g: g.T), "W", "is transposed"),
    (gradient(lambda g: g * 0), "W", "is zero, and the true gradient is not"),
    (gradient(lambda g: g.astype("float16")), "W", "is float16, and its array is float64: precision is lost"),
    (gradient(lambda g: g + NOISE), "W", ""),
    (gradient(lambda g: g + 1e-6 * NOISE), "W", ""),
    (gradient(lambda g: g + np.eye(4)), "W", "4 of 16 coordinates are wrong, the first at [0, 0]"),
    (gradient(non_finite(0, (3, 2))), "W", "1 of 16 coordinates are wrong, the first at [3, 2]"),
    (gradient(lambda g: g.tolist()), "W", "is a list instead of an array"),
    (broken(add=lambda self, p, g: None), "W", "no gradient was written"),
    (
        broken(backward=lambda self, dy, saved: Dense.backward(self, dy, saved) - dy),
        "dx",
        "lacks exactly dy: the gradient of a residual add",
    ),
    (
        broken(forward=lambda self, x: (F.gelu_tanh(x), x), backward=lambda self, dy, x: F.gelu_backward(dy, x)),
        "dx",
        "is the gradient of gelu, and forward computes gelu_tanh",
    ),
    (broken(backward=lambda self, dy, saved: Dense.backward(self, dy, saved) and None), "backward", "raised ValueError: The truth value"),
    (broken(backward=lambda self, dy, saved: (Dense.backward(self, dy, saved), None)), "dx", "is a tuple instead of an array"),
    (wide(backward=lambda self, dy, saved: [Wide.backward(self, dy, saved), None][1]), "dx", "backward returned None"),
    (wide(dW=lambda self, g: self.add(self.W, g.T)), "W", "has shape (3, 4) instead of (4, 3): transposed, it is right"),
    (wide(dW=lambda self, g: self.add(self.W, 2 * g.T)), "W", "has shape (3, 4) instead of (4, 3)"),
    (wide(db=lambda self, dy: self.add(self.b, dy)), "b", "has shape (5, 3) instead of (3,): the sum over axis 0 is left out"),
    (wide(db=lambda self, dy: self.add(self.b, dy**2)), "b", "has shape (5, 3) instead of (3,)"),
    (wide(db=lambda self, dy: self.add(self.b, dy.sum(0, keepdims=True))), "b", "has shape (1, 3) instead of (3,): its values are right"),
    (
        wide(db=lambda self, dy: self.add(self.b, dy.sum(axis=1))),
        "b",
        "has shape (5,) instead of (3,): the sum is over axis 1 instead of 0",
    ),
]


@pytest.mark.parametrize(("layer", "name", "remark"), REMARKS, ids=[r[2][:40] or "nothing" for r in REMARKS])
def test_a_remark_is_true(layer, name, remark):
    found = failures(layer)
    assert found[name][0] == "WRONG"
    assert found[name][1].startswith(remark) if remark else found[name][1] == ""
    if "shape" in remark:
        assert found[name][1] == remark  # no other remark
    assert set(found) <= {name, "(all, one direction)"}


def test_no_factor_is_reported_without_one():
    """Half a gradient is wrong, and no remark about state, a factor or a transposition explains it."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        noise = rng.standard_normal((4, 4)) * 10.0 ** rng.uniform(-6, 1)
        remark = failures(gradient(lambda g, noise=noise: g + noise))["W"][1]
        assert remark == "" or "coordinates are wrong" in remark


def test_a_loss_that_forgets_dy_is_wrong():
    class Sum(Dense):
        def forward(self, x):
            return (x**3).sum(), x

        def backward(self, dy, saved):
            return 3 * saved**2

    verdict, remark = failures(Sum())["dx"]
    assert verdict == "WRONG"
    assert "times the true gradient" in remark


def test_state_in_the_layer_is_distinguished_from_a_plain_mistake():
    class Stale(Dense):
        def forward(self, x):
            self.x = x
            return super().forward(x)

        def backward(self, dy, saved):
            return super().backward(dy, self.x)

    assert failures(Stale())["W"][1] == "is right only if no other forward comes in between: state is kept in the layer"
    assert "state" not in failures(gradient(lambda g: g * (1 + 3e-7)))["W"][1]

    class Summing(Dense):
        total = 0

        def backward(self, dy, saved):
            self.total = self.total + super().backward(dy, saved)
            return self.total

    assert failures(Summing())["dx"][1] == "is right only the first time: state is kept in the layer"


@pytest.mark.parametrize("factor", [1, 3])
def test_functions_that_hold_a_parameter_are_checked_with_it(factor):
    """A copy of the parameter would never be read, and any backward would pass. The layer is unchanged afterwards."""
    W = P(Dense().W.data.astype("float32"))
    backward = lambda dy, x: (Dense.add(None, W, factor * (x.T @ dy)), dy @ W.data.T)[1]  # noqa: E731
    layer = SimpleNamespace(forward=lambda x: (x @ W.data, x), backward=backward, parameters=lambda: [("W", W)])
    data = W.data
    assert failures(layer).get("W") == (None if factor == 1 else ("WRONG", "is 3 times the true gradient"))
    assert (W.data is data, W.grad) == (True, None)
    with pytest.raises(ValueError, match="no copy can be made of the layer"):
        ml.gradcheck(SimpleNamespace(**vars(layer), lock=threading.Lock()), X)


def test_small_gradients_are_checked_as_strictly_as_large_ones():
    """dW is small where x is small, and equally wrong: the check compares changes proportional to the array."""
    found = failures(gradient(lambda g: 1.005 * g), 1e-8 * X)
    assert found["W"] == ("WRONG", "is 1.005 times the true gradient")


def test_a_write_in_the_first_call_only_is_detected():
    """relu_(x) writes in the first forward only: afterwards no element is negative."""

    def relu_(self, x):
        np.maximum(x, 0, out=x)
        return x @ self.W.data + x, x.copy()

    assert failures(broken(forward=relu_))["x"] == ("WRONG", "was written to")

    def clipped(self, x):
        self.W.data = np.clip(self.W.data, -0.5, 0.5)
        return x @ self.W.data + x, x

    assert failures(broken(forward=clipped))["W"][0] == "WRONG"


def test_a_shared_parameter_and_a_table_of_indices():
    class Tied(Dense):
        def __init__(self):
            super().__init__()
            self.order = P(np.array([3, 1, 0, 2]))
            self.order.trainable = False

        def forward(self, x):
            y, saved = super().forward(x)
            return y[:, self.order.data], saved

        def backward(self, dy, saved):
            return super().backward(dy[:, np.argsort(self.order.data)], saved)

        def parameters(self):
            return [("W", self.W), ("head", self.W), ("order", self.order)]

    report = ml.gradcheck(Tied(), X)
    assert report.ok, str(report)


def test_a_parameter_without_influence_needs_no_gradient():
    class Spare(Dense):
        def parameters(self):
            return [*super().parameters(), ("spare", P(np.ones(2)))]

    report = ml.gradcheck(Spare(), X)
    assert report.ok
    assert "no gradient was written; y does not depend on it" in str(report)


def test_need_dx_false_in_forward_is_checked_too():
    class Greedy(ml.Linear):
        def backward(self, dy, saved, need_dx=True):
            dx = super().backward(dy, saved, need_dx)
            if not saved.need_dx:
                self.weight.grad = self.weight.grad * 2
            return dx

    report = ml.gradcheck(Greedy(4, 3, rng=0), X)
    assert [(e.name, e.remark) for e in report.failures] == [("weight", "need_dx=False changes this gradient")]


def test_gradients_add_up_without_dx_too():
    class Fresh(ml.Linear):
        def backward(self, dy, saved, need_dx=True):
            if not need_dx:
                self.weight.grad = None
            return super().backward(dy, saved, need_dx)

    report = ml.gradcheck(Fresh(4, 3, rng=0), X)
    assert [(e.name, e.remark) for e in report.failures] == [("weight", "need_dx=False does not add to this gradient: += is missing")]


def test_need_dx_false_must_not_compute_dx():
    class Eager(ml.Linear):
        def backward(self, dy, saved, need_dx=True):
            return super().backward(dy, saved, True)

    report = ml.gradcheck(Eager(4, 3, rng=0), X)
    assert [(e.name, e.remark) for e in report.failures] == [("dx", "need_dx=False still computes dx")]


def test_kinks_everywhere_never_pass():
    assert failures(ml.ReLU(), np.zeros((2, 3))) == {"dx": ("inconclusive", "every coordinate has a kink here; choose another x")}

    class Least:
        """y = x_0 + min(|x_0|, |x_1|): smooth at 0 along each axis, and in no other direction."""

        def forward(self, x):
            return x[:, 0] + abs(x).min(axis=1), x

        def backward(self, dy, saved):
            return dy[:, None] * np.array([1.0, 0.0])

        def parameters(self):
            return []

    expected = ("inconclusive", "a kink in each of five directions; choose another x")
    assert failures(Least(), np.zeros((3, 2))) == {"(all, one direction)": expected}


# -- large values: rounding errors and real mistakes ---------------------------------------------------------------------


class Scaled:
    """A layer whose gradients are all too large by a factor of 1.001."""

    def __init__(self, layer):
        self.layer = layer

    def forward(self, x):
        return self.layer.forward(x)

    def backward(self, dy, saved):
        return self.layer.backward(1.001 * dy, saved)

    def parameters(self):
        return self.layer.parameters()


LAYERS = {
    "Tanh": lambda: ml.Tanh(),
    "GELU": lambda: ml.GELU(),
    "SiLU": lambda: ml.SiLU(),
    "LayerNorm": lambda: ml.LayerNorm(6),
    "Attention": lambda: ml.Attention(6, 3, rng=1, dtype="float64"),
    "MLP": lambda: ml.MLP([6, 5, 3], ml.Tanh, rng=1, dtype="float64"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [1, 30, 100, 1000])
def test_large_values_give_no_false_alarm_and_hide_no_mistake(name, size):
    verdicts = set()
    for seed in range(4):
        x = size * np.random.default_rng(seed).standard_normal((7, 6))
        right, wrong = ml.gradcheck(LAYERS[name](), x, seed=seed), ml.gradcheck(Scaled(LAYERS[name]()), x, seed=seed)
        assert right.verdict in ("ok", "inconclusive"), str(right)
        assert wrong.verdict == "WRONG" if right.ok else not wrong.ok, str(wrong)
        verdicts.add(right.verdict)
    assert "ok" in verdicts or (name == "Tanh" and size > 30), verdicts


def test_dominant_rounding_errors_are_reported():
    report = ml.gradcheck(ml.Tanh(), np.array([[-12.0, 150, 200], [90, 180, -100]]))
    assert (report.ok, report.verdict) == (False, "inconclusive")
    assert "finite differences are good to" in str(report)
    assert "choose smaller values" in str(report)
    report = ml.gradcheck(ml.ReLU(), -1 - np.arange(4.0).reshape(2, 2))
    assert (report.ok, report.verdict) == (False, "inconclusive")
    assert "every gradient is zero here; choose another x" in str(report)


def test_a_complete_model_passes():
    """The bundled model: 858,880 parameters, 22 x 256 logits, whose rounding errors once failed the check."""
    model = ml.load_model("pydoc", "numpy").unfreeze()
    ids = np.frombuffer(b"def f(x): return x + 1", dtype=np.uint8).astype(np.int64)
    report = ml.gradcheck(model, ids, max_coordinates=2)
    assert report.ok, str(report)


def test_the_caller_sets_the_tolerance():
    layer = gradient(lambda g: g * (1 + 1e-5))
    assert ml.gradcheck(layer, X, tol=1e-4).ok
    assert all(e.remark == "" for e in ml.gradcheck(layer, X, tol=1e-4).entries)
    assert not ml.gradcheck(layer, X, tol=1e-6).ok


def test_frozen_parameters_and_parameters_without_the_attribute():
    layer = Dense()
    layer.W = Parameter(layer.W.data, trainable=False)
    assert ("W", "is frozen but has a gradient") in [(e.name, e.remark) for e in ml.gradcheck(layer, X).failures]
    layer = broken(add=lambda self, p, g: None)
    layer.W = Parameter(layer.W.data, trainable=False)
    assert ml.gradcheck(layer, X).ok


# -- what a reader may hand over -------------------------------------------------------------------------------------------------------


def test_a_parameter_may_be_called_x():
    layer = broken(parameters=lambda self: [("x", self.W)])
    assert ml.gradcheck(layer, X).ok


def test_an_object_without_parameters_or_without_backward():
    class Double:
        def forward(self, x):
            return 2 * x, None

        def backward(self, dy, saved):
            return 2 * dy

    assert ml.gradcheck(Double(), X).ok
    with pytest.raises(ValueError, match="int has no forward or no backward"):
        ml.gradcheck(3, X)


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        (lambda g: g > 0, "is bool, and its array is float64: precision is lost"),
        (lambda g: float(g.sum()), "is a float instead of an array"),
        (lambda g: g[:2], "has shape (2, 4) instead of (4, 4)"),
        (lambda g: np.full(g.shape, np.nan), "16 of 16 values are NaN or infinite"),
    ],
)
def test_a_gradient_of_another_type_or_shape(change, remark):
    assert failures(gradient(change))["W"][1].startswith(remark)


def test_a_function_that_does_not_end_is_stopped():
    def endless(self, x):
        while True:
            pass

    found = failures(broken(forward=endless), timeout=0.2)
    assert found["forward"][1].startswith("raised TimeoutError: it did not end within 0.2 seconds")
    assert ml.gradcheck(Dense(), X, timeout=60).ok


LAYER = """
import numpy as np
from minilora.layers import Parameter
class Dense:
    def __init__(self):
        self.W = Parameter(np.ones((4, 3)))
    def forward(self, x):
        return x @ self.W.data, x
    def backward(self, dy, saved):
        self.W.add_grad(FACTOR * saved.T @ dy)
        return dy @ self.W.data.T
    def parameters(self):
        return [("W", self.W)]
made = Dense()
"""


def run(capsys, *words):
    status = main(["gradcheck", "--backend", "numpy", *words])
    return status, *capsys.readouterr()


def test_a_layer_in_a_file(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(LAYER.replace("FACTOR", "1"))
    for name in ("Dense", "made"):
        status, out, _ = run(capsys, f"{path}:{name}")
        assert status == 0
        assert "all 3 checks agree" in out
    assert run(capsys, f"{path}:Dense", "--x", "2x4")[0] == 0
    path.write_text(LAYER.replace("FACTOR", "3"))
    status, out, err = run(capsys, f"{path}:Dense")
    assert status == 1
    assert out.splitlines()[-1].startswith("Dense: W is 3 times the true gradient")
    assert f"[{path}:9]" in out
    assert "WRONG; --table prints every gradient." in err
    status, out, _ = run(capsys, f"{path}:Dense", "--json")
    fault = json.loads(out)["faults"][0]
    assert (status, fault["gradient"], fault["source"]) == (1, "W", f"{path}:9")


@pytest.mark.parametrize(
    ("text", "what", "message"),
    [
        ("import not_here", "a", "ModuleNotFoundError: No module named 'not_here'"),
        ("def f(:", "a", "line 1: SyntaxError"),
        ("def made(): raise KeyError('x')", "made", "KeyError"),
        ("a = 1", "b", "has no b; it has a"),
        ("class A:\n  def forward(self, x): pass\n  backward = forward", "A", "give --x ROWSxCOLUMNS"),
    ],
)
def test_a_file_that_cannot_be_checked(tmp_path, capsys, text, what, message):
    (tmp_path / "mine.py").write_text(text)
    status, _, err = run(capsys, f"{tmp_path / 'mine.py'}:{what}")
    assert status == 1
    assert message in err
    assert "no such Python file" in run(capsys, f"{tmp_path}/none.py:A")[2]


def test_a_whole_model_by_its_calls(capsys):
    """The bundled model: all 858,880 parameters, every call of it, along random directions."""
    status, out, _ = run(capsys, "pydoc", "--table")
    assert status == 0
    assert "transformer.h.3.mlp.c_fc/linear: dW" in out
    assert "all 157 checks agree" in out
