"""Llama and Qwen2 against transformers and PEFT, rotary positions, and generation with a cache."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from versions import skip_before

import minilora as ml
from minilora import functional as F
from minilora import kernels as K
from minilora.formats.gguf import in_halves
from minilora.lora import lora_layers
from minilora.models import GPT2, GPT2Config, KVCache, Llama, LlamaConfig

with safe_open(__file__.replace("test_llama.py", "golden/llama.safetensors"), "np") as file:
    ABOUT = json.loads(file.metadata()["about"])
    GOLDEN = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
CASES = list(ABOUT["configs"])
OFFSETS = [0, 5, 6, 13]
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


def case(name):
    """{key: array} of a golden case."""
    return {key.partition("|")[2]: value for key, value in GOLDEN.items() if key.startswith(f"{name}|")}


def by_prefix(golden, prefix):
    return {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}


def assign(model, tensors, dtype):
    """Set parameters from a state dict, transposing (out, in) to (in, out). Every tensor must find its parameter."""
    parameters = dict(model.parameters())
    for path, value in tensors.items():
        transposed = value.T if value.ndim == 2 and not path.endswith("embed_tokens.weight") else value
        assert parameters[path].data.shape == transposed.shape, path
        parameters[path].data = transposed.astype(dtype)


def adapted(name, golden, config, dtype="float64"):
    """Our model with the weights and the adapters of a case."""
    model = Llama(LlamaConfig.from_json(config), rng=0, dtype=dtype)
    base = by_prefix(golden, "base:")
    assert {path for path, _ in model.parameters()} == base.keys()  # minilora's paths equal those of the checkpoint
    assign(model, base, dtype)
    targets = [path.rpartition(".")[0] for path in by_prefix(golden, "lora:")] if "adapted head" in name else "all-linear"
    ml.inject(model, ml.LoraConfig(r=3, lora_alpha=5, target_modules=targets), rng=0)
    lora = by_prefix(golden, "lora:")
    assert {path for path, p in model.parameters() if p.trainable} == lora.keys()
    assign(model, lora, dtype)
    return model


def deviations(model, golden, backend):
    """{name: largest deviation relative to the largest value} of logits, loss and the gradients of all adapters."""
    model.to(backend)
    expected = {"logits": golden["logits"], "loss": golden["loss"][0], **by_prefix(golden, "grad:")}
    logits, _ = model.forward(golden["ids"], keep=False, offsets=OFFSETS)
    loss, saved = model.loss(golden["ids"], golden["labels"], OFFSETS)
    model.loss_backward(saved)
    found = {"logits": logits, "loss": loss, **{path: p.grad.T for path, p in model.parameters() if p.trainable}}
    assert found.keys() == expected.keys()
    return {what: float(abs(ml.to_numpy(found[what]) - e).max() / abs(e).max()) for what, e in expected.items()}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_golden(name, dtype, backend):
    golden = case(name)
    found = deviations(adapted(name, golden, ABOUT["configs"][name], dtype), golden, backend)
    worst = max(found, key=found.get)
    assert found[worst] < TOLERANCE[dtype], f"{worst}: {found[worst]:.1e}"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_live(name):
    """The installed oracles: in float64, and in float32 as transformers computes it."""
    for module in ("torch", "transformers", "peft"):
        found = pytest.importorskip(module, reason=f"{module} is not installed: pip install 'minilora[oracle]'")
    if "adapted head" in name:
        skip_before(found, (0, 20), "warns of a tied layer that is adapted")
    from golden import make_llama

    golden = {key: value.numpy() for key, value in make_llama.tensors(name).items()}
    config = make_llama.base_model(name).config.to_dict()
    found = deviations(adapted(name, golden, config), golden, "numpy")
    assert max(found.values()) < 1e-10, found

    golden |= {key: value.numpy() for key, value in make_llama.run(make_llama.adapted_model(name, exact=False).float(), name).items()}
    found = deviations(adapted(name, golden, config, "float32"), golden, "numpy")
    assert max(found.values()) < 1e-5, found


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_config_that_is_written(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'minilora[oracle]'")
    raw = ABOUT["configs"][name]
    config = LlamaConfig.from_json(raw)
    theirs = transformers.AutoConfig.for_model(**config.to_json()).to_dict()
    apart = {"architectures", "dtype", "id2label", "initializer_range", "transformers_version"}
    unlike = [key for key in raw.keys() - apart if theirs[key] != raw[key]]
    assert unlike == []
    assert theirs["architectures"] == [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[raw["model_type"]]]
    assert LlamaConfig.from_json(theirs) == config == LlamaConfig.from_json(config.to_json())


# -- saved and computed values --------------------------------------------------------------------------------------------


def small(tied=False, **options):
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 2, "max_position_embeddings": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    return LlamaConfig(**{**sizes, **heads, **options})


IDS = np.array([1, 5, 2, 10, 0, 7, 7])
BOUNDS = [0, 4, 7]
LABELS = np.array([5, 2, 10, -100, 7, 7, -100])


def with_lora(model, targets="all-linear"):
    """The model with adapters whose B is not zero."""
    ml.inject(model, ml.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), rng=0)
    return model


ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("alone", ADAPTED)
def test_one_trainable_adapter_gets_the_same_gradient_as_among_all(alone, monkeypatch):
    """Frozen adapters around it are neither computed nor saved, and backward stops at its block."""
    model = with_lora(Llama(small(), rng=0, dtype="float64"))
    model.loss_backward(model.loss(IDS, LABELS, BOUNDS)[1])
    (path,) = (path for path, _ in lora_layers(model) if ".1." in path and path.endswith(alone))
    expected = {f"{path}.lora_{ab}": dict(model.parameters())[f"{path}.lora_{ab}"].grad for ab in "AB"}

    model.freeze()
    for name, p in model.parameters():
        p.trainable = name in expected
    monkeypatch.setattr(model.model.layers[0], "backward", None)
    needs = []
    plain = K.attention_backward
    monkeypatch.setattr(K, "attention_backward", lambda *args: needs.append(args[8]) or plain(*args))
    model.loss_backward(model.loss(IDS, LABELS, BOUNDS)[1])
    for name, p in model.parameters():
        assert (p.grad is None) == (name not in expected)
    for name, grad in expected.items():
        np.testing.assert_allclose(dict(model.parameters())[name].grad, grad, rtol=1e-12)
    assert needs == [{f"d{alone[0]}"}] if alone[0] in "qkv" else needs == []


@pytest.mark.parametrize("labels", [LABELS, np.array([5, 2, 10, 0, 7, 7, 1])], ids=["some rows", "all rows"])
@pytest.mark.parametrize("kind", ["tied", "free", "head only", "adapted head", "adapted head only"])
def test_gradients_of_the_loss_match_those_of_the_logits(kind, labels, on, backend):
    """loss / loss_backward, which never hold the logits, against forward / cross_entropy / backward; half of a larger batch."""

    def build():
        model = Llama(small(tied=kind == "tied"), rng=0, dtype="float64")
        if kind.startswith("adapted head"):
            with_lora(model, ["lm_head"] if kind.endswith("only") else ["q_proj", "lm_head"])
        if kind == "head only":
            model.freeze().lm_head.unfreeze()
        return model.to(backend)

    one, two = build(), build()
    count = 2 * int((labels != -100).sum())
    loss, saved = one.loss(IDS, labels, BOUNDS, count=count)
    one.loss_backward(saved)
    logits, saved = two.forward(IDS, offsets=BOUNDS)
    expected, dlogits = ml.cross_entropy(logits, labels)
    two.backward(dlogits / 2, saved)
    assert float(loss) == pytest.approx(float(expected) / 2, rel=1e-12)
    assert float(one.loss(IDS, labels, BOUNDS, count=count, keep=False)[0]) == pytest.approx(float(loss), rel=1e-12)
    for (path, p), (_, q) in zip(one.parameters(), two.parameters(), strict=True):
        assert (p.grad is None) == (not p.trainable)
        if p.grad is not None:
            np.testing.assert_allclose(ml.to_numpy(p.grad), ml.to_numpy(q.grad), atol=1e-13, err_msg=path)
            assert float(abs(p.grad).max()) > 0


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]])
def test_a_part_without_labels_adds_nothing(targets):
    """The part of a batch that a replica gets may have no labels."""
    model = with_lora(Llama(small(), rng=0), targets)
    loss, saved = model.loss(IDS, np.full(7, -100), BOUNDS, count=5)
    model.loss_backward(saved)
    assert float(loss) == 0
    assert all(float(abs(p.grad).max()) == 0 for _, p in model.parameters() if p.trainable)


# -- rotary positions -----------------------------------------------------------------------------------------------------


def test_rotated_products_depend_on_the_distance_alone(on):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal(8), rng.standard_normal(8)
    products = []
    for s, t in ((0, 0), (9, 9), (3, 1), (12, 10), (1, 3)):
        cos, sin = F.rotary_tables(np.array([s, t]), 8, 100.0, on(q))
        rotated = ml.to_numpy(F.rotary(on(np.stack([q, k])), cos, sin))
        products.append(float(rotated[0] @ rotated[1]))
    assert products[0] == pytest.approx(q @ k)
    assert products[1] == pytest.approx(products[0])
    assert products[3] == pytest.approx(products[2])
    assert abs(products[4] - products[2]) > 0.1  # ahead differs from behind
    assert abs(products[0] - products[2]) > 0.1


def test_the_two_rotary_layouts_differ_by_the_order_of_rows(on):
    """Reordering the rows of a projection from interleaved to halves and rotating halves equals rotating interleaved pairs."""
    x = np.random.default_rng(0).standard_normal((5, 12))
    cos, sin = F.rotary_tables(np.arange(5), 4, 100.0, on(x))
    order = in_halves(np.arange(12), 3)
    assert order[:4].tolist() == [0, 2, 1, 3]
    pairs = x.reshape(5, 3, 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (ml.to_numpy(cos) + 1j * ml.to_numpy(sin))[:, None]  # as complex numbers
    interleaved = np.stack([turned.real, turned.imag], axis=-1).reshape(5, 12)
    halves = ml.to_numpy(F.rotary(on(x[:, order]), cos, sin))
    np.testing.assert_allclose(halves, interleaved[:, order], rtol=1e-14)
    np.testing.assert_allclose(ml.to_numpy(F.rotary_backward(on(halves), cos, sin)), x[:, order], rtol=1e-12)


def test_angles_of_distant_positions_are_exact_in_float32():
    """Computed in float32 alone, the angle of position 100,000 would be wrong by 0.004."""
    position = np.array([100_003])
    cos, sin = F.rotary_tables(position, 6, 10000.0, np.zeros(1, np.float32))
    angles = 100_003 * 10000.0 ** (-np.array([0, 2, 4]) / 6)
    np.testing.assert_array_equal(cos[0], np.cos(angles).astype(np.float32))
    np.testing.assert_array_equal(sin[0], np.sin(angles).astype(np.float32))


# -- generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["base", "adapted", "merged"])
@pytest.mark.parametrize("kind", ["gpt2", "tied", "free", "qwen2"])
def test_decoding_token_by_token_equals_one_forward(kind, how, backend):
    if kind == "gpt2":
        model = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=4), rng=0, dtype="float64")
    else:
        model = Llama(small(kind == "tied", model_type="qwen2" if kind == "qwen2" else "llama"), rng=0, dtype="float64")
    for path, p in model.parameters():
        if path.endswith("bias"):
            p.data = p.data + 0.5
    if how != "base":
        with_lora(model, ["q_proj", "down_proj", "lm_head"] if kind == "free" else "all-linear")
    model.to(backend)
    if how == "merged":
        ml.merge(model)
    expected = ml.to_numpy(model.forward(IDS, keep=False)[0])

    cache = KVCache(block=3)  # grows twice
    for a, b in ((0, 2), (2, 3), (3, 6), (6, 7)):
        logits = model.decode(IDS[a:b], cache)
        assert logits.shape == (11,)
        np.testing.assert_allclose(ml.to_numpy(logits), expected[b - 1], rtol=1e-11)
        assert cache.length == b

    cache.length = 3  # drops the last four tokens
    np.testing.assert_allclose(ml.to_numpy(model.decode(IDS[3:5], cache)), expected[4], rtol=1e-11)

    with pytest.raises(ValueError, match="9 tokens is longer than the model's 8 positions"):
        model.decode(IDS[:4], cache)
    assert cache.length == 5


# -- configurations -------------------------------------------------------------------------------------------------------


def test_both_notations_of_the_rotary_base():
    assert LlamaConfig.from_json({"rope_theta": 500.0, "rope_scaling": None}).rope_theta == 500.0
    assert LlamaConfig.from_json({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}).rope_theta == 500.0
    assert LlamaConfig.from_json({"rope_theta": 500.0, "rope_scaling": {"type": "default"}}).rope_theta == 500.0


def test_qwen2_has_biases_on_q_k_and_v_and_llama_by_configuration():
    def biases(**options):
        return {path.split(".")[-2] for path, _ in Llama(small(**options), rng=0).parameters() if path.endswith("bias")}

    assert biases() == set()
    assert biases(model_type="qwen2") == {"q_proj", "k_proj", "v_proj"}
    assert biases(attention_bias=True) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert biases(mlp_bias=True) == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling .*llama3"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_scaling .*linear.*factor is -2.0"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters .*yarn"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters .*full_attention"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters .*partial_rotary_factor"),
        ({"use_sliding_window": True, "sliding_window": 128}, "a llama has no use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_attention_heads": 6, "hidden_size": 32}, "not a multiple of num_attention_heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4, "hidden_size": 24}, "not a multiple of num_key_value_heads"),
        ({"hidden_size": 9, "num_attention_heads": 3}, "head_dim must be a positive even number, got 3"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer, got '2'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ({"model_type": "qwen2", "attention_bias": True}, "a qwen2 has no attention_bias; got True"),
    ],
)
def test_unsupported_fields_are_refused(raw, message):
    with pytest.raises(ValueError, match=f"here.json.*{message}"):
        LlamaConfig.from_json({"model_type": "llama", **raw}, "here.json")


def test_inactive_fields_are_accepted():
    LlamaConfig.from_json(
        {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 128, "layer_types": ["full_attention"] * 32}
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.forward(np.arange(9)), "9 tokens is longer than the model's 8 positions"),
        (lambda model: model.loss(IDS, np.full(7, -100)), "no row is labelled"),
        (lambda model: model.forward(np.array([3, 11])), "id 11 at position 1 is outside 0 to 10"),
        (lambda model: F.attention(*(np.ones((2, n)) for n in (8, 4, 4)), 4), "columns for 4 heads of one size"),
        (lambda model: F.attention(*(np.ones((2, n)) for n in (12, 8, 8)), 3, n_kv_head=2), "columns for 3 and 2 heads of one size"),
        (lambda model: F.rotary_tables(np.arange(3), 3, 1e4, np.ones(1)), "must be even"),
        (lambda model: F.rotary(np.ones((3, 8)), np.ones((3, 3)), np.ones((3, 3))), "rotary: x has shape"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Llama(small(), rng=0))
