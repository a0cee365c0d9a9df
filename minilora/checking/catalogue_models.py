"""The part of the catalogue that is whole models, trained and adapted in every way (minilora/models)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from minilora.adapters import BottleneckConfig, PartialConfig, inject, mixed
from minilora.checking.subjects import OFFSETS, LossOf, Subject, shaken
from minilora.lora import LoraConfig
from minilora.models import GPT2, BertClassifier, BertConfig, GPT2Config, Llama, LlamaConfig
from minilora.models.bert import BertLayer

Change = Callable[[Any, np.random.Generator], object]


def models(rng: np.random.Generator) -> Iterator[Subject]:
    """Every model, with and without its loss, on three short sequences."""
    d: dict[str, Any] = {"rng": rng, "dtype": "float64"}
    ids = rng.integers(0, 7, 9)
    config = GPT2Config(vocab_size=7, n_positions=6, n_embd=6, n_layer=2, n_head=3, n_inner=9, dropout=0.1)
    labels = np.where(rng.random(9) < 0.3, -100, rng.integers(0, 7, 9))
    for name, change in _GPT2_VARIANTS.items():
        model = shaken(GPT2(config, **d), rng)
        change(model, rng)
        yield f"GPT2, {name}", model, ids, {"offsets": OFFSETS}
        yield f"GPT2.loss, {name}", LossOf(model, labels), ids, {"offsets": OFFSETS}

    encoder: dict[str, Any] = {"vocab_size": 7, "hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 9}
    encoder |= {"max_position_embeddings": 6, "dropout": 0.1}
    for name, alter in _BERT_VARIANTS.items():
        classifier = shaken(BertClassifier(BertConfig(**encoder, num_labels=3), **d), rng)
        alter(classifier, rng)
        yield f"BertClassifier.loss, {name}", LossOf(classifier, np.array([2, -100, 0])), ids, {"offsets": OFFSETS}
    yield "BertClassifier, head only", classifier, ids, {"offsets": OFFSETS}
    yield "BertLayer", shaken(BertLayer(BertConfig(**encoder), **d), rng), rng.standard_normal((9, 6)), {"offsets": OFFSETS}
    number = shaken(BertClassifier(BertConfig(**encoder, num_labels=1, pooling="mean", hidden_act="relu"), **d), rng)
    inject(number, LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"]), rng=rng)
    yield "BertClassifier.loss, regression on the mean", LossOf(number, np.array([0.7, -100, -1.2])), ids, {"offsets": OFFSETS}

    base = shaken(BertClassifier(BertConfig(**encoder, num_labels=3), **d), rng).freeze()
    several = [base, base.replica(), base.replica()]
    for twin in several[1:]:
        inject(twin, LoraConfig(r=2, target_modules=["query", "intermediate.dense"], layers_to_transform=[1]), rng=rng)
    yield "BertClassifier, mixed, LoRA on the last layer", mixed(several, [1, 0, 2], OFFSETS), ids, {"offsets": OFFSETS}

    for name, (options, change_llama) in _LLAMA_VARIANTS.items():
        sizes = {"vocab_size": 7, "hidden_size": 6, "intermediate_size": 9, "num_hidden_layers": 2, "head_dim": 4}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 6}
        llama = shaken(Llama(LlamaConfig(**{**sizes, **heads, **options}), **d), rng)
        change_llama(llama, rng)
        yield f"Llama, {name}", llama, ids, {"offsets": OFFSETS}
        yield f"Llama.loss, {name}", LossOf(llama, labels), ids, {"offsets": OFFSETS}


_BOTTLENECK = BottleneckConfig(reduction_factor=3, init_std=0.5)
_LAST = BottleneckConfig(reduction_factor=2, init_std=0.5, train=[], target_modules=r".*\.1\..*(output\.dense|mlp\.c_proj|o_proj)")

_GPT2_VARIANTS: dict[str, Change] = {
    "all trained": lambda model, rng: model,
    "LoRA on all linear layers": lambda model, rng: inject(model, LoraConfig(r=2, lora_dropout=0.2), rng=rng),
    "LoRA on the last block": lambda model, rng: inject(
        model, LoraConfig(r=2, target_modules=["c_attn", "c_fc"], layers_to_transform=[1]), rng=1
    ),
    "recomputed": lambda model, rng: setattr(model.transformer, "recompute", True),
    "biases only": lambda model, rng: inject(model, PartialConfig(train=["bias"])),
    "bottlenecks": lambda model, rng: inject(model, _BOTTLENECK, rng=rng),
    "bottleneck on the last mlp": lambda model, rng: inject(model, _LAST, rng=rng),
}


_BERT_VARIANTS: dict[str, Change] = {
    "all trained": lambda model, rng: model,
    "LoRA on query and value": lambda model, rng: inject(
        model, LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"]), rng=1
    ),
    "LoRA on all linear layers": lambda model, rng: inject(model, LoraConfig(r=2, lora_dropout=0.2), rng=rng),
    "LoRA on the last layer": lambda model, rng: inject(
        model, LoraConfig(r=2, target_modules=["key", "intermediate.dense"], layers_to_transform=[1]), rng=1
    ),
    "last intermediate only": lambda model, rng: model.freeze().bert.encoder.layer[1].intermediate.unfreeze(),
    "bottlenecks": lambda model, rng: inject(model, _BOTTLENECK, rng=rng),
    "bottlenecks in the last layer": lambda model, rng: inject(model, _LAST, rng=rng),
    "biases only": lambda model, rng: inject(model, PartialConfig(train=["bias"])),
    "norms only": lambda model, rng: inject(model, PartialConfig(train=["norm"])),
    "head only": lambda model, rng: inject(model, PartialConfig(train=["head"])),
}


_LLAMA_VARIANTS: dict[str, tuple[dict[str, Any], Change]] = {
    "all trained, tied": ({"tie_word_embeddings": True}, lambda model, rng: model),
    "all trained, free head, biases": ({"attention_bias": True, "mlp_bias": True}, lambda model, rng: model),
    "LoRA on all linear layers, qwen2": (
        {"model_type": "qwen2", "num_hidden_layers": 1},
        lambda model, rng: inject(model, LoraConfig(r=2, lora_dropout=0.2), rng=rng),
    ),
    "LoRA on the last v and gate, tied": (
        {"tie_word_embeddings": True},
        lambda model, rng: inject(model, LoraConfig(r=1, target_modules=["v_proj", "gate_proj"], layers_to_transform=[1]), rng=rng),
    ),
    "LoRA on k and the head": ({}, lambda model, rng: inject(model, LoraConfig(r=2, target_modules=["k_proj", "lm_head"]), rng=rng)),
    "head only": ({}, lambda model, rng: inject(model, PartialConfig(train=["head"]))),
    "bottlenecks": ({"mlp_bias": True}, lambda model, rng: inject(model, _BOTTLENECK, rng=rng)),
    "bottleneck on the last o_proj": ({}, lambda model, rng: inject(model, _LAST, rng=rng)),
    "norms only": ({}, lambda model, rng: inject(model, PartialConfig(train=["norm"]))),
}
