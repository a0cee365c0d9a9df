"""Model and adapter folders: round trips, PEFT's layout, and broken files."""

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import CONFIG, logits

import minilora as ml
from minilora.formats.adapter_config import read_adapter_config
from minilora.formats.atomic import write_file, write_json
from minilora.formats.fetch import model_folder
from minilora.formats.fitting import check_fit
from minilora.formats.mark import fingerprint
from minilora.formats.tensors import map_tensors
from minilora.lora import lora_layers


def adapted(seed=0, **config):
    model = ml.GPT2(CONFIG, rng=0)
    ml.inject(model, ml.LoraConfig(**{"r": 2, "init_lora_weights": False, **config}), rng=seed)
    return model


@pytest.fixture
def base(tmp_path):
    ml.save_model(ml.GPT2(CONFIG, rng=0), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path):
    ml.save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_round_trip_of_a_model(base):
    np.testing.assert_array_equal(logits(ml.load_model(base, "numpy")), logits(ml.GPT2(CONFIG, rng=0)))
    assert not ml.load_model(base, "numpy").trainable


def test_the_names_of_the_published_gpt2_are_accepted(base):
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors")
    np.testing.assert_array_equal(logits(ml.load_model(base, "numpy")), logits(ml.GPT2(CONFIG, rng=0)))


