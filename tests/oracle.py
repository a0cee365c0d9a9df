"""Shared by test_gpt2 and test_bert: the golden file of golden/make_models.py, and its models and adapters loaded into minilora."""

import warnings

import numpy as np
from golden import make_models
from safetensors.numpy import load_file, save_file
from small_tokenizers import BPE, library_wordpiece

import minilora as ml
from minilora.formats.atomic import read_json, write_json
from minilora.lora import lora_layers

GOLDEN = load_file(make_models.FILE)
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "bert": "BertForSequenceClassification"}


def part(name, kind):
    """{key: array} of the golden file under <name>.<kind>."""
    prefix = f"{name}.{kind}."
    return {key.removeprefix(prefix): value for key, value in GOLDEN.items() if key.startswith(prefix)}


def batch(name):
    """(ids, labels, offsets) of the packed sequences."""
    ids, labels = make_models.data(name)
    return np.concatenate(ids), labels, np.cumsum([0, *map(len, ids)])


def write_checkpoint(name, folder, dtype="float64", **config):
    """Write the golden model to a folder in the format of transformers."""
    labels = {"id2label": {str(i): f"L{i}" for i in range(3)}} if name == "bert" else {}
    folder.mkdir(exist_ok=True)
    write_json(
        folder / "config.json",
        {"model_type": name, "architectures": [ARCHITECTURES[name]], **make_models.CONFIGS[name], **labels, **config},
    )
    save_file({key: value.astype(dtype) for key, value in part(name, "weights").items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def bare_bert(folder):
    """Write the golden BERT without its head and with a tokenizer, the form of published sentence encoders."""
    write_checkpoint("bert", folder)
    weights = {name.removeprefix("bert."): value for name, value in part("bert", "weights").items() if name.startswith("bert.")}
    raw = {name: value for name, value in read_json(folder / "config.json").items() if name != "id2label"}
    write_json(folder / "config.json", raw | {"architectures": ["BertModel"]})
    save_file({name: value.astype("float32") for name, value in weights.items()}, folder / "model.safetensors")
    library_wordpiece().save(str(folder / "tokenizer.json"))
    return folder


def small_llama(folder):
    """Write a random Llama with the tokenizer BPE."""
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1}
    ml.save_model(ml.Llama(ml.LlamaConfig(vocab_size=BPE.vocab_size, max_position_embeddings=96, **sizes), rng=0), folder)
    BPE.save(folder)
    return folder


def adapted(name, folder, dtype, backend="numpy"):
    """The golden model with the golden adapter."""
    model = ml.load_model(write_checkpoint(name, folder), "numpy", dtype)
    ml.inject(model, ml.LoraConfig(**make_models.LORA[name]))
    values = part(name, "lora")
    layers = lora_layers(model)
    assert {f"{path}.lora_{x}.weight" for path, _ in layers for x in "AB"} == values.keys()
    for path, layer in layers:
        layer.lora_A.data = values[f"{path}.lora_A.weight"].T.astype(dtype)
        layer.lora_B.data = values[f"{path}.lora_B.weight"].T.astype(dtype)
    return model.to(backend)


def as_peft(model, values):
    """{PEFT's name: array in PEFT's orientation} from {path: array} of the trainable parameters."""
    result, linear = {}, {f"{path}.weight" for path, layer in model.modules() if isinstance(layer, ml.Linear)}
    for path, value in values.items():
        lora = path.endswith(("lora_A", "lora_B"))
        result[f"{path}.weight" if lora else path] = value.T if lora or (path in linear and not model.weights_are_in_out) else value
    return result


def gradients(model):
    return as_peft(model, {path: ml.to_numpy(p.grad) for path, p in model.parameters() if p.trainable})


def deviation(found, expected):
    """The largest difference, relative to the largest expected value, over all keys, which must be the same."""
    if not isinstance(expected, dict):
        found, expected = {"": ml.to_numpy(found)}, {"": expected}
    assert found.keys() == expected.keys()
    assert all(found[key].shape == expected[key].shape for key in expected)
    return max(float(np.abs(found[key] - expected[key]).max() / np.abs(expected[key]).max()) for key in expected)


def train(model, name):
    """Losses of the golden training run, computed by minilora."""
    ids, labels, offsets = batch(name)
    optimizer = ml.AdamW(model.parameters(), lr=make_models.LR, weight_decay=0.01)
    losses = []
    for _ in range(make_models.STEPS):
        loss, saved = model.loss(ids, labels, offsets)
        model.loss_backward(saved)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return np.array(losses)


def live(name):
    """The golden values, recomputed by the installed oracles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the oracles
        return make_models.golden(name)
