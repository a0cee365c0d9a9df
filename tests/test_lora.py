"""LoRA: the known answers of the papers, injection, merging, factorisation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IDS, gpt2

import minilora as ml
from minilora.lora import lora_layers


def injected(model=None, rng=0, **config):
    model = model or gpt2()
    ml.inject(model, ml.LoraConfig(**{"r": 2, **config}), rng=rng)
    return model


def perturb(model, scale=0.3):
    """Move the adapters away from zero."""
    rng = np.random.default_rng(5)
    for _, layer in lora_layers(model):
        layer.lora_B.data = (scale * rng.standard_normal(layer.lora_B.data.shape)).astype(layer.lora_B.data.dtype)
    return model


# -- known answers (float64, computed before this code existed) -----------------------------------------------------------


def test_known_answer_1_the_normal_init_dominates_the_weight():
    """A, B ~ N(0, 1), d = 384, r = 8, W ~ N(0, 1 / d): ||x A B|| / ||x W|| is about 58; with B = 0 it is exactly 0."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 384))
    base = ml.Linear(384, 384, bias=False, rng=rng, dtype="float64")
    base.weight.data = rng.normal(0, 384**-0.5, (384, 384))
    layer = ml.LoRALinear(base, r=8, alpha=8, init="normal", rng=rng)
    low = np.linalg.norm(x @ layer.lora_A.data @ layer.lora_B.data)
    assert 50 < low / np.linalg.norm(x @ base.weight.data) < 66
    usual = ml.LoRALinear(base, r=8, rng=rng)
    assert not usual.delta().any()
    np.testing.assert_array_equal(usual.forward(x)[0], base.forward(x)[0])


def test_known_answer_1_with_both_zero_nothing_ever_moves():
    layer = ml.LoRALinear(ml.Linear(6, 5, rng=0), r=2, rng=0)
    layer.lora_A.data[...] = 0
    x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    optimizer = ml.SGD(layer.parameters(), lr=0.1)
    for _ in range(5):
        y, saved = layer.forward(x)
        layer.backward(y - 1, saved)
        optimizer.step()
        optimizer.zero_grad()
    assert not layer.lora_A.data.any()
    assert not layer.lora_B.data.any()


@pytest.mark.parametrize("r", [1, 2, 4, 6])
def test_known_answer_2_lora_reaches_the_whitened_eckart_young_floor(r):
    """Linear regression with a planted rank-4 shift: rank r reaches the discarded singular values of L dW, not those of dW."""
    rng = np.random.default_rng(0)
    d, T = 16, 400
    x = rng.standard_normal((T, d)) * np.linspace(0.2, 2, d)  # inputs that are not white
    W = rng.standard_normal((d, d))
    dW = rng.standard_normal((d, 4)) @ rng.standard_normal((4, d)) / 4
    target = x @ (W + dW)

    base = ml.Linear(d, d, bias=False, rng=rng, dtype="float64")
    base.weight.data = W
    layer = ml.LoRALinear(base, r=r, alpha=r, rng=rng)
    optimizer = ml.AdamW(layer.parameters(), lr=0.02, betas=(0.9, 0.95), eps=1e-30)
    rate = ml.schedule("cosine", 4000)
    for step in range(4000):
        y, saved = layer.forward(x)
        loss, dy = ml.mse(y, target)
        layer.backward(dy, saved, need_dx=False)
        optimizer.lr = 0.02 * rate(step)
        optimizer.step()
        optimizer.zero_grad()

    L = np.linalg.cholesky(x.T @ x / T).T
    floor = (np.linalg.svd(L @ dW, compute_uv=False)[r:] ** 2).sum() / d
    plain_floor = (np.linalg.svd(dW, compute_uv=False)[r:] ** 2).sum() / d
    if r >= 4:
        assert float(loss) < 1e-14
    else:
        assert float(loss) == pytest.approx(floor, rel=1e-4)
        assert abs(plain_floor / floor - 1) > 0.05  # the two floors differ


