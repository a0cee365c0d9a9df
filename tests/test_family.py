"""LoRA variants: their properties on NumPy and the fake CuPy. Their gradients are checked in test_gradients."""

from pathlib import Path

import numpy as np
import pytest
from golden import make_adapters
from safetensors.numpy import load_file
from tiny import IDS, gpt2, logits

import minilora as ml
from examples.preconditioned import (
    create_lora_pro_optimizer,
    create_lorafa_optimizer,
    create_riemannian_optimizer,
    lora_fa,
    lora_pro,
    riemannian,
)
from minilora.lora import adaptation, adapter_parameters, lora_layers
from minilora.lora.variants.vera import Projections, VeraConfig
from minilora.optim.optimizers import create_loraplus_optimizer

LABELS = np.append(IDS[1:], -100)


def config_of(vera=False, **config):
    return (VeraConfig if vera else ml.LoraConfig)(**{"r": 2, **config})


def injected(model=None, **config):
    model = model or gpt2()
    ml.inject(model, config_of(**config), rng=0, train_step=lambda: gradients(model))
    return model


def perturb(model, scale=0.3):
    """Perturb the parameters of the adapters."""
    rng = np.random.default_rng(5)
    for p in adapter_parameters(model).values():
        p.data = (p.data + scale * rng.standard_normal(p.data.shape)).astype(p.data.dtype)
    return model


def gradients(model):
    model.zero_grad()
    model.loss_backward(model.loss(IDS, LABELS)[1])
    return {path: p.grad for path, p in model.parameters() if p.trainable}


def distance(a, b):
    """The largest difference, relative to the largest value."""
    return float(abs(a - b).max()) / float(abs(b).max())


# -- properties of all variants ----------------------------------------------------------------------------------------------

METHODS = {
    "DoRA": {"use_dora": True},
    "DoRA, exact, dropout": {"use_dora": "exact", "lora_dropout": 0.2},
    "gaussian": {"init_lora_weights": "gaussian"},
    "PiSSA": {"init_lora_weights": "pissa", "lora_alpha": 5},
    "PiSSA, fast": {"init_lora_weights": "pissa_niter_2", "use_rslora": True, "rank_pattern": {"c_fc": 3}, "alpha_pattern": {"c_attn": 3}},
    "OLoRA": {"init_lora_weights": "olora", "lora_dropout": 0.2},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "EVA": {"init_lora_weights": "eva"},
    "EVA, ranks as requested": {"init_lora_weights": "eva", "eva_config": {"rho": 1.0, "whiten": True}},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "LoRA-GA, A2rBr, weight_svd": {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "A2rBr", "scale": "weight_svd"}},
    "LoRA-GA, random, gd_scale": {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "random", "scale": "gd_scale"}},
    "DoRA, PiSSA": {"use_dora": True, "init_lora_weights": "pissa"},
    "embedding": {"target_modules": ["wte", "wpe", "c_fc"], "use_rslora": True, "lora_alpha": 2},
    "VeRA": {"vera": True, "r": 9, "projection_prng_key": 3},
    "VeRA, random projections": {"vera": True, "r": 4, "save_projection": False, "vera_dropout": 0.2, "bias": "vera_only"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_does_not_change_the_output(method, backend):
    base = logits(gpt2().to(backend))
    assert distance(logits(injected(gpt2().to(backend), **METHODS[method])), base) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_merged_unmerged_and_disabled(method, backend):
    base = logits(gpt2().to(backend))
    model = perturb(injected(**METHODS[method])).to(backend)
    unmerged = logits(model)
    assert distance(unmerged, base) > 1e-2
    changes = ml.merge(model)
    assert all(change > 0 for change in changes.values())
    assert distance(logits(model), unmerged) < 1e-5
    for _ in range(2):  # merged and unmerged
        with ml.disabled(model):
            assert float(abs(logits(model) - base).max()) == 0
        ml.unmerge(model)
    assert float(abs(logits(model) - unmerged).max()) == 0
    ml.merge(model)
    with pytest.raises(RuntimeError, match=r"is merged and cannot be trained"):
        model.loss(IDS, LABELS)


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded(method, tmp_path):
    model = perturb(injected(**METHODS[method]))
    ml.save_adapter(model, tmp_path)
    again = gpt2()
    ml.load_adapter(again, tmp_path)
    assert distance(logits(again), logits(model)) < 2e-6  # PiSSA's is saved as a difference of rank 2 r: 1.06e-6 with NumPy 2.5's BLAS


@pytest.mark.parametrize("method", METHODS)
def test_a_replica_has_the_same_gradient_and_shares_the_weights(method, backend):
    model = perturb(injected(**{**METHODS[method], "vera_dropout" if "vera" in METHODS[method] else "lora_dropout": 0})).to(backend)
    replica = model.replica()
    for path, g in gradients(model).items():
        assert float(abs(gradients(replica)[path] - g).max()) == 0
    model.zero_grad()
    replica.zero_grad()
    assert set(matrices_in(replica)) <= set(matrices_in(model))


def matrices_in(value, seen=None):
    """{id: array} of every matrix that can be reached from a value."""
    seen = {} if seen is None else seen
    if id(value) not in seen:
        seen[id(value)] = value
        inside = [getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)]
        inside += [*getattr(value, "__dict__", {}).values()] + (list(value) if isinstance(value, (list, tuple)) else [])
        for part in inside:
            if not isinstance(part, (type, str, int, float)):
                matrices_in(part, seen)
    return {key: v for key, v in seen.items() if getattr(v, "ndim", 0) > 1}


