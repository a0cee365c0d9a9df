"""Published checkpoints: mapped without a copy, sharded, bare, from the hub; written for transformers; bad files."""

import json
import os
import struct
import subprocess
import sys
import tracemalloc
import types

import ml_dtypes
import numpy as np
import oracle
import pytest
from golden import make_models
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import minilora as ml
from minilora.formats.atomic import read_json, write_json
from minilora.formats.tensors import map_tensors, write_tensors

NAMES = ("gpt2", "bert")


def logits(model, name):
    ids, _, offsets = oracle.batch(name)
    return ml.to_numpy(model.forward(ids, keep=False, offsets=offsets)[0])


def is_mapped(x):
    while x is not None and not isinstance(x, np.memmap):
        x = getattr(x, "base", None)
    return x is not None


def edit(folder, change):
    """Change the tensors of a folder with `change`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def shards(folder, **changes):
    """Split a folder's tensors over two files, with `changes` to the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: value for name, value in tensors.items() if places[name] == file}, folder / file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places | changes})
    return folder


# -- reading ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_memory_mapped_model_supports_everything(name, tmp_path):
    folder = oracle.write_checkpoint(name, tmp_path / "m", "float32")
    model = ml.load_model(folder, "numpy")
    assert all(is_mapped(p.data) and not p.data.flags.writeable for _, p in model.parameters())
    assert not any(is_mapped(p.data) for _, p in ml.load_model(folder, "numpy", "float64").parameters())
    assert model.origin.source == str(folder)
    assert not model.trainable
    before = logits(model, name)
    assert oracle.deviation(before, oracle.GOLDEN[f"{name}.logits"]) > 1e-3  # the golden logits include the adapter

    ids, labels, offsets = oracle.batch(name)
    ml.inject(model, ml.LoraConfig(r=2, init_lora_weights=False), rng=0)
    adapted = logits(model, name)
    ml.merge(model)
    np.testing.assert_allclose(logits(model, name), adapted, atol=1e-5)
    ml.unmerge(model)

    full = ml.load_model(folder, "numpy").unfreeze()
    optimizer = ml.SGD(full.parameters(), lr=0.1)
    _, saved = full.loss(ids, labels, offsets)
    full.loss_backward(saved)
    optimizer.step()
    assert np.abs(logits(full, name) - before).max() > 1e-3
    ml.save_model(full, folder)  # overwrites the file that `model` maps
    np.testing.assert_array_equal(logits(model.to("numpy", "float32"), name), adapted)
    np.testing.assert_array_equal(logits(ml.load_model(folder, "numpy"), name), logits(full, name))


