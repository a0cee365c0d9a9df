"""The contract of layers: what is saved and what is computed."""

import numpy as np
import pytest

import minilora as ml
from minilora import functional as F
from minilora import kernels as K
from minilora.checking.catalogue import catalogue
from minilora.layers import Saved, reseed
from minilora.lora import lora_layers

CONFIG = ml.GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=3, n_head=3)
IDS = np.array([1, 5, 2, 10, 0, 7, 7])
OFFSETS = [0, 4, 7]
LABELS = np.array([5, 2, 10, -100, 7, 7, -100])


def arrays_in(saved):
    """All arrays in nested saved values."""
    if isinstance(saved, Saved):
        return arrays_in(saved.values)
    if isinstance(saved, (tuple, list)):
        return [a for item in saved for a in arrays_in(item)]
    return [saved] if hasattr(saved, "nbytes") else []


def test_a_frozen_linear_saves_nothing(on):
    _, saved = ml.Linear(4, 3, rng=0).freeze().forward(np.ones((2, 4), np.float32))
    assert arrays_in(saved) == []


def test_inference_saves_nothing():
    for _, layer, x, options in catalogue():
        assert layer.forward(x, keep=False, **options)[1] is None


def test_a_layer_may_be_applied_twice(on, backend):
    layer = ml.Linear(3, 3, rng=0, dtype="float64").to(backend)
    x1, x2, dy = (on(np.random.default_rng(i).standard_normal((4, 3))) for i in range(3))
    _, s1 = layer.forward(x1)
    _, s2 = layer.forward(x2)
    layer.forward(x2 * 9, keep=False)  # an evaluation in between changes nothing
    layer.backward(dy, s1)
    layer.backward(dy, s2)
    np.testing.assert_allclose(ml.to_numpy(layer.weight.grad), ml.to_numpy((x1 + x2).T @ dy), rtol=1e-12)


@pytest.mark.parametrize("freeze", [True, False])
def test_changing_trainable_between_forward_and_backward_raises(freeze):
    for _, layer, x, options in catalogue():
        if not [p for _, p in layer.parameters() if p.trainable]:
            continue
        if not freeze:
            layer.freeze()
        y, saved = layer.forward(x, **options)
        if freeze:
            layer.freeze()
        else:
            layer.unfreeze()
        with pytest.raises(RuntimeError, match="frozen or unfrozen since forward"):
            layer.backward(np.ones_like(y), saved)


def test_backward_without_saved_or_with_other_flags_raises():
    layer, x = ml.Linear(3, 2, rng=0), np.ones((4, 3), np.float32)
    y, saved = layer.forward(x, keep=False)
    with pytest.raises(RuntimeError, match="keep=True"):
        layer.backward(y, saved)
    y, saved = layer.forward(x, need_dx=False)
    with pytest.raises(RuntimeError, match="need_dx=False"):
        layer.backward(y, saved)


def model_with_lora(**config):
    model = ml.GPT2(CONFIG, rng=0)
    ml.inject(model, ml.LoraConfig(r=2, **config), rng=0)
    return model


def test_nothing_below_the_lowest_trainable_parameter_is_saved_or_run(monkeypatch):
    """With LoRA in the last block alone, the two blocks below save nothing and run no backward."""
    model = model_with_lora(target_modules=["c_proj"], layers_to_transform=[2])
    calls = []
    for i, block in enumerate(model.transformer.h):
        forward, backward = block.forward, block.backward
        monkeypatch.setattr(block, "forward", lambda *a, f=forward, i=i, **k: calls.append((i, "forward", k["keep"])) or f(*a, **k))
        monkeypatch.setattr(block, "backward", lambda *a, f=backward, i=i, **k: calls.append((i, "backward")) or f(*a, **k))
    _, saved = model.loss(IDS, LABELS, OFFSETS)
    model.loss_backward(saved)
    assert calls == [(0, "forward", False), (1, "forward", False), (2, "forward", True), (2, "backward")]


def test_no_step_forms_the_dW_of_a_frozen_weight(monkeypatch):
    """Counted at the one place that forms one: linear_backward."""
    formed = []

    def counted(plain):
        def counting(*args):
            *_, W, need = args
            if "dW" in need:
                formed.append(W.shape)
            return plain(*args)

        return counting

    monkeypatch.setattr(K, "linear_backward", counted(K.linear_backward))
    monkeypatch.setattr("minilora.functional.lora.linear_backward", lambda dy, x, W, need: counted(F.linear_backward)(dy, x, W, need))
    model = model_with_lora()
    model.loss_backward(model.loss(IDS, LABELS, OFFSETS)[1])
    assert formed == []
    assert all(p.grad is None for path, p in model.parameters() if ".lora_" not in path)
    assert all(p.grad is not None for path, p in model.parameters() if ".lora_" in path)

    full = ml.GPT2(CONFIG, rng=0)
    full.loss_backward(full.loss(IDS, LABELS, OFFSETS)[1])
    assert len(formed) == 4 * CONFIG.n_layer  # the count can be positive


