"""LoRA's family: what each method promises, on NumPy and on the stand-in. Their gradients are in the catalogue (test_gradients)."""

import numpy as np
import pytest

import minilora as ml
from minilora.lora import lora_layers
from minilora.lora.layer import adapter_parameters

CONFIG = ml.GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=2, n_head=3)
IDS = np.array([1, 5, 2, 10, 0, 7, 7])
LABELS = np.append(IDS[1:], -100)


def gpt2(**options):
    return ml.GPT2(CONFIG, rng=0, **options)


def injected(model=None, **config):
    model = model or gpt2()
    ml.inject(model, ml.LoraConfig(**{"r": 2, **config}), rng=0)
    return model


def shake(model, scale=0.3):
    """What the adapters train, away from where it starts."""
    rng = np.random.default_rng(5)
    for p in adapter_parameters(model).values():
        p.data = (p.data + scale * rng.standard_normal(p.data.shape)).astype(p.data.dtype)
    return model


def logits(model):
    return model.forward(IDS, keep=False)[0]


def gradients(model):
    model.zero_grad()
    model.loss_backward(model.loss(IDS, LABELS)[1])
    return {path: p.grad for path, p in model.parameters() if p.trainable}


def distance(a, b):
    """The largest difference, relative to the largest value."""
    return float(abs(a - b).max()) / float(abs(b).max())


# -- what all of them promise ------------------------------------------------------------------------------------------------

METHODS = {
    "DoRA": {"use_dora": True},
    "DoRA, exact, dropout": {"use_dora": "exact", "lora_dropout": 0.2},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_changes_nothing(method, backend):
    base = logits(gpt2().to(backend))
    assert distance(logits(injected(**METHODS[method]).to(backend)), base) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_merged_unmerged_and_disabled(method, backend):
    base = logits(gpt2().to(backend))
    model = shake(injected(**METHODS[method])).to(backend)
    apart = logits(model)
    assert distance(apart, base) > 1e-2
    changes = ml.merge(model)
    assert all(change > 0 for change in changes.values())
    assert distance(logits(model), apart) < 1e-5
    for _ in range(2):  # merged, and not
        with ml.disabled(model):
            assert float(abs(logits(model) - base).max()) == 0
        ml.unmerge(model)
    assert float(abs(logits(model) - apart).max()) == 0
    ml.merge(model)
    with pytest.raises(RuntimeError, match=r"is merged and cannot be trained"):
        model.loss(IDS, LABELS)


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded(method, tmp_path):
    model = shake(injected(**METHODS[method]))
    ml.save_adapter(model, tmp_path)
    again = gpt2()
    ml.load_adapter(again, tmp_path)
    assert distance(logits(again), logits(model)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_replica_has_the_same_gradient_and_shares_the_weights(method, backend):
    model = shake(injected(**{**METHODS[method], "lora_dropout": 0})).to(backend)
    twin = model.replica()
    for path, g in gradients(model).items():
        assert float(abs(gradients(twin)[path] - g).max()) == 0
    own = {id(p.data) for _, p in model.parameters()}
    assert all(id(p.data) in own for _, p in twin.parameters())


# -- DoRA --------------------------------------------------------------------------------------------------------------------


def test_dora_keeps_the_lengths_of_the_columns_apart_from_their_direction(on, backend):
    model = shake(injected(ml.MLP([7, 5], rng=0, dtype="float64"), use_dora=True)).to(backend)
    layer = model.layers[0]
    V = layer.weight.data + layer.scaling * layer.lora_A.data @ layer.lora_B.data
    m, c = layer.lora_magnitude_vector.data, (V * V).sum(axis=0) ** 0.5
    x = on(np.random.default_rng(0).standard_normal((4, 7)))
    assert distance(layer.forward(x)[0], x @ V * (m / c) + layer.bias.data) < 1e-14
    lengths = ((layer.weight.data + layer.delta()) ** 2).sum(axis=0) ** 0.5
    assert distance(lengths, abs(m)) < 1e-14


def test_only_the_exact_gradient_of_dora_is_blind_to_the_lengths_of_the_columns():
    """y depends on the direction of V's columns alone; where A is square, B can lengthen column j: no gradient along that."""
    slopes, dm = {}, {}
    for value in (True, "exact"):
        layer = shake(injected(ml.MLP([5, 7], rng=0, dtype="float64"), r=5, use_dora=value)).layers[0]
        x, dy = np.random.default_rng(1).standard_normal((2, 9, 7))
        layer.backward(dy, layer.forward(x[:, :5])[1])
        A, B, s = layer.lora_A.data, layer.lora_B.data, layer.scaling
        lengthen = np.linalg.solve(s * A, layer.weight.data + s * A @ B)  # s A (B + t lengthen_j) is V_j (1 + t) in column j
        slopes[value] = (layer.lora_B.grad * lengthen).sum(axis=0)
        dm[value] = layer.lora_magnitude_vector.grad
    np.testing.assert_allclose(slopes["exact"], 0, atol=1e-12)
    assert np.abs(slopes[True]).min() > 1e-2
    np.testing.assert_array_equal(dm[True], dm["exact"])


REFUSED = {
    "DoRA of no kind": ({"use_dora": "both"}, "use_dora is 'both'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_changed(case):
    config, message = REFUSED[case]
    model = gpt2()
    with pytest.raises(ValueError, match=message):
        injected(model, **config)
    assert lora_layers(model) == []
    assert all(p.trainable for _, p in model.parameters())


def test_dora_refuses_a_column_without_direction():
    model = gpt2()
    model.transformer.h[1].mlp.c_fc.weight.data[:, 3] = 0
    with pytest.raises(ValueError, match="column of the weight is zero"):
        injected(model, use_dora=True)
