"""LoRA variants against PEFT, live: gradients here; adapters in both directions in test_peft, which shares the cases."""

import json

import numpy as np
import pytest
from golden.make_adapters import IDS, LABELS, adapted, base, logits, losses, options, quietly
from safetensors.numpy import load_file
from test_peft import bases, deviation, minilora_model, our_logits, our_losses  # noqa: F401  (fixtures)
from versions import skip_before

import minilora as ml
from examples.preconditioned import create_lorafa_optimizer, create_riemannian_optimizer
from minilora.lora import adapter_parameters, lora_layers
from minilora.lora.variants.vera import VeraConfig
from minilora.models import BertClassifier
from minilora.optim.optimizers import create_loraplus_optimizer

KINDS = ("bert", "gpt2", "llama")


def next_tokens(ids):
    labels = np.full(ids.shape, -100)
    labels[:, :-1] = ids[:, 1:]
    return labels


def our_backward(model):
    """Forward and backward on the first golden batch."""
    labels = LABELS[0] if isinstance(model, BertClassifier) else next_tokens(IDS[0])
    model.zero_grad()
    model.loss_backward(model.loss(IDS[0].ravel(), labels.ravel(), offsets=[0, 7, 14])[1])


def our_gradients(model):
    """{path: gradient} under PEFT's names."""
    our_backward(model)
    return {path: p.grad.T.copy() for path, p in adapter_parameters(model).items()}


def their_backward(model):
    """Forward and backward of a model of transformers or PEFT on the same batch."""
    import torch

    ids, labels = torch.from_numpy(IDS[0]), torch.from_numpy(LABELS[0])
    model.zero_grad()
    out = quietly(model, input_ids=ids).logits
    if out.ndim == 3:
        out, labels = out[:, :-1].reshape(-1, out.shape[-1]), ids[:, 1:].reshape(-1)
    torch.nn.functional.cross_entropy(out, labels).backward()


def their_gradients(model):
    their_backward(model)
    names = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    names = {name.replace(".default.weight", "").replace(".default", ""): p for name, p in names.items()}
    return {name: p.grad.numpy() for name, p in names.items() if "modules_to_save" not in name}


