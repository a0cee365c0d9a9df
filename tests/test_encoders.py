"""RoBERTa, XLM-RoBERTa, DistilBERT and ModernBERT against transformers and PEFT; bad input. golden/make_encoders.py has the cases."""

import json
from itertools import pairwise

import numpy as np
import oracle
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import minilora as ml
from minilora.adapters import mixed
from minilora.adapters.extraction import extract
from minilora.formats.atomic import write_json
from minilora.formats.tokenizer import load_tokenizer
from minilora.kernels import dispatch
from minilora.lora import lora_layers
from minilora.models.modernbert import ModernBertConfig
from minilora.models.registry import ARCHITECTURES
from minilora.quantization.nf4 import is_nf4
from minilora.quantization.quantize import to_half_precision

with safe_open(__file__.replace("test_encoders.py", "golden/encoders.safetensors"), "np") as file:
    CONFIGS = json.loads(file.metadata()["about"])["configs"]
    GOLDEN = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
LENGTHS, LABELS = [5, 11, 1, 6], np.array([2, 0, -100, 1])
OFFSETS = np.cumsum([0, *LENGTHS])
LORA = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
STEPS, LR = 30, 3e-3


def part(name, kind):
    """{key: array} of a golden case under `kind`."""
    prefix = f"{name}|{kind}."
    return {key.removeprefix(prefix): value for key, value in GOLDEN.items() if key.startswith(prefix)}


def data(name):
    """As in make_encoders."""
    ids = [np.random.default_rng(7 + n).integers(0, CONFIGS[name]["vocab_size"], n) for n in LENGTHS]
    ids[1][3] = CONFIGS[name].get("pad_token_id", 0 if name == "distilbert" else 1)
    return np.concatenate(ids)


