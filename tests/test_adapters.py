"""Bottleneck adapters and partial tuning: trainable parameters, initial values, file contents; a small torch model is the oracle."""

import json
from itertools import pairwise

import numpy as np
import pytest
from tiny import IDS, tiny_model

import minilora as ml
from minilora.adapters import METHODS, bottlenecks
from minilora.adapters.bottleneck import truncated_normal
from minilora.formats.tensors import map_tensors
from minilora.lora import adaptation

OFFSETS = [0, 3, 4, 7]


def loss(model, keep=True):
    labels = np.array([1, 0, 2]) if isinstance(model, ml.BertClassifier) else np.array([5, 2, 10, -100, 7, 7, 1])
    return model.loss(IDS, labels, OFFSETS, keep=keep)


def logits(model):
    return ml.to_numpy(model.forward(IDS, keep=False, offsets=OFFSETS)[0])


def trained(model, steps=3, lr=0.05):
    optimizer = ml.AdamW(model.parameters(), lr)
    for _ in range(steps):
        model.loss_backward(loss(model)[1])
        optimizer.step()
        optimizer.zero_grad()
    return model


def injected(kind, method, dtype="float64", **options):
    model = tiny_model(kind, dtype)
    ml.inject(model, METHODS[method](**options), rng=1)
    return model


KINDS = ["bert", "gpt2", "llama", "tied"]
CASES = [(kind, method) for kind in KINDS for method in METHODS]
CASES = [(k, m) for k, m in CASES if not (m == "head" and k in ("gpt2", "tied")) and not (m == "bitfit" and k in ("llama", "tied"))]


@pytest.mark.parametrize("kind", KINDS)
def test_each_block_has_two_bottlenecks_of_the_papers_size(kind):
    n, d = 6, 2
    model = tiny_model(kind)
    head = {"classifier.weight", "classifier.bias"} if kind == "bert" else set()
    before = {path: p.data.size for path, p in model.parameters()}
    paths = ml.inject(model, ml.BottleneckConfig(reduction_factor=n / d), rng=0)
    assert len(paths) == 2 * 2 == len(bottlenecks(model))
    new = {path: p for path, p in model.parameters() if path not in before}
    assert sum(p.data.size for p in new.values()) == 4 * (2 * n * d + d + n)
    norms = {path for path in before if "norm" in path.lower() or "ln_" in path}
    assert {path for path, p in model.parameters() if p.trainable} == new.keys() | norms | head


@pytest.mark.parametrize(
    ("kind", "method", "expected"),
    [
        ("bert", "head", lambda path: path.startswith("classifier.")),
        ("bert", "layer-norm", lambda path: "LayerNorm" in path or path.startswith("classifier.")),
        ("bert", "bitfit", lambda path: path.endswith("bias") or path.startswith("classifier.")),
        ("gpt2", "bitfit", lambda path: path.endswith("bias")),
        ("gpt2", "layer-norm", lambda path: "ln_" in path),
        ("llama", "head", lambda path: path == "lm_head.weight"),
        ("llama", "layer-norm", lambda path: "norm" in path),
    ],
)
def test_trainable_parameters_of_the_partial_methods(kind, method, expected):
    model = injected(kind, method)
    assert {path for path, p in model.parameters() if p.trainable} == {path for path, _ in model.parameters() if expected(path)}
    model.loss_backward(loss(model)[1])
    assert {path for path, p in model.parameters() if p.grad is not None} == {path for path, p in model.parameters() if p.trainable}


def test_a_fresh_bottleneck_stays_close_to_the_base_model():
    """The difference is of the order of init_std^2, and not zero: with D = U = 0 the gradients would vanish."""
    far = [np.abs(logits(injected("bert", "bottleneck", init_std=std)) - logits(tiny_model("bert"))).max() for std in (1e-2, 1e-3)]
    assert 0 < far[1] < far[0] < 1e-3
    assert far[0] / far[1] == pytest.approx(100, rel=0.3)


def test_initial_values_are_a_normal_distribution_truncated_at_two_deviations():
    x = truncated_normal(np.random.default_rng(0), (100, 300), 0.01)
    assert 0.0199 < np.abs(x).max() <= 0.02
    assert x.std() == pytest.approx(0.01 * 0.8796, rel=0.01)  # standard deviation of a normal distribution truncated at two


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_a_disabled_adapter_gives_the_base_model_bit_for_bit(kind, method, backend):
    model = trained(injected(kind, method).to(backend))
    before, expected = logits(model), logits(tiny_model(kind).to(backend))
    with ml.disabled(model):
        np.testing.assert_array_equal(logits(model), expected)
    np.testing.assert_array_equal(logits(model), before)
    assert np.abs(before - expected).max() > 1e-3


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_save_and_load_give_the_same_model(kind, method, backend, tmp_path):
    model = trained(injected(kind, method, "float32").to(backend))
    size = ml.save_adapter(model, tmp_path)
    again = tiny_model(kind, "float32").to(backend)
    assert ml.load_adapter(again, tmp_path) == adaptation(model).config
    np.testing.assert_array_equal(logits(again), logits(model))
    count = sum(p.data.size for _, p in model.parameters() if p.trainable)
    assert 4 * count < size < 4 * count + 6000
    with ml.disabled(again):
        np.testing.assert_array_equal(logits(again), logits(tiny_model(kind, "float32").to(backend)))
    assert trained(again)  # training can continue


