"""Llama with scaled rotary frequencies, Mistral, Qwen3, SmolLM3 and Gemma 3 against transformers and PEFT."""

import json
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from golden.make_adapters import ADAMW, quietly
from oracle import deviation
from safetensors import safe_open
from test_llama import TOLERANCE, assign, by_prefix

import minilora as ml
from minilora import kernels as K
from minilora.formats.atomic import read_json, write_json
from minilora.models import KVCache, Llama, LlamaConfig
from minilora.models.generate import generate
from minilora.models.llama_config import VARIANTS

with safe_open(__file__.replace("test_relatives.py", "golden/relatives.safetensors"), "np") as file:
    ABOUT = json.loads(file.metadata()["about"])
    GOLDEN = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
OFFSETS = [0, 5, 6, 29]
IN_FILE = list(ABOUT["configs"])
CASES = """llama3 | linear | dynamic | yarn | yarn, all settings | yarn, attention factor | qwen3 | qwen3, biases, windows | qwen2, windows
    mistral | mistral, no window | smollm3 | smollm3, windows, biases | gemma3 | gemma3, biases""".replace("\n   ", " |").split(" | ")


def adapted(golden, config, dtype="float64"):
    """Our model with the weights and the adapters of a case."""
    model = Llama(LlamaConfig.from_json(config), rng=0, dtype=dtype)
    base, lora = by_prefix(golden, "base:"), by_prefix(golden, "lora:")
    assert {path for path, _ in model.parameters()} == base.keys()  # minilora's paths equal those of the checkpoint
    assign(model, base, dtype)
    ml.inject(model, ml.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"), rng=0)
    assert {path for path, p in model.parameters() if p.trainable} == lora.keys()
    assign(model, lora, dtype)
    return model


def deviations(model, golden, backend="numpy"):
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
@pytest.mark.parametrize("name", IN_FILE)
def test_golden(name, dtype, backend):
    golden = {key.partition("|")[2]: value for key, value in GOLDEN.items() if key.startswith(f"{name}|")}
    found = deviations(adapted(golden, ABOUT["configs"][name], dtype), golden, backend)
    worst = max(found, key=found.get)
    assert found[worst] < TOLERANCE[dtype], f"{worst}: {found[worst]:.1e}"


# -- live -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def oracles():
    """The module that makes the golden file, whose models are transformers' and whose adapters are PEFT's."""
    for module in ("torch", "transformers", "peft"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'minilora[oracle]'")
    from golden import make_relatives

    return make_relatives


@pytest.fixture(scope="session")
def folders(oracles, tmp_path_factory):
    """Folders of transformers' models, by case."""
    folder = tmp_path_factory.mktemp("relatives")
    for name in oracles.CASES:
        quietly(oracles.base_model(name, False).float().save_pretrained, folder / name)
    return {name: folder / name for name in oracles.CASES}


def test_the_cases_are_those_of_the_oracles(oracles):
    assert list(oracles.CASES) == CASES
    assert {case["model_type"] for case in oracles.CASES.values()} == set(VARIANTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_live(name, oracles):
    """In float64, and in float32 as transformers computes it."""
    golden = {key: value.numpy() for key, value in oracles.tensors(name).items()}
    config = oracles.base_model(name).config.to_dict()
    found = deviations(adapted(golden, config), golden)
    assert max(found.values()) < 1e-10, found

    golden |= {key: value.numpy() for key, value in oracles.run(oracles.adapted_model(name, exact=False).float(), name).items()}
    found = deviations(adapted(golden, config, "float32"), golden)
    assert max(found.values()) < 1e-5, found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_the_config_that_is_written(name, oracles):
    import transformers

    raw = oracles.base_model(name).config.to_dict()
    config = LlamaConfig.from_json(raw)
    theirs = transformers.AutoConfig.for_model(**config.to_json()).to_dict()
    ours = {"architectures", "dtype", "id2label", "initializer_range", "transformers_version"}
    assert [key for key in raw.keys() - ours if theirs[key] != raw[key]] == []
    assert LlamaConfig.from_json(theirs) == config == LlamaConfig.from_json(config.to_json())


def their_logits(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids[None]), use_cache=False).logits[0].numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IN_FILE)
def test_adapters_go_both_ways_and_thirty_steps_match_peft(name, oracles, folders, tmp_path):
    import peft
    import torch

    theirs = oracles.adapted_model(name, exact=False).float()
    theirs.save_pretrained(tmp_path / "theirs")
    ids, labels = (x.numpy() for x in oracles.batch(name))
    model = ml.load_model(folders[name], "numpy")
    ml.load_adapter(model, tmp_path / "theirs")
    expected = their_logits(theirs, ids)
    assert deviation(model.forward(ids, keep=False)[0], expected) < 1e-5
    assert np.abs(ml.load_model(folders[name], "numpy").forward(ids, keep=False)[0] - expected).max() > 0.1

    options = ADAMW | {"lr": 3e-3}
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], **options)
    our_optimizer = ml.AdamW(model.parameters(), **options)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = oracles.run(theirs, name)["loss"]  # and backward
        optimizer.step()
        our_loss, saved = model.loss(ids, labels, OFFSETS)
        model.loss_backward(saved)
        our_optimizer.step()
        our_optimizer.zero_grad()
        losses.append((float(our_loss), float(loss)))
    ours, expected = np.array(losses).T
    assert np.abs(ours / expected - 1).max() < 1e-4
    assert expected[-1] < 0.9 * expected[0]

    ml.save_adapter(model, tmp_path / "ours")
    base = oracles.base_model(name, exact=False).float()
    read = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert deviation(their_logits(read, ids), model.forward(ids, keep=False)[0]) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_gemmas_embedding_and_norms_are_adapted_as_in_peft(oracles, folders, tmp_path):
    """The update of the embedding is scaled with it; norms are trained as 1 + weight."""
    import peft
    import torch

    fields = {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["q_norm", "post_attention_layernorm"]}
    theirs = peft.get_peft_model(oracles.base_model("gemma3", False).float(), peft.LoraConfig(r=3, task_type="CAUSAL_LM", **fields))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    theirs.eval().save_pretrained(tmp_path)
    model, ids = ml.load_model(folders["gemma3"], "numpy"), oracles.batch("gemma3")[0].numpy()
    ml.load_adapter(model, tmp_path)
    assert deviation(model.forward(ids, keep=False)[0], their_logits(theirs, ids)) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_merged_folder_and_greedy_tokens_match_transformers(name, oracles, folders, tmp_path):
    """From 6 tokens to 32: beyond the windows and the original length. With a cache, as without one."""
    import torch
    import transformers

    ids = oracles.batch(name)[0].numpy()
    model = ml.load_model(folders[name], "numpy")
    ml.inject(model, ml.LoraConfig(r=2, init_lora_weights=False), rng=0)
    ml.merge(model)
    ml.save_model(model, tmp_path / "m")
    merged, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info[key] for key in info), info
    assert deviation(their_logits(merged.eval(), ids), model.forward(ids, keep=False)[0]) < 1e-5
    prompt = torch.tensor(ids[None, :6])
    sampling = {"max_new_tokens": 26, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    expected = merged.generate(prompt, **sampling)[0, 6:].tolist()
    assert list(generate(model, ids[:6], 26, 0.0)) == expected
    text = [*ids[:6].tolist()]
    for _ in range(26):
        text.append(int(model.forward(np.array(text), keep=False)[0][-1].argmax()))
    assert text[6:] == expected
    cache, at = KVCache(block=5), [0, 3, 4, 15, 16, 29]
    logits = model.forward(ids, keep=False)[0]
    for a, b in pairwise(at):
        assert deviation(model.decode(ids[a:b], cache), logits[b - 1]) < 1e-5
    with pytest.raises(ValueError, match="33 tokens is longer than the model's 32 positions"):
        model.decode(ids[:4], cache)


# -- the contract -----------------------------------------------------------------------------------------------------------------

KINDS = ("qwen3", "mistral", "smollm3", "gemma3")


def golden_model(name, dtype="float64"):
    golden = {key.partition("|")[2]: value for key, value in GOLDEN.items() if key.startswith(f"{name}|")}
    return golden, adapted(golden, ABOUT["configs"][name], dtype)


def step(model, golden, labels=None, prefix=None):
    """The loss, and the gradients of all trainable parameters."""
    loss, saved = model.loss(golden["ids"], golden["labels"] if labels is None else labels, OFFSETS, prefix=prefix)
    model.loss_backward(saved)
    return float(loss), {path: ml.to_numpy(p.grad) for path, p in model.parameters() if p.trainable}


def same(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for path, grad in expected[1].items():
        assert deviation(found[1][path], grad) < tolerance, path


@pytest.mark.parametrize("name", KINDS)
def test_recomputed_blocks_and_a_frozen_prefix_change_nothing(name):
    golden, model = golden_model(name)
    expected = step(model, golden)
    golden, model = golden_model(name)
    model.body.recompute = True
    same(step(model, golden), expected, 1e-14)

    golden, model = golden_model(name)
    for path, p in model.parameters():
        p.trainable = p.trainable and path.startswith(f"model.layers.{len(model.model.layers) - 1}.")
    prefix = model.body.prefix(golden["ids"], OFFSETS)
    assert prefix.blocks == len(model.model.layers) - 1
    found = step(model, golden, prefix=prefix)
    same(found, (expected[0], {path: expected[1][path] for path in found[1]}), 1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_nobody_reads_are_left_out(name, monkeypatch):
    """With one label, the last attention computes one row, of queries alone; the loss and the gradients stay those of the logits."""
    golden, model = golden_model(name)
    labels = np.full(29, -100)
    labels[20] = 5
    asked = []
    plain = K.attention
    monkeypatch.setattr(K, "attention", lambda q, *args, **more: asked.append(len(q)) or plain(q, *args, **more))
    found = step(model, golden, labels)
    assert asked == [29] * (len(model.model.layers) - 1) + [1]
    golden, model = golden_model(name)
    logits, saved = model.forward(golden["ids"], offsets=OFFSETS)
    loss, dlogits = ml.cross_entropy(logits, labels)
    model.backward(dlogits, saved)
    same(found, (float(loss), {path: p.grad for path, p in model.parameters() if p.trainable}), 1e-11)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_half_precision_is_close_to_float32(name, dtype, backend):
    golden, model = golden_model(name, "float32")
    expected = ml.to_numpy(model.forward(golden["ids"], keep=False, offsets=OFFSETS)[0])
    exact = step(model, golden)
    golden, model = golden_model(name, "float32")
    trained = [path for path, p in model.parameters() if p.trainable]
    for path, p in model.parameters():
        if p.data.ndim == 2 and path not in trained:
            p.data = p.data.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    model.to(backend)
    logits, _ = model.forward(golden["ids"], keep=False, offsets=OFFSETS)
    assert logits.dtype.name == dtype
    close = 0.02 if dtype == "float16" else 0.15
    assert deviation(ml.to_numpy(logits).astype("float32"), expected) < close
    found = step(model, golden)
    assert found[0] == pytest.approx(exact[0], rel=close / 2)
    for path, grad in found[1].items():
        assert grad.dtype == np.float32
        assert np.linalg.norm(grad - exact[1][path]) < 4 * close * np.linalg.norm(exact[1][path]), path


@pytest.mark.parametrize("name", KINDS)
def test_nf4_equals_the_model_with_the_weights_that_it_stands_for(name, backend):
    golden, model = golden_model(name, "float32")
    done = ml.quantize_model(model)
    assert len(done) == 7 * len(model.model.layers)
    golden, dense = golden_model(name, "float32")
    kept = dict(model.parameters())
    for path, p in dense.parameters():
        p.data = kept[path].data.dense() if hasattr(kept[path].data, "dense") else p.data
    expected = step(dense, golden)
    same(step(model.to(backend), golden), expected, 1e-4)


def test_a_mixed_batch_uses_each_models_own_head_norms():
    """Norms of heads see each sequence's rows, as every layer does."""
    golden, model = golden_model("qwen3")
    base = Llama(model.config, rng=0, dtype="float64").freeze()
    tuned = base.replica()
    ml.inject(tuned, ml.PartialConfig(train=["norm"]))
    rng = np.random.default_rng(0)
    for path, p in tuned.parameters():
        if path.endswith(("q_norm.weight", "k_norm.weight")):
            p.data = p.data + rng.standard_normal(p.data.shape)
    mixture = ml.mixed([base, tuned], [1, 0, 1], OFFSETS)
    logits = mixture.forward(golden["ids"], keep=False, offsets=OFFSETS)[0]
    for (a, b), own in zip(pairwise(OFFSETS), (tuned, base, tuned), strict=True):
        np.testing.assert_allclose(logits[a:b], own.forward(golden["ids"][a:b], keep=False)[0], rtol=1e-10)


# -- bad input --------------------------------------------------------------------------------------------------------------------


def test_an_adapter_of_another_architecture_of_the_same_sizes_is_refused(tmp_path):
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 2}
    kinds = {"llama": {}, "mistral": {"sliding_window": 3}, "qwen2": {}, "smollm3": {}}
    models = {kind: Llama(LlamaConfig(model_type=kind, **sizes, **more), rng=i) for i, (kind, more) in enumerate(kinds.items())}
    ml.inject(models["llama"], ml.LoraConfig(r=2), rng=0)
    ml.save_adapter(models["llama"], tmp_path)
    for kind in ("mistral", "qwen2", "smollm3"):
        with pytest.raises(ValueError, match="made for a base model with other weights"):
            ml.load_adapter(models[kind], tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3", {"model_type": "llama"}, r"has 'model\.layers\.\d\.self_attn\.\w_norm\.weight' \(4 tensors"),
        ("mistral", {"model_type": "qwen3"}, r"lacks 'model\.layers\.\d\.self_attn\.\w_norm\.weight' \(4 tensors"),
        ("mistral", {"model_type": "qwen2"}, r"lacks 'model\.layers\.0\.self_attn\.k_proj\.bias' \(6 tensors"),
        ("qwen3", {"head_dim": 12}, r"q_proj\.weight has shape \(18, 30\), the model expects \(18, 36\)"),
        ("qwen3", {"attention_bias": True}, r"lacks 'model\.layers\.0\.self_attn\.k_proj\.bias' \(8 tensors"),
        ("gemma3", {"model_type": "mistral", "layer_types": None}, "a mistral has no query_pre_attn_scalar"),
        ("gemma3", {"num_hidden_layers": 4, "layer_types": None}, r"lacks 'model\.layers\.3"),
        ("gemma3", {"num_hidden_layers": 2}, "layer_types must be a list of 2"),
        ("gemma3", {"tie_word_embeddings": False}, r"lacks 'lm_head\.weight'"),
        ("smollm3", {"tie_word_embeddings": False}, r"lacks 'lm_head\.weight'"),
        ("llama3", {"num_key_value_heads": 3}, r"k_proj\.weight has shape"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_refused(name, change, message, tmp_path):
    _, model = golden_model(name, "float32")
    ml.merge(model)
    ml.save_model(model, tmp_path)
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json"), "architectures": [], **change})
    with pytest.raises(ValueError, match=message):
        ml.load_model(tmp_path, "numpy")


@pytest.mark.parametrize("name", ["llama3", "yarn", *KINDS])
def test_a_sequence_beyond_the_context_is_refused(name):
    """Beyond the original length, up to max_position_embeddings, it is computed as in transformers: see test_golden."""
    _, model = golden_model(name)
    ids = np.zeros(33, np.int64)
    for call in (lambda: model.forward(ids), lambda: model.decode(ids, KVCache()), lambda: model.loss(ids, ids)):
        with pytest.raises(ValueError, match="33 tokens is longer than the model's 32 positions"):
            call()


def test_a_tokenizer_with_more_tokens_than_the_embedding_is_refused(tmp_path):
    from small_tokenizers import BPE

    from minilora.formats.tokenizer import load_tokenizer

    BPE.save(tmp_path)
    with pytest.raises(ValueError, match="but the model's embedding has 30 rows"):
        load_tokenizer(tmp_path, 30)


def test_a_window_forgets_what_is_before_it():
    """A change of the first token reaches, through two layers of window 4, the next six tokens and none after them."""
    _, model = golden_model("mistral")
    ids = np.arange(20) % 37
    before = model.forward(ids, keep=False)[0]
    after = model.forward(np.concatenate([[30], ids[1:]]), keep=False)[0]
    changed = np.flatnonzero(np.abs(after - before).max(axis=1) > 0)
    assert changed.tolist() == list(range(7))
    cache = KVCache()
    model.decode(ids[:15], cache)
    k, v, rows = cache.extend(0, np.zeros((1, 10)), np.zeros((1, 10)), 4)
    assert (len(k), len(v), rows.tolist()) == (4, 4, [3])


@pytest.mark.parametrize("name", KINDS)
def test_a_model_says_what_it_is(name, tmp_path):
    from minilora.runs.info import describe

    _, model = golden_model(name, "float32")
    ml.merge(model)
    ml.save_model(model, tmp_path)
    kind = ABOUT["configs"][name]["model_type"]
    assert describe(tmp_path)["model_type"] == kind == ml.load_model(tmp_path, "numpy").model_type