def write(name, folder, weights=None, **config):
    """The folder of a case, as transformers writes it."""
    folder.mkdir(exist_ok=True)
    architectures = [ARCHITECTURES[CONFIGS[name]["model_type"]].architectures[0]]
    write_json(folder / "config.json", {**CONFIGS[name], "architectures": architectures, **config})
    weights = part(name, "weights") if weights is None else weights
    save_file({key: value.astype("float32") for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def adapted(name, folder, dtype="float32", backend="numpy"):
    """The golden model with the golden adapter."""
    model = ml.load_model(write(name, folder), "numpy", dtype)
    assert {path for path, _ in model.parameters()} == part(name, "weights").keys()
    ml.inject(model, ml.LoraConfig(**LORA), rng=0)
    values = part(name, "lora")
    assert {f"{path}.lora_{x}.weight" for path, _ in lora_layers(model) for x in "AB"} == values.keys()
    for path, layer in lora_layers(model):
        layer.lora_A.data = values[f"{path}.lora_A.weight"].T.astype(dtype)
        layer.lora_B.data = values[f"{path}.lora_B.weight"].T.astype(dtype)
    return model.to(backend)


def logits(model, name):
    return ml.to_numpy(model.forward(data(name), keep=False, offsets=OFFSETS)[0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_loss_and_adapter_gradients_match_the_oracles(name, dtype, backend, tmp_path):
    model = adapted(name, tmp_path / "m", dtype, backend)
    loss, saved = model.loss(data(name), LABELS, OFFSETS)
    model.loss_backward(saved)
    assert logits(model, name).dtype == loss.dtype == dtype
    assert oracle.deviation(logits(model, name), GOLDEN[f"{name}|logits"]) < TOLERANCE[dtype]
    assert oracle.deviation(loss, GOLDEN[f"{name}|loss"]) < TOLERANCE[dtype]
    assert oracle.deviation(oracle.gradients(model), part(name, "grads")) < TOLERANCE[dtype]


def thirty_steps(name, folder):
    """The deviations of the losses, and of the trained parameters afterwards."""
    model, losses = adapted(name, folder / "m"), []
    optimizer = ml.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    for _ in range(STEPS):
        loss, saved = model.loss(data(name), LABELS, OFFSETS)
        model.loss_backward(saved)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    after = oracle.as_peft(model, {path: p.data for path, p in model.parameters() if p.trainable})
    return oracle.deviation(np.array(losses), GOLDEN[f"{name}|run"]), oracle.deviation(after, part(name, "after"))


@pytest.mark.parametrize("name", CONFIGS)
def test_thirty_steps_of_adamw_match_the_oracles(name, tmp_path):
    assert max(thirty_steps(name, tmp_path)) < 1e-4


# -- live -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def judge():
    """make_encoders, where its packages are installed."""
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason=f"the oracle {package} is not installed: pip install 'minilora[oracle]'")
    import sys

    from golden import make_models

    sys.modules.setdefault("make_models", make_models)
    from golden import make_encoders

    return make_encoders


LIVE = pytest.mark.filterwarnings("ignore")  # warnings of transformers


@LIVE
@pytest.mark.parametrize("name", CONFIGS)
def test_the_golden_file_matches_the_installed_oracles(name, judge):
    now = judge.golden(name)
    assert judge.CASES == CONFIGS
    assert now.keys() == {key for key in GOLDEN if key.startswith(f"{name}|")}
    for key, value in now.items():
        assert oracle.deviation(value, GOLDEN[key]) < (1e-4 if "|run" in key or "|after" in key else 1e-11), key


@LIVE
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_and_merged_models_both_ways(name, judge, tmp_path):
    """PEFT's adapter here, ours in PEFT, ours merged in transformers: the same logits."""
    import peft
    import transformers

    base = judge.build(name).float()
    base.save_pretrained(tmp_path / "base")
    theirs = judge.adapt(judge.build(name), name).float()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = judge.run(theirs, name)[0].detach().numpy()
    model = ml.load_model(tmp_path / "base", "numpy")
    before = logits(model, name)
    ml.load_adapter(model, tmp_path / "theirs")
    assert oracle.deviation(logits(model, name), expected) < 1e-5
    assert oracle.deviation(before, expected) > 1e-2

    rng = np.random.default_rng(0)
    for _, p in model.parameters():
        if p.trainable:
            p.data = p.data + rng.normal(0, 0.1, p.data.shape).astype(p.data.dtype)
    changed = logits(model, name)
    ml.save_adapter(model, tmp_path / "ours")
    assert (
        load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    )
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert oracle.deviation(judge.run(again, name)[0].detach().numpy(), changed) < 1e-5
    ml.merge(model)
    ml.save_model(model, tmp_path / "merged")
    merged, report = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    assert oracle.deviation(judge.run(merged.eval(), name)[0].detach().numpy(), changed) < 1e-5
    assert oracle.deviation(logits(ml.load_model(tmp_path / "merged", "numpy"), name), changed) < 1e-5


@LIVE
@pytest.mark.parametrize("name", CONFIGS)
def test_all_linear_layers_adapted_here_load_in_peft(name, judge, tmp_path):
    """Also of DistilBERT, for which PEFT's own "all-linear" fails: the file names the layers."""
    import peft

    ml.save_adapter(adapted(name, tmp_path / "m"), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(judge.build(name), tmp_path / "ours").double().eval()
    assert oracle.deviation(judge.run(theirs, name)[0].detach().numpy(), GOLDEN[f"{name}|logits"]) < 1e-5


@LIVE
@pytest.mark.parametrize("kind", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_without_a_classifier_get_one(name, kind, judge, tmp_path, capsys):
    """Hidden states are those of transformers; what is left out and what is drawn is said."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CONFIGS[name])
    theirs = getattr(transformers, "Auto" + kind.replace("For", "ModelFor")).from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    capsys.readouterr()
    ours = ml.load_model(tmp_path, "numpy", labels=4)
    said = capsys.readouterr().err
    assert "classifier" in said
    assert "initialised at random" in said
    assert ("the head for another task" in said) == (kind == "ForMaskedLM")
    body = theirs if kind == "Model" else theirs.base_model
    h = ours.body.forward(data(name), keep=False, offsets=OFFSETS)[0]
    expected = [body(input_ids=torch.tensor(data(name)[None, a:b])).last_hidden_state[0] for a, b in pairwise(OFFSETS)]
    assert oracle.deviation(h, torch.cat(expected).detach().numpy()) < 1e-5
    assert logits(ours, name).shape == (4, 4)


@LIVE
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_the_config_that_is_written(name, judge, tmp_path):
    import transformers

    config = ARCHITECTURES[CONFIGS[name]["model_type"]].config
    theirs = transformers.AutoConfig.for_model(**CONFIGS[name])
    ours = config.from_json(json.loads(theirs.to_json_string(use_diff=False)))
    again = transformers.AutoConfig.for_model(**ours.to_json())
    unlike = {key for key, value in theirs.to_dict().items() if again.to_dict()[key] != value}
    unread = {"architectures", "initializer_range", "dtype"}  # save_model writes the tokens from the model's own file
    assert not {key for key in unlike - unread if "dropout" not in key and key[:4] not in ("bos_", "eos_", "cls_", "sep_")}
    assert config.from_json(ours.to_json()) == ours


def test_modernbert_has_its_rotary_settings_from_transformers_4_and_5():
    old = {"global_rope_theta": 500.0, "local_rope_theta": 20, "global_attn_every_n_layers": 2, "num_hidden_layers": 3}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    thetas = {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 20, "rope_type": "default"}}
    new = {"layer_types": kinds, "rope_parameters": thetas, "num_hidden_layers": 3, "global_rope_theta": 7.0}  # unread beside the other
    old, new = (ModernBertConfig.from_json({"model_type": "modernbert", **raw}) for raw in (old, new))
    for config in (old, new):
        assert [config.kind(i) for i in range(3)] == kinds
        assert (config.global_rope_theta, config.local_rope_theta) == (500, 20)


# -- what is saved, packed sequences, precision ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_do_not_affect_each_other_and_gradients_of_shards_add_up(name, backend, tmp_path):
    model, ids = adapted(name, tmp_path / "m", "float64", backend), data(name)
    together = logits(model, name)

    def gradient(parts):
        model.zero_grad()
        for a, b in parts:
            first, last = OFFSETS[a], OFFSETS[b]
            _, saved = model.loss(ids[first:last], LABELS[a:b], OFFSETS[a : b + 1] - first, 3)
            model.loss_backward(saved)
        return oracle.gradients(model)

    for i, (a, b) in enumerate(pairwise(OFFSETS)):
        np.testing.assert_allclose(ml.to_numpy(model.forward(ids[a:b], keep=False)[0])[0], together[i], rtol=1e-9)
    whole = gradient([(0, 4)])
    assert oracle.deviation(gradient([(0, 2), (2, 4)]), whole) < 1e-12
    model.body.recompute = True
    assert oracle.deviation(gradient([(0, 4)]), whole) < 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_of_frozen_blocks_may_be_passed_in(name, backend, tmp_path):
    model, ids = ml.load_model(write(name, tmp_path / "m"), backend, "float64"), data(name)
    assert model.body.prefix(ids, OFFSETS).blocks == model.config.num_hidden_layers - 1
    targets = r".*\.1\..*(query|q_lin|Wqkv)"
    ml.inject(model, ml.LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS", init_lora_weights=False), rng=0)
    results = []
    for prefix in (None, model.body.prefix(ids, OFFSETS)):
        loss, saved = model.loss(ids, LABELS, OFFSETS, prefix=prefix)
        model.zero_grad()
        model.loss_backward(saved)
        results.append((loss, oracle.gradients(model)))
    assert prefix.blocks == 1
    assert float(results[0][0]) == float(results[1][0])
    assert oracle.deviation(results[1][1], results[0][1]) < 1e-12


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_of_several_adapters(name, backend, tmp_path):
    """Each sequence has the logits of its own adapter, and of its own head."""
    base = ml.load_model(write(name, tmp_path / "m"), backend, "float64")
    models = [base, base.replica(), base.replica()]
    for seed, model in enumerate(models[1:]):
        ml.inject(model, ml.LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False), rng=seed)
        for path, p in model.parameters():
            if path.startswith("classifier"):
                p.data = p.data + seed + 1
    found = logits(mixed(models, [2, 0, 1, 2], OFFSETS), name)
    for i, k in enumerate([2, 0, 1, 2]):
        np.testing.assert_allclose(found[i], logits(models[k], name)[i], rtol=1e-9)


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float16"}, {"quantize": "nf4"}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_and_nf4(name, options, backend, tmp_path):
    """Close to float32, and adapters train."""
    expected = ml.load_model(write(name, tmp_path / "m"), "numpy")
    model = ml.load_model(tmp_path / "m", backend, **options)
    assert oracle.deviation(logits(model, name), logits(expected, name)) < (0.5 if "quantize" in options else 0.05)
    ml.inject(model, ml.LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear"), rng=0)
    _, saved = model.loss(data(name), LABELS, OFFSETS)
    model.loss_backward(saved)
    assert all(bool(np.isfinite(ml.to_numpy(p.grad)).all()) and p.grad.dtype == "float32" for _, p in model.parameters() if p.trainable)


HEADS = {"roberta": {"classifier"}, "distilbert": {"pre_classifier", "classifier"}, "modernbert": {"classifier"}}


@pytest.mark.parametrize("name", HEADS)
def test_what_is_new_in_a_head_is_neither_quantized_nor_extracted_but_trained(name, tmp_path):
    """The names of these modules end with "classifier", by which PEFT trains them fully."""
    base = ml.load_model(write(name, tmp_path / "m"), "numpy", "float64")
    heads = [path for path, _ in base.parameters() if path.partition(".")[0] in HEADS[name]]
    quantized = ml.load_model(tmp_path / "m", "numpy", quantize="nf4")
    assert sorted(path for path, p in quantized.parameters() if p.data.ndim == 2 and not is_nf4(p.data) and "embed" not in path) == sorted(
        path for path in heads if path.endswith("weight")
    )
    tuned = ml.load_model(tmp_path / "m", "numpy", "float64")
    for i, (path, p) in enumerate(tuned.parameters()):
        if "embeddings" not in path:
            p.data = p.data + np.random.default_rng(i).normal(0, 0.1, p.data.shape)
    found, layers = extract(base, tuned, energy=1.0)
    assert not {layer.path for layer in layers} & {path.rpartition(".")[0] for path in heads}
    assert oracle.deviation(logits(found, name), logits(tuned, name)) < 1e-9
    ml.inject(base, ml.PartialConfig(train=["head"]))
    assert [path for path, p in base.parameters() if p.trainable] == heads


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_block_runs_on_the_rows_that_the_head_reads(name, tmp_path, monkeypatch):
    model = adapted(name, tmp_path / "m", "float64")
    last, rows = model.body.parts().blocks[-1], []
    forward = type(last).forward
    monkeypatch.setattr(
        type(last), "forward", lambda self, *args, **options: rows.append(options["rows"]) or forward(self, *args, **options)
    )
    model.loss(data(name), LABELS, OFFSETS)
    mean = model.config.pooling == "mean"
    assert rows[:-1] == [None] * (len(rows) - 1)
    assert rows[-1] is None if mean else rows[-1].tolist() == OFFSETS[:-1].tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modernbert_beyond_the_blocks_of_the_kernels(dtype, backend, monkeypatch):
    """Texts longer than a window and than a block of queries, heads for tensor cores: loss and gradients are those of the reference."""
    sizes = {"vocab_size": 50, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 40, "num_hidden_layers": 2}
    config = ModernBertConfig(**sizes, max_position_embeddings=300, local_attention=64, pad_token_id=None, pooling="mean")
    model = ml.BertClassifier(config, rng=0)
    if dtype == "bfloat16":
        to_half_precision(model, dtype)
    ml.inject(model.to(backend), ml.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), rng=0)
    ids, offsets = np.random.default_rng(0).integers(0, 50, 480), [0, 300, 307, 480]

    def step():
        model.zero_grad()
        loss, saved = model.loss(ids, np.array([0, 1, 1]), offsets)
        model.loss_backward(saved)
        return float(loss), oracle.gradients(model)

    loss, found = step()
    monkeypatch.setattr(dispatch, "PLAIN", True)
    expected_loss, expected = step()
    tolerance = 1e-5 if dtype == "float32" else 0.05
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    largest = max(float(np.abs(g).max()) for g in expected.values())
    assert max(float(np.abs(found[key] - g).max()) for key, g in expected.items()) < tolerance * largest


# -- bad input ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_longer_than_the_positions(name, tmp_path):
    model = ml.load_model(write(name, tmp_path / "m"), "numpy")
    c = model.config
    longest = c.max_position_embeddings - (c.pad_token_id + 1 if "roberta" in name else 0)
    ids = np.full(longest + 1, 7)
    assert model.forward(ids[1:], keep=False)[0].shape == (1, 3)
    with pytest.raises(ValueError, match=f"a sequence of {longest + 1} tokens is longer than the model's {longest} positions"):
        model.forward(ids, keep=False)


BAD = {
    "roberta": [
        ({"hidden_size": 13}, "hidden_size 13 is not a multiple"),
        ({"intermediate_size": 21}, "intermediate.dense.weight has shape"),
        ({"num_hidden_layers": 3}, r"lacks 'roberta.encoder.layer.2"),
        ({"num_hidden_layers": 1}, r"has 'roberta.encoder.layer.1"),
        ({"type_vocab_size": 2}, "token_type_embeddings.weight has shape"),
        ({"max_position_embeddings": 14}, "position_embeddings.weight has shape"),
        ({"pad_token_id": None}, "places begin after pad_token_id None"),
        ({"pad_token_id": 12}, "13 places begin after pad_token_id 12"),
        ({"model_type": "bert", "architectures": []}, "lacks 'bert.embeddings"),
        ({"model_type": "distilbert"}, "architecture 'RobertaForSequenceClassification'; supported: DistilBertForSeq"),
    ],
    "distilbert": [
        ({"hidden_dim": 21}, "ffn.lin1.weight has shape"),
        ({"intermediate_size": 20}, "has intermediate_size 20; supported: no such field"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu'; supported: no such field"),
        ({"activation": "silu"}, "hidden_act is 'silu'; supported: gelu"),
        ({"hidden_size": 24}, "hidden_size is 24, but dim|dim is 12, but hidden_size"),
    ],
    "modernbert": [
        ({"norm_bias": True}, "lacks 'head.norm.bias'"),
        ({"attention_bias": True}, r"lacks 'model.layers.0.attn.Wo.bias'"),
        ({"intermediate_size": 34}, r"model.layers.0.mlp.Wi.weight has shape \(12, 34\), the model expects \(12, 68\)"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types must be 4 of full_attention and sliding_attention"),
        ({"num_attention_heads": 4}, "a head has 3 features"),
    ],
}


@pytest.mark.parametrize(("name", "change", "message"), [(name, *case) for name, cases in BAD.items() for case in cases])
def test_a_config_that_contradicts_its_tensors_or_is_not_supported(name, change, message, tmp_path):
    folder = write(name, tmp_path / "m", **change)
    with pytest.raises(ValueError, match=message) as caught:
        ml.load_model(folder, "numpy")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_adapter_for_another_architecture_of_the_same_sizes(tmp_path):
    """BERT and RoBERTa have blocks of the same names: the adapter of one is refused by the other, unless it names no head."""
    roberta = adapted("roberta", tmp_path / "roberta")
    ml.save_adapter(roberta, tmp_path / "adapter")
    bert = ml.load_model(oracle.write_checkpoint("bert", tmp_path / "bert"), "numpy")
    with pytest.raises(ValueError, match="adapter"):
        ml.load_adapter(bert, tmp_path / "adapter")
    assert not lora_layers(bert)
    distilbert = ml.load_model(write("distilbert", tmp_path / "distilbert"), "numpy")
    with pytest.raises(ValueError, match="no linear layer is called"):
        ml.load_adapter(distilbert, tmp_path / "adapter")
    roberta = ml.load_model(tmp_path / "roberta", "numpy")
    ml.inject(roberta, ml.LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION"), rng=0)  # without the names' prefix
    ml.save_adapter(roberta, tmp_path / "bare")
    with pytest.raises(ValueError, match="weights"):
        ml.load_adapter(bert, tmp_path / "bare")


def test_a_tokenizer_beyond_the_embedding(tmp_path):
    from small_tokenizers import roberta_bpe, write_tokenizer

    library, settings = roberta_bpe(), {"tokenizer_class": "RobertaTokenizer"}
    rows = library.get_vocab_size()
    assert load_tokenizer(write_tokenizer(tmp_path / "a", library, settings), rows).vocab_size == rows
    folder = write_tokenizer(tmp_path / "b", library, {**settings, "additional_special_tokens": ["<new>"]})
    with pytest.raises(ValueError, match=rf"the tokenizer has ids up to {rows}, but the model's embedding has {rows} rows"):
        load_tokenizer(folder, rows)