def test_known_answer_4_adam_does_not_depend_on_the_scales_of_a_and_b():
    """eps = 0: alpha / (pq), the initial A and its rate times p, and B's rate times q leave the trajectory unchanged to rounding."""
    p, q = 3.0, 0.2
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((20, 6)), rng.standard_normal((20, 5))

    def trajectory(p, q):
        layer = ml.LoRALinear(ml.Linear(6, 5, rng=1, dtype="float64"), r=2, alpha=8 / (p * q), rng=2)
        layer.lora_A.data *= p
        optimizers = ml.AdamW([layer.lora_A], 0.01 * p, eps=0), ml.AdamW([layer.lora_B], 0.01 * q, eps=0)
        losses = []
        for _ in range(40):
            y, saved = layer.forward(x)
            loss, dy = ml.mse(y, target)
            layer.backward(dy, saved)
            for optimizer in optimizers:
                if losses or optimizer is optimizers[1]:  # at the first step dA = 0, which gives 0 / 0 without eps
                    optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss))
        return losses

    plain = trajectory(1.0, 1.0)
    np.testing.assert_allclose(trajectory(p, q), plain, rtol=1e-10)
    assert plain[-1] < 0.9 * plain[0]
    assert abs(trajectory(p, 1.0)[-1] / plain[-1] - 1) < 1e-10
    assert plain[5] != pytest.approx(trajectory_without_rates(x, target, p, q)[5], rel=1e-3)


def trajectory_without_rates(x, target, p, q):
    """With unchanged rates, the trajectory changes."""
    layer = ml.LoRALinear(ml.Linear(6, 5, rng=1, dtype="float64"), r=2, alpha=8 / (p * q), rng=2)
    layer.lora_A.data *= p
    optimizer, losses = ml.AdamW(layer.parameters(), 0.01), []
    for _ in range(6):
        y, saved = layer.forward(x)
        loss, dy = ml.mse(y, target)
        layer.backward(dy, saved)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_known_answer_6_factorize_is_optimal(m, n, data):
    r = data.draw(st.integers(1, min(m, n)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dW, x = rng.standard_normal((m, n)), rng.standard_normal((3 * m + 2, m)) * np.linspace(0.3, 3, m)
    A, B = ml.factorize(dW, r)
    assert A.shape == (m, r)
    assert B.shape == (r, n)
    S = np.linalg.svd(dW, compute_uv=False)
    best = np.linalg.norm(dW - A @ B)
    assert best**2 == pytest.approx((S[r:] ** 2).sum(), abs=1e-10)

    Ax, Bx = ml.factorize(dW, r, x)
    whitened = np.linalg.norm(x @ (dW - Ax @ Bx))
    assert whitened <= np.linalg.norm(x @ (dW - A @ B)) + 1e-9
    assert best <= np.linalg.norm(dW - Ax @ Bx) + 1e-9
    for _ in range(5):  # no neighbour is better
        dA, dB = 1e-3 * rng.standard_normal(A.shape), 1e-3 * rng.standard_normal(B.shape)
        assert np.linalg.norm(dW - (A + dA) @ (B + dB)) >= best - 1e-12
        assert np.linalg.norm(x @ (dW - (Ax + dA) @ (Bx + dB))) >= whitened - 1e-9


def test_factorize_on_a_backend(on):
    dW = np.random.default_rng(0).standard_normal((5, 4))
    A, B = ml.factorize(on(dW), 4, on(np.random.default_rng(1).standard_normal((9, 5))))
    np.testing.assert_allclose(ml.to_numpy(A @ B), dW, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_factorize_refuses_inputs_in_a_subspace(on, dtype):
    rng = np.random.default_rng(0)
    dW, x = rng.standard_normal((5, 4)), rng.standard_normal((9, 5)) * [1, 1e-3, 1, 1e2, 1]
    ml.factorize(on(dW, dtype), 2, on(x, dtype))
    for column in (x[:, 1] - 2 * x[:, 4], 0 * x[:, 0]):
        with pytest.raises(ValueError, match="not linearly independent"):
            ml.factorize(on(dW, dtype), 2, on(np.column_stack([x[:, :2], column, x[:, 3:]]), dtype))


# -- injection -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "count", "ends"),
    [
        ({"target_modules": "all-linear"}, 8, {"c_attn", "c_proj", "c_fc"}),
        ({"target_modules": ["c_attn"]}, 2, {"c_attn"}),
        ({"target_modules": ["attn.c_proj"]}, 2, {"c_proj"}),
        ({"target_modules": ["transformer.h.1.mlp.c_fc"]}, 1, {"c_fc"}),
        ({"target_modules": r".*\.h\.0\..*c_(attn|fc)"}, 2, {"c_attn", "c_fc"}),
        ({"target_modules": ["c_attn", "c_fc"], "layers_to_transform": 1}, 2, {"c_attn", "c_fc"}),
        ({"target_modules": "all-linear", "exclude_modules": ["c_proj"]}, 4, {"c_attn", "c_fc"}),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}, 4, {"c_attn", "c_proj"}),
    ],
)
def test_targets(config, count, ends):
    model = gpt2()
    paths = ml.inject(model, ml.LoraConfig(r=2, **config), rng=0)
    assert len(paths) == count == len(lora_layers(model))
    assert {path.rpartition(".")[2] for path in paths} == ends
    assert {path for path, p in model.parameters() if p.trainable} == {f"{path}.lora_{ab}" for path in paths for ab in "AB"}


