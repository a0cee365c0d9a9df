"""Adapter files: every tensor is loaded or refused, new heads are saved, bases are distinguished, older versions of PEFT read them."""

import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minilora as ml
from minilora.formats.atomic import read_json, write_json
from minilora.formats.tensors import map_tensors, stored_dtypes, write_tensors
from minilora.lora import adaptation
from minilora.models.bert import BertConfig
from minilora.models.llama import LlamaConfig

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = np.array([3, 1, 4, 1, 5, 9, 2, 6])
EMBEDDING = "base_model.model.model.embed_tokens.weight"
PEFT_0_6 = """peft_type auto_mapping base_model_name_or_path revision task_type inference_mode r target_modules lora_alpha lora_dropout
    fan_in_fan_out bias modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern""".split()


def llama(folder, dtype=None, **changes):
    """A small random Llama with large weights, so that errors show."""
    model = ml.Llama(LlamaConfig(**SIZES, **changes), rng=0)
    for _, p in model.parameters():
        if p.data.ndim == 2:
            p.data = 10 * p.data
    ml.save_model(model, folder, dtype)
    return folder


def bert(folder, pooler=True, **changes):
    """A small random BERT without a head, and optionally without a pooler."""
    ml.save_model(ml.BertClassifier(BertConfig(**SIZES, **changes), rng=0), folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name.removeprefix("bert."): 10 * value for name, value in tensors.items() if "classifier" not in name}
    save_file({name: value for name, value in kept.items() if pooler or "pooler" not in name}, folder / "model.safetensors")
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "architectures": ["BertModel"]})
    return folder


def perturbed(model):
    rng = np.random.default_rng(5)
    for _, p in model.parameters():
        if p.trainable:
            p.data = (p.data + 0.2 * rng.standard_normal(p.data.shape)).astype(p.data.dtype)
    return model


def adapted(base, **config):
    model = ml.load_model(base, "numpy")
    ml.inject(model, ml.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **config}), rng=0)
    return perturbed(model)


def logits(model):
    return model.forward(IDS, keep=False)[0]