def test_gradients_of_the_loss_match_those_of_the_logits():
    """loss / loss_backward, which never hold the logits, against forward / cross_entropy / backward, which do."""
    one, two = (ml.GPT2(CONFIG, rng=0, dtype="float64") for _ in range(2))
    loss, saved = one.loss(IDS, LABELS, OFFSETS)
    one.loss_backward(saved)
    logits, saved = two.forward(IDS, offsets=OFFSETS)
    expected, dlogits = ml.cross_entropy(logits, LABELS)
    two.backward(dlogits, saved)
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    for (path, p), (_, q) in zip(one.parameters(), two.parameters(), strict=True):
        np.testing.assert_allclose(p.grad, q.grad, atol=1e-13, err_msg=path)


def test_packed_sequences_do_not_affect_each_other():
    model = ml.GPT2(CONFIG, rng=0, dtype="float64")
    together, _ = model.forward(IDS, keep=False, offsets=OFFSETS)
    separate = [model.forward(IDS[a:b], keep=False)[0] for a, b in ((0, 4), (4, 7))]
    np.testing.assert_allclose(together, np.concatenate(separate), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtypes_are_kept(dtype, backend, on):
    """No silent promotion: outputs, input gradients and parameter gradients have the dtype of the layer."""
    for name, layer, x, options in catalogue():
        layer.to(backend, dtype)
        x = on(x.astype(dtype)) if x.dtype.kind == "f" else x
        if name == "lora_linear":
            continue  # the catalogue fixes its W in float64
        y, saved = layer.forward(x, **options)
        dy = on(np.ones(y.shape, dtype)) if y.ndim else y
        dx = layer.backward(dy, saved)
        assert str(y.dtype) == dtype, name
        assert dx is None or str(dx.dtype) == dtype, name
        assert all(p.grad is None or str(p.grad.dtype) == dtype for _, p in layer.parameters()), name


def test_a_replica_shares_weights_and_owns_gradients():
    model = model_with_lora()
    replica = model.replica()
    for (path, p), (twin_path, q) in zip(model.parameters(), replica.parameters(), strict=True):
        assert path == twin_path
        assert p is not q
        assert p.data is q.data
    replica.loss_backward(replica.loss(IDS, LABELS, OFFSETS)[1])
    assert all(p.grad is None for _, p in model.parameters())
    assert replica.transformer.h[0].attn is not model.transformer.h[0].attn


def test_dropout_depends_on_seed_and_call_and_is_off_in_inference():
    layer, x = ml.Dropout(0.5), np.ones((20, 20))
    first, second = layer.forward(x)[0], layer.forward(x)[0]
    assert (first != second).any()
    np.testing.assert_array_equal(layer.forward(x, keep=False)[0], x)
    reseed(layer, 7)
    again = layer.forward(x)[0]
    reseed(layer, 7)
    np.testing.assert_array_equal(layer.forward(x)[0], again)
    reseed(layer, 8)
    assert (layer.forward(x)[0] != again).any()


def test_paths_are_those_of_the_published_checkpoint():
    paths = [path for path, _ in ml.GPT2(CONFIG, rng=0).parameters()]
    assert paths[:4] == ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.bias"]
    assert "transformer.h.2.attn.c_attn.weight" in paths
    assert "transformer.h.2.mlp.c_proj.bias" in paths
    assert paths[-2:] == ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    assert len(paths) == len(set(paths)) == 2 + 12 * CONFIG.n_layer + 2


def test_lora_keeps_the_paths_of_wrapped_layers():
    base = {path for path, _ in ml.GPT2(CONFIG, rng=0).parameters()}
    adapted = {path for path, _ in model_with_lora().parameters()}
    assert base < adapted
    assert {path.rpartition(".")[2] for path in adapted - base} == {"lora_A", "lora_B"}
    assert len(lora_layers(model_with_lora())) == 4 * CONFIG.n_layer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ml.Linear(0, 3), "at least 1"),
        (lambda: ml.MLP([3]), "input and an output"),
        (lambda: ml.Dropout(1.5), "p is 1.5"),
        (lambda: ml.GELU("fast"), "'none' or 'tanh'"),
        (lambda: ml.Attention(6, 4), "not a multiple"),
        (lambda: ml.GPT2Config(n_embd=10, n_head=3), "not a multiple"),
        (lambda: ml.GPT2Config(n_layer=0), "n_layer must be a positive integer"),
        (lambda: ml.GPT2(CONFIG, rng=0).forward(np.arange(9)), "9 tokens is longer than the model's 8 positions"),
        (lambda: ml.GPT2(CONFIG, rng=0).loss(IDS, np.full(7, -100)), "no row is labelled"),
        (lambda: ml.GPT2(CONFIG, rng=0).forward(np.array([3, 11])), "id 11 at position 1 is outside 0 to 10"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
