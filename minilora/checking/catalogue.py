"""Everything that has a gradient here, ready to be checked: what `minilora gradcheck` and the tests check.

Pairs and layers are in files of their own; here are the models, trained and adapted in every way.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from minilora.adapters import BottleneckConfig, PartialConfig, inject, mixed
from minilora.backend import to_backend
from minilora.checking.catalogue_layers import adapters, large, layers
from minilora.checking.catalogue_pairs import pairs
from minilora.checking.gradcheck import gradcheck
from minilora.checking.report import Report
from minilora.checking.subjects import OFFSETS, LossOf, Subject, frozen_but, shaken
from minilora.lora import LoraConfig, lora_layers
from minilora.models import GPT2, BertClassifier, BertConfig, GPT2Config, Llama, LlamaConfig
from minilora.models.bert import BertLayer, BertSelfAttention, DistilBertConfig
from minilora.models.modernbert import ModernBertConfig

Change = Callable[[Any], object] | LoraConfig | BottleneckConfig | PartialConfig | None  # what to do with a model, or inject into it


def catalogue(seed: int = 0) -> Iterator[Subject]:
    """(name, object, x, forward options) of every pair, layer and model, on small odd shapes, in float64 on NumPy."""
    rng = np.random.default_rng(seed)
    for part in (pairs, layers, large, adapters, models):
        yield from part(rng)


def check_all(backend: str = "numpy", tol: float = 1e-7) -> Iterator[tuple[str, Report]]:
    """(name, report) for everything in the catalogue, on a backend."""
    for name, layer, x, options in catalogue():
        on_device = x if x.dtype.kind != "f" else to_backend(x, backend)
        yield name, gradcheck(layer.to(backend), on_device, tol=tol, max_coordinates=40 if x.size < 1000 else 4, **options)


def models(rng: np.random.Generator) -> Iterator[Subject]:
    """Every model, with and without its loss, on three short sequences."""
    d: dict[str, Any] = {"rng": rng, "dtype": "float64"}
    ids, at = rng.integers(0, 7, 9), {"offsets": OFFSETS}
    labels = np.where(rng.random(9) < 0.3, -100, rng.integers(0, 7, 9))

    def changed(model: Any, change: Change) -> Any:
        shaken(model, rng)
        if callable(change):
            change(model)
        elif change is not None:
            inject(model, change, rng=rng)
        return model

    def bert(change: Change, **options: Any) -> Any:
        return changed(BertClassifier(BertConfig(**{**_BERT, **options}), **d), change)

    decoders: dict[str, Any] = {
        f"GPT2, {name}": (GPT2, GPT2Config(**_GPT2, dropout=0.1), change) for name, change in _GPT2_VARIANTS.items()
    }
    for name, (options, change) in _LLAMA_VARIANTS.items():
        decoders[f"Llama, {name}"] = Llama, LlamaConfig(**{**_LLAMA, **options}), change
    for name, (kind, config, change) in decoders.items():
        model = changed(kind(config, **d), change)
        yield name, model, ids, at
        yield name.replace(",", ".loss,", 1), LossOf(model, labels), ids, at
    counted = changed(GPT2(GPT2Config(**_GPT2), **d), _LAST)
    yield "GPT2.loss, a count", LossOf(counted, labels, count=11), ids, at
    one_block = GPT2Config(**{**_GPT2, "n_layer": 1})
    dora = GPT2(one_block, **d)
    inject(dora, LoraConfig(r=2, use_dora="exact"), rng=rng)
    yield "GPT2, DoRA", dora, ids[:6], {}
    tied = changed(GPT2(one_block, **d), LoraConfig(r=2, target_modules=["wte", "wpe", "c_fc"]))
    for _, layer in lora_layers(tied):
        shaken(layer, rng, layer.trains)
    yield "GPT2.loss, embeddings adapted, head tied", LossOf(tied, np.append(ids[1:6], -100)), ids[:6], {}

    for name, change in _BERT_VARIANTS.items():
        yield f"BertClassifier.loss, {name}", LossOf(bert(change), np.array([2, -100, 0])), ids, at
    yield "BertClassifier, head only", bert(_BERT_VARIANTS["head only"]), ids, at
    yield "BertLayer", shaken(BertLayer(BertConfig(**_BERT), **d), rng), rng.standard_normal((9, 6)), at
    yield "BertClassifier.loss, a count", LossOf(bert(_BERT_VARIANTS["head only"]), np.array([2, -100, 0]), count=5), ids, at
    yield "BertSelfAttention, frozen", BertSelfAttention(6, 3, 3, 2, True, rng, "float64").freeze(), rng.standard_normal((9, 6)), at
    for part in ("output.LayerNorm", "output.dense", "intermediate", "attention.output.LayerNorm", "attention.output.dense"):
        config = BertConfig(**{**_BERT, "dropout": 0.0})  # where nothing below is trained, dropout is off, and y another one
        layer = frozen_but(shaken(BertLayer(config, **d), rng), part)
        yield f"BertLayer, {part} trained", layer, rng.standard_normal((9, 6)), at
    number = bert(_BERT_VARIANTS["LoRA on query and value"], num_labels=1, pooling="mean", hidden_act="relu")
    yield "BertClassifier.loss, regression on the mean", LossOf(number, np.array([0.7, -100, -1.2])), ids, at
    yield "BertClassifier.loss, regression, a count", LossOf(number, np.array([0.7, -100, -1.2]), count=5), ids, at
    for kind, config in _ENCODERS.items():
        for name, change in _ENCODER_VARIANTS.items():
            yield f"{kind}.loss, {name}", LossOf(changed(BertClassifier(config, **d), change), np.array([2, -100, 0])), ids, at
    base = bert(None).freeze()
    several = [base, base.replica(), base.replica()]
    for replica in several[1:]:
        inject(replica, LoraConfig(r=2, target_modules=["query", "intermediate.dense"], layers_to_transform=[1]), rng=rng)
    yield "BertClassifier, mixed, LoRA on the last layer", mixed(several, [1, 0, 2], OFFSETS), ids, at
    upper = changed(GPT2(GPT2Config(**{**_GPT2, "n_layer": 3}), **d), LoraConfig(r=2, layers_to_transform=[1, 2], target_modules=["c_fc"]))
    yield "GPT2.loss, LoRA on two blocks above a prefix", LossOf(upper, labels, prefix=True), ids, at


_GPT2: dict[str, Any] = {"vocab_size": 7, "n_positions": 6, "n_embd": 6, "n_head": 3, "n_inner": 9, "n_layer": 2}
_SIZES: dict[str, Any] = {"vocab_size": 7, "hidden_size": 6, "intermediate_size": 9, "num_hidden_layers": 2, "max_position_embeddings": 6}
_BERT: dict[str, Any] = {**_SIZES, "num_attention_heads": 3, "dropout": 0.1, "num_labels": 3}
_PADDED = {"vocab_size": 8, "pad_token_id": 7, "max_position_embeddings": 13}  # padding has no gradient, and so is not among the ids
_MODERN = {**_BERT, "hidden_size": 12, "pad_token_id": None, "local_attention": 2}
_BIASED: dict[str, Any] = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
_ENCODERS = {
    "RoBERTa": BertConfig(**{**_BERT, **_PADDED}, model_type="roberta", type_vocab_size=1),
    "DistilBERT": DistilBertConfig(**_BERT),
    "ModernBERT": ModernBertConfig(**_MODERN, global_attn_every_n_layers=2),
    "ModernBERT, mean, biases": ModernBertConfig(**_MODERN, **_BIASED, pooling="mean", layer_types=["sliding_attention"] * 2),
}
_LLAMA: dict[str, Any] = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}

_ALL_LINEAR = LoraConfig(r=2, lora_dropout=0.2)
_BIASES, _NORMS, _HEAD = (PartialConfig(train=[part]) for part in ("bias", "norm", "head"))
_BOTTLENECK = BottleneckConfig(reduction_factor=3, init_std=0.5)
_LAST = BottleneckConfig(reduction_factor=2, init_std=0.5, train=[], target_modules=r".*\.1\..*(output\.dense|mlp\.c_proj|o_proj)")

_GPT2_VARIANTS: dict[str, Change] = {
    "all trained": None,
    "LoRA on all linear layers": _ALL_LINEAR,
    "LoRA on the last block": LoraConfig(r=2, target_modules=["c_attn", "c_fc"], layers_to_transform=[1]),
    "recomputed": lambda model: setattr(model.body, "recompute", True),
    "biases only": _BIASES,
    "bottlenecks": _BOTTLENECK,
    "bottleneck on the last mlp": _LAST,
}
_BERT_VARIANTS: dict[str, Change] = {
    "all trained": None,
    "LoRA on query and value": LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"]),
    "LoRA on all linear layers": _ALL_LINEAR,
    "LoRA on the last layer": LoraConfig(r=2, target_modules=["key", "intermediate.dense"], layers_to_transform=[1]),
    "last intermediate only": lambda model: model.freeze().bert.encoder.layer[1].intermediate.unfreeze(),
    "bottlenecks": _BOTTLENECK,
    "bottlenecks in the last layer": _LAST,
    "biases only": _BIASES,
    "norms only": _NORMS,
    "head only": _HEAD,
}
_ENCODER_VARIANTS = {
    "all trained": None,
    "LoRA on all linear layers, head": LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"),
    "LoRA on the last block": LoraConfig(r=1, target_modules=r".*\.1\..*(query|q_lin|Wqkv|Wi)"),
    "norms only": _NORMS,
    "bottleneck on the last Wo": BottleneckConfig(train=[], target_modules=r".*\.1\.(mlp\.Wo|output\.dense|ffn\.lin2)"),
    "head only": _HEAD,
}
_TIED = {"tie_word_embeddings": True}
_YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 3}
_QWEN3 = {"model_type": "qwen3", "attention_bias": True, "use_sliding_window": True, "sliding_window": 2, "max_window_layers": 1}
_GEMMA3 = {"model_type": "gemma3_text", "sliding_window": 2, "sliding_window_pattern": 2, "query_pre_attn_scalar": 3, **_TIED}
_LLAMA_VARIANTS: dict[str, tuple[dict[str, Any], Change]] = {
    "all trained, tied": (_TIED, None),
    "all trained, free head, biases": ({"attention_bias": True, "mlp_bias": True}, None),
    "LoRA on all linear layers, qwen2": ({"model_type": "qwen2", "num_hidden_layers": 1}, _ALL_LINEAR),
    "LoRA on the last v and gate, tied": (_TIED, LoraConfig(r=1, target_modules=["v_proj", "gate_proj"], layers_to_transform=[1])),
    "LoRA on k and the head": ({}, LoraConfig(r=2, target_modules=["k_proj", "lm_head"])),
    "all trained, scaled frequencies": ({"rope_scaling": _YARN, "num_hidden_layers": 1}, None),
    "all trained, qwen3, a window": (_QWEN3, None),
    "LoRA on q, k, v and o, qwen3": (_QWEN3, LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])),
    "LoRA on the last v, qwen3": (_QWEN3, LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[1])),
    "norms only, qwen3": (_QWEN3, _NORMS),
    "LoRA on all linear layers, mistral": ({"model_type": "mistral", "sliding_window": 2, "num_hidden_layers": 1}, _ALL_LINEAR),
    "all trained, smollm3, without rotation": ({"model_type": "smollm3", "no_rope_layers": [0, 1]}, None),
    "all trained, gemma3": (_GEMMA3, None),
    "LoRA on the last gate, gemma3": (_GEMMA3, LoraConfig(r=2, target_modules=["gate_proj"], layers_to_transform=[1])),
    "LoRA on the last up, gemma3": (_GEMMA3, LoraConfig(r=2, target_modules=["up_proj"], layers_to_transform=[1])),
    "norms only, gemma3": (_GEMMA3, _NORMS),
    "the last norm after attention, gemma3": (_GEMMA3, lambda model: frozen_but(model, "model.layers.1.post_attention_layernorm")),
    "the last norm after the mlp, gemma3": (_GEMMA3, lambda model: frozen_but(model, "model.layers.1.post_feedforward_layernorm")),
    "the last k_norm, gemma3": (_GEMMA3, lambda model: frozen_but(model, "model.layers.1.self_attn.k_norm")),
    "head only": ({}, _HEAD),
    "bottlenecks": ({"mlp_bias": True}, _BOTTLENECK),
    "bottleneck on the last o_proj": ({}, _LAST),
    "norms only": ({}, _NORMS),
    "the last o_proj": ({}, lambda model: frozen_but(model, "model.layers.1.self_attn.o_proj")),
    "the last down_proj": ({}, lambda model: frozen_but(model, "model.layers.1.mlp.down_proj")),
}