def test_mapped_weights_take_no_memory(tmp_path):
    """In a subprocess, to measure nothing else: 40 MB of weights, and Python allocates less than 4 MB."""
    model = ml.BertClassifier(ml.BertConfig(vocab_size=30000, hidden_size=320, num_hidden_layers=1, num_attention_heads=4), rng=0)
    ml.save_model(model, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").stat().st_size > 40e6
    code = f"""
import tracemalloc, minilora as ml, minilora.models, safetensors.numpy
tracemalloc.start()
model = ml.load_model({str(tmp_path / "m")!r}, "numpy")
print(tracemalloc.get_traced_memory()[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4e6


@pytest.mark.parametrize("name", NAMES)
def test_shards_load_as_one_model(name, tmp_path):
    single = ml.load_model(oracle.write_checkpoint(name, tmp_path / "m"), "numpy", "float64")
    again = ml.load_model(shards(oracle.write_checkpoint(name, tmp_path / "s")), "numpy", "float64")
    np.testing.assert_array_equal(logits(single, name), logits(again, name))


def bare(folder, pooler=True):
    """The folder as a saved BertModel: no prefix, no classifier, a buffer, and optionally no pooler."""

    def change(tensors):
        for key in list(tensors):
            value = tensors.pop(key)
            if key.startswith("bert.") and (pooler or "pooler" not in key):
                tensors[key.removeprefix("bert.")] = value
        tensors["embeddings.position_ids"] = np.arange(11)[None]

    raw = read_json(folder / "config.json")
    write_json(folder / "config.json", {**{k: v for k, v in raw.items() if k != "id2label"}, "architectures": ["BertModel"]})
    return edit(folder, change)


def test_a_decoder_without_its_head_is_refused(tmp_path):
    folder = edit(oracle.small_llama(tmp_path / "m"), lambda t: t.pop("lm_head.weight"))
    with pytest.raises(
        ValueError, match=r"m lacks 'lm_head.weight': save the model with its head \(AutoModelForCausalLM, not AutoModel\), or tie it"
    ):
        ml.load_model(folder, "numpy")


def test_a_bare_bert_gets_a_classifier_and_reports_it(tmp_path, capsys):
    expected = ml.load_model(oracle.write_checkpoint("bert", tmp_path / "w"), "numpy", "float64")
    assert capsys.readouterr().err == ""
    folder = bare(oracle.write_checkpoint("bert", tmp_path / "m"))
    model = ml.load_model(folder, "numpy", "float64", labels=5)
    assert capsys.readouterr().err == f"{folder} has no classifier: initialised at random, to be trained or loaded.\n"
    ids, _, offsets = oracle.batch("bert")
    np.testing.assert_array_equal(model.embed(ids, offsets), expected.embed(ids, offsets))
    assert logits(model, "bert").shape == (4, 5)
    W = model.classifier.weight.data
    assert 0.01 < W.std() < 0.03
    assert not model.classifier.bias.data.any()
    np.testing.assert_array_equal(W, ml.load_model(folder, "numpy", "float64", labels=5).classifier.weight.data)
    assert ml.load_model(folder, "numpy").config.num_labels == 2  # transformers' default
    capsys.readouterr()
    ml.load_model(bare(oracle.write_checkpoint("bert", tmp_path / "p"), pooler=False), "numpy")
    assert "no bert.pooler.dense and no classifier" in capsys.readouterr().err


def test_old_bert_names_and_heads_of_other_tasks(tmp_path, capsys):
    folder = oracle.write_checkpoint("bert", tmp_path / "m", architectures=["BertForMaskedLM"])
    expected = logits(ml.load_model(folder, "numpy"), "bert")

    def change(tensors):
        for key in list(tensors):
            old = key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(key)
        tensors["cls.predictions.bias"] = np.zeros(61)

    np.testing.assert_array_equal(logits(ml.load_model(edit(folder, change), "numpy"), "bert"), expected)
    assert "the head for another task (cls.predictions.bias, ...) is ignored" in capsys.readouterr().err


def test_gpt2_buffers_are_ignored_and_a_head_must_equal_the_embedding(tmp_path):
    folder = oracle.write_checkpoint("gpt2", tmp_path / "m")
    expected = logits(ml.load_model(folder, "numpy"), "gpt2")
    edit(folder, lambda t: t.update({"transformer.h.0.attn.bias": np.ones((1, 1, 13, 13)), "lm_head.weight": t["transformer.wte.weight"]}))
    np.testing.assert_array_equal(logits(ml.load_model(folder, "numpy"), "gpt2"), expected)
    edit(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from transformer.wte.weight"):
        ml.load_model(folder, "numpy")


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_bfloat16_and_unaligned_tensors_are_read(tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    half = (x.view(np.uint32) >> 16).astype(np.uint16)
    entry = {"dtype": "BF16", "shape": [3, 4], "data_offsets": [1, 25]}  # preceded by one byte: not aligned
    path = raw_file(tmp_path / "x", {"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}, "x": entry}, b"\1" + half.tobytes())
    tensors, _ = map_tensors(path)
    assert tensors["x"].dtype == np.float32
    assert np.abs(tensors["x"] - x).max() < 2**-7 * np.abs(x).max()
    np.testing.assert_array_equal(tensors["x"].view(np.uint32), x.view(np.uint32) & 0xFFFF0000)


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("float32", ""), ("float64", ""), ("bfloat16", ""), ("float16", ""), ("float32", "nf4"), (None, "")]
)
def test_a_file_in_bfloat16_loads_as_the_same_numbers_in_float32_do(dtype, quantize, tmp_path):
    config = ml.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    ml.save_model(ml.Llama(config, rng=0), tmp_path / "half", dtype="bfloat16")
    ml.save_model(ml.load_model(tmp_path / "half", "numpy"), tmp_path / "float", dtype="float32")
    models = [ml.load_model(tmp_path / name, "numpy", dtype, quantize=quantize) for name in ("half", "float")]
    for (path, p), (_, q) in zip(*(model.parameters() for model in models), strict=True):
        assert p.data.dtype == q.data.dtype, path
        np.testing.assert_array_equal(ml.to_numpy(p.data), ml.to_numpy(q.data))
    assert is_mapped(dict(models[0].parameters())["model.layers.0.mlp.up_proj.weight"].data) == (dtype == "bfloat16")


def test_loading_a_file_in_bfloat16_never_holds_it_in_float32(tmp_path):
    """The peak is what remains, and what the conversion of one weight takes."""
    config = ml.LlamaConfig(vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4)
    ml.save_model(ml.Llama(config, rng=0), tmp_path / "model", dtype="bfloat16")
    in_float32 = 2 * (tmp_path / "model" / "model.safetensors").stat().st_size
    for dtype, quantize, share in (("float32", "nf4", 0.5), ("bfloat16", "", 0.1)):
        ml.load_model(tmp_path / "model", "numpy", dtype, quantize=quantize)  # what is imported and cached counts once
        tracemalloc.start()
        model = ml.load_model(tmp_path / "model", "numpy", dtype, quantize=quantize)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < share * in_float32, (dtype, quantize, peak / in_float32)
        del model


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC1])  # infinity, -infinity, NaN
def test_what_is_not_finite_in_bfloat16_is_refused(bits, tmp_path):
    config = ml.LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    ml.save_model(ml.Llama(config, rng=0), tmp_path / "m", dtype="bfloat16")
    tensors = map_tensors(tmp_path / "m" / "model.safetensors", ml_dtypes.bfloat16)[0]
    tensors = {name: value.copy() for name, value in tensors.items()}
    tensors["model.norm.weight"].view(np.uint16)[1] = bits
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="holds values that are not finite"):
        ml.load_model(tmp_path / "m", "numpy")


def test_gguf_files_use_the_gguf_reader(tmp_path, monkeypatch):
    weights = oracle.part("bert", "weights")
    raw = {"model_type": "bert", **make_models.CONFIGS["bert"], "num_labels": 3}
    with pytest.raises(FileNotFoundError, match="there is no file"):
        ml.load_model(tmp_path / "x.gguf", "numpy")
    monkeypatch.setattr("minilora.formats.checkpoint.read_gguf", lambda path: (raw, weights))
    model = ml.load_model(tmp_path / "x.gguf", "numpy", "float64")
    expected = ml.load_model(oracle.write_checkpoint("bert", tmp_path / "m"), "numpy", "float64")
    np.testing.assert_array_equal(logits(model, "bert"), logits(expected, "bert"))
    assert model.origin.source == str(tmp_path / "x.gguf")


# -- the hub ----------------------------------------------------------------------------------------------------------------


def test_hub_cache_and_offline_mode_are_respected(tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install 'minilora[hf]'")
    home = tmp_path / "models--org--name"
    (home / "snapshots" / "abc").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("abc")
    oracle.write_checkpoint("bert", home / "snapshots" / "abc")
    code = """
import minilora as ml
model = ml.load_model("org/name", "numpy")
print(model.origin.hub_id, model.origin.source)
try:
    ml.load_model("org/other", "numpy")
except FileNotFoundError as error:
    print(error)
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout.splitlines()
    assert out[0] == f"org/name {home / 'snapshots' / 'abc'}"
    assert out[1].startswith("there is no folder org/other, and it cannot be fetched from the hub: ")
    assert len(out) == 2


def test_hub_requests_and_errors(tmp_path, monkeypatch):
    requested = {}
    hub = types.ModuleType("huggingface_hub")

    def fetch(name, **options):
        requested.update(options, name=name)
        raise OSError("no\nnetwork")

    hub.snapshot_download = fetch
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="it cannot be fetched from the hub: no network"):
        ml.load_model("org/name", "numpy")
    assert requested["name"] == "org/name"
    assert "*.safetensors" in requested["allow_patterns"]
    assert not any(pattern.endswith((".bin", "*")) for pattern in requested["allow_patterns"])
    hub.snapshot_download = lambda name, **options: str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"org/name on the hub has no config.json"):
        ml.load_model("org/name", "numpy")
    for path in (
        "./org/name",
        "org/model.safetensors",
        "org/config.json",
        "nowhere",
        str(tmp_path / "nowhere"),
        tmp_path / "nowhere",
    ):  # not hub ids
        with pytest.raises(FileNotFoundError, match="there is no model at"):
            ml.load_model(path, "numpy")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'minilora\[hf\]'"):
        ml.load_model("org/name", "numpy")
    oracle.write_checkpoint("gpt2", tmp_path / "name").rename(tmp_path / "org")
    (tmp_path / "org").rename(tmp_path / "name")
    monkeypatch.chdir(tmp_path.parent)
    assert ml.load_model(f"{tmp_path.name}/name", "numpy").origin.hub_id is None  # a folder whose name looks like a hub id