# -- PEFT's golden adapters (golden/make_family.py) --------------------------------------------------------------------------

GOLDEN = Path(__file__).parent / "golden"
EXPECTED = load_file(GOLDEN / "family" / "expected.safetensors")


def golden_llama(backend="numpy"):
    return ml.load_model(GOLDEN / "peft" / "llama" / "base", backend)


@pytest.mark.parametrize("what", ["dora", "embedding", "vera"])
def test_golden_adapters_match_peft(what, backend):
    model = golden_llama(backend)
    ml.load_adapter(model, GOLDEN / "family" / what)
    ids, offsets = make_adapters.IDS[0], [0, 7, 14]
    assert distance(ml.to_numpy(model.forward(ids.ravel(), keep=False, offsets=offsets)[0]), EXPECTED[f"{what}.logits"]) < 1e-5
    labels = np.full(ids.shape, -100)
    labels[:, :-1] = ids[:, 1:]
    model.loss_backward(model.loss(ids.ravel(), labels.ravel(), offsets)[1])
    expected = {key.removeprefix(f"{what}.gradient."): g for key, g in EXPECTED.items() if key.startswith(f"{what}.gradient.")}
    found = {path: ml.to_numpy(p.grad).T for path, p in adapter_parameters(model).items()}
    assert found.keys() == expected.keys()
    for path, g in expected.items():
        assert distance(found[path], g) < 1e-5, path


