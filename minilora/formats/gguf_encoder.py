"""BERT and its relatives in GGUF files. llama.cpp keeps them as embedding models, of architecture "bert" or "modern-bert".

Which relative a file of "bert" holds, its tokenizer says: byte-level BPE is RoBERTa's, unigrams are XLM-RoBERTa's, WordPiece is BERT's, or
DistilBERT's where there are no token types. Undone is what conversion/bert.py of https://github.com/ggml-org/llama.cpp does: the first
pad_token_id + 1 positions of RoBERTa are cut off, and the layers of a head are called cls and cls.output. BERT's pooler is left out.
"""

from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats.gguf_header import SIZES, Tensor, dequantized, short
from minilora.models.config_file import made
from minilora.models.modernbert import GLOBAL, LOCAL
from minilora.models.registry import ARCHITECTURES as FAMILIES

ARCHITECTURES = ("bert", "modern-bert")
_TOP = "embeddings.word_embeddings embeddings.position_embeddings embeddings.token_type_embeddings embeddings.LayerNorm"
_BERT = """attention.self.query attention.self.key attention.self.value attention.output.dense attention.output.LayerNorm
    intermediate.dense output.dense output.LayerNorm"""
_DISTILBERT = "attention.q_lin attention.k_lin attention.v_lin attention.out_lin sa_layer_norm ffn.lin1 ffn.lin2 output_layer_norm"
_MODERNBERT = "embeddings.tok_embeddings embeddings.norm final_norm", "layers", "attn_norm attn.Wqkv attn.Wo mlp_norm mlp.Wi mlp.Wo"
_ROBERTA = (_TOP, "encoder.layer", _BERT), ("classifier.dense", "classifier.out_proj")
_NAMES = {  # (modules at the top, the list of blocks, modules of a block), (cls, cls.output)
    "bert": ((_TOP, "encoder.layer", _BERT), ("bert.pooler.dense", "classifier")),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": ((_TOP, "transformer.layer", _DISTILBERT), ("pre_classifier", "classifier")),
    "modernbert": (_MODERNBERT, ("head.dense", "classifier")),
}
_EPS = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"  # of ModernBERT the first is norm_eps, which transformers reads
_OFF = "expert_count moe_every_n_layers attention.causal attention.max_alibi_bias attention.clamp_kqv attention.scale"
FIXED = {**dict.fromkeys(_OFF.split(), 0), "rope.scaling.type": "none"}  # the only supported values
READ = {*_EPS, "attention.head_count_kv", "classifier.output_labels", "classifier.pooling_type", "pooling_type", "vocab_size"}
READ |= {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base", "rope.freq_base_swa", "hidden_activation"}
_TYPES = "token_types.weight"
_MEAN, _FIRST = 1, 2  # kinds of pooling
_POOLING = 0, _MEAN, _FIRST, 4  # none ... a head: of sentence embeddings, of which neither the hidden states nor our heads depend


def model_type(meta: dict[str, Any], stored: dict[str, Tensor]) -> str:
    """The model_type of transformers that computes what a file of ARCHITECTURES holds."""
    if meta["general.architecture"] == "modern-bert":
        return "modernbert"
    kind = {"gpt2": "roberta", "t5": "xlm-roberta"}.get(str(meta.get("tokenizer.ggml.model")), "bert")
    return "distilbert" if kind == "bert" and _TYPES not in stored else kind


def configuration(found: dict[str, Any], meta: dict[str, Any], stored: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """An encoder as in transformers' config.json. found: the metadata of the architecture, which has all SIZES, and only READ and FIXED
    besides. Raises ValueError for what is not supported, and for contradictions.

    What a file does not say is as published: GELU (llama.cpp computes its approximation by tanh), and in ModernBERT a head that reads the
    mean, as there.
    """
    kind = model_type(meta, stored)
    modern, counts = kind == "modernbert", "roberta" in kind
    rows, width = stored["token_embd.weight"].shape
    depth, heads, d = (found[name] for name in ("block_count", "attention.head_count", "embedding_length"))
    labels, pooling = found.get("classifier.output_labels", []), found.get("pooling_type", 0)
    reads = found.get("classifier.pooling_type", _MEAN if modern else _FIRST)
    eps = [short(found[name]) for name in _EPS[not modern :] if name in found] or [None]
    for fits, why in (
        (type(depth) is int and 0 < depth <= len(stored), f"block_count is {depth!s:.40}, but there are {len(stored)} tensors"),
        (width == d, f"embedding_length is {d!s:.40}, but token_embd.weight has {width} columns"),
        (eps[0] is not None, f"{_EPS[1]} is missing"),
        (kind != "distilbert" or eps == [1e-12], f"it has no token types, as a DistilBERT, whose {_EPS[1]} is 1e-12 and not {eps[0]}"),
        (found.get("attention.head_count_kv", heads) == heads, f"there are {heads!s:.40} heads, but attention.head_count_kv differs"),
        (pooling in _POOLING, f"pooling_type {pooling!s:.40} is not supported"),
        (reads == _FIRST or (modern and reads == _MEAN), f"classifier.pooling_type {reads!s:.40} is not supported"),
        (isinstance(labels, list) and all(isinstance(label, str) for label in labels), "classifier.output_labels is no list of names"),
    ):
        if not fits:
            raise ValueError(f"{path}: {why}.")
    values = {field: found[name] for name, field in SIZES.items()} | {"model_type": kind, "vocab_size": rows, "layer_norm_eps": eps[0]}
    values["pad_token_id"] = pad = meta.get("tokenizer.ggml.padding_token_id", None if modern else int(counts))
    if counts and type(pad) is type(found["context_length"]) is int:
        values["max_position_embeddings"] += pad + 1
    if _TYPES in stored and stored[_TYPES].shape:
        values["type_vocab_size"] = stored[_TYPES].shape[0]
    out = output_layer(kind, stored)
    n = out.shape[0] if out is not None and out.shape else len(labels) or 2
    values |= {"num_labels": n, "id2label": dict(enumerate(labels)) or None}
    if modern:
        window, pattern = found.get("attention.sliding_window"), found.get("attention.sliding_window_pattern", 3)
        if type(pattern) is int:
            pattern = [pattern == 0 or i % pattern for i in range(depth)]
        values |= {
            "local_attention": window or 128,
            "layer_types": [LOCAL if window and local else GLOBAL for local in pattern] if isinstance(pattern, list) else pattern,
            "global_rope_theta": short(found.get("rope.freq_base", 1e4)),
            "local_rope_theta": short(found.get("rope.freq_base_swa", 1e4)),
            "hidden_act": found.get("hidden_activation", "gelu"),
            "pooling": "mean" if reads == _MEAN else "cls",
        }
        biases = {"attention": "blk.0.attn_qkv", "mlp": "blk.0.ffn_up", "norm": "output_norm", "classifier": "cls"}
        values |= {f"{name}_bias": f"{stem}.bias" in stored for name, stem in biases.items()}
    return made(FAMILIES[kind].config, values, str(path)).to_json()


def tensors(config: dict[str, Any], stored: dict[str, Tensor], path: Path, dtype: Any) -> dict[str, np.ndarray]:
    """{path as in transformers: array} of an encoder with this configuration, (out, in), dequantized to `dtype`.

    The positions of RoBERTa that were cut off are zero. Those below pad_token_id are never read; that of padding is zero as published.
    """
    import gguf

    kind = config["model_type"]
    family, (top, blocks, parts) = FAMILIES[kind], _NAMES[kind][0]
    depth = (c := family.config.from_json(config)).num_hidden_layers
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MODERN_BERT if kind == "modernbert" else gguf.MODEL_ARCH.BERT, depth)
    bare = [*top.split(), *(f"{blocks}.{i}.{part}" for i in range(depth) for part in parts.split())]
    published = {names.get_name(name): family.prefix + name for name in bare} | _head(kind, stored)
    result: dict[str, np.ndarray] = {}
    for tensor in stored.values():
        value, (stem, _, what) = dequantized(tensor, path), tensor.name.rpartition(".")
        stems = [stem.replace("qkv", x) for x in "qkv"] if kind != "modernbert" and stem.endswith("attn_qkv") else [stem]
        found = [f"{published.get(name)}.{what}" for name in stems]
        if any(name not in published for name in stems) or what not in ("weight", "bias") or result.keys() & found:
            raise ValueError(f"{path} has a tensor {tensor.name!r}, which is not part of a supported model.")
        if len(value) % len(stems):
            raise ValueError(f"{path}: {tensor.name} has {len(value)} rows, not a multiple of 3.")
        if stem == "position_embd" and c.counts_from_padding:
            if value.shape != (expected := (c.longest_sequence, c.hidden_size)):
                raise ValueError(f"{path}: {tensor.name} has shape {value.shape}; the metadata say {expected}.")
            value = np.pad(value, ((c.pad_token_id + 1, 0), (0, 0)))
        result |= {name: np.asarray(part, dtype) for name, part in zip(found, np.split(value, len(stems)), strict=True)}
    return result


def output_layer(kind: str, stored: dict[str, Tensor]) -> Tensor | None:
    """The weight of the last layer of the head; None of a decoder, and where the file has no head."""
    only = kind in _NAMES and _head(kind, stored).get("cls") == _NAMES[kind][1][1]
    return stored.get("cls.weight" if only else "cls.output.weight")


def _head(kind: str, stored: dict[str, Tensor]) -> dict[str, str]:
    """{name in the file: path in transformers} of the layers of the head. BERT's one layer is cls where its classes have no names."""
    dense, out = _NAMES[kind][1]
    if "cls.output.weight" not in stored and (cls := stored.get("cls.weight")) is not None and cls.shape[:1] != cls.shape[1:]:
        return {"cls": out}
    return {"cls": dense, "cls.output": out} | ({"cls.norm": "head.norm"} if kind == "modernbert" else {})
