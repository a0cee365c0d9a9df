"""PEFT in both directions: adapters made there and used here, made here and used there, trained on both sides.

The golden files of make_adapters.py are always compared; all cases run live where torch, transformers and peft are installed.
"""

import json
import os

import numpy as np
import pytest
from golden.make_adapters import ADAMW, FOLDER, IDS, LABELS, SIZES, adapted, base, logits, losses, options, quietly
from safetensors.numpy import load_file, save_file
from versions import LORA_ONLY, is_before, skip_before

import minilora as ml
from minilora.lora import lora_layers
from minilora.models import BertClassifier

KINDS = ("bert", "gpt2", "llama")


def minilora_model(folder):
    """The model of a transformers folder, frozen."""
    return ml.load_model(folder, "numpy")


def our_logits(model, ids=IDS[0], offsets=(0, 7, 14)):
    return ml.to_numpy(model.forward(ids.ravel(), keep=False, offsets=list(offsets))[0])


def our_losses(model, optimizer=None):
    optimizer = optimizer or ml.AdamW(model.parameters(), **ADAMW)
    result = []
    for ids, labels in zip(IDS, LABELS, strict=True):
        if not isinstance(model, BertClassifier):
            labels = np.full(ids.shape, -100)
            labels[:, :-1] = ids[:, 1:]
        loss, saved = model.loss(ids.ravel(), labels.ravel(), offsets=[0, 7, 14])
        model.loss_backward(saved)
        optimizer.step()
        optimizer.zero_grad()
        result.append(float(loss))
    return np.array(result)


def deviation(a, b, what):
    """The largest difference, relative to the largest value; also written to the file that MINILORA_MEASURE names."""
    assert a.shape == b.shape
    found = float(np.abs(a.astype(np.float64) - b).max() / np.abs(b).max())
    if "MINILORA_MEASURE" in os.environ:
        with open(os.environ["MINILORA_MEASURE"], "a") as file:
            file.write(f"{what}: {found:.1e}\n")
    return found


# -- golden files, without torch ---------------------------------------------------------------------------------------------

GOLDEN = [(kind.name, path.parent.name) for kind in sorted(FOLDER.iterdir()) for path in sorted(kind.glob("*/adapter_config.json"))]


@pytest.mark.parametrize(("kind", "what"), [case for case in GOLDEN if case[1] != "start"])
def test_golden_adapters_of_peft_match_its_logits(kind, what, backend):
    expected = load_file(FOLDER / kind / "expected.safetensors")
    model = minilora_model(FOLDER / kind / "base")
    assert deviation(our_logits(model.to(backend)), expected["base"], f"golden, {kind}, base") < 1e-5
    ml.load_adapter(model, FOLDER / kind / what)
    assert deviation(our_logits(model), expected[what], f"golden, {kind}, {what}") < 1e-5
    assert np.abs(expected[what] - expected["base"]).max() > 1e-2 * np.abs(expected["base"]).max()


@pytest.mark.parametrize("kind", KINDS)
def test_golden_trajectory(kind):
    expected = load_file(FOLDER / kind / "expected.safetensors")["losses"]
    model = minilora_model(FOLDER / kind / "base")
    ml.load_adapter(model, FOLDER / kind / "start")
    assert deviation(our_losses(model), expected, f"golden, {kind}, 30 losses") < 1e-4
    assert np.ptp(expected) > 0.1 * expected[0]  # the losses change


@pytest.mark.parametrize(("kind", "what"), GOLDEN)
def test_round_trip_of_golden_adapters(kind, what, tmp_path):
    """Tensors bit for bit under the same keys, and every known field of the configuration."""
    model = minilora_model(FOLDER / kind / "base")
    ml.load_adapter(model, FOLDER / kind / what)
    ml.save_adapter(model, tmp_path)
    before, after = load_file(FOLDER / kind / what / "adapter_model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    assert after.keys() == {key for key in before if "original_module" not in key and "modules_to_save" not in key}
    for key, value in after.items():
        np.testing.assert_array_equal(value, before[key])
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in (FOLDER / kind / what, tmp_path))
    before["base_model_name_or_path"] = after["base_model_name_or_path"]
    assert after == {key: before[key] for key in after}
    left_out = {key for key in before if key not in after and before[key]}
    assert left_out <= {"auto_mapping", "peft_version", *UNSUPPORTED, *NEUTRAL}