CONFIGS = [
    {},
    {"target_modules": ["c_attn"], "use_rslora": True},
    {"target_modules": r".*h\.1\..*c_fc"},
    {"rank_pattern": {"c_fc": 3}, "alpha_pattern": {"c_fc": 1}, "bias": "all"},
    {"bias": "lora_only", "modules_to_save": ["ln_f"], "target_modules": ["c_attn", "c_fc"], "layers_to_transform": [1]},
    {"exclude_modules": ["c_proj"]},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_round_trip_of_an_adapter(config, tmp_path, backend):
    model = adapted(**config)
    rng = np.random.default_rng(1)
    for _, p in model.parameters():
        if p.trainable:
            p.data = p.data + rng.standard_normal(p.data.shape).astype(np.float32)
    ml.save_adapter(model.to(backend), tmp_path / "a")
    again = ml.GPT2(CONFIG, rng=0).to(backend)
    ml.load_adapter(again, tmp_path / "a")
    np.testing.assert_array_equal(ml.to_numpy(logits(again)), ml.to_numpy(logits(model)))
    assert {path for path, p in again.parameters() if p.trainable} == {path for path, p in model.parameters() if p.trainable}


def test_the_layout_is_pefts(adapter):
    tensors, config = load_file(adapter / "adapter_model.safetensors"), json.loads((adapter / "adapter_config.json").read_text())
    prefix = "base_model.model.transformer.h.0.attn.c_attn"
    layer = dict(lora_layers(adapted()))["transformer.h.0.attn.c_attn"]
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_A.weight"], layer.lora_A.data.T)
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_B.weight"], layer.lora_B.data.T)
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["fan_in_fan_out"] is True  # GPT-2's own weights are (in, out)
    assert config["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    assert (config["r"], config["lora_alpha"]) == (2, 8)


def test_the_bundled_model_is_small_and_knows_english():
    folder = model_folder("pydoc")
    assert (folder / "model.safetensors").stat().st_size <= 2_000_000
    model = ml.load_model("pydoc", "numpy")
    assert sum(p.data.size for _, p in model.parameters()) <= 1_000_000
    text = np.frombuffer(b"The with statement is used to wrap the execution of a block with methods", dtype=np.uint8).astype(np.int64)
    nats, _ = model.loss(text[:-1], text[1:], keep=False)
    assert float(nats) / np.log(2) < 2  # a uniformly random byte has 8 bits


# -- broken files ----------------------------------------------------------------------------------------------------------


def edit_config(folder, **changes):
    path = next(folder.glob("*config.json"))
    write_json(path, {**json.loads(path.read_text()), **changes})


def edit_tensors(folder, change):
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncate(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-50])


def wrong_header(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(struct.pack("<Q", 2**60) + path.read_bytes()[8:])


def foreign(folder):
    next(folder.glob("*.safetensors")).write_bytes(b"\x80\x04 this is a pickle, or a picture, or a poem" * 10)


WTE = "transformer.wte.weight"
BAD_MODELS = {
    "truncated": (truncate, "not a readable safetensors file"),
    "header lies": (wrong_header, "not a readable safetensors file"),
    "foreign": (foreign, "not a readable safetensors file"),
    "no tensors": (lambda f: (f / "model.safetensors").unlink(), "there is no file"),
    "no config": (lambda f: (f / "config.json").unlink(), "there is no model at"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{r: 8"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "architecture": (lambda f: edit_config(f, model_type="t5"), "model_type 't5'; supported: gpt2"),
    "activation": (lambda f: edit_config(f, activation_function="relu"), "'relu'; supported: gelu_new"),
    "sizes": (lambda f: edit_config(f, n_head=5), "not a multiple"),
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(WTE)), "lacks 'transformer.wte.weight'"),
    "extra": (lambda f: edit_tensors(f, lambda t: t.update(stray=np.ones(1))), "has 'transformer.stray' .* no place for"),
    "misshapen": (
        lambda f: edit_tensors(f, lambda t: t.update({WTE: np.ones((3, 6), np.float32)})),
        r"has shape \(3, 6\), the model expects \(11, 6\)",
    ),
    "integers": (lambda f: edit_tensors(f, lambda t: t.update({WTE: np.ones((11, 6), np.int64)})), "not finite floating-point"),
    "NaN": (lambda f: edit_tensors(f, lambda t: t[WTE].__setitem__((2, 2), np.nan)), "not finite floating-point"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_model_folder(case, base):
    spoil, message = BAD_MODELS[case]
    spoil(base)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        ml.load_model(base, "numpy")
    assert "\n" not in str(caught.value)


A = "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
BAD_ADAPTERS = {
    "truncated": (truncate, "not a readable safetensors file"),
    "foreign": (foreign, "not a readable safetensors file"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "there is no adapter in"),
    "not LoRA": (lambda f: edit_config(f, peft_type="IA3"), "peft_type is 'IA3'; supported: LORA"),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "lacks .*lora_magnitude_vector"),
    "unknown": (lambda f: edit_config(f, use_magic="much"), "use_magic='much' is not supported"),
    "rank": (lambda f: edit_config(f, r=0), "at least 1"),
    "rank and tensors differ": (lambda f: edit_config(f, r=3), r"has shape \(2, 6\), the model expects \(3, 6\)"),
    "other modules": (lambda f: edit_config(f, target_modules=["q_proj"]), "does not fit this model: .* 'q_proj'"),
    "no modules": (lambda f: edit_config(f, target_modules=None), "target_modules is missing"),
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(A)), "lacks .*made for another model"),
    "extra": (lambda f: edit_tensors(f, lambda t: t.update(stray=np.ones(1))), "has no place for"),
    "NaN": (lambda f: edit_tensors(f, lambda t: t[A].__setitem__((0, 0), np.inf)), "not finite"),
}


@pytest.mark.parametrize("case", BAD_ADAPTERS)
def test_a_bad_adapter_leaves_the_model_unchanged(case, adapter):
    spoil, message = BAD_ADAPTERS[case]
    spoil(adapter)
    model = ml.GPT2(CONFIG, rng=0)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        ml.load_adapter(model, adapter)
    assert "\n" not in str(caught.value)
    assert lora_layers(model) == []
    np.testing.assert_array_equal(logits(model), logits(ml.GPT2(CONFIG, rng=0)))


def test_an_adapter_of_a_model_with_other_weights_is_refused(adapter):
    with pytest.raises(ValueError, match="base model with other weights"):
        ml.load_adapter(ml.GPT2(CONFIG, rng=1), adapter)


def test_the_fingerprint_does_not_depend_on_dtype_or_adapter():
    plain = ml.GPT2(CONFIG, rng=0)
    assert fingerprint(plain)[0] == fingerprint(adapted())[0] == fingerprint(ml.GPT2(CONFIG, rng=0).to(dtype="float16"))[0]
    assert fingerprint(plain)[0] != fingerprint(ml.GPT2(CONFIG, rng=1))[0]


def test_an_adapter_for_another_size_is_refused(adapter):
    other = ml.GPT2(ml.GPT2Config(vocab_size=11, n_positions=8, n_embd=12, n_layer=2, n_head=3), rng=0)
    with pytest.raises(ValueError, match=r"other weights|made for another model"):
        ml.load_adapter(other, adapter)


def test_neutral_fields_of_peft_are_accepted(adapter):
    edit_config(
        adapter, use_dora=False, loftq_config={}, megatron_config=None, layer_replication=None, peft_version="0.21.2", eva_config=None
    )
    assert read_adapter_config(adapter).r == 2


def test_saving_without_adapters_or_unmerged_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers"):
        ml.save_adapter(ml.GPT2(CONFIG, rng=0), tmp_path / "a")
    with pytest.raises(ValueError, match="unmerged adapter"):
        ml.save_model(adapted(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_merged_model_is_saved_merged(tmp_path):
    model = adapted()
    expected = logits(model)
    ml.merge(model)
    ml.save_model(model, tmp_path / "m")
    np.testing.assert_allclose(logits(ml.load_model(tmp_path / "m", "numpy")), expected, atol=1e-6)


def test_a_failed_write_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def fail(temporary):
        with open(temporary, "w") as file:
            file.write("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_file(path, fail)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_file_does_not_take_the_place_of_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileExistsError, match="not replaced"):
        write_json(tmp_path / "pipe", {})
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system does not say how much memory is resident")
def test_a_check_gives_back_what_it_has_read(tmp_path):
    """Of an embedding few rows are read again: the others would count as this process's memory to its end."""

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    save_file({"w": np.ones((2**24, 2), "float32")}, tmp_path / "w.safetensors")
    tensors, before = map_tensors(tmp_path / "w.safetensors")[0], resident()
    check_fit("here", tensors, {"w": (2**24, 2)})
    assert resident() - before < 2**24  # of 2^27
    assert tensors["w"].sum() == 2**25
    assert resident() - before > 2**26