def test_the_orientation_in_the_file_is_that_of_the_checkpoint(tmp_path):
    for kind, shape in (("bert", (2, 6)), ("gpt2", (6, 2))):  # PyTorch's Linear keeps (out, in), GPT-2's Conv1D (in, out)
        model = injected(kind, "bottleneck", reduction_factor=3)
        ml.save_adapter(model, tmp_path / kind)
        tensors, _ = map_tensors(tmp_path / kind / "adapter_model.safetensors")
        assert {value.shape for key, value in tensors.items() if key.endswith("down.weight")} == {shape}
        assert tensors.keys() == {path for path, p in model.parameters() if p.trainable}
    config = json.loads((tmp_path / "bert" / "adapter_config.json").read_text())
    assert config["peft_type"] == "BOTTLENECK"
    assert config["reduction_factor"] == 3


def test_replicas_share_weights_and_sum_gradients():
    """The training loop relies on replicas of an adapted model."""
    model = injected("bert", "bottleneck")
    replica = model.replica()
    replica.loss_backward(loss(replica)[1])
    model.loss_backward(loss(model)[1])
    for (path, p), (_, q) in zip(model.parameters(), replica.parameters(), strict=True):
        assert p.data is q.data, path
        if p.trainable:
            np.testing.assert_array_equal(p.grad, q.grad)


def test_partial_tuning_merges_into_a_model_and_bottlenecks_do_not(tmp_path):
    model = trained(injected("gpt2", "bitfit", "float32"))
    ml.save_model(model, tmp_path / "m")
    np.testing.assert_array_equal(logits(ml.load_model(tmp_path / "m", "numpy")), logits(model))
    with pytest.raises(ValueError, match="has a bottleneck adapter, which cannot be merged into a weight"):
        ml.save_model(injected("gpt2", "bottleneck"), tmp_path / "n")


# -- live comparison with transformers ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # warnings of transformers
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_match_torch(kind, tmp_path):
    """transformers' model with h + f(h D + b1) U + b2 added to its projections by hooks, a direct implementation of the paper."""
    torch = pytest.importorskip("torch", reason="the oracle torch is not installed: pip install 'minilora[oracle]'")
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'")
    name, ends = {
        "bert": ("BertForSequenceClassification", ("output.dense",)),
        "gpt2": ("GPT2LMHeadModel", ("c_proj",)),
    }.get(kind, ("LlamaForCausalLM", ("o_proj", "down_proj")))
    ours = tiny_model(kind, "float32")
    for _, p in ours.parameters():
        p.data = p.data + 0.3 * np.random.default_rng(p.data.size).standard_normal(p.data.shape).astype("float32")
    ml.save_model(ours, tmp_path)
    theirs = getattr(transformers, name).from_pretrained(tmp_path, dtype=torch.float32).double().eval()
    ours = ml.load_model(tmp_path, "numpy", "float64")
    ml.inject(ours, ml.BottleneckConfig(reduction_factor=3, non_linearity="gelu_new" if kind == "gpt2" else "silu", init_std=0.4), rng=0)
    f = torch.nn.functional.silu if kind != "gpt2" else lambda x: torch.nn.functional.gelu(x, approximate="tanh")

    hooked = {}
    places = dict(bottlenecks(ours))
    for path, module in theirs.named_modules():
        if path.endswith(ends):
            layer = places.pop(path)
            layer.down.bias.data[...], layer.up.bias.data[...] = 0.2, -0.1
            ends_of = [(end, which) for end in ("down", "up") for which in ("weight", "bias")]
            parts = {f"{path}.{end}.{which}": getattr(getattr(layer, end), which).data for end, which in ends_of}
            tensors = {key: torch.tensor(value, requires_grad=True) for key, value in parts.items()}
            hooked |= tensors
            D, b1, U, b2 = tensors.values()
            module.register_forward_hook(lambda m, x, h, D=D, b1=b1, U=U, b2=b2: h + f(h @ D + b1) @ U + b2)
    assert not places
    rows = [theirs(torch.tensor(IDS[None, a:b])).logits for a, b in pairwise(OFFSETS)]
    theirs_y = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])
    y, saved = ours.forward(IDS, offsets=OFFSETS)
    within = 1e-9 if kind in ("bert", "gpt2") else 1e-5  # transformers computes norms and angles of Llama in float32
    np.testing.assert_allclose(y, theirs_y.detach().numpy(), rtol=within, atol=within)
    dy = np.random.default_rng(0).standard_normal(y.shape)
    ours.backward(dy, saved)
    (theirs_y * torch.tensor(dy)).sum().backward()
    expected = {path: p.grad.numpy() for path, p in theirs.named_parameters() if p.grad is not None}
    for path, p in ours.parameters():
        if p.trainable:
            g = hooked[path].grad.numpy() if path in hooked else expected[path].T
            np.testing.assert_allclose(p.grad, g, rtol=within, atol=within * np.abs(g).max(), err_msg=path)