# -- live ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bases(peft, tmp_path_factory):
    """Folders of transformers models by kind."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in SIZES:
        quietly(base(kind).save_pretrained, folder / kind)
    return folder


def known_to_peft(kind):
    """Fields that `inject` refuses but `load_adapter` accepts: the initialisation of a trained adapter does not matter."""
    usual = options(kind)["names"]
    more = {
        "orthogonal": {"init_lora_weights": "orthogonal"},
        "EVA": {"init_lora_weights": "eva", "rank_pattern": {usual["target_modules"][0]: 3}},
        "MiCA": {"init_lora_weights": "mica"},
        "rank beyond the layer": {"r": 40},
        "a name that matches nothing": {"target_modules": [*usual["target_modules"], "nothing"]},
        "an exclusion and a pattern that match nothing": {"exclude_modules": ["nothing"], "alpha_pattern": {"nothing": 3}},
    }
    return options(kind) | {what: usual | fields for what, fields in more.items()}


@pytest.mark.parametrize(("kind", "what"), [(kind, what) for kind in SIZES for what in known_to_peft(kind)])
def test_an_adapter_of_peft_works_in_minilora(kind, what, peft, bases, tmp_path):
    if what == "MiCA":
        skip_before(peft, (0, 20), "has no MiCA")
    if known_to_peft(kind)[what].get("bias") == "lora_only":
        skip_before(peft, (0, 21), LORA_ONLY)
    theirs = adapted(kind, known_to_peft(kind)[what])
    quietly(theirs.save_pretrained, tmp_path)
    model = minilora_model(bases / kind)
    untouched = our_logits(model)
    ml.load_adapter(model, tmp_path)
    expected = logits(theirs)
    assert deviation(our_logits(model), expected, f"PEFT -> here, {kind}, {what}") < 1e-5
    assert np.abs(expected - untouched).max() > 1e-2 * np.abs(expected).max()
    assert trained_here(model) == trained_there(theirs) | ({*_frozen_b(model)} if what == "MiCA" else set())


@pytest.mark.parametrize(("kind", "what"), [(kind, what) for kind in SIZES for what in options(kind)])
def test_an_adapter_of_minilora_works_in_peft(kind, what, peft, bases, tmp_path):
    if options(kind)[what].get("bias") == "lora_only":
        skip_before(peft, (0, 21), LORA_ONLY)
    model = minilora_model(bases / kind)
    ml.inject(model, ml.LoraConfig(**options(kind)[what]), rng=0)
    rng = np.random.default_rng(7)
    for _, p in model.parameters():
        if p.trainable:
            p.data = (p.data + 0.2 * rng.standard_normal(p.data.shape)).astype(np.float32)
    ml.save_adapter(model, tmp_path)
    theirs = quietly(peft.PeftModel.from_pretrained, base(kind), tmp_path).eval()
    assert deviation(our_logits(model), logits(theirs), f"here -> PEFT, {kind}, {what}") < 1e-5
    # PEFT ignores unknown keys, so the tensors it has read are compared, too
    read, written = quietly(peft.get_peft_model_state_dict, theirs), load_file(tmp_path / "adapter_model.safetensors")
    assert written.keys() == {key for key in read if not any(s in key for s in ("original_module", "modules_to_save", "base_layer.weight"))}
    for key, value in written.items():
        np.testing.assert_array_equal(value, read[key].numpy())


@pytest.mark.parametrize("kind", SIZES)
def test_thirty_steps_of_adamw_match_peft(kind, peft, bases, tmp_path):
    theirs = adapted(kind, options(kind)["all linear layers"], seed=None)
    quietly(theirs.save_pretrained, tmp_path)
    model = minilora_model(bases / kind)
    ml.load_adapter(model, tmp_path)
    expected = losses(theirs)
    assert deviation(our_losses(model), expected, f"30 losses, {kind}") < 1e-4
    assert np.ptp(expected) > 0.1 * expected[0]


@pytest.mark.parametrize("kind", SIZES)
def test_a_merged_folder_works_in_transformers(kind, peft, bases, tmp_path):
    """With trained biases and norm: all are in the folder."""
    import transformers

    model = minilora_model(bases / kind)
    quietly(adapted(kind, options(kind)["bias all, a norm whole"]).save_pretrained, tmp_path / "a")
    ml.load_adapter(model, tmp_path / "a")
    expected = our_logits(model)
    ml.merge(model)
    ml.save_model(model, tmp_path / "m")
    theirs = getattr(transformers, type(base(kind)).__name__)
    merged = quietly(theirs.from_pretrained, tmp_path / "m").eval()
    assert deviation(logits(merged), expected, f"merged, {kind}") < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_of_half_precision(dtype, peft, bases, tmp_path):
    import torch
    from safetensors import torch as files

    quietly(adapted("llama", options("llama")["a norm whole"]).save_pretrained, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    files.save_file({key: value.to(getattr(torch, dtype)) for key, value in files.load_file(path).items()}, path)
    theirs = quietly(peft.PeftModel.from_pretrained, base("llama"), tmp_path).eval()
    model = minilora_model(bases / "llama")
    ml.load_adapter(model, tmp_path)
    assert deviation(our_logits(model), logits(theirs), f"{dtype} on file") < 1e-5


def trained_here(model):
    """Paths of the trainable parameters."""
    return {path for path, p in model.parameters() if p.trainable}


def trained_there(model):
    """The same paths of a PEFT model, under minilora's names."""
    names = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
    for old, new in ((".default.weight", ""), (".modules_to_save.default", ""), (".base_layer", "")):
        names = {name.replace(old, new) if old != ".default.weight" or ".lora_" in name else name for name in names}
    return {name.removesuffix(".default") for name in names}


