"""LoRA's family against PEFT, live: gradients here; adapters both ways in test_peft, whose options the methods share."""

import numpy as np
import pytest
from golden.make_adapters import IDS, LABELS, adapted, base, options, quietly
from test_peft import bases, deviation, ours, peft  # noqa: F401  (fixtures)

import minilora as ml
from minilora.lora.layer import adapter_parameters
from minilora.models import BertClassifier

KINDS = ("bert", "gpt2", "llama")


def next_tokens(ids):
    labels = np.full(ids.shape, -100)
    labels[:, :-1] = ids[:, 1:]
    return labels


def our_gradients(model):
    """{path: gradient}, as PEFT has it, of the first golden batch."""
    labels = LABELS[0] if isinstance(model, BertClassifier) else next_tokens(IDS[0])
    model.zero_grad()
    model.loss_backward(model.loss(IDS[0].ravel(), labels.ravel(), offsets=[0, 7, 14])[1])
    return {path: p.grad.T for path, p in adapter_parameters(model).items()}


def their_gradients(model):
    """The same, of a PEFT model."""
    import torch

    ids, labels = torch.from_numpy(IDS[0]), torch.from_numpy(LABELS[0])
    model.zero_grad()
    out = quietly(model, input_ids=ids).logits
    if out.ndim == 3:
        out, labels = out[:, :-1].reshape(-1, out.shape[-1]), ids[:, 1:].reshape(-1)
    torch.nn.functional.cross_entropy(out, labels).backward()
    names = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    names = {name.replace(".default.weight", "").replace(".default", ""): p for name, p in names.items()}
    return {name: p.grad.numpy() for name, p in names.items() if "modules_to_save" not in name}


METHODS = {
    "DoRA": {"use_dora": True},
    "DoRA, rsLoRA": {"use_dora": True, "use_rslora": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_pefts(kind, method, peft, bases, tmp_path):  # noqa: F811
    theirs = adapted(kind, options(kind)["names"] | METHODS[method])
    quietly(theirs.save_pretrained, tmp_path)
    model = ours(bases / kind)
    ml.load_adapter(model, tmp_path)
    found, wanted = our_gradients(model), their_gradients(theirs)
    assert found.keys() == wanted.keys()
    for path, g in wanted.items():
        assert deviation(found[path], g, f"gradient, {kind}, {method}, {path}") < 1e-5


def test_exact_dora_is_pefts_forward_and_another_gradient(peft, bases, tmp_path):  # noqa: F811
    import json

    model = ours(bases / "llama")
    fields = options("llama")["names"]
    ml.inject(model, ml.LoraConfig(**fields, use_dora="exact"), rng=0)
    rng = np.random.default_rng(3)
    for p in adapter_parameters(model).values():
        p.data = (p.data + 0.2 * rng.standard_normal(p.data.shape)).astype(np.float32)
    ml.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    theirs = quietly(peft.PeftModel.from_pretrained, base("llama"), tmp_path, is_trainable=True).eval()
    found, wanted = our_gradients(model), their_gradients(theirs)
    last = "model.layers.1.mlp.up_proj"
    assert deviation(found[f"{last}.lora_magnitude_vector"], wanted[f"{last}.lora_magnitude_vector"], "exact DoRA, dm") < 1e-5
    assert deviation(found[f"{last}.lora_B"], wanted[f"{last}.lora_B"], "exact DoRA, dB") > 1e-2