# -- writing ----------------------------------------------------------------------------------------------------------------

FAMILIES = {
    "gpt2": ("GPT2LMHeadModel", make_models.CONFIGS["gpt2"]),
    "bert": ("BertForSequenceClassification", {**make_models.CONFIGS["bert"], "num_labels": 3}),
    "llama": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama, free head": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
}
LLAMA = {
    "vocab_size": 53,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
}


@pytest.mark.filterwarnings("ignore")  # warnings of transformers
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_with_transformers(family, tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle torch is not installed: pip install 'minilora[oracle]'")
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'")
    name, options = FAMILIES[family]
    model_type = family.partition(",")[0]
    if model_type in ("llama", "qwen2"):
        options = {**LLAMA, **options}
    torch.manual_seed(0)
    config = getattr(transformers, {"gpt2": "GPT2Config", "bert": "BertConfig", "llama": "LlamaConfig", "qwen2": "Qwen2Config"}[model_type])
    theirs = getattr(transformers, name)(config(**options, initializer_range=0.3, bos_token_id=1, eos_token_id=2)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ids = np.random.default_rng(0).integers(0, 53, 9)

    def check_round_trip(model):
        with torch.no_grad():
            return model(input_ids=torch.tensor(ids[None])).logits.numpy().reshape(-1, 3 if model_type == "bert" else 53)

    ours = ml.load_model(tmp_path / "theirs", "numpy")
    assert oracle.deviation(ours.forward(ids, keep=False)[0], check_round_trip(theirs)) < 1e-5
    ml.inject(ours, ml.LoraConfig(r=2, init_lora_weights=False), rng=0)
    ml.merge(ours)
    ml.save_model(ours, tmp_path / "ours")
    again, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in info), info
    assert again.dtype == torch.float32
    merged = ours.forward(ids, keep=False)[0]
    assert np.abs(merged - check_round_trip(theirs)).max() > 0.1
    assert oracle.deviation(merged, check_round_trip(again.eval())) < 1e-5
    written, result = load_file(tmp_path / "ours" / "model.safetensors"), read_json(tmp_path / "ours" / "config.json")
    assert ("lm_head.weight" in written) == (family == "llama, free head")
    assert result["architectures"] == [name]
    assert result["eos_token_id"] == 2
    assert oracle.deviation(ml.load_model(tmp_path / "ours", "numpy").forward(ids, keep=False)[0], merged) < 1e-6
    if model_type == "bert":
        assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").config.num_labels == 3


def test_the_tokenizer_is_saved_with_the_model(tmp_path):
    folder = oracle.write_checkpoint("bert", tmp_path / "m")
    for name in ("tokenizer.json", "vocab.txt", "notes.txt"):
        (folder / name).write_text(name)
    ml.save_model(ml.load_model(folder, "numpy"), tmp_path / "out", dtype="float16")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "tokenizer.json", "vocab.txt"}
    assert (tmp_path / "out" / "vocab.txt").read_text() == "vocab.txt"
    assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == "float16"
    assert read_json(tmp_path / "out" / "config.json")["id2label"] == {"0": "L0", "1": "L1", "2": "L2"}