def _frozen_b(model):
    """MiCA trains no B; here its adapters are plain LoRA."""
    return (f"{path}.lora_B" for path, _ in lora_layers(model))


TRICKY = {
    "gpt2": [
        {"target_modules": ["c_proj"]},
        {"target_modules": ["attn.c_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["h.1.mlp.c_fc", "transformer.h.0.mlp.c_proj"]},
        {"target_modules": ["transformer.h.0.mlp.c_proj", "c_attn"], "layers_to_transform": [1]},
        {"target_modules": ["c_attn"], "layers_to_transform": []},
        {"target_modules": ["c_attn"], "layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": "transformer.h"},
        {"target_modules": "c_attn"},
        {"target_modules": ".*c_attn|.*c_fc"},
        {"target_modules": ".*attn"},
        {"target_modules": r".*\.h\.1\..*"},
        {"target_modules": ["wte", "c_fc"]},
        {"target_modules": ["ln_1"]},
        {"target_modules": "All-Linear"},
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": "all-linear|.*c_fc"},
        {"target_modules": "all-linear", "exclude_modules": ["attn.c_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["attn"]},
        {"target_modules": "all-linear", "modules_to_save": ["attn"]},
        {"target_modules": "all-linear", "modules_to_save": ["h.0.mlp"]},
        {"target_modules": ["c_fc", "c_attn"], "modules_to_save": ["fc"]},
        {"target_modules": ["c_fc", "c_attn"], "modules_to_save": ["c_fc"]},
        {"target_modules": ["c_attn", "c_fc"], "exclude_modules": [".*c_fc"]},
    ],
    "llama": [
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head"]},
        {"target_modules": ".*(proj|head)"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": "all-linear", "modules_to_save": ["lm_head", "norm"]},
    ],
    "bert": [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {"target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION"},
        {"target_modules": ["dense"]},
        {"target_modules": ["output.dense"], "layers_to_transform": [1]},
        {"target_modules": ["output.dense", "pooler.dense"], "layers_to_transform": [1], "layers_pattern": "layer"},
        {"target_modules": ["classifier", "query"], "task_type": "SEQ_CLS"},
        {"target_modules": ["classifier"], "task_type": "SEQ_CLS"},
        {"target_modules": ["self"]},
        {"target_modules": ["query"], "modules_to_save": ["attention"]},
        {"target_modules": "all-linear", "modules_to_save": ["pooler"], "task_type": "SEQ_CLS"},
    ],
}


@pytest.mark.parametrize(("kind", "fields"), [(kind, fields) for kind, cases in TRICKY.items() for fields in cases], ids=str)
def test_the_same_modules_are_adapted(kind, fields, peft, bases):
    """The same set, or both refuse."""
    if fields.get("layers_pattern") == "transformer.h":
        skip_before(peft, (0, 21), "refuses a pattern of two parts")
    try:
        theirs = quietly(peft.get_peft_model, base(kind), peft.LoraConfig(r=2, **fields))
        expected = set(theirs.base_model.targeted_module_names)
    except (ValueError, TypeError):
        expected = None
    model = minilora_model(bases / kind)
    if expected is None:
        with pytest.raises(ValueError, match=r"target_modules|modules_to_save|layers_to_transform|fully trained"):
            ml.inject(model, ml.LoraConfig(r=2, **fields), strict=False)
    else:
        assert set(ml.inject(model, ml.LoraConfig(r=2, **fields), strict=False)) == expected
        assert trained_here(model) == trained_there(theirs)


@pytest.mark.parametrize(
    ("kind", "name"), [("gpt2", "wte"), ("gpt2", "lm_head"), ("tied llama", "embed_tokens"), ("tied llama", "lm_head")]
)
def test_tied_weights_are_not_trained_separately(kind, name, peft, bases, tmp_path):
    """PEFT trains a copy of one tied weight and leaves the other: a model that does not exist here."""
    quietly(adapted(kind, options(kind)["names"] | {"modules_to_save": [name]}).save_pretrained, tmp_path)
    with pytest.raises(ValueError, match=f"modules_to_save: .*{name} cannot be fully trained"):
        ml.load_adapter(minilora_model(bases / kind), tmp_path)
    with pytest.raises(ValueError, match="share"):
        ml.LoraConfig(modules_to_save=["transformer" if kind == "gpt2" else "model"]).full_modules(minilora_model(bases / kind))
    with pytest.raises(ValueError, match="share"):
        ml.LoraConfig(r=2, target_modules=[options(kind)["names"]["target_modules"][0], "lm_head"]).targets(minilora_model(bases / kind))


def test_embeddings_that_peft_adds_to_the_file(peft, bases, tmp_path):
    """With save_embedding_layers=True the frozen embeddings are in the file; they are accepted if they equal the model's."""
    theirs = adapted("llama", options("llama")["names"])
    quietly(theirs.save_pretrained, tmp_path, save_embedding_layers=True)
    model = minilora_model(bases / "llama")
    ml.load_adapter(model, tmp_path)
    assert deviation(our_logits(model), logits(theirs), "embeddings written along") < 1e-5
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = minilora_model(bases / "llama")
    ml.load_adapter(model, tmp_path)
    again = quietly(peft.PeftModel.from_pretrained, base("llama"), tmp_path).eval()
    assert deviation(our_logits(model), logits(again), "other embeddings written along") < 1e-5


@pytest.mark.parametrize(("kind", "names"), [("llama", ["embed_tokens", "lm_head"]), ("bert", ["word_embeddings", "pooler"])])
def test_trained_embeddings_that_peft_writes_three_times(kind, names, peft, bases, tmp_path):
    """With save_embedding_layers=True the file holds modules_to_save as trained, a second copy, and the original."""
    theirs = adapted(kind, options(kind)["names"] | {"modules_to_save": names})
    quietly(theirs.save_pretrained, tmp_path, save_embedding_layers=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert any(".modules_to_save." in key for key in tensors)
    model = minilora_model(bases / kind)
    ml.load_adapter(model, tmp_path)
    assert deviation(our_logits(model), logits(theirs), f"trained embeddings three times, {kind}") < 1e-5
    key = next(key for key in tensors if ".modules_to_save." in key)
    save_file({**tensors, key: tensors[key] + 1}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="differs from what it is a copy of"):
        ml.load_adapter(minilora_model(bases / kind), tmp_path)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_initialisers_that_change_the_base_are_refused_until_converted(init, peft, bases, tmp_path):
    theirs = adapted("llama", options("llama")["names"] | {"init_lora_weights": init}, seed=None)
    quietly(theirs.save_pretrained, tmp_path / "start")
    import torch

    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3)
    quietly(theirs.save_pretrained, tmp_path / "raw")
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' is not supported"):
        ml.load_adapter(minilora_model(bases / "llama"), tmp_path / "raw")
    expected = logits(theirs)
    start = json.loads((tmp_path / "start" / "adapter_config.json").read_text())
    (tmp_path / "start" / "adapter_config.json").write_text(json.dumps(start | {"init_lora_weights": True}))
    quietly(theirs.save_pretrained, tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = minilora_model(bases / "llama")
    ml.load_adapter(model, tmp_path / "converted")
    assert deviation(our_logits(model), expected, f"{init}, converted") < 1e-5


def test_every_field_of_peft_is_known_or_classified(peft):
    """No field may be ignored because it was forgotten."""
    import dataclasses

    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    known = {field.name for field in dataclasses.fields(ml.LoraConfig)}
    assert theirs <= known | UNSUPPORTED.keys() | NEUTRAL.keys()
    assert is_before(peft, 0, 21) or theirs == known | UNSUPPORTED.keys() | NEUTRAL.keys()
    for name in known & theirs - {"target_modules"}:  # there, None means a table of architectures
        assert getattr(peft.LoraConfig(), name) == getattr(ml.LoraConfig(), name), name


# -- unsupported fields ---------------------------------------------------------------------------------------------------------

UNSUPPORTED = {
    "use_qalora": True,
    "lora_bias": True,
    "ensure_weight_tying": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 1], [0, 1]],
    "alora_invocation_tokens": [3, 4],
    "megatron_config": {"tensor_model_parallel_size": 1},
    "velora_config": {"num_groups": 64},
    "kasa_config": {"beta": 0.1},
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"nblocks": 2},
    "monteclora_config": {"num_samples": 8},
}
NEUTRAL = {  # values that change nothing about a trained adapter
    "peft_type": "LORA",
    "peft_version": "0.99",
    "auto_mapping": {"base_model_class": "GPT2LMHeadModel", "parent_library": "transformers.models.gpt2.modeling_gpt2"},
    "revision": "main",
    "inference_mode": False,
    "runtime_config": {"ephemeral_gpu_offload": False},
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "loftq_config": {"loftq_bits": 4},
}
REFUSED = {f"{name}={value!r}": {name: value} for name, value in UNSUPPORTED.items()} | {
    "init_lora_weights='loftq'": {"init_lora_weights": "loftq"},
    "init_lora_weights='corda'": {"init_lora_weights": "corda"},
    "init_lora_weights='lora_ga'": {"init_lora_weights": "lora_ga"},
    "init_lora_weights='magic'": {"init_lora_weights": "magic"},
    "task_type is 'TOKEN_CLS'": {"task_type": "TOKEN_CLS"},
    "peft_type is 'LOHA'": {"peft_type": "LOHA"},
    "rank 1000000000 is beyond": {"rank_pattern": {}, "r": 10**9},
    "r must be an integer, got 1000000000000": {"r": 10**12},
    "bias is 'some'": {"bias": "some"},
    "use_rslora must be true or false, got 'yes'": {"use_rslora": "yes"},
    "lora_alpha must be a number, got inf": {"lora_alpha": float("inf")},
    "modules_to_save must be a list .*, got 'ln_f'": {"modules_to_save": "ln_f"},
    "rank_pattern='\\(' is not a regular expression": {"rank_pattern": {"(": 2}},
    "layers_to_transform must be .* got ..first": {"layers_to_transform": ["first"]},
    "layers_pattern says": {"layers_pattern": "h"},
    "target_modules must be .* got": {"target_modules": ["c_attn", 3]},
    "task_type='SEQ_CLS' fully trains the head": {"task_type": "SEQ_CLS"},
}


def edited(source, folder, **changes):
    """A copy of an adapter folder with fields changed."""
    folder.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    (folder / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize("message", REFUSED)
def test_unsupported_fields_are_refused_by_name(message, tmp_path):
    model = minilora_model(FOLDER / "gpt2" / "base")
    before = our_logits(model)
    pattern = message.replace("[", r"\[").replace("{", r"\{")
    with pytest.raises(ValueError, match=pattern) as caught:
        ml.load_adapter(model, edited(FOLDER / "gpt2" / "patterns", tmp_path / "a", **REFUSED[message]))
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(our_logits(model), before)


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_are_accepted(name, tmp_path):
    model = minilora_model(FOLDER / "gpt2" / "base")
    ml.load_adapter(model, edited(FOLDER / "gpt2" / "patterns", tmp_path / "a", **{name: NEUTRAL[name]}))
    assert deviation(our_logits(model), load_file(FOLDER / "gpt2" / "expected.safetensors")["patterns"], name) < 1e-5


def test_an_adapter_of_another_kind_of_model_or_of_none(tmp_path):
    for kind, other in (("gpt2", "llama"), ("llama", "bert"), ("bert", "gpt2")):
        with pytest.raises(ValueError, match=r"does not fit this model: target_modules: .* there are|did you mean"):
            ml.load_adapter(minilora_model(FOLDER / kind / "base"), FOLDER / other / "patterns")
    folder = edited(FOLDER / "gpt2" / "patterns", tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which is never read"):
        ml.load_adapter(minilora_model(FOLDER / "gpt2" / "base"), folder)


@pytest.mark.parametrize("cut", [1, 100, 3000])
def test_a_truncated_adapter(cut, tmp_path):
    folder = edited(FOLDER / "gpt2" / "patterns", tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        ml.load_adapter(minilora_model(FOLDER / "gpt2" / "base"), folder)


# -- minilora's side ------------------------------------------------------------------------------------------------------------


def test_a_fully_trained_head_does_not_change_the_fingerprint(tmp_path):
    """The head of a base model is drawn at random at each load, so the trained head is not that of the base."""
    model = minilora_model(FOLDER / "bert" / "base")
    ml.inject(model, ml.LoraConfig(r=2, task_type="SEQ_CLS"), rng=0)
    model.classifier.weight.data = model.classifier.weight.data + 1
    ml.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier", "score"])
    again = minilora_model(FOLDER / "bert" / "base")
    again.classifier.weight.data = again.classifier.weight.data * 0
    ml.load_adapter(again, tmp_path)
    np.testing.assert_array_equal(our_logits(again), our_logits(model))


def test_a_rank_above_the_number_of_classes_explains_what_to_do():
    with pytest.raises(ValueError, match="rank 8 is beyond classifier, which is 12 x 3; task_type='SEQ_CLS' fully trains"):
        ml.inject(minilora_model(FOLDER / "bert" / "base"), ml.LoraConfig(r=8))


def test_manually_trained_parameters_are_not_lost_silently(tmp_path):
    model = minilora_model(FOLDER / "gpt2" / "base")
    ml.inject(model, ml.LoraConfig(r=2, target_modules=["c_attn"], bias="lora_only"), rng=0)
    model.freeze()  # after training, named parameters are still written
    ml.save_adapter(model, tmp_path / "a")
    assert "base_model.model.transformer.h.1.attn.c_attn.base_layer.bias" in load_file(tmp_path / "a" / "adapter_model.safetensors")
    model.transformer.ln_f.unfreeze()
    with pytest.raises(ValueError, match=r"transformer\.ln_f\.weight is trainable, but the configuration does not name it"):
        ml.save_adapter(model, tmp_path / "b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": {"c_atn": 4}}, "rank_pattern: 'c_atn' matches none of the adapted layers; did you mean .*c_attn"),
        ({"alpha_pattern": {"lm_head": 4}}, "alpha_pattern: 'lm_head' matches none"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules: 'q_proj' matches no module"),
        ({"exclude_modules": ".*q_proj"}, "exclude_modules: '.*q_proj' matches no module"),
        ({"layers_to_transform": [1]}, "layers_to_transform needs a list of names"),
        ({"target_modules": ["c_attn", "ln_1"]}, r"transformer\.h\.0\.ln_1 is not linear, but LayerNorm"),
    ],
)
def test_fields_without_effect_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ml.inject(minilora_model(FOLDER / "gpt2" / "base"), ml.LoraConfig(**{"r": 2, **fields}))