def distance(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


def logits_in_peft(peft, base, adapter, name="AutoModelForCausalLM", seed=0, **options):
    """The output of transformers and PEFT for the two folders; torch initialises missing modules with this seed."""
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model = getattr(transformers, name).from_pretrained(base, dtype=torch.float32, **options)
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
        with torch.no_grad():
            out = model(torch.tensor(IDS[None]))
    return (out.last_hidden_state if name == "AutoModel" else out.logits)[0].numpy()


# -- tensors of the base model in an adapter file ------------------------------------------------------------------------------------


def with_embedding(tmp_path, change, **options):
    """(base folder, adapter folder whose file also has the embedding of the base, changed by `change`)."""
    base, adapter = llama(tmp_path / "base", **options), tmp_path / "adapter"
    ml.save_adapter(adapted(base), adapter)
    tensors, metadata = map_tensors(adapter / "adapter_model.safetensors")
    E = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    tensors |= change(E)
    write_tensors(adapter / "adapter_model.safetensors", tensors, metadata)
    return base, adapter


def one_ulp_off(E):
    """One element changed by one unit in the last place."""
    E = E.copy()
    E[4, 7] = np.nextafter(E[4, 7], np.float32(9))
    return E


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_unchanged_embedding_of_the_base_is_ignored_in_any_dtype(dtype, tmp_path):
    base, adapter = with_embedding(tmp_path, lambda E: {})
    E = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    tensors, metadata = map_tensors(adapter / "adapter_model.safetensors")
    write_tensors(adapter / "adapter_model.safetensors", tensors | {EMBEDDING: E}, metadata, {EMBEDDING: dtype})
    model = ml.load_model(base, "numpy")
    assert ml.load_adapter(model, adapter).modules_to_save is None
    np.testing.assert_array_equal(logits(model), logits(adapted(base)))


def test_an_embedding_that_differs_by_one_bit_is_loaded_and_saved_again(tmp_path):
    base, adapter = with_embedding(tmp_path, lambda E: {EMBEDDING: one_ulp_off(E)})
    model, untouched = ml.load_model(base, "numpy"), ml.load_model(base, "numpy").model.embed_tokens.weight.data
    assert ml.load_adapter(model, adapter).modules_to_save == ["model.embed_tokens"]
    assert (model.model.embed_tokens.weight.data != untouched).sum() == 1
    with ml.disabled(model):
        np.testing.assert_array_equal(model.model.embed_tokens.weight.data, untouched)
    ml.save_adapter(model, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    np.testing.assert_array_equal(again[EMBEDDING], one_ulp_off(untouched))


def test_a_tied_head_in_the_file_must_equal_the_embedding(tmp_path):
    head = "base_model.model.lm_head.weight"
    base, adapter = with_embedding(tmp_path, lambda E: {EMBEDDING: E, head: E}, tie_word_embeddings=True)
    ml.load_adapter(ml.load_model(base, "numpy"), adapter)
    base, adapter = with_embedding(tmp_path, lambda E: {head: E + 1}, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"has 'base_model.model.lm_head.weight' .* no place for"):
        ml.load_adapter(ml.load_model(base, "numpy"), adapter)
    base, adapter = with_embedding(tmp_path, lambda E: {EMBEDDING: E + 1}, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"model.embed_tokens cannot be fully trained, since embedding and head share"):
        ml.load_adapter(ml.load_model(base, "numpy"), adapter)


@pytest.mark.parametrize("path", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"])
def test_any_other_weight_of_the_base_is_loaded_if_it_differs(path, tmp_path, peft):
    def change(E):
        return {f"base_model.model.{path}": 1.5 * load_file(tmp_path / "base" / "model.safetensors")[path]}

    base, adapter = with_embedding(tmp_path, change)
    model = ml.load_model(base, "numpy")
    ml.load_adapter(model, adapter)
    assert distance(logits(model), logits(adapted(base))) > 1e-2
    assert distance(logits(model), logits_in_peft(peft, base, adapter)) < 1e-5


def test_the_base_weight_of_an_adapted_layer_must_match_the_model(tmp_path):
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    W = "model.layers.0.self_attn.q_proj.weight"
    base, adapter = with_embedding(tmp_path, lambda E: {key: load_file(tmp_path / "base" / "model.safetensors")[W]})
    ml.load_adapter(ml.load_model(base, "numpy"), adapter)
    base, adapter = with_embedding(tmp_path, lambda E: {key: 2 * load_file(tmp_path / "base" / "model.safetensors")[W]})
    with pytest.raises(ValueError, match=r"has '.*q_proj.base_layer.weight' .* no place for"):
        ml.load_adapter(ml.load_model(base, "numpy"), adapter)


# -- randomly initialised heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["query"], "task_type": "SEQ_CLS"},
        {"target_modules": ["query"]},
        {"target_modules": ["dense"], "task_type": "SEQ_CLS"},  # the pooler is adapted
    ],
)
def test_a_random_head_and_pooler_are_saved_with_the_adapter(config, tmp_path, peft, capsys):
    """PEFT, whose own head depends on the seed, and a model here with another head, give the outputs of the saved model."""
    base = bert(tmp_path / "b", pooler=False)
    model = ml.load_model(base, "numpy", labels=3)
    ml.inject(model, ml.LoraConfig(r=2, **config), rng=0)
    ml.save_adapter(perturbed(model), tmp_path / "a")
    expected = logits(model)
    for seed in (1, 2):
        theirs = logits_in_peft(peft, base, tmp_path / "a", "AutoModelForSequenceClassification", seed, num_labels=3)
        assert distance(theirs[None], expected) < 1e-5
    again = ml.load_model(base, "numpy", labels=3)
    for layer in (again.bert.pooler.dense, again.classifier):
        layer.weight.data = layer.weight.data[::-1].copy()
    capsys.readouterr()
    ml.load_adapter(again, tmp_path / "a")
    np.testing.assert_array_equal(logits(again), expected)
    assert capsys.readouterr().err == ""
    ml.save_adapter(again, tmp_path / "again")
    file = "adapter_model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


def test_weights_that_stay_random_are_reported(tmp_path, capsys):
    base = bert(tmp_path / "b", pooler=False)
    model = ml.load_model(base, "numpy", labels=3)
    ml.inject(model, ml.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), rng=0)
    ml.save_adapter(model, tmp_path / "a")
    tensors, metadata = map_tensors(tmp_path / "a" / "adapter_model.safetensors")
    write_tensors(tmp_path / "a" / "adapter_model.safetensors", {k: v for k, v in tensors.items() if "pooler" not in k}, metadata)
    raw = read_json(tmp_path / "a" / "adapter_config.json")
    write_json(tmp_path / "a" / "adapter_config.json", {**raw, "modules_to_save": ["classifier", "score"]})
    capsys.readouterr()
    ml.load_adapter(ml.load_model(base, "numpy", labels=3), tmp_path / "a")
    assert "a has no bert.pooler.dense, and its base has none: initialised at random." in capsys.readouterr().err


