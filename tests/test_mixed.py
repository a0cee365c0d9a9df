"""Half-precision activations: every kernel against the float32 reference on the same rounded numbers, to the rounding of the type."""

import json
import sys
from dataclasses import asdict
from importlib import import_module

import fakecupy
import ml_dtypes
import numpy as np
import pytest

import minilora as ml
from minilora import functional as F
from minilora import kernels as K
from minilora import tuned
from minilora.cli import main
from minilora.data.batches import Batch
from minilora.formats.atomic import read_json
from minilora.kernels import cuda
from minilora.models.attention import KVCache
from minilora.models.generate import generate
from minilora.optim.flat import clip_grad_norm
from minilora.quantization.quantize import to_half_precision
from minilora.runs.finetune import finetune
from minilora.runs.merge import merge_run
from minilora.runs.recipe import Recipe
from minilora.runs.run_file import open_model
from minilora.training.loop import train
from minilora.training.loss_scale import LossScale
from minilora.training.prefix import PrefixCache
from minilora.training.watch import Diverged

grouped, cuda_losses = (import_module(f"minilora.kernels.{name}") for name in ("grouped", "cuda.losses"))
KINDS = {"float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
EPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # half the distance from 1 to the next number


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def draw(kind, on):
    """draw(5, 3) is half precision, draw(5, 3, dtype="float32") is not; both are on the backend under test."""
    rng = np.random.default_rng(0)
    return lambda *shape, dtype=None, scale=1.0: on((scale * rng.standard_normal(shape)).astype(dtype or KINDS[kind]))


def in_float32(value):
    """The values in float32 on the host."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(in_float32, value))
    return ml.to_numpy(value).astype("float32") if hasattr(value, "dtype") and value.dtype.itemsize == 2 else value_on_host(value)


def value_on_host(value):
    return ml.to_numpy(value) if hasattr(value, "dtype") else value


def check(kind, got, expected, dtypes, ulps=4.0):
    """Each of `got` in its dtype ("half" or "float32"), and within so many roundings of `expected`, measured on the largest number."""
    for g, w, dtype in zip(got, expected, dtypes, strict=True):
        if dtype is None:
            assert g is None
            continue
        assert g.dtype == (KINDS[kind] if dtype == "half" else np.dtype(dtype))
        g, w = in_float32(g), in_float32(w)
        assert g.shape == w.shape
        np.testing.assert_allclose(g, w, rtol=0, atol=ulps * EPS[kind] * max(float(np.abs(w).max(initial=0)), 1e-6))


@pytest.mark.parametrize("bias", [True, False])
def test_linear(kind, bias, draw):
    x, W, b, dy = draw(6, 12), draw(12, 7), draw(7, dtype="float32") if bias else None, draw(6, 7)
    check(
        kind, [K.linear(x, W, b)[0], K.product(x, W)], [F.linear(*in_float32([x, W, b])), in_float32(x) @ in_float32(W)], ["half", "half"]
    )
    x_32 = draw(6, 12, dtype="float32")  # a half-precision weight does not downcast a wider input
    check(kind, [K.linear(x_32, W, b)[0]], [F.linear(*in_float32([x_32, W, b]))], ["float32"], ulps=1e-2)
    dx, dW, db = K.linear_backward(dy, K.linear(x, W, b)[1], None, W, ("dx", "db"))
    check(kind, [dx, dW, db], F.linear_backward(in_float32(dy), None, in_float32(W), ("dx", "db")), ["half", None, "float32"])


def test_a_float32_head_returns_float32_and_half_precision_gradients(kind, draw):
    x, W, b, dy = draw(6, 12), draw(12, 7, dtype="float32"), draw(7, dtype="float32"), draw(6, 7, dtype="float32")
    y, saved = K.linear(x, W, b)
    check(kind, [y], [F.linear(*in_float32([x, W, b]))], ["float32"], ulps=1e-2)
    check(kind, K.linear_backward(dy, saved, x, W), F.linear_backward(*in_float32([dy, x, W])), ["half", "float32", "float32"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("need", [("dx", "dA", "dB"), ("dA",), ("dB",), ("dx",)])
def test_lora(kind, masked, need, draw, on):
    x, W, dy = draw(6, 12), draw(12, 7), draw(6, 7)
    b, A, B = (draw(*shape, dtype="float32") for shape in ((7,), (12, 2), (2, 7)))
    mask = on((np.arange(72).reshape(6, 12) % 3 > 0).astype("float32") * 1.5) if masked else None
    y, saved = K.lora_linear(x, W, b, A, B, 0.7, mask)
    u = saved.value
    expected, expected_u = F.lora_linear(*in_float32([x, W, b, A, B]), 0.7, in_float32(mask))
    check(kind, [y, u], [expected, expected_u], ["half", "half"])
    got = K.lora_linear_backward(dy, x, saved, W, A, B, 0.7, mask, need)
    reference = F.lora_linear_backward(*in_float32([dy, x, u, W, A, B]), 0.7, in_float32(mask), need)
    check(kind, got, reference, ["half" if "dx" in need else None, *("float32" if name in need else None for name in ("dA", "dB"))])


def test_norms(kind, draw):
    x, dy, gamma, beta = draw(5, 70), draw(5, 70), draw(70, dtype="float32"), draw(70, dtype="float32")
    for f, arguments in (("layer_norm", (gamma, beta)), ("rms_norm", (gamma,))):
        y, inner = getattr(K, f)(x, *arguments)
        xhat, rstd = inner.value
        expected, saved = getattr(F, f)(*in_float32([x, *arguments]))
        check(kind, [y, xhat, rstd], [expected, *saved], ["half", "half", "float32"])
        got = getattr(K, f"{f}_backward")(dy, inner, gamma)
        reference = getattr(F, f"{f}_backward")(in_float32(dy), in_float32((xhat, rstd)), in_float32(gamma))
        check(kind, got, reference, ["half", *["float32"] * len(arguments)])


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations(kind, name, draw):
    x, dy = draw(5, 9, scale=3.0), draw(5, 9)
    y, derivative = getattr(K, name)(x)
    dx = getattr(K, f"{name}_backward")(dy, derivative)
    reference = getattr(F, name)(in_float32(x)), getattr(F, f"{name}_backward")(in_float32(dy), in_float32(x))
    check(kind, [y, derivative.value, dx], [reference[0], in_float32(derivative.value), reference[1]], ["half"] * 3)
    assert getattr(K, name)(x, keep=False)[1] is None


def test_plain_activations(kind, draw):
    x, dy = draw(5, 9), draw(5, 9)
    for layer in (ml.ReLU(), ml.Tanh()):
        y, saved = layer.forward(x)
        expected, reference = layer.forward(in_float32(x))
        check(kind, [y, layer.backward(dy, saved)], [expected, layer.backward(in_float32(dy), reference)], ["half"] * 2)


def test_the_gate(kind, draw):
    g, u, dy = draw(5, 9), draw(5, 9), draw(5, 9)
    y, saved = K.swiglu(g, u)
    expected, reference = K.swiglu(in_float32(g), in_float32(u))
    got = [y, *saved.value, *K.swiglu_backward(dy, saved)]
    check(kind, got, [expected, *reference.value, *K.swiglu_backward(in_float32(dy), reference)], ["half"] * 5)
    assert K.swiglu(g, u, keep=False)[1] is None


def test_rotary(kind, draw, on):
    x, angles = draw(5, 24), np.random.default_rng(1).standard_normal((5, 4))
    tables = on(np.cos(angles), "float32"), on(np.sin(angles), "float32")
    y, saved = K.rotary(x, *tables)
    check(kind, [y], [F.rotary(*in_float32([x, *tables]))], ["half"])
    got, reference = K.rotary_backward(x, saved, *tables), F.rotary_backward(*in_float32([x, *tables]))
    check(kind, [got], [reference], ["half"])


def test_dropout_masks_match_float32(kind, draw):
    x = draw(37, 11)
    y = K.dropout(x, 0.1, 5)[0]
    check(kind, [y], [F.dropout(in_float32(x), 0.1, 5)], ["half"], ulps=1)
    assert (in_float32(y) == 0).sum() == (F.dropout(in_float32(x), 0.1, 5) == 0).sum()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("offsets", [[0, 7, 14, 21], [0, 3, 12, 21]])
def test_attention(kind, causal, offsets, draw, monkeypatch):
    monkeypatch.setattr(grouped, "KEPT", 8)  # some sequences recompute saved values
    q, k, v, do = draw(21, 24), draw(21, 24)[:, :12], draw(21, 12), draw(21, 24)
    for rows, window in ((None, None), (np.array([2, 6, 9, 20]), None), (None, 3)):
        q_, do_ = (q, do) if rows is None else (q[: len(rows)], do[: len(rows)])
        o, saved = K.attention(q_, k, v, 6, offsets, causal, n_kv_head=3, rows=rows, window=window)
        expected, reference = K.attention(*in_float32([q_, k, v]), 6, offsets, causal, n_kv_head=3, rows=rows, window=window)
        check(kind, [o], [expected], ["half"])
        if saved.by.where != "reference":
            kept = [part[0] for *_, parts in saved.value for part in parts if part is not None]
            assert kept
            assert all(E.dtype == KINDS[kind] for E in kept)
        got = K.attention_backward(do_, q_, k, v, saved, 6, offsets, 3, rows=rows)
        check(kind, got, K.attention_backward(*in_float32([do_, q_, k, v]), reference, 6, offsets, 3, rows=rows), ["half"] * 3, ulps=8)


def test_scores_are_float32(kind, draw):
    """With large scores, rounding before the softmax would give errors of a quarter."""
    q, k, v, do = draw(21, 8, scale=6.0), draw(21, 8, scale=6.0), draw(21, 8), draw(21, 8)
    o, saved = K.attention(q, k, v, 2)
    expected, reference = K.attention(*in_float32([q, k, v]), 2)
    check(kind, [o], [expected], ["half"])
    check(
        kind,
        K.attention_backward(do, q, k, v, saved, 2),
        K.attention_backward(*in_float32([do, q, k, v]), reference, 2),
        ["half"] * 3,
        ulps=8,
    )


def test_masks_and_angles_are_float32(kind, backend):
    """Neither 1 / (1 - p) nor the cosine of an angle is exact in half precision."""
    layer = adapted("gpt2", kind, backend, lora_dropout=0.1).transformer.h[0].attn.c_attn
    mask = layer.mask(layer.weight.data, 3)
    assert float(mask.max()) == np.float32(1 / 0.9)
    rope = adapted("llama", kind, backend).model.block_inputs(np.arange(3), layer.weight.data)["rope"]
    assert [table.dtype.name for tables in rope.values() for table in tables] == ["float32"] * 2


@pytest.mark.parametrize("head", ["half", "float32"])
def test_the_loss_over_the_vocabulary(kind, head, draw, monkeypatch):
    monkeypatch.setattr(cuda_losses, "LOGITS", 5 * 256)
    monkeypatch.setitem(tuned.sizes, "logits", 5 * 256)
    x, W, labels = draw(5, 8), draw(8, 700, dtype=None if head == "half" else head), np.array([0, 699, 256, 255, 3])
    got, reference = K.linear_cross_entropy(x, W, labels, 9, {"dx"}), F.linear_cross_entropy(*in_float32([x, W]), labels, 9, {"dx"})
    check(kind, got[:1], reference[:1], ["float32"], ulps=1e-2)
    check(kind, got[1:], reference[1:], ["half", None])
    assert K.linear_cross_entropy(x, W, labels, 9, ())[1] is None
    if head == "float32":
        got, reference = K.linear_cross_entropy(x, W, labels), F.linear_cross_entropy(*in_float32([x, W]), labels)
        check(kind, got, reference, ["float32", "half", "float32"])
    z = draw(5, 7)
    check(kind, K.cross_entropy(z, labels % 7), F.cross_entropy(in_float32(z), labels % 7), ["float32", "half"])


def test_rounding_is_to_nearest_even_and_keeps_nan(kind, fake_cupy):
    """The sources convert by themselves. Every number of the type is read, multiplied and written (by dropout)."""
    if not cuda.ENABLED:
        pytest.skip("the fake CuPy runs CUDA sources through g++")
    every = np.arange(2**16, dtype=np.uint16).view(KINDS[kind])  # all numbers of the type, read and written
    x = fakecupy.module.asarray(every)
    with np.errstate(all="ignore"):
        for p in (0.0, 0.75, 1 - 1 / 1.1):  # times 1, 4 (some overflow) and 1.1, in float32, where it is kept
            got = K.dropout(x, p, 3)[0].get()
            kept = F.dropout_mask(np.empty(0, "float32"), every.shape, p, 3) > 0
            expected = np.where(kept, every.astype("float32") * np.float32(1 / (1 - p)), np.float32(0)).astype(KINDS[kind])
            np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
            np.testing.assert_array_equal(got[~np.isnan(got)].view(np.uint16), expected[~np.isnan(expected)].view(np.uint16))


# -- whole models -------------------------------------------------------------------------------------------------------------

MODELS = {
    "gpt2": lambda: ml.GPT2(ml.GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=2, dropout=0.1), rng=0),
    "llama": lambda: ml.Llama(ml.LlamaConfig(**LLAMA), rng=0),
    "bert": lambda: ml.BertClassifier(ml.BertConfig(**BERT), rng=0),
}
LLAMA = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": True}
BERT = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT |= {"max_position_embeddings": 32, "num_labels": 3}
IDS, OFFSETS = np.random.default_rng(0).integers(0, 60, 21), np.array([0, 9, 14, 21])


def half_model(name, kind):
    model = MODELS[name]()
    to_half_precision(model, kind)
    return model


def adapted(name, kind, backend, half=True, **options):
    """A small model with half-precision weights, or with the same values in float32, and LoRA with B away from zero."""
    model = MODELS[name]()
    for _, p in model.parameters():
        p.data = p.data * 3 if p.data.ndim == 2 else p.data  # activations large enough to reveal errors
    to_half_precision(model, kind)
    if not half:
        model.to(dtype="float32")
    model.to(backend)
    options = {"r": 2, "target_modules": "all-linear", "task_type": "SEQ_CLS" if name == "bert" else None, **options}
    ml.inject(model, ml.LoraConfig(**options), rng=1)
    for i, (path, p) in enumerate(model.parameters()):
        if path.endswith("lora_B"):
            p.data = ml.to_backend(np.random.default_rng(i).normal(0, 0.1, p.data.shape), backend, "float32")
    return model


def gradients(model, name):
    labels = np.array([0, 2, 1]) if name == "bert" else IDS[::-1].copy()
    loss, saved = model.loss(IDS, labels, OFFSETS)
    model.loss_backward(saved)
    return loss, {path: p.grad for path, p in model.parameters() if p.trainable}


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.2, "bias": "all"}, {"modules_to_save": None}])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_model_match_float32(name, kind, options, backend):
    if "modules_to_save" in options:
        options = {"modules_to_save": {"gpt2": ["ln_1"], "llama": ["norm"], "bert": ["pooler.dense", "LayerNorm"]}[name]}
    loss, grads = gradients(adapted(name, kind, backend, **options), name)
    expected_loss, expected = gradients(adapted(name, kind, backend, half=False, **options), name)
    assert loss.dtype == np.float32
    assert float(loss) == pytest.approx(float(expected_loss), rel=EPS[kind])
    assert grads.keys() == expected.keys()
    assert all(g.dtype == np.float32 for g in grads.values())
    norm = np.linalg.norm
    lengths = {path: norm(ml.to_numpy(w)) for path, w in expected.items()}
    differences = {path: norm(ml.to_numpy(g) - ml.to_numpy(expected[path])) for path, g in grads.items()}
    assert norm(list(differences.values())) <= 5 * EPS[kind] * norm(list(lengths.values()))
    least = 0.01 * max(lengths.values())  # the gradient of BERT's key.bias is zero
    for path, length in lengths.items():
        assert differences[path] <= 16 * EPS[kind] * (length + least), path


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_tokens_are_generated(name, kind, backend):
    """decode, token by token, gives the logits of the complete sequence; both are half precision."""
    model, cache = adapted(name, kind, backend), KVCache(block=4)
    logits, _ = model.forward(IDS, keep=False)
    assert logits.dtype == KINDS[kind]
    for part in (IDS[:5], IDS[5:6], IDS[6:13], IDS[13:]):
        last = model.decode(part, cache)
    check(kind, [last], [in_float32(logits)[-1]], ["half"], ulps=8)
    assert len(list(generate(model, IDS, 5))) == 5


@pytest.mark.parametrize("config", [ml.BottleneckConfig(reduction_factor=4), ml.PartialConfig(train=["bias", "norm"])])
def test_other_adapters(config, kind, backend):
    """Trainable parameters are float32, the rest of the model stays in half precision."""
    grads = []
    for half in (True, False):
        model = half_model("bert", kind)
        model.to(backend, None if half else "float32")
        ml.inject(model, config, rng=0)
        grads.append(gradients(model, "bert")[1])
    assert all(g.dtype == np.float32 for g in grads[0].values())
    got, expected = (np.concatenate([ml.to_numpy(g).ravel() for g in each.values()]) for each in grads)
    assert np.linalg.norm(got - expected) <= 6 * EPS[kind] * np.linalg.norm(expected)


def test_saved_values_take_half_the_memory(kind, backend):
    def size(value):
        if hasattr(value, "nbytes"):
            return value.nbytes
        return sum(map(size, value.values() if isinstance(value, dict) else value)) if isinstance(value, (tuple, list, dict)) else 0

    saved = [size(adapted("gpt2", kind, backend, half).loss(IDS, IDS, OFFSETS)[1]) for half in (True, False)]
    assert 0.5 <= saved[0] / saved[1] < 0.55


def test_a_step_neither_synchronises_nor_has_more_products(kind, fake_cupy):
    counts = []
    for half in (True, False):
        model = adapted("gpt2", kind, "cupy", half)
        optimizer = ml.AdamW(model.parameters(), lr=1e-3)
        assert optimizer.flat.data.dtype == optimizer.m.dtype == np.float32
        with fakecupy.count() as c:
            loss, saved = model.loss(IDS, IDS, OFFSETS)
            model.loss_backward(saved)
            clip_grad_norm(optimizer.flat, 1.0, 2.0**15)
            optimizer.step()
        assert (c.syncs, c.to_host, loss.dtype) == (0, 0, np.float32)
        counts.append(c)
    assert sorted(counts[0].products) == sorted(counts[1].products)  # x W comes last in half precision
    assert counts[0].launches < 1.35 * counts[1].launches  # A and B are downcast, and some results


# -- training -----------------------------------------------------------------------------------------------------------------

SMALL = {"steps": 12, "batch_size": 4, "window": 64, "eval_bytes": 4096, "sample_bytes": 0, "threads": 1, "backend": "numpy"}


def run(folder, **fields):
    return finetune(Recipe(**{**SMALL, **fields}), folder, say=lambda line: None)


def test_a_run_matches_float32(tmp_path):
    """Held-out loss within 1 %; the saved adapter is opened with the same dtypes, gives the same figures, and is merged in float32."""
    ends = {dtype: run(tmp_path / dtype, dtype=dtype) for dtype in ("float32", *KINDS)}
    for kind, dtype in KINDS.items():
        assert ends[kind]["after"]["loss"] == pytest.approx(ends["float32"]["after"]["loss"], rel=0.01)
        model = open_model(tmp_path / kind, "numpy")
        assert {str(p.data.dtype) for path, p in model.parameters() if ".lora_" not in path} == {kind, "float32"}
        assert model.transformer.wte.weight.data.dtype == dtype
        assert all(change > 0 for change in merge_run(tmp_path / kind, tmp_path / f"{kind} merged").values())
        assert open_model(tmp_path / f"{kind} merged", "numpy").transformer.wte.weight.data.dtype == np.float32
        with ml.disabled(model):
            ml.save_model(model, tmp_path / f"{kind} base")
        again = ml.load_model(tmp_path / f"{kind} base", "numpy", kind)
        np.testing.assert_array_equal(again.transformer.wte.weight.data, model.transformer.wte.weight.data)
    assert ends["float16"]["loss_scale"] == {"value": 2.0**15, "good": 12, "left_out": 0}
    assert "loss_scale" not in ends["bfloat16"]


def test_the_flag(tmp_path):
    flags = {name: value for name, value in SMALL.items() if name != "steps"}
    arguments = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["finetune", "--steps", "2", "--dtype", "bfloat16", "--out", str(tmp_path / "run"), *arguments]) == 0
    assert read_json(tmp_path / "run" / "run.json")["configuration"]["dtype"] == "bfloat16"


def test_cached_frozen_blocks_are_half_precision(kind):
    model = adapted("gpt2", kind, "numpy", target_modules=["c_attn"], layers_to_transform=[1])
    batch = Batch(IDS, IDS, OFFSETS)
    expected = model.body.prefix(IDS, OFFSETS)
    for limit in (2**20, 0):  # kept, computed again
        cache = PrefixCache(limit)
        for _ in range(2):
            found = cache(model, batch)
            assert found.x.dtype == KINDS[kind]
            np.testing.assert_array_equal(in_float32(found.x), in_float32(expected.x))


def flat_of(model):
    optimizer = ml.AdamW(model.parameters(), lr=1e-2)
    return optimizer, [optimizer.flat.data, optimizer.m, optimizer.v]


def batches(count=None):
    return iter([Batch(IDS, IDS[::-1].copy(), OFFSETS)] * (count or 100))


def test_an_overflow_halves_the_scale_and_changes_nothing_else(backend):
    model = adapted("gpt2", "float16", backend)
    optimizer, arrays = flat_of(model)
    scale = LossScale(2.0**30)  # the gradient of the loss certainly overflows
    before = [ml.to_numpy(x).copy() for x in arrays]
    steps = train(model, optimizer, batches(), 40, lambda step: 1.0, loss_scale=scale)
    first = next(steps)
    assert np.isfinite(first.loss)
    assert not np.isfinite(first.grad_norm)
    assert (scale.value, scale.left_out, optimizer.t) == (2.0**29, 1, 0)
    for x, then in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(ml.to_numpy(x), then)
    norms = [step.grad_norm for step in steps]
    assert np.isfinite(norms[-10:]).all()
    assert optimizer.t == np.isfinite(norms).sum()
    assert scale.left_out == 0
    assert np.isfinite(ml.to_numpy(optimizer.flat.data)).all()


def test_the_scale_does_not_change_the_gradient(backend):
    """Loss and norm are unchanged, too: bit for bit in float32, as the scale is a power of two."""
    result = []
    for value in (1.0, 2.0**15):
        model = adapted("gpt2", "float16", backend, half=False)
        optimizer, (data, *_) = flat_of(model)
        step = next(train(model, optimizer, batches(), 1, lambda step: 1.0, loss_scale=LossScale(value)))
        result.append((step.loss, step.grad_norm, ml.to_numpy(data)))
    assert result[0][:2] == result[1][:2]
    np.testing.assert_array_equal(result[0][2], result[1][2])


def test_small_gradients_do_not_vanish(backend):
    """Divided by a million labels, gradients underflow in float16; scaled, they equal those of float32 up to rounding."""
    differences = {}
    for value in (1.0, 2.0**15):
        found = []
        for half in (True, False):
            model = adapted("gpt2", "float16", backend, half)
            _, saved = model.loss(IDS, IDS[::-1].copy(), OFFSETS, 10**6 / value)
            model.loss_backward(saved)
            found.append(np.concatenate([ml.to_numpy(p.grad).ravel() for _, p in model.parameters() if p.trainable]) / value)
        differences[value] = np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1])
    assert differences[2.0**15] < 5 * EPS["float16"] < differences[1.0]


def test_the_loss_scale_grows_gives_up_and_resumes_from_its_state():
    scale = LossScale()
    for _ in range(LossScale.PATIENCE - 1):
        scale.update(True)
    again = LossScale(**json.loads(json.dumps(asdict(scale))))
    for each in (scale, again):
        assert each.value == 2.0**15
        each.update(True)
        assert asdict(each) == {"value": 2.0**16, "good": 0, "left_out": 0}
    for _ in range(LossScale.LIMIT - 1):
        scale.update(False)
    assert not scale.lost
    scale.update(False)
    assert scale.lost
    with pytest.raises(ValueError, match="above 0"):
        LossScale(0)
    assert LossScale.of(adapted("gpt2", "bfloat16", "numpy")) is None
    assert LossScale.of(adapted("gpt2", "float16", "numpy")).value == 2.0**15


def test_a_loss_that_no_scale_can_fix_diverges(backend):
    model = adapted("gpt2", "float16", backend)
    model.transformer.ln_f.weight.data[...] = np.nan
    optimizer, _ = flat_of(model)
    before = ml.to_numpy(optimizer.flat.data).copy()
    with pytest.raises(Diverged, match="step 20") as stop:
        list(train(model, optimizer, batches(), 40, lambda step: 1.0))
    assert stop.value.kept == 0
    np.testing.assert_array_equal(ml.to_numpy(optimizer.flat.data), before)


# -- refused ------------------------------------------------------------------------------------------------------------------


def test_invalid_combinations_are_reported_in_one_sentence(kind, monkeypatch):
    with pytest.raises(ValueError, match="dtype is 'float8'; choose float32, float64, float16 or bfloat16"):
        ml.load_model("pydoc", "numpy", "float8")
    with pytest.raises(ValueError, match=f"dtype {kind} and quantize 'nf4' exclude each other"):
        ml.load_model("pydoc", "numpy", kind, quantize="nf4")
    with pytest.raises(ValueError, match="unknown dtype 'float8'; choose float32, bfloat16, float16"):
        Recipe(dtype="float8")
    with pytest.raises(ValueError, match="quantize exclude each other"):
        Recipe(dtype=kind, quantize="nf4")
    with pytest.raises(ValueError, match="method full"):
        Recipe(dtype=kind, method="full")
    model = ml.load_model("pydoc", "numpy", kind)
    with pytest.raises(ValueError, match=f"wte.weight is {kind}, in which small steps are lost"):
        ml.AdamW(model.unfreeze().parameters(), 1e-3)
    bert = half_model("bert", kind)
    with pytest.raises(ValueError, match=rf"to train bert\.embeddings\.word_embeddings needs weights of float32, these are of {kind}"):
        ml.inject(bert, ml.LoraConfig(target_modules=["query"], modules_to_save=["word_embeddings"]))
    for options in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"target_modules": ["wpe"]}):
        with pytest.raises(ValueError, match=r"float32.*load the model with dtype='float32'"):
            ml.inject(model, ml.LoraConfig(**{"target_modules": ["c_attn"], **options}))
    ml.inject(model, ml.LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ValueError, match=f"merge needs weights of float32, these are of {kind}"):
        ml.merge(model)
    with pytest.raises(ValueError, match="is quantized"):
        to_half_precision(ml.load_model("pydoc", "numpy", quantize="nf4"), kind)


def test_numbers_beyond_float16_and_a_missing_extra(monkeypatch):
    model = ml.GPT2(ml.GPT2Config(vocab_size=5, n_positions=4, n_embd=4, n_layer=1, n_head=1), rng=0)
    model.transformer.wpe.weight.data[0, 0] = -1e5
    with pytest.raises(ValueError, match=r"wpe.weight has numbers beyond float16's 65504; choose bfloat16"):
        to_half_precision(model, "float16")
    assert model.transformer.wte.weight.data.dtype == np.float32  # nothing changed
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"minilora\[bf16\]"):
        ml.load_model("pydoc", "numpy", "bfloat16")
