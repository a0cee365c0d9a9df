"""The table of operations: every row has a reference, and whatever is chosen for an array equals it, in value and in all gradients."""

from importlib import import_module
from itertools import chain, combinations
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import minilora as ml
from minilora import functional as F
from minilora import kernels as K
from minilora.kernels import cuda, dispatch
from minilora.kernels.half import upcast
from minilora.kernels.report import report
from minilora.tuned import sizes

DTYPES = {"float64": "float64", "float32": "float32", "float16": "float16", "bfloat16": ml_dtypes.bfloat16}
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 8 * 2.0**-11, "bfloat16": 8 * 2.0**-8}
T, M, N, R = 11, 6, 5, 2
OFFSETS = np.array([0, 4, 11])


def case(*args, rest=lambda args, saved: (saved,), needs=(), **options):
    """rest: the arguments of backward between dy and `need`; options of forward and backward."""
    return SimpleNamespace(args=args, rest=rest, needs=needs, options=options)


def attention(draw, d):
    q, k, v = draw(T, 4 * d), draw(T, 2 * d), draw(T, 2 * d)
    return case(q, k, v, 4, OFFSETS, rest=lambda a, saved: (*a[:3], saved, 4, OFFSETS), needs=("dq", "dk", "dv"), n_kv_head=2)