METHODS = {
    "DoRA": {"use_dora": True},
    "DoRA, rsLoRA": {"use_dora": True, "use_rslora": True},
    "embedding": {},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_match_peft(kind, method, peft, bases, tmp_path):  # noqa: F811
    theirs = adapted(kind, options(kind)["embedding adapted" if method == "embedding" else "names"] | METHODS[method])
    quietly(theirs.save_pretrained, tmp_path)
    model = minilora_model(bases / kind)
    ml.load_adapter(model, tmp_path)
    found, expected = our_gradients(model), their_gradients(theirs)
    assert found.keys() == expected.keys()
    for path, g in expected.items():
        if kind == "bert" and path.endswith("embedding_A"):
            found[path][:, 0] = 0  # in transformers, 0 is padding, which gets no gradient; here nothing is padded
        assert deviation(found[path], g, f"gradient, {kind}, {method}, {path}") < 1e-5


def test_exact_dora_has_pefts_forward_and_another_gradient(peft, bases, tmp_path):  # noqa: F811
    model = minilora_model(bases / "llama")
    fields = options("llama")["names"]
    ml.inject(model, ml.LoraConfig(**fields, use_dora="exact"), rng=0)
    rng = np.random.default_rng(3)
    for p in adapter_parameters(model).values():
        p.data = (p.data + 0.2 * rng.standard_normal(p.data.shape)).astype(np.float32)
    ml.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    theirs = quietly(peft.PeftModel.from_pretrained, base("llama"), tmp_path, is_trainable=True).eval()
    found, expected = our_gradients(model), their_gradients(theirs)
    last = "model.layers.1.mlp.up_proj"
    assert deviation(found[f"{last}.lora_magnitude_vector"], expected[f"{last}.lora_magnitude_vector"], "exact DoRA, dm") < 1e-5
    assert deviation(found[f"{last}.lora_B"], expected[f"{last}.lora_B"], "exact DoRA, dB") > 1e-2


# -- initial values ----------------------------------------------------------------------------------------------------------


def products(model):
    """{path: scaling A B}, (in, out), of a model of either library; independent of the signs of singular vectors."""
    if isinstance(model, ml.Layer):
        return {path: layer.scaling * layer.lora_A.data @ layer.lora_B.data for path, layer in lora_layers(model)}
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            A, B = (getattr(layer, f"lora_{ab}")["default"].weight.detach().numpy().T for ab in "AB")
            found[name.removeprefix("base_model.model.")] = layer.scaling["default"] * A @ B
    return found


@pytest.mark.parametrize(
    ("kind", "init"),
    [*((kind, init) for kind in KINDS for init in ("pissa", "pissa_niter_400")), ("bert", "olora"), ("llama", "olora")],
)  # PEFT's OLoRA ignores GPT-2's orientation
def test_initialisers_that_change_the_weight(kind, init, peft, bases, tmp_path):  # noqa: F811
    fields = options(kind)["names"] | {"init_lora_weights": init, "r": 3, "lora_alpha": 4, "use_rslora": True}
    theirs = adapted(kind, fields, seed=None)
    model = minilora_model(bases / kind)
    untouched = our_logits(model)
    ml.inject(model, ml.LoraConfig(**fields), rng=0)
    found, expected = products(model), products(theirs)
    assert found.keys() == expected.keys()
    for path, change in expected.items():
        assert deviation(found[path], change, f"{init}, {kind}, {path}") < (1e-4 if "niter" not in init else 1e-3)
    assert deviation(our_logits(model), logits(theirs), f"{init}, {kind}, at the start") < 1e-5
    if "niter" not in init:  # PEFT draws another random subspace
        expected = losses(theirs)
        assert deviation(our_losses(model), expected, f"{init}, {kind}, 30 losses") < 1e-4

    ml.save_adapter(model, tmp_path)
    result = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (result["r"], result["init_lora_weights"]) == (6, True)
    again = quietly(peft.PeftModel.from_pretrained, base(kind), tmp_path).eval()
    assert deviation(our_logits(model), logits(again), f"{init}, {kind}, as a LoRA of rank 2 r") < 1e-5
    with ml.disabled(model):
        np.testing.assert_array_equal(our_logits(model), untouched)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "ga", [{}, {"direction": "A2rBr", "scale": "weight_svd"}, {"direction": "ArBr", "scale": "gd_scale"}, {"scale": "unit"}], ids=str
)
def test_lora_ga(kind, ga, peft, bases):  # noqa: F811
    """Singular vectors are compared up to their sign, which is arbitrary."""
    if kind == "gpt2" and ga.get("scale", "stable") == "stable":
        ga = ga | {"scale": "unit"}  # PEFT takes the rows of a Conv1D for outputs here
    fields = options(kind)["names"] | {"init_lora_weights": "lora_ga", "r": 3, "lora_ga_config": ga, "layers_to_transform": 0}
    config = quietly(peft.LoraConfig, **fields | {"lora_ga_config": peft.LoraGAConfig(**ga)})
    theirs = base(kind)
    quietly(peft.tuners.lora.preprocess_loraga, theirs, config, lambda: their_backward(theirs))
    theirs = quietly(peft.get_peft_model, theirs, config).eval()
    model = minilora_model(bases / kind)
    ml.inject(model, ml.LoraConfig(**fields), rng=0, train_step=lambda: our_backward(model))
    assert deviation(our_logits(model), logits(theirs), f"LoRA-GA, {kind}, at the start") < 1e-5
    expected = {name: p.detach().numpy() for name, p in theirs.named_parameters() if ".lora_" in name}
    for path, p in adapter_parameters(model).items():
        value = expected[f"base_model.model.{path}.default.weight"].T
        rough = 1e-2 if ga.get("scale") == "weight_svd" else 1e-3  # PEFT's singular value of W depends on a random subspace
        assert deviation(np.abs(p.data), np.abs(value), f"LoRA-GA, {kind}, {path}") < rough


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eva", [{"rho": 1.0}, {"rho": 2.0}, {"rho": 2.0, "adjust_scaling_factors": False}], ids=str)
def test_eva(kind, eva, peft, bases, tmp_path):  # noqa: F811
    """Ranks equal PEFT's; directions agree to the precision of its incremental SVD."""
    import torch

    fields = options(kind)["names"] | {"init_lora_weights": "eva", "r": 3, "eva_config": eva}
    theirs = quietly(peft.get_peft_model, base(kind), quietly(peft.LoraConfig, **fields | {"eva_config": peft.EvaConfig(tau=1, **eva)}))
    data = [{"input_ids": torch.from_numpy(IDS[0]), "attention_mask": torch.ones(IDS[0].shape, dtype=torch.int64)}]
    quietly(peft.initialize_lora_eva_weights, theirs, data, show_progress_bar=False)
    model = minilora_model(bases / kind)
    found = ml.inject(model, ml.LoraConfig(**fields), rng=0, train_step=lambda: our_logits(model))
    expected = {name.removeprefix("base_model.model."): m for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(found) == set(expected)
    for path, layer in lora_layers(model):
        A = expected[path].lora_A["default"].weight.detach().numpy()
        assert A.shape == (layer.r, layer.in_features), path
        assert layer.scaling == pytest.approx(expected[path].scaling["default"])
        cosines = np.linalg.svd(A @ layer.lora_A.data, compute_uv=False)
        assert cosines.min() > 0.999, path
        assert np.abs(np.diag(A @ layer.lora_A.data)).min() > 0.99, path
    ml.save_adapter(model, tmp_path)
    again = quietly(peft.PeftModel.from_pretrained, base(kind), tmp_path)
    assert {name.removeprefix("base_model.model.") for name, m in again.named_modules() if hasattr(m, "lora_A")} == set(found)


# -- optimizers --------------------------------------------------------------------------------------------------------------


def lorafa(optimizers, model):
    """PEFT's, with a negligible eps: it adds eps before the bias correction, and torch's AdamW after it."""
    optimizer = optimizers.create_lorafa_optimizer(model, 3, 8, 1e-2)
    optimizer.param_groups[0]["eps"] = 1e-12
    return optimizer


OPTIMIZERS = {
    "LoRA+": (
        lambda m: create_loraplus_optimizer(m, ml.AdamW, lr=3e-3, loraplus_lr_ratio=5, loraplus_weight_decay=0.1),
        lambda o, m, adamw: o.create_loraplus_optimizer(m, adamw, lr=3e-3, loraplus_lr_ratio=5, loraplus_weight_decay=0.1),
    ),
    "Riemannian": (
        lambda m: create_riemannian_optimizer(m, ml.AdamW, lr=1e-2, weight_decay=0.1),
        lambda o, m, adamw: o.create_riemannian_optimizer(m, adamw, lr=1e-2, weight_decay=0.1),
    ),
    "LoRA-FA": (lambda m: create_lorafa_optimizer(m, 1e-2, eps=1e-12), lambda o, m, adamw: lorafa(o, m)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_thirty_steps_match_peft(kind, method, peft, bases, tmp_path, monkeypatch):  # noqa: F811
    import torch

    if method == "Riemannian":
        skip_before(peft, (0, 21), "has no Riemannian preconditioning")
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)  # otherwise it computes products in half precision
    theirs = adapted(kind, options(kind)["all linear layers"] | {"bias": "all", "use_dora": method == "LoRA+"}, seed=None)
    quietly(theirs.save_pretrained, tmp_path)
    model = minilora_model(bases / kind)
    ml.load_adapter(model, tmp_path)
    ours_of, theirs_of = OPTIMIZERS[method]
    expected = losses(theirs, quietly(theirs_of, peft.optimizers, theirs, torch.optim.AdamW))
    assert deviation(our_losses(model, ours_of(model)), expected, f"30 losses, {kind}, {method}") < 1e-4
    assert np.ptp(expected) > 0.1 * expected[0]


# -- VeRA --------------------------------------------------------------------------------------------------------------------


def vera_options(kind):
    usual = {key: options(kind)["names"][key] for key in ("target_modules", "task_type", "fan_in_fan_out")} | {"r": 5}
    norm = options(kind)["a norm whole"]["modules_to_save"]
    return {
        "names": usual,
        "all linear layers, random projections": usual
        | {"target_modules": "all-linear", "save_projection": False, "projection_prng_key": 7},
        "biases, a norm, one layer": usual | {"bias": "vera_only", "modules_to_save": norm, "layers_to_transform": [1]},
        "all biases, not zero": usual | {"bias": "all", "init_weights": False, "d_initial": 0.5, "r": 40},
    }


def vera_of_peft(kind, what, peft):
    import torch

    torch.manual_seed(1)
    model = quietly(peft.get_peft_model, base(kind), quietly(peft.VeraConfig, **vera_options(kind)[what]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize(("kind", "what"), [(kind, what) for kind in KINDS for what in vera_options(kind)])
def test_vera_in_both_directions(kind, what, peft, bases, tmp_path):  # noqa: F811
    if "bias" in vera_options(kind)[what]:
        skip_before(peft, (0, 21), "does not save all biases of VeRA")
    theirs = vera_of_peft(kind, what, peft)
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    model = minilora_model(bases / kind)
    ml.load_adapter(model, tmp_path / "theirs")
    assert deviation(our_logits(model), logits(theirs), f"VeRA, PEFT -> here, {kind}, {what}") < 1e-5
    found, expected = our_gradients(model), their_gradients(theirs)
    for path, g in found.items():
        assert deviation(g, expected[path], f"VeRA, gradient, {kind}, {what}, {path}") < 1e-5

    rng = np.random.default_rng(2)
    for _, p in model.parameters():
        if p.trainable:
            p.data = (p.data + 0.1 * rng.standard_normal(p.data.shape)).astype(np.float32)
    ml.save_adapter(model, tmp_path / "ours")
    again = quietly(peft.PeftModel.from_pretrained, base(kind), tmp_path / "ours").eval()
    assert deviation(our_logits(model), logits(again), f"VeRA, here -> PEFT, {kind}, {what}") < 1e-5
    before, after = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert after.keys() == {key for key in before if "original_module" not in key and "modules_to_save" not in key}
    result = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    assert result[1].keys() <= result[0].keys()


def test_the_matrices_of_vera_match_peft_bit_for_bit(peft, bases):  # noqa: F811
    theirs = vera_of_peft("llama", "all linear layers, random projections", peft)
    model = minilora_model(bases / "llama")
    ml.inject(model, VeraConfig(**vera_options("llama")["all linear layers, random projections"]))
    shared = lora_layers(model)[0][1].projections
    np.testing.assert_array_equal(shared.A.T, theirs.base_model.vera_A["default"].numpy())
    np.testing.assert_array_equal(shared.B.T, theirs.base_model.vera_B["default"].numpy())


def test_every_field_of_the_configuration_of_vera(peft):
    import dataclasses

    of_both = {field.name for field in dataclasses.fields(peft.PeftConfig)}
    theirs = {field.name for field in dataclasses.fields(peft.VeraConfig)} - of_both
    known = {field.name for field in dataclasses.fields(VeraConfig)}
    assert theirs <= known - set(VeraConfig.not_in_file)
    for name in theirs - {"target_modules"}:
        assert getattr(peft.VeraConfig(), name) == getattr(VeraConfig(), name), name