# -- broken checkpoints -----------------------------------------------------------------------------------------------------

W = "bert.encoder.layer.1.output.dense.weight"


def config(**changes):
    return lambda f: write_json(f / "config.json", {**read_json(f / "config.json"), **changes})


def only(name):
    return lambda f: (f / "model.safetensors").rename(f / name)


BAD = {
    "missing": (lambda f: edit(f, lambda t: t.pop(W)), rf"lacks '{W}' \(1 tensors"),
    "half a classifier": (lambda f: edit(f, lambda t: t.pop("classifier.bias")), "lacks 'classifier.bias'"),
    "no classifier where one is promised": (
        lambda f: edit(f, lambda t: [t.pop("classifier.bias"), t.pop("classifier.weight")]),
        "lacks 'classifier.bias'",
    ),
    "extra": (lambda f: edit(f, lambda t: t.update({"bert.stray": np.ones(1)})), "has 'bert.stray' .* no place for"),
    "twice": (lambda f: edit(f, lambda t: t.update({W[5:]: t[W]})), f"has '{W}' twice"),
    "misshapen": (lambda f: edit(f, lambda t: t.update({W: t[W].T.copy()})), r"has shape \(12, 20\), the model expects \(20, 12\)"),
    "NaN": (lambda f: edit(f, lambda t: t[W].__setitem__((1, 2), np.nan)), "not finite"),
    "infinite": (lambda f: edit(f, lambda t: t[W].__setitem__((1, 2), -np.inf)), "not finite"),
    "integers": (lambda f: edit(f, lambda t: t.update({W: t[W].astype(np.int32)})), r"\(int32\) holds values that are not finite"),
    "architecture": (
        config(model_type="t5"),
        "model_type 't5'; supported: gpt2, bert, roberta, .*llama, mistral, qwen2, qwen3, smollm3, gemma3_text",
    ),
    "architecture of another type": (config(architectures=5), "architectures must be a list of names, got 5"),
    "architecture in a list": (config(architectures=[["x"]]), "is of architecture"),
    "task": (
        config(architectures=["BertForTokenClassification"]),
        "'BertForTokenClassification'; supported: BertForSequenceClassification",
    ),
    "a size that is not the tensors'": (config(intermediate_size=24), "has shape .*, the model expects"),
    "pickled": (only("pytorch_model.bin"), r"only a pickled checkpoint \(pytorch_model.bin\), .* convert it to safetensors"),
    "no weights": (only("weights.dat"), "there is no file .*model.safetensors, nor"),
    "index outside": (lambda f: shards(f, **{W: "../model-00001-of-00002.safetensors"}), "not the plain name of a file in its folder"),
    "index absolute": (lambda f: shards(f, **{W: "/etc/passwd"}), "'/etc/passwd', which is not the plain name"),
    "index on another system": (lambda f: shards(f, **{W: "..\\x.safetensors"}), "not the plain name"),
    "index of a list": (lambda f: shards(f, **{W: [1]}), r"names the file \[1\], which is not"),
    "index of a number": (lambda f: shards(f, **{W: 3}), "names the file 3, which is not"),
    "index without files": (lambda f: shards(f, **{W: "model-00003.safetensors"}), "No such file or directory"),
    "index and shard differ": (lambda f: shards(f, stray="model-00001-of-00002.safetensors"), "differ: 'stray' is not there"),
    "shard has more": (
        lambda f: write_json(
            shards(f) / "model.safetensors.index.json",
            {"weight_map": {W: read_json(f / "model.safetensors.index.json")["weight_map"][W]}},
        ),
        "differ: .* is there, but not in the index",
    ),
    "index without a map": (lambda f: write_json(shards(f) / "model.safetensors.index.json", {"weight_map": []}), "has no weight_map"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint(case, tmp_path):
    folder = oracle.write_checkpoint("bert", tmp_path / "m")
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        ml.load_model(folder, "numpy")
    assert "\n" not in str(caught.value)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="this model is not a classifier"):
        ml.load_model("pydoc", "numpy", labels=3)
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(12, 3\), the model expects \(12, 4\)"):
        ml.load_model(oracle.write_checkpoint("bert", tmp_path / "m"), "numpy", labels=4)
    for dtype in ("int8", "float3", "float8"):
        with pytest.raises(ValueError, match=f"dtype is '{dtype}'; choose float32"):
            ml.load_model("pydoc", "numpy", dtype)


F4 = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
BAD_FILES = {
    "empty": (None, b"", None, "header too small"),
    "length beyond the file": ({"x": F4}, bytes(8), 10**6, "invalid header length"),
    "length beyond all files": ({"x": F4}, bytes(8), 2**64 - 1, "header too large"),
    "no JSON": (b"{'x': 3}", b"", None, "invalid JSON in header"),
    "no text": (b"\xff\xfe{}", b"", None, "invalid UTF-8 in header"),
    "a list": ([F4], bytes(8), None, "invalid JSON in header: invalid type: sequence"),
    "nested without end": (b"[" * 100_000, b"", None, "invalid JSON in header"),
    "a name twice": (b'{"x": 1, "x": 2}', b"", None, "invalid JSON in header: invalid type: integer"),
    "truncated": ({"x": F4}, bytes(7), None, "file not fully covered"),
    "bytes left over": ({"x": F4}, bytes(9), None, "file not fully covered"),
    "shape and extent": ({"x": {**F4, "shape": [3, 1]}}, bytes(8), None, "invalid shape, data type, or offset"),
    "backwards": ({"x": {**F4, "data_offsets": [8, 0]}}, bytes(8), None, "invalid offset for tensor `x`"),
    "negative": ({"x": {**F4, "data_offsets": [-8, 0]}}, bytes(8), None, "invalid value: integer `-8`"),
    "huge": ({"x": {**F4, "shape": [2**40, 2**40]}}, bytes(8), None, "overflow computing buffer size"),
    "huge and empty": ({"x": {**F4, "shape": [2**63, 0], "data_offsets": [0, 0]}}, b"", None, "has shape [9223372036854775808"),
    "beyond all strides, and empty": (
        {"x": {**F4, "shape": [2**61, 0], "data_offsets": [0, 0]}},
        b"",
        None,
        "has shape [2305843009213693952",
    ),
    "overlapping": (
        {"x": F4, "y": {**F4, "data_offsets": [4, 12]}},
        bytes(12),
        None,
        "invalid offset for tensor `y`",
    ),
    "a hole": ({"x": {**F4, "data_offsets": [8, 16]}}, bytes(16), None, "invalid offset for tensor `x`"),
    "a fraction": ({"x": {**F4, "shape": [2.0, 1]}}, bytes(8), None, "invalid type: floating point `2.0`"),
    "a true shape": ({"x": {**F4, "shape": [2, True]}}, bytes(8), None, "invalid type: boolean `true`"),
    "a hundred axes": ({"x": {**F4, "shape": [1] * 99 + [2]}}, bytes(8), None, "has shape [1, 1"),
    "no dtype": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), None, "missing field `dtype`"),
    "unknown dtype": ({"x": {**F4, "dtype": "F8_E4M3", "data_offsets": [0, 2]}}, bytes(2), None, "has dtype 'F8_E4M3'; supported: F64"),
    "a list for a dtype": ({"x": {**F4, "dtype": ["F32"]}}, bytes(8), None, "invalid type: sequence"),
    "a text for a tensor": ({"x": "F32"}, bytes(8), None, "invalid type: string"),
    "metadata": ({"__metadata__": {"a": 1}, "x": F4}, bytes(8), None, "invalid type: integer `1`, expected a string"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_wrong_header(case, tmp_path):
    header, data, length, message = BAD_FILES[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"") if header is None else raw_file(path, header, data, length)
    with pytest.raises(ValueError, match="is not a readable safetensors file") as caught:
        map_tensors(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 40))
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, changes, cut):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    write_tensors(path, {"a": np.ones((3, 2)), "b": np.arange(4, dtype=np.float32), "c": np.zeros((0, 5))})
    content = bytearray(path.read_bytes())
    for at, byte in changes:
        content[at % len(content)] = byte
    path.unlink()
    path.write_bytes(content[: len(content) - cut])
    refused = ""
    try:
        tensors, _ = map_tensors(path)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert "is not a readable safetensors file" in refused
    else:
        assert cut == 0
        assert sum(t.nbytes for t in tensors.values()) == 64