def test_golden_initial_values_of_pissa():
    model = golden_llama()
    ml.inject(model, ml.LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa"))
    tensors = load_file(GOLDEN / "family" / "pissa.safetensors")
    for path, layer in lora_layers(model):
        A, B = (tensors[f"base_model.model.{path}.lora_{ab}.weight"].T for ab in "AB")
        assert distance(layer.lora_A.data @ layer.lora_B.data, A @ B) < 1e-4
    ids = make_adapters.IDS[0].ravel()
    assert distance(model.forward(ids, keep=False, offsets=[0, 7, 14])[0], EXPECTED["pissa.logits"]) < 1e-5


# -- DoRA --------------------------------------------------------------------------------------------------------------------


def test_dora_separates_magnitude_and_direction_of_columns(on, backend):
    model = perturb(injected(ml.MLP([7, 5], rng=0, dtype="float64"), use_dora=True)).to(backend)
    layer = model.layers[0]
    V = layer.weight.data + layer.scaling * layer.lora_A.data @ layer.lora_B.data
    m, c = layer.lora_magnitude_vector.data, (V * V).sum(axis=0) ** 0.5
    x = on(np.random.default_rng(0).standard_normal((4, 7)))
    assert distance(layer.forward(x)[0], x @ V * (m / c) + layer.bias.data) < 1e-14
    lengths = ((layer.weight.data + layer.delta()) ** 2).sum(axis=0) ** 0.5
    assert distance(lengths, abs(m)) < 1e-14


def test_only_the_exact_gradient_of_dora_is_orthogonal_to_column_scaling():
    """y depends only on the direction of V's columns. With A square, B can scale column j: the gradient in that direction is zero."""
    slopes, dm = {}, {}
    for value in (True, "exact"):
        layer = perturb(injected(ml.MLP([5, 7], rng=0, dtype="float64"), r=5, use_dora=value)).layers[0]
        x, dy = np.random.default_rng(1).standard_normal((2, 9, 7))
        layer.backward(dy, layer.forward(x[:, :5])[1])
        A, B, s = layer.lora_A.data, layer.lora_B.data, layer.scaling
        scale_column = np.linalg.solve(s * A, layer.weight.data + s * A @ B)  # s A (B + t lengthen_j) is V_j (1 + t) in column j
        slopes[value] = (layer.lora_B.grad * scale_column).sum(axis=0)
        dm[value] = layer.lora_magnitude_vector.grad
    np.testing.assert_allclose(slopes["exact"], 0, atol=1e-12)
    assert np.abs(slopes[True]).min() > 1e-2
    np.testing.assert_array_equal(dm[True], dm["exact"])


# -- initial values ----------------------------------------------------------------------------------------------------------


def one_layer(m=9, n=7, **config):
    """(layer, weight) of a single Linear with an adapter of r = 3."""
    model = ml.MLP([m, n], rng=0, dtype="float64")
    x, dy = np.random.default_rng(1).standard_normal((2, 40, max(m, n)))

    def step():
        model.backward(dy[:, :n], model.forward(x[:, :m])[1])

    W = model.layers[0].weight.data.copy()
    ml.inject(model, ml.LoraConfig(**{"r": 3, "lora_alpha": 5, **config}), rng=0, train_step=step)
    return model.layers[0], W


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_300"])
def test_pissa_initialises_with_the_principal_components(init):
    layer, W = one_layer(init_lora_weights=init)
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    np.testing.assert_allclose(layer.scaling * layer.lora_A.data @ layer.lora_B.data, (U[:, :3] * S[:3]) @ Vt[:3], atol=1e-10)
    np.testing.assert_allclose(layer.lora_A.data.T @ layer.lora_A.data, np.diag(S[:3] / layer.scaling), atol=1e-10)
    np.testing.assert_allclose(np.linalg.svd(np.eye(9) @ layer.W, compute_uv=False)[:4], S[3:], atol=1e-10)
    np.testing.assert_array_equal(layer.weight.data, W)


def test_olora_initialises_with_orthonormal_rows():
    layer, W = one_layer(init_lora_weights="olora")
    B = layer.lora_B.data
    np.testing.assert_allclose(B @ B.T, np.eye(3), atol=1e-14)
    np.testing.assert_allclose(layer.lora_A.data, W @ B.T, atol=1e-14)  # W^T = Q R, hence Q^T W^T = R


def test_orthogonal_factors_both_have_gradients_at_the_first_step():
    model = injected(init_lora_weights="orthogonal", r=4)
    for path, g in gradients(model).items():
        assert np.abs(g).max() > 0, path
    assert all(np.abs(layer.lora_A.data).max() > 0.05 and np.abs(layer.delta()).max() < 1e-7 for _, layer in lora_layers(model))


def test_eva_assigns_ranks_by_explained_variance():
    """Two parallel layers: one reads inputs that vary in three directions, the other in one."""
    rng = np.random.default_rng(0)
    directions, _ = np.linalg.qr(rng.standard_normal((8, 3)))
    x = 5 + rng.standard_normal((200, 3)) * [4, 2, 1] @ directions.T + 1e-3 * rng.standard_normal((200, 8))

    class Beside(ml.Sequential):
        def forward(self, x, keep=True, need_dx=True):
            many, one = self.layers
            return many.forward(x, keep)[0] + one.forward(x @ directions[:, :1] @ directions[:, :1].T, keep)[0], None

    model = Beside(ml.Linear(8, 6, rng=0, dtype="float64"), ml.Linear(8, 6, rng=0, dtype="float64"))
    config = ml.LoraConfig(r=2, lora_alpha=4, init_lora_weights="eva", alpha_pattern={"layers.1": 6})
    assert ml.inject(model, config, rng=0, train_step=lambda: model.forward(x)) == ["layers.0", "layers.1"]
    many, one = model.layers
    assert (many.r, many.alpha, one.r, one.alpha) == (3, 6, 1, 3)
    assert adaptation(model).config.rank_pattern == {"layers.0": 3, "layers.1": 1}
    assert np.abs(np.diag(many.lora_A.data.T @ directions)).min() > 0.99
    assert not many.lora_B.data.any()


def test_eva_skips_a_layer_that_explains_too_little(tmp_path):
    """One layer reads six directions with a sixth of the variance each; the two others each explain half."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 6))

    class Beside(ml.Sequential):
        def forward(self, x, keep=True, need_dx=True):
            return self.layers[0].forward(x, keep)[0] + self.layers[1].forward(x * [1, 1, 0, 0, 0, 0], keep)[0], None

    model = Beside(ml.Linear(6, 6, rng=0, dtype="float64"), ml.Linear(6, 6, rng=0, dtype="float64"))
    config = ml.LoraConfig(r=1, init_lora_weights="eva", target_modules=["0", "1"])
    assert ml.inject(model, config, rng=0, train_step=lambda: model.forward(x)) == ["layers.1"]
    assert (type(model.layers[0]), model.layers[1].r, model.layers[1].scaling) == (ml.Linear, 2, config.lora_alpha)
    assert (adaptation(model).config.target_modules, config.target_modules) == (["layers.1"], ["0", "1"])


def test_lora_ga_follows_the_gradient_of_full_fine_tuning():
    """With "unit", A B^T are singular vectors of the gradient: the first step of B follows the largest."""
    layer, W = one_layer(init_lora_weights="lora_ga", lora_ga_config={"scale": "unit"})
    x, dy = np.random.default_rng(1).standard_normal((2, 40, 9))
    U, S, Vt = np.linalg.svd(x.T @ dy[:, :7], full_matrices=False)
    np.testing.assert_allclose(np.abs(layer.lora_A.data), np.abs(U[:, :3]), atol=1e-12)
    np.testing.assert_allclose(np.abs(layer.lora_B.data), np.abs(S[3:6, None] * Vt[3:6]), atol=1e-11)
    np.testing.assert_allclose(W, layer.weight.data)
    stable, _ = one_layer(init_lora_weights="lora_ga", lora_ga_config={"stable_gamma": 4})
    np.testing.assert_allclose(stable.lora_B.data, layer.lora_B.data * 7**0.25 / 2, atol=1e-11)


def test_data_driven_initialisers_leave_the_model_unchanged():
    model, trained = gpt2(), []
    model.transformer.wte.freeze()
    with pytest.raises(ZeroDivisionError):
        ml.inject(model, ml.LoraConfig(r=2, init_lora_weights="lora_ga"), train_step=lambda: trained.append(model.trainable) or 1 / 0)
    assert trained == [True]
    assert {path for path, p in model.parameters() if not p.trainable} == {"transformer.wte.weight"}
    assert {type(layer) for _, layer in model.modules()} == {type(layer) for _, layer in gpt2().modules()}


# -- embeddings --------------------------------------------------------------------------------------------------------------


def test_an_adapted_embedding_updates_only_the_rows_read(backend):
    model = injected(target_modules=["wte"]).to(backend)
    layer = model.transformer.wte
    gradients(model)
    dA = ml.to_numpy(layer.lora_embedding_A.grad)
    assert set(np.flatnonzero(np.abs(dA).sum(axis=1))) == set(IDS[:-1].tolist())  # the last row has no label and no successor
    assert not ml.to_numpy(layer.lora_embedding_B.grad).any()  # A is still zero
    layer.lora_embedding_A.data += 1
    assert float(abs(model.head - layer.weight.data.T).max()) == 0  # tied to the table, not to its adapter


def test_a_tied_head_is_not_merged_with_the_embedding(tmp_path):
    model = perturb(injected(target_modules=["wte", "c_fc"]))
    ml.merge(model)
    with pytest.raises(ValueError, match=r"the head is tied to transformer\.wte"):
        ml.save_model(model, tmp_path / "m")
    free = ml.Llama(ml.LlamaConfig(vocab_size=11, hidden_size=6, intermediate_size=9, num_hidden_layers=1, num_attention_heads=3), rng=0)
    perturb(injected(free, target_modules=["embed_tokens"]))
    ml.merge(free)
    ml.save_model(free, tmp_path / "free")
    assert distance(logits(ml.load_model(tmp_path / "free", "numpy")), logits(free)) < 1e-6


# -- VeRA --------------------------------------------------------------------------------------------------------------------


def test_vera_trains_two_vectors_per_layer_and_shares_the_rest(backend):
    model = perturb(injected(vera=True, r=5)).to(backend)
    layers = [layer for _, layer in lora_layers(model)]
    assert sum(p.data.size for _, p in model.parameters() if p.trainable) == sum(5 + layer.out_features for layer in layers)
    gradients(model)  # creates the two shared matrices
    there = [layer.projections.like(layer.vera_lambda_d.data, 24, 24) for layer in (*layers, model.replica().transformer.h[0].mlp.c_fc)]
    assert len({id(layer.projections) for layer in layers}) == 1
    assert {(A.shape, B.shape) for A, B in there} == {((24, 5), (5, 24))}  # of the size of the widest layers
    layer = model.transformer.h[0].mlp.c_fc
    A, B = layer.projections.like(layer.weight.data, 6, 24)
    expected = (A * layer.vera_lambda_d.data) @ B * layer.vera_lambda_b.data
    assert distance(layer.delta(), expected) < 1e-6


def test_vera_draws_its_matrices_from_the_key():
    """Known answers of PEFT 0.21.2, which draws with torch."""
    shared = Projections.drawn(3, 4, 2, 0)
    assert shared.A.T[0].tolist() == [-0.010587962344288826, 0.75864577293396, -1.1639615297317505]
    assert shared.B.T[3].tolist() == [-1.6547120809555054, -1.1471062898635864]
    assert np.abs(Projections.drawn(3, 4, 2, 1).A - shared.A).max() > 0.1


def test_vera_loads_the_matrices_of_the_file(tmp_path):
    from safetensors.numpy import save_file

    model = perturb(injected(vera=True, r=5))
    ml.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    assert (tensors["base_model.vera_A"].shape, tensors["base_model.vera_B"].shape) == ((5, 24), (24, 5))
    save_file(tensors | {"base_model.vera_A": 2 * tensors["base_model.vera_A"]}, path)
    again = gpt2()
    ml.load_adapter(again, tmp_path)
    found, was = (m.transformer.h[0].mlp.c_fc.matrices()[0] for m in (again, model))
    assert distance(found, 2 * was) == 0
    for change, message in (
        ({"base_model.vera_A": None}, "lacks 'base_model.vera_A'"),
        ({"base_model.vera_B": tensors["base_model.vera_B"][:5]}, r"base_model.vera_B has shape \(5, 5\)"),
    ):
        save_file({key: value for key, value in (tensors | change).items() if value is not None}, path)
        with pytest.raises(ValueError, match=message):
            ml.load_adapter(gpt2(), tmp_path)


# -- optimizers for A and B --------------------------------------------------------------------------------------------------


def test_lora_plus_sets_the_rate_of_b_and_excludes_biases_and_norms_from_decay(backend):
    model = perturb(injected(bias="all", modules_to_save=["ln_f"], use_dora=True)).to(backend)
    model.transformer.wpe.unfreeze()
    before = {path: ml.to_numpy(p.data).copy() for path, p in model.parameters() if p.trainable}
    options = {"lr": 0.1, "loraplus_lr_ratio": 4, "loraplus_weight_decay": 0.5}
    optimizer = create_loraplus_optimizer(model, ml.SGD, **options)
    gradients(model)
    optimizer.step()
    for path, p in model.parameters():
        if p.trainable:
            fast = path.endswith("lora_B") or p.data.ndim == 1
            decay = 0 if path.endswith("bias") or "ln_f" in path else 0.5
            moved = 0.1 * (4 if fast else 1) * (ml.to_numpy(p.grad) + decay * before[path])
            np.testing.assert_allclose(ml.to_numpy(p.data), before[path] - moved, atol=1e-6, err_msg=path)


def factors(p=1.0):
    """A, B, their gradients, the full gradient and a scaling; A scaled by p and B by 1 / p, with an equal product."""
    rng = np.random.default_rng(2)
    A, B, G, s = p * rng.standard_normal((7, 3)), rng.standard_normal((3, 5)) / p, rng.standard_normal((7, 5)), 1.7
    return A, B, s * G @ B.T, s * A.T @ G, G, s


def onto(M):
    """The projection onto the columns of M."""
    return M @ np.linalg.pinv(M)


@pytest.mark.parametrize("method", [riemannian, lora_pro])
def test_preconditioned_steps_do_not_depend_on_the_scales_of_a_and_b(method):
    def step(p):
        A, B, gA, gB, _, s = factors(p)
        gA, gB = method(A, B, gA, gB, s, 0)
        return gA @ B + A @ gB

    np.testing.assert_allclose(step(5.0), step(1.0), rtol=1e-9)
    A, B, gA, gB, *_ = factors(5.0)
    assert np.abs(gA @ B + A @ gB - step(1.0)).max() > 1  # plain steps depend on it


def test_lora_pro_is_the_projection_of_the_full_gradient_onto_the_tangent_space():
    A, B, gA, gB, G, s = factors()
    hA, hB = lora_pro(A, B, gA, gB, s, 0)
    P, Q = onto(A), onto(B.T)
    np.testing.assert_allclose(s * (hA @ B + A @ hB), P @ G + G @ Q - P @ G @ Q, atol=1e-12)
    away = lambda X: ((hA + A @ X - gA) ** 2).sum() + ((hB - X @ B - gB) ** 2).sum()  # noqa: E731  (the same step for any X)
    for X in 1e-3 * np.random.default_rng(0).standard_normal((9, 3, 3)):
        assert away(X) > away(0 * X)
    assert not lora_pro(A, 0 * B, 0 * gA, gB, s, 1e-8)[0].any()  # B = 0, the initial value


def test_lora_fa_saves_no_x_and_projects_the_full_gradient(backend):
    A, B, _, gB, G, s = factors()
    np.testing.assert_allclose(s * A @ lora_fa(A, B, None, gB, s, 0)[1], onto(A) @ G, atol=1e-12)
    model = injected(modules_to_save=["ln_f"]).to(backend)
    before = {path: p.data.copy() for path, p in adapter_parameters(model).items()}
    optimizer = create_lorafa_optimizer(model, lr=0.1)
    layer = model.transformer.h[0].attn.c_attn
    _, saved = layer.forward(layer.weight.data[:, :6])
    assert sum(value is not None for value in saved.values) == 1  # x A
    gradients(model)
    optimizer.step()
    for path, p in adapter_parameters(model).items():
        assert (float(abs(p.data - before[path]).max()) > 0) == path.endswith("lora_B")


REFUSED = {
    "orthogonal, odd": ({"init_lora_weights": "orthogonal", "r": 3}, "the rank must be even, got 3"),
    "VeRA and DoRA": ({"vera": True, "use_dora": True}, "use_dora and VeRA exclude each other"),
    "VeRA with LoRA's alpha": ({"vera": True, "lora_alpha": 16}, "lora_alpha and VeRA exclude each other"),
    "VeRA with LoRA's bias": ({"vera": True, "bias": "lora_only"}, "choose 'none', 'all' or 'vera_only'"),
    "VeRA's key": ({"vera": True, "projection_prng_key": -1}, "projection_prng_key is -1; it must be an integer from 0"),
    "VeRA's dropout": ({"vera": True, "vera_dropout": 1}, "vera_dropout is 1; it must be at least 0 and below 1"),
    "VeRA's start": ({"vera": True, "d_initial": float("nan")}, "d_initial is nan; it must be a number"),
    "VeRA on an embedding": ({"vera": True, "target_modules": ["wte"]}, "VeRA has no way to adapt a layer of type Embedding"),
    "embedding beyond its rank": ({"target_modules": ["wte"], "r": 7}, r"rank 7 is beyond transformer\.wte, which is 11 x 6"),
    "DoRA on an embedding": ({"target_modules": ["wte"], "use_dora": True}, "DoRA has no way to adapt a layer of type Embedding"),
    "PiSSA on an embedding": ({"target_modules": ["wte"], "init_lora_weights": "pissa"}, "is for linear layers; transformer.wte is of"),
    "neither linear nor an embedding": ({"target_modules": ["ln_f"]}, "is not linear, but LayerNorm; only a Linear or an Embedding"),
    "EVA without data": ({"init_lora_weights": "eva", "train_step": None}, "'eva' reads data: pass a train_step to inject"),
    "EVA on too little": (
        {"init_lora_weights": "eva", "r": 6, "train_step": "one token"},
        "shown .*c_attn 1 tokens; rank 6 needs at least 7",
    ),
    "EVA of small rho": ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, "rho is 0.5; it must be at least 1"),
    "EVA, unknown option": ({"init_lora_weights": "eva", "eva_config": {"tau": 0.9}}, "there is no option 'tau'; known: rho, whiten"),
    "LoRA-GA beyond the SVD": (
        {"init_lora_weights": "lora_ga", "r": 4},
        "rank 4 needs 8 singular vectors, .* 6 x 18",
    ),
    "LoRA-GA without backward": ({"init_lora_weights": "lora_ga", "train_step": "one token"}, "train_step has left no gradient for"),
    "LoRA-GA, direction": ({"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "up"}}, "direction is 'up'; choose ArB2r"),
    "options of another": ({"init_lora_weights": "pissa", "eva_config": {"rho": 1}}, "eva_config goes with init_lora_weights='eva', not"),
    "PiSSA beyond the SVD": ({"init_lora_weights": "pissa", "r": 7}, "rank 7 is beyond .*c_attn, which is 6 x 18"),
    "OLoRA by iterations": ({"init_lora_weights": "olora_niter_3"}, "init_lora_weights is 'olora_niter_3'; choose one of True, False"),
    "PiSSA by no iterations": ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights is 'pissa_niter_x'"),
    "DoRA of no kind": ({"use_dora": "both"}, "use_dora is 'both'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_changed(case):
    config, message = REFUSED[case]
    model = gpt2()
    step = {"train_step": lambda: gradients(model)} if "train_step" not in config else {"train_step": config["train_step"]}
    if step["train_step"] == "one token":
        step = {"train_step": lambda: model.forward(IDS[:1], keep=False)}
    with pytest.raises(ValueError, match=message):
        ml.inject(model, config_of(**{key: value for key, value in config.items() if key != "train_step"}), **step)
    assert lora_layers(model) == []
    assert all(p.trainable for _, p in model.parameters())


def test_dora_refuses_a_zero_column():
    model = gpt2()
    model.transformer.h[1].mlp.c_fc.weight.data[:, 3] = 0
    with pytest.raises(ValueError, match="column of the weight is zero"):
        injected(model, use_dora=True)


@pytest.mark.parametrize("create", [create_riemannian_optimizer, create_lora_pro_optimizer])
def test_preconditioning_in_training(create, backend):
    """The loss falls, other parameters take AdamW's step, and a model without A and B is refused."""
    model, plain = (injected(modules_to_save=["ln_f"]).to(backend) for _ in range(2))
    optimizers = create(model, ml.AdamW, lr=1e-2), ml.AdamW(plain.parameters(), lr=1e-2)
    losses = []
    for step in range(12):
        for m, optimizer in zip((model, plain), optimizers, strict=True):
            gradients(m)
            optimizer.step()
        losses.append(float(model.loss(IDS, LABELS, keep=False)[0]))
        if step == 0:
            gains = [dict(m.parameters())["transformer.ln_f.weight"].data for m in (model, plain)]
            assert distance(*gains) == 0
    assert losses[-1] < losses[0] - 0.05
    with pytest.raises(ValueError, match="needs trainable lora_A and lora_B"):
        create(gpt2(), ml.AdamW, lr=1e-2)


def test_lora_plus_refuses_an_invalid_ratio():
    with pytest.raises(ValueError, match="loraplus_lr_ratio must be a positive number, got 0"):
        create_loraplus_optimizer(injected(), ml.AdamW, lr=1e-2, loraplus_lr_ratio=0)