OPERATIONS = {  # draw: activations and frozen weights; real: parameters
    "relu": lambda draw, real: case(draw(T, M)),
    "tanh": lambda draw, real: case(draw(T, M)),
    "gelu": lambda draw, real: case(draw(T, M)),
    "gelu_tanh": lambda draw, real: case(draw(T, M)),
    "silu": lambda draw, real: case(draw(T, M)),
    "swiglu": lambda draw, real: case(draw(T, M), draw(T, M), needs=("dg", "du")),
    "linear": lambda draw, real: case(
        draw(T, M), draw(M, N), real(N), rest=lambda a, saved: (saved, *a[:2]), needs=("dx", "dW", "db")
    ),
    "lora_linear": lambda draw, real: case(
        draw(T, M), draw(M, N), real(N), real(M, R), real(R, N), 0.7,
        rest=lambda a, saved: (a[0], saved, a[1], *a[3:], None), needs=("dx", "dA", "dB"),
    ),
    "layer_norm": lambda draw, real: case(
        draw(T, M), real(M), real(M), rest=lambda a, saved: (saved, a[1]), needs=("dx", "dgamma", "dbeta")
    ),
    "rms_norm": lambda draw, real: case(draw(T, M), real(M), rest=lambda a, saved: (saved, a[1]), needs=("dx", "dgamma")),
    "rotary": lambda draw, real: case(draw(T, 8), real(T, 2), real(T, 2), rest=lambda a, saved: (saved, *a[1:])),
    "dropout": lambda draw, real: case(draw(T, M), 0.3, 5, rest=lambda a, saved: (saved, *a[1:])),
    "attention": lambda draw, real: attention(draw, 3),
    "attention, flash": lambda draw, real: attention(draw, 32),
}  # fmt: skip
LABELS = np.arange(T) * 57 % 600
FUNCTIONS = {
    "add": lambda draw, real: case(draw(T, M), draw(T, M)),
    "multiply": lambda draw, real: case(draw(T, M), draw(T, M)),
    "cross_entropy": lambda draw, real: case(draw(T, 600), LABELS, -100, 0.5),
    "linear_cross_entropy": lambda draw, real: case(draw(T, M), draw(M, 600), LABELS, 17, ("dx",)),
    "dropout_mask": lambda draw, real: case(real(M), (T, M), 0.3, 5),
    "adamw": lambda draw, real: case(
        real(40), real(40), real(40), abs(real(40)), real(40), 1.0, F.AdamStep(0.1, 0.01, 0.9, 0.99, 0.5, 0.3, 1e-8, True)
    ),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that every kernel is chosen, and every loop runs more than once."""
    monkeypatch.setitem(sizes, "block", 23)
    monkeypatch.setitem(sizes, "logits", 256 * T)
    monkeypatch.setattr(import_module("minilora.kernels.cuda.losses"), "LOGITS", 256 * T)


@pytest.fixture(params=DTYPES)
def arrays(request, on):
    rng = np.random.default_rng(0)

    def draw(dtype):
        return lambda *shape: on(rng.standard_normal(shape).astype(dtype))

    kind = request.param
    return SimpleNamespace(kind=kind, draw=draw(DTYPES[kind]), real=draw("float64" if kind == "float64" else "float32"))


def reference(name):
    return dispatch.TABLE[name].kernels[-1]


def subsets(needs):
    return [set(s) for s in chain.from_iterable(combinations(needs, n) for n in range(len(needs) + 1))] if needs else [None]


def gradients(name, case, dy, saved, need):
    found = getattr(K, f"{name}_backward")(dy, *case.rest(case.args, saved), **case.options, **({} if need is None else {"need": need}))
    return found if isinstance(found, tuple) else (found,)


def close(a, b, kind):
    if a is None or b is None:
        assert a is b
        return
    a, b = (ml.to_numpy(upcast(x)).astype("float64") for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[kind] * max(1.0, float(np.abs(b).max(initial=0))))


def test_every_operation_has_a_reference_pair_and_is_tried_here():
    assert {name.partition(",")[0] for name in OPERATIONS} | set(FUNCTIONS) == set(dispatch.TABLE)
    for name, op in dispatch.TABLE.items():
        assert [k.where for k in op.kernels].count("reference") == 1
        assert op.kernels[-1].where == "reference"
        assert callable(getattr(F, name, None)) or name in ("add", "multiply")
        if name not in FUNCTIONS:
            assert op.kernels[-1].backward is getattr(F, f"{name}_backward")
        assert all(kernel.gain and (kernel.fits is None or kernel.when) for kernel in op.kernels[:-1])


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_chosen_equals_the_reference(name, arrays, backend):
    made, name = OPERATIONS[name](arrays.draw, arrays.real), name.partition(",")[0]
    y, saved = getattr(K, name)(*made.args, **made.options)
    half, available = arrays.kind in ("float16", "bfloat16"), dispatch.TABLE[name].kernels
    if backend == "numpy" and arrays.kind == "float32" and not dispatch.PLAIN:
        assert saved.by.where == ("numpy" if any(k.where == "numpy" for k in available) else "reference")
    if backend == "cupy" and cuda.ENABLED and not dispatch.PLAIN:
        assert saved.by.where == ("cuda" if any(k.where == "cuda" for k in available) else "reference")
    dy = arrays.draw(*y.shape)
    plain = SimpleNamespace(**vars(made) | {"args": upcast(made.args)})
    expected, value = reference(name).forward(*plain.args, **plain.options)
    plain_saved = dispatch.Saved(reference(name), value, expected.dtype, False)
    assert y.dtype == made.args[0].dtype
    close(y, expected, arrays.kind)
    every = gradients(name, plain, upcast(dy), plain_saved, (made.needs and set(made.needs)) or None)
    for need in subsets(made.needs):
        found = gradients(name, made, dy, saved, need)
        for i, (a, b) in enumerate(zip(found, every, strict=True)):
            close(a, b if need is None or made.needs[i] in need else None, arrays.kind)
            if a is not None:
                assert a.dtype == (made.args[0].dtype if i in dispatch.TABLE[name].activations else "float32" if half else arrays.kind)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_loss_or_a_step_equals_the_reference(name, arrays):
    made, again = FUNCTIONS[name](arrays.draw, arrays.real), None
    again = [a.copy() if hasattr(a, "shape") else a for a in upcast(made.args)]
    found, expected = getattr(K, name)(*made.args), reference(name).forward(*again)
    if name == "adamw":  # in place
        found, expected = made.args[:4], again[:4]
    kind = "float32" if name in ("adamw", "dropout_mask") and arrays.kind != "float64" else arrays.kind
    for a, b in zip(found, expected, strict=True) if isinstance(expected, tuple | list) else [(found, expected)]:
        close(a, b, kind)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_backward_follows_forward_when_kernels_are_turned_off_or_on_in_between(name, first, arrays, monkeypatch):
    made, name = OPERATIONS[name](arrays.draw, arrays.real), name.partition(",")[0]
    monkeypatch.setattr(dispatch, "PLAIN", first)
    y, saved = getattr(K, name)(*made.args, **made.options)
    dy, need = arrays.draw(*y.shape), set(made.needs) or None
    same = gradients(name, made, dy, saved, need)
    monkeypatch.setattr(dispatch, "PLAIN", not first)
    monkeypatch.setattr(dispatch, "choose", None)  # backward does not choose
    for a, b in zip(gradients(name, made, dy, saved, need), same, strict=True):
        np.testing.assert_array_equal(ml.to_numpy(upcast(a)), ml.to_numpy(upcast(b)))


def test_the_report_names_what_a_model_uses_and_why(backend, monkeypatch):
    model = ml.GPT2(ml.GPT2Config(vocab_size=40, n_positions=16, n_embd=12, n_layer=1, n_head=2, dropout=0.1), rng=0).to(backend)
    ml.inject(model, ml.LoraConfig(r=2, target_modules=["c_attn"]))
    where = "numpy" if backend == "numpy" else "cuda" if cuda.ENABLED else "reference"
    rows = {row.operation: row for row in report(model, tokens=64)}
    used = "layer_norm lora_linear linear attention gelu_tanh dropout add linear_cross_entropy adamw"
    assert rows.keys() >= set(used.split())
    assert all(row.why for row in rows.values())
    assert rows["attention"].implementation == ("reference" if dispatch.PLAIN else where)
    assert backend != "numpy" or "no numpy kernel" in rows["linear"].why
    monkeypatch.setattr(dispatch, "PLAIN", True)
    for row in report(model, tokens=64):
        assert row.implementation == "reference"
        assert "MINILORA_KERNELS" in row.why or "no numpy kernel" in row.why or "no cuda kernel" in row.why
    assert not dispatch.observers