def test_patterns_bias_and_modules_to_save():
    model = injected(
        r=2,
        lora_alpha=8,
        rank_pattern={"mlp.c_fc": 4, r"h\.0\.attn\.c_attn": 1},
        alpha_pattern={"c_fc": 2},
        bias="lora_only",
        modules_to_save=["ln_f"],
        use_rslora=True,
        target_modules=["c_attn", "c_fc"],
    )
    layers = dict(lora_layers(model))
    assert [layers[f"transformer.h.{i}.{name}"].r for i in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")] == [1, 4, 2, 4]
    assert layers["transformer.h.0.mlp.c_fc"].scaling == 2 / math.sqrt(4)
    trained = {path for path, p in model.parameters() if p.trainable and ".lora_" not in path}
    assert trained == {f"{path}.bias" for path in layers} | {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    everywhere = {path for path, p in injected(bias="all").parameters() if p.trainable and ".lora_" not in path}
    assert len(everywhere) == 8 + 4 + 1


def test_inject_works_on_any_tree_of_layers():
    model = ml.MLP([4, 8, 3], ml.Tanh, rng=0)
    assert ml.inject(model, ml.LoraConfig(r=2), rng=0) == ["layers.0", "layers.2"]
    assert isinstance(model.layers[0], ml.LoRALinear)


REFUSED = {
    "unknown name": ({"target_modules": ["c_atn"]}, "no linear layer is called 'c_atn'; did you mean 'c_attn'"),
    "unknown among known": ({"target_modules": ["c_attn", "q_proj"]}, "called 'q_proj'"),
    "expression": ({"target_modules": "attn"}, "no linear layer matches 'attn'; there are c_attn, c_fc, c_proj"),
    "not an expression": ({"target_modules": "(h"}, "not a regular expression"),
    "nothing left": ({"exclude_modules": ".*"}, "no linear layer is left"),
    "no layer 7": ({"target_modules": ["c_fc"], "layers_to_transform": [7]}, "no linear layer is left"),
    "empty": ({"target_modules": []}, "target_modules is empty"),
    "rank 0": ({"r": 0}, "rank r must be an integer of at least 1"),
    "rank too large": ({"r": 7}, "rank 7 is beyond transformer.h.0.attn.c_attn, which is 6 x 18"),
    "rank not whole": ({"r": 1.5}, "got 1.5"),
    "alpha": ({"lora_alpha": 0}, "lora_alpha must be a positive number"),
    "dropout": ({"lora_dropout": 1}, "below 1"),
    "bias": ({"bias": "some"}, "'none', 'all' or 'lora_only'"),
    "init": ({"init_lora_weights": "magic"}, "init_lora_weights is .magic."),
    "module to save": ({"modules_to_save": ["ln_g"]}, "no module is called 'ln_g'; did you mean 'ln_"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_changed(case):
    config, message = REFUSED[case]
    model = gpt2()
    with pytest.raises(ValueError, match=message):
        ml.inject(model, ml.LoraConfig(**{"r": 2, **config}))
    assert lora_layers(model) == []
    assert all(p.trainable for _, p in model.parameters())


def test_injecting_twice_is_refused():
    with pytest.raises(ValueError, match="has LoRA layers already"):
        injected(injected())


def test_functions_without_adapters_report_it():
    for verb in (ml.merge, ml.unmerge):
        with pytest.raises(ValueError, match="no LoRA layers"):
            verb(gpt2())
    with pytest.raises(ValueError, match="no LoRA layers"), ml.disabled(gpt2()):
        pass


# -- merge, unmerge, disabled ------------------------------------------------------------------------------------------------


def test_merged_and_unmerged_agree(backend):
    model = perturb(injected()).to(backend)
    model_of_base = gpt2().to(backend)
    unmerged, _ = model.forward(IDS, keep=False)
    changes = ml.merge(model)
    together, _ = model.forward(IDS, keep=False)
    scale = float(abs(unmerged).max())
    assert float(abs(together - unmerged).max()) < 1e-6 * scale
    assert all(change > 0 for change in changes.values())
    ml.unmerge(model)
    again, _ = model.forward(IDS, keep=False)
    assert float(abs(again - unmerged).max()) == 0
    base, _ = model_of_base.forward(IDS, keep=False)
    assert float(abs(base - unmerged).max()) > 1e-2 * scale  # merging changed something


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_adapters_give_the_base_model_bit_for_bit(merged, backend):
    base, _ = gpt2().to(backend).forward(IDS, keep=False)
    model = perturb(injected(bias="all", modules_to_save=["ln_f"])).to(backend)
    optimizer = ml.SGD(model.parameters(), 0.5)
    for _ in range(2):  # biases and layer norm also change
        model.loss_backward(model.loss(IDS, np.append(IDS[1:], -100))[1])
        optimizer.step()
    if merged:
        ml.merge(model)
    before, _ = model.forward(IDS, keep=False)
    with ml.disabled(model):
        inside, _ = model.forward(IDS, keep=False)
    after, _ = model.forward(IDS, keep=False)
    assert float(abs(inside - base).max()) == 0
    assert float(abs(after - before).max()) == 0
    assert float(abs(after - base).max()) > 0


def test_disabled_ends_with_an_exception():
    model = perturb(injected())
    with pytest.raises(KeyError), ml.disabled(model):
        raise KeyError
    assert all(layer.enabled for _, layer in lora_layers(model))


def test_training_a_merged_model_is_refused():
    model = injected()
    ml.merge(model)
    with pytest.raises(RuntimeError, match="unmerge"):
        model.loss(IDS, np.append(IDS[1:], -100))


def test_merging_leaves_the_base_weights_unchanged():
    model = perturb(injected())
    before = {path: p.data.copy() for path, p in model.parameters()}
    ml.merge(model)
    for path, p in model.parameters():
        np.testing.assert_array_equal(p.data, before[path])


def test_a_merged_model_moves_with_its_adapters(backend):
    model = perturb(injected())
    ml.merge(model)
    expected, _ = model.forward(IDS, keep=False)
    moved, _ = model.to(backend, "float64").forward(IDS, keep=False)
    assert moved.dtype == np.float64
    np.testing.assert_allclose(ml.to_numpy(moved), expected, atol=1e-5)


def test_two_thin_products_are_w_plus_sab(on, backend):
    layer = perturb(injected(ml.MLP([7, 5], rng=0, dtype="float64"), r=3, lora_alpha=5)).layers[0].to(backend)
    x = on(np.random.default_rng(0).standard_normal((4, 7)))
    y, _ = layer.forward(x)
    expected = x @ (layer.weight.data + 5 / 3 * layer.lora_A.data @ layer.lora_B.data) + layer.bias.data
    assert float(abs(y - expected).max()) < 1e-13


def test_the_initial_values():
    base = ml.Linear(4000, 30, rng=0)
    A = ml.LoRALinear(base, r=20, rng=0).lora_A.data
    assert np.abs(A).max() <= 1 / math.sqrt(4000)
    assert A.std() == pytest.approx(1 / math.sqrt(3 * 4000), rel=0.02)
    gaussian = ml.LoRALinear(base, r=20, init="gaussian", rng=0)
    assert gaussian.lora_A.data.std() == pytest.approx(1 / 20, rel=0.02)
    assert not gaussian.lora_B.data.any()
    seed = ml.LoRALinear(base, r=20, init="normal", rng=0)
    assert seed.lora_A.data.std() == pytest.approx(1, rel=0.02)
    assert seed.lora_B.data.std() == pytest.approx(1, rel=0.1)
    assert ml.LoRALinear(base, r=20, init=False, rng=0).lora_B.data.any()


def test_all_linear_excludes_the_output_head():
    class WithHead(ml.Sequential):
        output_head = "layers.1"

    model = WithHead(ml.Linear(3, 4, rng=0), ml.Linear(4, 2, rng=0))
    assert list(ml.LoraConfig(r=1).targets(model)) == ["layers.0"]
    assert list(ml.LoraConfig(r=1, target_modules=["layers.1"]).targets(model)) == ["layers.1"]