# -- refused ------------------------------------------------------------------------------------------------------------------

REFUSED = {
    "factor": ("bert", lambda: ml.BottleneckConfig(reduction_factor=0.5), "reduction_factor must be a number of at least 1"),
    "std": ("bert", lambda: ml.BottleneckConfig(init_std=-1), "init_std must be a number of at least 0"),
    "act": ("bert", lambda: ml.BottleneckConfig(non_linearity="swish"), "non_linearity is 'swish'; choose relu"),
    "kind": ("bert", lambda: ml.PartialConfig(train=["biases"]), "train names 'biases'; choose from bias, norm, head"),
    "text": ("bert", lambda: ml.PartialConfig(train="bias"), "train is 'bias'; it must be a list"),
    "target": ("bert", lambda: ml.BottleneckConfig(target_modules=["output.dens"]), "no linear layer is called 'output.dens'"),
    "tied": ("gpt2", lambda: ml.PartialConfig(), "lm_head shares its weight with the embedding"),
    "no bias": ("llama", lambda: ml.PartialConfig(train=["bias"]), "this model has no bias"),
    "nothing": ("gpt2", lambda: ml.PartialConfig(train=[]), "nothing is left to train"),
    "module": ("bert", lambda: ml.PartialConfig(modules_to_save=["poler"]), "no module is called 'poler'; did you mean"),
    "both": (
        "bert",
        lambda: ml.BottleneckConfig(target_modules=["pooler.dense"], modules_to_save=["bert.pooler"]),
        "no linear layer is left",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_changed(case):
    kind, config, message = REFUSED[case]
    model = tiny_model(kind)
    with pytest.raises(ValueError, match=message):
        ml.inject(model, config())
    assert bottlenecks(model) == []
    assert all(p.trainable for _, p in model.parameters())


def test_a_tree_without_known_names_lists_the_names_to_pass():
    model = ml.MLP([3, 4, 2], rng=0)
    with pytest.raises(ValueError, match=r"nothing here is called output\.dense or c_proj"):
        ml.inject(model, ml.BottleneckConfig(train=[]))
    assert ml.inject(model, ml.BottleneckConfig(train=[], target_modules="all-linear")) == ["layers.0", "layers.2"]


@pytest.mark.parametrize("first", [ml.LoraConfig(r=2), ml.BottleneckConfig(), ml.PartialConfig(train=["norm"])])
@pytest.mark.parametrize("second", [ml.LoraConfig(r=2), ml.BottleneckConfig(), ml.PartialConfig(train=["norm"])])
def test_injecting_twice_is_refused(first, second):
    model = tiny_model("bert")
    ml.inject(model, first)
    with pytest.raises(ValueError, match="already; load the base model again"):
        ml.inject(model, second)


BAD_FOLDERS = {
    "another base": (lambda d: None, "made for a base model with other weights"),
    "a field": (lambda d: change(d, "dropout", 0.1), "dropout=0.1 is not supported"),
    "a value": (lambda d: change(d, "reduction_factor", "many"), "reduction_factor must be a number"),
    "another size": (lambda d: change(d, "reduction_factor", 2), "has shape"),
    "targets": (lambda d: change(d, "target_modules", ["nowhere"]), "does not fit this model: target_modules"),
    "one more": (lambda d: change(d, "train", []), "which the model has no place for"),
    "kind": (lambda d: change(d, "peft_type", "PREFIX"), "peft_type is 'PREFIX'; supported: LORA, VERA, BOTTLENECK, PARTIAL"),
}


def change(folder, key, value):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_leave_the_model_unchanged(case, tmp_path):
    damage, message = BAD_FOLDERS[case]
    ml.save_adapter(injected("bert", "bottleneck"), tmp_path)
    damage(tmp_path)
    model = tiny_model("bert")
    if case == "another base":
        model.bert.pooler.dense.weight.data += 1
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        ml.load_adapter(model, tmp_path)
    np.testing.assert_array_equal(logits(model), before)
    assert adaptation(model).config is None


def test_parameters_that_the_configuration_does_not_name_are_not_dropped_silently(tmp_path):
    model = injected("bert", "bottleneck")
    model.bert.pooler.unfreeze()
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.weight is trainable, but the configuration does not name it"):
        ml.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
