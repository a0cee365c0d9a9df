"""The trace: every call once, FLOPs and saved bytes as they are counted at run time, and nothing left behind."""

import gc

import numpy as np
import pytest
from counting import Counted, counting

import minilora as ml
from minilora import kernels as K
from minilora.checking.catalogue import catalogue
from minilora.checking.flops import FORMULAS, Flops, value
from minilora.checking.trace import owner, trace, where
from minilora.layers import Layer, Parameter

CATALOGUE = {name: rest for name, *rest in catalogue()}
SMALL = {"vocab_size": 7, "n_positions": 6, "n_embd": 6, "n_head": 3, "n_inner": 9, "n_layer": 2}
IDS = np.array([1, 4, 2, 0, 3])


def adapted():
    model = ml.GPT2(ml.GPT2Config(**SMALL), rng=0, dtype="float64")
    ml.inject(model, ml.LoraConfig(r=2, target_modules=["c_attn"], layers_to_transform=[1]), rng=0)
    return model


def traced(layer, x, arrays=False, **options):
    with trace(layer, arrays) as calls:
        y, saved = layer.forward(x, **options)
        layer.backward(np.ones_like(y), saved)
    return calls, saved


@pytest.mark.parametrize("name", CATALOGUE)
def test_flops_are_those_that_run(name):
    """FORMULAS against arrays that count every matrix product they take part in."""
    layer, x, options = CATALOGUE[name]
    x = x.view(Counted) if x.dtype.kind == "f" else x
    with counting(layer) as count:
        layer.forward(x, **options)  # what is computed once, such as the norms of a weight's columns
        before = count.flops
        with trace(layer) as calls:
            y, saved = layer.forward(x, **options)
            forward = count.flops
            layer.backward(np.ones(y.shape).view(Counted), saved)
    assert sum(c.flops.total for c in calls) == count.flops - before
    assert sum(c.flops.forward for c in calls if c.during == "forward") <= forward - before


@pytest.mark.parametrize("name", CATALOGUE)
def test_saved_bytes_are_those_that_are_held(name):
    """The arrays of the trace, each once, against those that the garbage collector finds below what forward returned."""
    layer, x, options = CATALOGUE[name]
    calls, saved = traced(layer, x, **options)
    parameters = {id(owner(p.data)) for _, p in layer.parameters()}
    found, todo, seen = {}, [saved], set()
    while todo:
        for thing in gc.get_referents(todo.pop()) if todo else ():
            if id(thing) in seen or isinstance(thing, (Layer, Parameter, type, type(gc))):
                continue
            seen.add(id(thing))
            if isinstance(thing, np.ndarray):
                if thing.ndim and id(owner(thing)) not in parameters:
                    found[id(owner(thing))] = owner(thing).nbytes
            elif (
                isinstance(thing, (tuple, list, dict))
                or (callable(thing) and "_again" in getattr(thing, "__qualname__", ""))
                or type(thing).__name__ == "cell"
            ):
                todo.append(thing)
    if name not in HELD_BY_PAIRS:
        assert sum(c.bytes_saved for c in calls) == sum(found.values())


HELD_BY_PAIRS = {name for name, (layer, *_) in CATALOGUE.items() if type(layer).__name__ == "Pair"}  # they keep all they know


def test_places_are_those_of_the_parameters():
    model = adapted()
    calls, _ = traced(model, IDS)
    owners = {path.rpartition(".")[0] for path, _ in model.parameters()}
    assert owners <= {c.place for c in calls if not c.is_operation}
    assert {c.place.rpartition("/")[0] for c in calls if c.is_operation} <= {c.place for c in calls if not c.is_operation}
    call = next(c for c in calls if c.name == "lora_linear")
    assert call.place == "transformer.h.1.attn.c_attn/lora_linear"
    assert call.parent.name == "LoRALinear"
    assert call.implementation == "reference"
    assert call.shapes["dA"] == (6, 2)
    assert where(call.backward_function).endswith(f"functional/lora.py:{call.backward_function.__code__.co_firstlineno}")
    assert [c.order for c in sorted((c for c in calls if c.order is not None), key=lambda c: c.order)] == list(range(24))


def test_what_is_frozen_is_skipped():
    calls, _ = traced(adapted(), IDS)
    below = [c for c in calls if c.place.startswith("transformer.h.0") and c.is_operation]
    assert all(c.order is None and c.bytes_saved == 0 and c.flops.dx == c.flops.dW == 0 for c in below)
    assert sum(c.flops.skipped for c in below) > 0
    lora = next(c for c in calls if c.name == "lora_linear")
    T, m, n, r = 5, 6, 18, 2
    assert lora.flops.sizes == {"T": T, "m": m, "n": n, "r": r}
    assert lora.flops.dW == 2 * T * r * (m + n) + 2 * T * r * n  # dA, dB, and dy B^T
    assert lora.flops.skipped == 2 * T * m * n + 2 * T * m * (n + r)  # dW, and dx: nothing below is trained


def test_arrays_only_on_request():
    calls, _ = traced(adapted(), IDS)
    assert all(c.y is None for c in calls)
    calls, _ = traced(adapted(), IDS, arrays=True)
    call = next(c for c in calls if c.name == "lora_linear")
    np.testing.assert_allclose(call.y, call.args["x"] @ call.args["W"] + call.args["b"] + 8 / 2 * 0, atol=1)
    assert call.grads["dx"] is None
    assert call.grads["dB"].shape == (2, 18)


def test_nothing_is_left_behind():
    """Also after an exception, whose innermost call is kept."""
    before, model = vars(K).copy(), adapted()
    attributes = [set(vars(layer)) - {"_known_flags"} for _, layer in model.modules()]
    with pytest.raises(ValueError, match="is outside"), trace(model) as calls:
        model.forward(np.array([99]))
    assert calls.failed.name == "embedding"
    assert vars(K) == before
    assert attributes == [set(vars(layer)) - {"_known_flags"} for _, layer in model.modules()]


def test_a_changed_or_foreign_saved_is_noted():
    layer = ml.Linear(4, 3, rng=0, dtype="float64")
    x = np.ones((2, 4))
    with trace(layer, arrays=True) as calls:
        _, first = layer.forward(x)
        x *= 2
        layer.backward(np.ones((2, 3)), first)
    assert calls[0].changed
    assert not calls[0].foreign


def test_any_object_with_the_contract():
    class Twice:
        def __init__(self):
            self.inner = Square()

        def forward(self, x):
            y, saved = self.inner.forward(x)
            return 2 * y, saved

        def backward(self, dy, saved):
            return self.inner.backward(2 * dy, saved)

        def parameters(self):
            return []

    class Square:
        def forward(self, x):
            return x * x, x

        def backward(self, dy, saved):
            return 2 * dy * saved

    calls, _ = traced(Twice(), np.ones((2, 3)))
    assert [(c.place, c.name, c.order, c.bytes_saved) for c in calls] == [("", "Twice", 0, 0), ("inner", "Square", 1, 48)]


def test_formulas():
    assert value("2 T m n + 4 T", {"T": 3, "m": 5, "n": 7}) == 222
    assert Flops(1, 2, 3, 4).total == 6
    assert all("forward" in formulas for formulas in FORMULAS.values())