@pytest.mark.parametrize("config", [ml.BottleneckConfig(), ml.PartialConfig(train=["norm"])])
def test_a_random_pooler_is_saved_with_other_methods(config, tmp_path):
    base = bert(tmp_path / "b", pooler=False)
    model = ml.load_model(base, "numpy", labels=3)
    ml.inject(model, config, rng=0)
    ml.save_adapter(perturbed(model), tmp_path / "a")
    again = ml.load_model(base, "numpy", labels=3)
    again.bert.pooler.dense.weight.data = again.bert.pooler.dense.weight.data[::-1].copy()
    ml.load_adapter(again, tmp_path / "a")
    np.testing.assert_array_equal(logits(again), logits(model))


def test_mean_pooling_is_reported_when_written(tmp_path, capsys):
    model = ml.BertClassifier(BertConfig(**SIZES, pooling="mean"), rng=0)
    ml.save_model(model, tmp_path / "m")
    assert "mean of the tokens; transformers and PEFT read the first one" in capsys.readouterr().err
    ml.inject(model, ml.LoraConfig(r=2, target_modules=["query"]), rng=0)
    ml.save_adapter(model, tmp_path / "a")
    assert "mean of the tokens; transformers and PEFT read the first one" in capsys.readouterr().err


# -- adapters of models without a head ----------------------------------------------------------------------------------------------

BARE = {
    "bert": {"target_modules": ["query", "dense"]},
    "bert, whole modules": {"target_modules": ["query"], "modules_to_save": ["pooler"]},
    "bert, expression": {"target_modules": r"encoder\.layer\.1\..*(key|value)"},
    "llama": {"target_modules": ["q_proj", "down_proj"]},
    "llama, expression": {"target_modules": r"layers\.[01]\.mlp\..*_proj", "exclude_modules": r"layers\.0\..*"},
    "bert, no task": {"target_modules": ["query", "dense"], "task_type": None},
    "bert, no task, an exclusion": {"target_modules": r".*(key|dense)", "exclude_modules": r".*1\..*", "task_type": None},
    "bert, all biases": {"target_modules": ["query"], "bias": "all"},
    "bert, a head to save that is not there": {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": None},
    "llama, blocks by number, of a bare name": {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0]},
}


@pytest.mark.parametrize("name", BARE)
def test_adapters_of_a_bare_model_work_in_both_directions(name, tmp_path, peft):
    import torch
    import transformers

    base = bert(tmp_path / "b") if name.startswith("bert") else llama(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModel.from_pretrained(base, dtype=torch.float32)
        config = peft.LoraConfig(**{"r": 2, "init_lora_weights": False, "task_type": "FEATURE_EXTRACTION", **BARE[name]})
        peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "a")
    model = ml.load_model(base, "numpy")
    ml.load_adapter(model, tmp_path / "a")
    hidden = model.bert if name.startswith("bert") else model.model
    expected = logits_in_peft(peft, base, tmp_path / "a", "AutoModel")
    untouched = logits_in_peft(peft, base, _zero(tmp_path / "a", tmp_path / "zero"), "AutoModel")
    assert distance(expected, untouched) > 1e-2
    assert distance(logits(hidden), expected) < 1e-5
    ml.save_adapter(model, tmp_path / "own")
    assert distance(logits_in_peft(peft, base, tmp_path / "own", "AutoModel"), expected) < 1e-6


