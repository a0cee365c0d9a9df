"""Tiny models, inputs and files that several tests share."""

import json

import numpy as np

import minilora as ml

CONFIG = ml.GPT2Config(vocab_size=11, n_positions=8, n_embd=6, n_layer=2, n_head=3)
SIZES = {"vocab_size": 11, "max_position_embeddings": 8, "hidden_size": 6, "num_attention_heads": 3, "num_hidden_layers": 2}
IDS = np.array([1, 5, 2, 10, 0, 7, 7])


def gpt2(**options):
    return ml.GPT2(CONFIG, rng=0, **options)


def tiny_model(kind, dtype="float64"):
    """A "gpt2", "bert" (three classes), "llama", or "tied" (a Llama whose head is its embedding)."""
    if kind == "gpt2":
        return gpt2(dtype=dtype)
    if kind == "bert":
        return ml.BertClassifier(ml.BertConfig(**SIZES, intermediate_size=9, num_labels=3), rng=0, dtype=dtype)
    return ml.Llama(ml.LlamaConfig(**SIZES, intermediate_size=9, tie_word_embeddings=kind == "tied"), rng=0, dtype=dtype)


def logits(model):
    return model.forward(IDS, keep=False)[0]


def write_jsonl(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