def _zero(source, folder):
    """A copy of an adapter with all tensors zero."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    save_file({k: v * (0 if "_B" in k else 1) for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


ENCODERS = {"kinds": ("roberta", "bert", "xlm-roberta"), "target_modules": ["query"], "task_type": "SEQ_CLS"}
OTHERS = {  # what an adapter of PEFT says of the first model, and those that refuse it for that
    "the class, noted without a task": {"kinds": ("llama", "mistral", "qwen2")},
    "the class of an encoder": {**ENCODERS, "task_type": None},
    "the base, where it is at hand": {"kinds": ("llama", "mistral", "qwen2"), "task_type": "CAUSAL_LM", "base": True},
    "the base of an encoder": {**ENCODERS, "base": True},
    "the name of the body": {**ENCODERS, "kinds": ("roberta", "bert")},
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_for_another_architecture_of_the_same_sizes(name, tmp_path, peft, capsys):
    """Without our mark, by what PEFT writes: LoRA of q and v has the same names and sizes in a Llama, a Mistral and a Qwen2."""
    import transformers

    config = {"target_modules": ["q_proj"], "r": 2, **OTHERS[name]}
    kinds, named = config.pop("kinds"), config.pop("base", False)
    auto = transformers.AutoModelForCausalLM if kinds[0] == "llama" else transformers.AutoModelForSequenceClassification
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in kinds:
            heads = {"num_key_value_heads": 2} if kinds[0] == "llama" else {}
            auto.from_config(transformers.AutoConfig.for_model(kind, **SIZES, **heads)).save_pretrained(tmp_path / kind)
        theirs = peft.get_peft_model(auto.from_pretrained(tmp_path / kinds[0]), peft.LoraConfig(**config))
        theirs.peft_config["default"].base_model_name_or_path = str(tmp_path / kinds[0]) if named else "elsewhere"
        theirs.save_pretrained(tmp_path / "a")
    ml.load_adapter(ml.load_model(tmp_path / kinds[0], "numpy"), tmp_path / "a")
    for kind in kinds[1:]:
        what = f"a: this adapter was made for a model of type {kinds[0]}, and the model here is of type {kind}"
        with pytest.raises(ValueError, match=f"{what}; load it anyway with --allow-other-weights"):
            ml.load_adapter(ml.load_model(tmp_path / kind, "numpy"), tmp_path / "a")
    if kinds[0] == "llama":
        capsys.readouterr()
        ml.load_adapter(ml.load_model(tmp_path / kinds[1], "numpy"), tmp_path / "a", allow_other_weights=True)
        assert f"made for a model of type llama, and the model here is of type {kinds[1]}." in capsys.readouterr().err


def test_an_adapter_without_a_base_name_does_not_use_the_bundled_model(tmp_path):
    from minilora.runs.run_file import open_model

    ml.save_adapter(adapted(llama(tmp_path / "base")), tmp_path / "a")
    result = read_json(tmp_path / "a" / "adapter_config.json")
    write_json(tmp_path / "a" / "adapter_config.json", {**result, "base_model_name_or_path": None})
    with pytest.raises(ValueError, match=r"a names no base model \(base_model_name_or_path\); give one as the model, and --adapter"):
        open_model(str(tmp_path / "a"), "numpy")
    assert distance(logits(open_model(str(tmp_path / "base"), "numpy", str(tmp_path / "a"))), logits(adapted(tmp_path / "base"))) == 0


# -- the base model of an adapter ---------------------------------------------------------------------------------------------------


def test_a_rounded_or_quantized_base_is_reported_and_another_model_refused(tmp_path, capsys):
    base = llama(tmp_path / "base")
    model = ml.load_model(base, "numpy")
    ml.save_model(model, tmp_path / "half", "bfloat16")
    ml.save_adapter(adapted(base), tmp_path / "a")
    expected = logits(adapted(base))
    capsys.readouterr()
    for where, options, message in (
        (tmp_path / "base", {}, ""),
        (tmp_path / "half", {}, "rounding to bfloat16"),
        (tmp_path / "base", {"quantize": "nf4"}, "quantization ("),
    ):
        copy = ml.load_model(where, "numpy", **options)
        ml.load_adapter(copy, tmp_path / "a")
        assert message in capsys.readouterr().err or not message
        assert distance(logits(copy), expected) < 0.5
    other = ml.Llama(LlamaConfig(**SIZES), rng=1)
    with pytest.raises(ValueError, match=r"other weights.*--allow-other-weights"):
        ml.load_adapter(other, tmp_path / "a")
    ml.load_adapter(other, tmp_path / "a", allow_other_weights=True)
    assert "trained on a base model with other weights" in capsys.readouterr().err
    ml.save_adapter(adapted(tmp_path / "half"), tmp_path / "h")
    ml.load_adapter(ml.load_model(base, "numpy"), tmp_path / "h")
    assert "rounding to bfloat16" in capsys.readouterr().err
    model = ml.load_model(base, "numpy", quantize="nf4")
    ml.inject(model, ml.LoraConfig(r=2, target_modules=["q_proj"]), rng=0)
    ml.save_adapter(model, tmp_path / "q")
    ml.load_adapter(ml.load_model(base, "numpy"), tmp_path / "q")
    assert "quantization (" in capsys.readouterr().err
    with pytest.raises(ValueError, match="other weights"):  # the fingerprint of a quantized base does not match every model
        ml.load_adapter(ml.Llama(LlamaConfig(**SIZES), rng=1), tmp_path / "q")


def test_older_versions_of_peft_know_every_field(tmp_path):
    base = llama(tmp_path / "base")
    ml.save_adapter(adapted(base), tmp_path / "a")
    assert set(read_json(tmp_path / "a" / "adapter_config.json")) <= set(PEFT_0_6)
    ml.save_adapter(adapted(base, use_rslora=True), tmp_path / "b")
    assert set(read_json(tmp_path / "b" / "adapter_config.json")) - set(PEFT_0_6) == {"use_rslora"}


# -- dtypes -------------------------------------------------------------------------------------------------------------------------


def test_bfloat16_rounds_to_nearest_even(tmp_path):
    """By hand: one unit in the last place of 1 is 2^-7, and half of it is a tie."""
    x = np.float32([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 3 * 2**-8, 2.0**-130, 0, 3.3895314e38])
    expected = np.float32([1, 1, 1 + 2**-6, 1 + 2**-7, -1 - 2**-6, 2.0**-130, 0, 3.3895314e38])
    write_tensors(tmp_path / "x", {"x": x, "y": x[:2]}, dtypes={"x": "bfloat16"})
    assert stored_dtypes(tmp_path / "x") == {"x": "bfloat16", "y": "float32"}
    np.testing.assert_array_equal(map_tensors(tmp_path / "x")[0]["x"], expected)
    with pytest.raises(ValueError, match="beyond float16's 65504"):
        write_tensors(tmp_path / "z", {"x": x}, dtypes={"x": "float16"})
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_merging_keeps_the_bases_dtype_and_size(dtype, tmp_path):
    from minilora.runs.merge import merge_run

    base = llama(tmp_path / "base", dtype)
    ml.save_adapter(adapted(base), tmp_path / "a")
    changes = merge_run(base, tmp_path / "m", tmp_path / "a")
    assert max(changes.values()) > 0.01
    merged, held = tmp_path / "m" / "model.safetensors", base / "model.safetensors"
    assert stored_dtypes(merged) == stored_dtypes(held)
    assert merged.stat().st_size == held.stat().st_size
    assert read_json(tmp_path / "m" / "config.json")["torch_dtype"] == dtype
    model = adapted(base)
    ml.merge(model)
    precise = model.model.layers[0].self_attn.q_proj.merged.T
    error = np.abs(map_tensors(merged)[0]["model.layers.0.self_attn.q_proj.weight"] - precise)
    assert (error <= {"bfloat16": 2**-8, "float16": 2**-11, "float32": 0}[dtype] * np.abs(precise) + 2**-25).all()
    merge_run(base, tmp_path / "wide", tmp_path / "a", "float32")
    assert set(stored_dtypes(tmp_path / "wide" / "model.safetensors").values()) == {"float32"}


# -- links and the hub --------------------------------------------------------------------------------------------------------------


def test_a_link_that_leaves_the_folder_is_not_published(tmp_path, capsys):
    base = llama(tmp_path / "base")
    (tmp_path / "secret").write_text("mine")
    (base / "vocab.txt").symlink_to(tmp_path / "secret")
    (base / "merges.txt").write_text("a b")
    (base / "vocab.json").symlink_to(base / "merges.txt")
    ml.save_model(ml.load_model(base, "numpy"), tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert (tmp_path / "out" / "vocab.json").read_text() == "a b"
    assert not (tmp_path / "out" / "vocab.json").is_symlink()
    assert "vocab.txt links to a file outside its folder, and is not copied" in capsys.readouterr().err


def test_links_inside_the_hub_cache_are_followed(tmp_path, capsys):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    llama(snapshot)
    blob = tmp_path / "models--org--name" / "blobs" / "123"
    blob.parent.mkdir()
    blob.write_text("a b")
    (snapshot / "merges.txt").symlink_to("../../blobs/123")
    ml.save_model(ml.load_model(snapshot, "numpy"), tmp_path / "out")
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b"
    assert capsys.readouterr().err == ""


def test_only_hub_ids_reach_the_hub(tmp_path, monkeypatch):
    import sys
    import types

    from minilora.runs.run_file import open_model, tokenizer_of

    requested = []
    hub = types.ModuleType("huggingface_hub")

    def fetch(name, **options):
        requested.append((name, options["local_files_only"]))
        raise OSError("no network")

    hub.snapshot_download = fetch
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("runs/lora-9", "studies/x", "models/mine", "./org/name", "../org/name", "~/name"):
        with pytest.raises(FileNotFoundError, match="there is no model at"):
            open_model(name, "numpy")
    assert requested == []
    base = llama(tmp_path / "base")
    model = adapted(base)
    adaptation(model).config.base_model_name_or_path = "org/name"
    ml.save_adapter(model, tmp_path / "a")
    for opened in (open_model, tokenizer_of):
        with pytest.raises(FileNotFoundError, match=r"org/name, and it is not in the hub's local cache"):
            opened("a")
    with pytest.raises(FileNotFoundError, match="Give it as the model, and --adapter a"):
        open_model("a", "numpy")
    assert {local for _, local in requested} == {True}
    requested.clear()
    with pytest.raises(FileNotFoundError, match="it cannot be fetched from the hub: no network"):
        open_model("org/name", "numpy", adapter="a")
    assert requested == [("org/name", False)]


# -- comparing adapters -------------------------------------------------------------------------------------------------------------


def test_compare_does_not_depend_on_the_order(tmp_path):
    from minilora.runs.merge import compare

    base = llama(tmp_path / "base")
    first, second = adapted(base), adapted(base, target_modules=["q_proj", "v_proj"], bias="none", modules_to_save=["model.norm"])
    ml.save_adapter(first, tmp_path / "a")
    ml.save_adapter(second, tmp_path / "b")
    ml.merge(second)
    ml.save_model(second, tmp_path / "merged")
    paths = [tmp_path / name for name in ("base", "a", "b", "merged")]
    for x in paths:
        for y in paths:
            assert compare(str(x), str(y)) == compare(str(y), str(x))
    q = "model.layers.0.self_attn.q_proj"
    deltas = [dict(model.modules())[q].delta() for model in (first, second)]
    assert compare(str(base), str(tmp_path / "a"))[f"{q}.weight"] == pytest.approx(np.abs(deltas[0]).max(), rel=1e-4)
    assert compare(str(tmp_path / "b"), str(tmp_path / "a"))[f"{q}.weight"] == pytest.approx(np.abs(deltas[0] - deltas[1]).max(), rel=1e-4)
    assert compare(str(tmp_path / "b"), str(tmp_path / "a"))["model.norm.weight"] > 0.1
    assert max(compare(str(tmp_path / "merged"), str(tmp_path / "b")).values()) == 0


def test_compare_of_classifiers(tmp_path):
    from minilora.runs.merge import compare

    base = bert(tmp_path / "base")
    model = ml.load_model(base, "numpy", labels=3)
    ml.inject(model, ml.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"), rng=0)
    head = model.classifier.weight.data.copy()
    ml.save_adapter(perturbed(model), tmp_path / "a")
    expected = np.abs(model.classifier.weight.data - head).max()
    for first, second in (("base", "a"), ("a", "base")):
        changes = compare(str(tmp_path / first), str(tmp_path / second))
        assert changes["classifier.weight"] == pytest.approx(expected)
        assert changes["bert.encoder.layer.0.attention.self.query.weight"] > 0
        assert changes["bert.pooler.dense.weight"] == 0


# -- the row of pad_token_id -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "tied"),
    [
        ({"target_modules": ["embed_tokens"]}, False),
        ({"target_modules": ["embed_tokens"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, False),  # PEFT does not fully train a tied table
    ],
)
def test_the_row_of_the_pad_token_gets_no_gradient_from_the_input(fields, tied, tmp_path):
    """All other rows behave as without it."""
    grads = {}
    for pad in (None, 4, -27):
        model = ml.load_model(llama(tmp_path / str(pad), pad_token_id=pad, tie_word_embeddings=tied), "numpy")
        ml.inject(model, ml.LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["q_proj"], **fields}), rng=0)
        _, saved = model.loss(IDS[:-1], IDS[1:])
        model.loss_backward(saved)
        grads[pad] = next(p.grad for path, p in model.parameters() if path.endswith(("embedding_A", "embed_tokens.weight")) and p.trainable)
    assert np.abs(grads[None][4]).max() > 0
    for pad in (4, -27):
        assert not grads[pad][4].any()
        np.testing.assert_array_equal(np.delete(grads[pad], 4, 0), np.delete(grads[None], 4, 0))


def test_a_fully_trained_tied_table_gets_the_gradient_of_the_head_for_the_pad_row(tmp_path):
    """Against finite differences of the head alone: the loss as a function of the row, with no token that reads it."""
    model = ml.load_model(llama(tmp_path / "m", pad_token_id=4, tie_word_embeddings=True), "numpy", "float64").unfreeze()
    ids = np.array([3, 1, 4, 5])
    _, saved = model.loss(ids[:-1], ids[1:])
    model.loss_backward(saved)
    grad = model.model.embed_tokens.weight.grad[4].copy()
    plain = ml.load_model(llama(tmp_path / "n", tie_word_embeddings=True), "numpy", "float64").unfreeze()
    _, saved = plain.loss(ids[:-1], ids[1:])
    plain.loss_backward(saved)
    h, _ = plain.model.forward(ids[:-1], keep=False)
    z = h @ plain.model.embed_tokens.weight.data.T
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(3), ids[1:]] -= 1
    np.testing.assert_allclose(grad, (p.T @ h / 3)[4], rtol=1e-9, atol=1e-12)
    assert np.abs(plain.model.embed_tokens.weight.grad[4] - grad).max() > 1e-6


def test_torch_agrees_on_the_pad_row(tmp_path, peft):
    import torch
    import transformers

    base = llama(tmp_path / "m", pad_token_id=4)
    model = ml.load_model(base, "numpy").unfreeze()
    _, saved = model.loss(IDS[:-1], IDS[1:])
    model.loss_backward(saved)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs(torch.tensor(IDS[None]), labels=torch.tensor(IDS[None])).loss.backward()
    expected = theirs.model.embed_tokens.weight.grad.numpy()
    assert not expected[4].any()
    assert distance(model.model.embed_tokens.weight.grad, expected) < 1e-4
