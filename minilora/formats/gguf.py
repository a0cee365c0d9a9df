"""Llama and its relatives in GGUF files, the format of llama.cpp: weights (quantized or not), sizes and tokenizer in one file.
Encoders: gguf_encoder.py.

What llama.cpp does not keep in a file is here as it is there (conversion/ and src/models/ of https://github.com/ggml-org/llama.cpp).
"""

import re
import sys
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from minilora.formats import gguf_encoder
from minilora.formats.gguf_header import SIZES, Tensor, dequantized, read_header, short
from minilora.models.llama_config import VARIANTS, LlamaConfig
from minilora.models.rope import frequencies

TYPES = {name: name for name in ("llama", "qwen2", "qwen3", "smollm3")} | {"gemma3": "gemma3_text"}  # its architecture: model_type
INTERLEAVED = ("llama", "smollm3")
_TOP = ["model.embed_tokens", "model.norm", "lm_head"]
_BLOCK = """input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj post_attention_layernorm
    mlp.gate_proj mlp.up_proj mlp.down_proj""".split()
_SIZES = SIZES | {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_OPTIONAL = {"attention.head_count_kv", "attention.key_length", "rope.freq_base"}
_FREQUENCIES = "rope_freqs.weight"
_NORMS = "self_attn.q_norm", "self_attn.k_norm"
_MORE_NORMS = "pre_feedforward_layernorm", "post_feedforward_layernorm"
_OFF = """expert_count expert_used_count attention.sliding_window attention.scale attention.clamp_kqv attention.max_alibi_bias
    rope.scaling.yarn_log_multiplier attn_logit_softcapping final_logit_softcapping logit_scale residual_scale embedding_scale
    use_parallel_residual"""
_FIXED = {**dict.fromkeys(_OFF.split(), 0), "attention.causal": True}  # the only supported values
_FIXED |= {f"rope.scaling.{name}": 1 for name in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor")}
_WINDOWS = "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"  # read for Gemma alone
_READ = """attention.value_length vocab_size rope.dimension_count rope.scale_linear rope.scaling.type rope.scaling.factor
    rope.scaling.original_context_length rope.scaling.finetuned rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    tensor_data_layout""".split()


def read_gguf(path: str | Path, dtype: Any = "float32") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config as in config.json, {path as in transformers: array}) of a GGUF file.

    Weights are (out, in), as published, and dequantized to `dtype`; those stored in `dtype` are mapped, not copied. A head tied to
    the embedding is absent. Files of architecture "llama" and "smollm3" order the rows of q and k for interleaved rotary embeddings; they
    are reordered for the half-split form (functional/rotary.py). Gemma's norms are stored with 1 added, which is taken off.

    Raises FileNotFoundError; ImportError without the extra `gguf`; ValueError when the file is truncated or not GGUF, and for
    unsupported architectures, options and quantizations, and unknown tensors.
    """
    path = Path(path)
    meta, stored = read_header(path)
    config = _config(meta, stored, path)
    if meta["general.architecture"] in gguf_encoder.ARCHITECTURES:
        return config, gguf_encoder.tensors(config, stored, path, dtype)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    import gguf

    depth = min(config["num_hidden_layers"], len(stored))  # a damaged file may have any number
    architecture, variant = meta["general.architecture"], VARIANTS[config["model_type"]]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], depth)
    parts = [*_BLOCK, *(_NORMS if variant.head_norms else ()), *(_MORE_NORMS if variant.gemma else ())]
    published = {names.get_name(name): name for name in [*_TOP, *(f"model.layers.{i}.{part}" for i in range(depth) for part in parts)]}
    tensors = {}
    for tensor in stored.values():
        if tensor.name == _FREQUENCIES and not variant.gemma:
            continue  # config has them
        stem, _, kind = tensor.name.rpartition(".")
        if (name := published.get(stem)) is None or kind not in ("weight", "bias"):
            raise ValueError(f"{path} has a tensor {tensor.name!r}, which is not part of a supported model.")
        value = dequantized(tensor, path)
        n_head = heads.get(name.rpartition(".")[2])
        if variant.gemma and stem.endswith("norm"):
            value = value - 1
        if architecture in INTERLEAVED and n_head is not None:
            if len(value) % (2 * n_head):
                raise ValueError(f"{path}: {tensor.name} has {len(value)} rows, not a multiple of 2 x {n_head} heads.")
            value = in_halves(value, n_head)
        tensors[f"{name}.{kind}"] = np.asarray(value, dtype)
    return config, tensors


def read_gguf_tokenizer(path: str | Path) -> tuple[int, dict[str, Any]]:
    """(rows of the embedding, {name: value} of the metadata tokenizer.ggml.<name>, tokenizer.chat_template and general.architecture) of a
    GGUF file. Raises as `read_gguf`."""
    meta, stored = read_header(Path(path))
    found = {re.sub(r"^tokenizer\.(ggml\.)?", "", name): value for name, value in meta.items() if name.startswith("tokenizer.")}
    for name in ("token_type", "scores", "precompiled_charsmap"):
        found |= {name: values.tolist()} if isinstance(values := found.get(name), array) else {}
    found["architecture"] = meta.get("general.architecture")
    return _config(meta, stored, Path(path))["vocab_size"], found


def read_gguf_classifier(path: str | Path) -> dict[str, Any] | None:
    """The configuration of a GGUF file with a classifier, from its header; None for one without. Raises as `read_gguf`."""
    meta, stored = read_header(Path(path))
    config = _config(meta, stored, Path(path))
    return config if gguf_encoder.output_layer(config["model_type"], stored) else None


def gguf_model_type(meta: dict[str, Any], stored: dict[str, Tensor]) -> str | None:
    """The model_type of transformers that a file's header names, None for one that is not supported."""
    if (architecture := meta.get("general.architecture")) in gguf_encoder.ARCHITECTURES:
        return gguf_encoder.model_type(meta, stored)
    return TYPES.get(str(architecture))


def in_halves(W: np.ndarray, n_head: int) -> np.ndarray:
    """Rows of a q or k projection (H d, m), or its bias (H d,), reordered from interleaved to half-split rotary embeddings.

    Within a head, the pairs (0, 1), (2, 3), ... become (0, d / 2), (1, d / 2 + 1), ...
    """
    heads = W.reshape(n_head, -1, 2, *W.shape[1:])  # (H, d / 2, 2, m)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(W.shape)


def _config(meta: dict[str, Any], stored: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The metadata of the model as transformers' config.json. Raises ValueError for what is not supported."""
    architecture = meta.get("general.architecture")
    if architecture not in (supported := (*TYPES, *gguf_encoder.ARCHITECTURES)):
        raise ValueError(f"{path} is of architecture {architecture!r:.80}; supported: {', '.join(supported)}.")
    found = {name.removeprefix(f"{architecture}."): value for name, value in meta.items() if name.startswith(f"{architecture}.")}
    encoder, variant = architecture in gguf_encoder.ARCHITECTURES, VARIANTS[TYPES.get(architecture, "llama")]
    windows = _WINDOWS if variant.gemma else ()
    required, known = (SIZES.keys(), gguf_encoder.READ) if encoder else (_SIZES.keys() - _OPTIONAL, {*_OPTIONAL, *_READ, *windows})
    fixed = gguf_encoder.FIXED if encoder else {name: value for name, value in _FIXED.items() if name not in windows}
    for name in required - found.keys():
        raise ValueError(f"{path} has no {architecture}.{name} in its metadata.")
    for name, only in fixed.items():
        if (value := found.get(name, only)) != only:
            raise ValueError(f"{path}: {architecture}.{name} is {value!s:.60}, which is not supported.")
    if unknown := sorted(found.keys() - {*required, *known, *fixed}):
        print(f"{path}: unknown options, ignored: {', '.join(unknown):.300}.", file=sys.stderr)
    if not isinstance(meta.get("tokenizer.ggml.tokens"), list):
        raise ValueError(f"{path} has no tokenizer: tokenizer.ggml.tokens is missing.")
    if "token_embd.weight" not in stored or len(stored["token_embd.weight"].shape) != 2:
        raise ValueError(f"{path} lacks the tensor 'token_embd.weight', or it is not a matrix.")
    if encoder:
        return gguf_encoder.configuration(found, meta, stored, path)
    raw = {
        "model_type": TYPES[architecture],
        "vocab_size": stored["token_embd.weight"].shape[0],
        **{field: short(found[name]) for name, field in _SIZES.items() if name in found},
        "tie_word_embeddings": "output.weight" not in stored,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": None,
        "attention_bias": "attention_bias" in variant.fields and "blk.0.attn_q.bias" in stored,
        "mlp_bias": "mlp_bias" in variant.fields and "blk.0.ffn_gate.bias" in stored,
        "rope_scaling": _scaling(found, stored, path),
    }
    if variant.gemma:
        window, pattern, base = (short(found.get(name)) for name in _WINDOWS)
        raw |= {
            "sliding_window": window or 1,
            "sliding_window_pattern": (pattern or 6) if window else 1,
            "rope_local_base_freq": base or 1e4,
        }
    config = LlamaConfig.from_json(raw, str(path))
    d: Any = config.head_dim
    if (tensor := stored.get(_FREQUENCIES)) is not None and tensor.shape != (d // 2,):
        raise ValueError(f"{path}: {_FREQUENCIES} has shape {tensor.shape}; a head of {d} features needs ({d // 2},).")
    if variant.gemma:  # of the 27B, llama.cpp divides by another number
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
        )
    for name in ("rope.dimension_count", "attention.value_length"):
        if found.get(name, config.head_dim) != config.head_dim:
            raise ValueError(f"{path}: rotary embeddings of part of a head, and values of another size than keys, are not supported.")
    return config.to_json()


def _scaling(found: dict[str, Any], stored: dict[str, Tensor], path: Path) -> dict[str, Any] | None:
    """rope_scaling of config.json. An absent type is "linear", as in llama.cpp, and a factor 0 none."""
    kind, context = found.get("rope.scaling.type", "linear"), found["context_length"]
    factor = short(found.get("rope.scaling.factor", found.get("rope.scale_linear"))) or 1.0
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"{path}: rope.scaling.type is {kind!r:.40}; supported: none, linear, yarn.")
    if (tensor := stored.get(_FREQUENCIES)) is not None:
        if kind != "none" and factor != 1:
            raise ValueError(f"{path}: {_FREQUENCIES} together with rope.scaling.factor is not supported.")
        return _llama3(found, [float(x) for x in dequantized(tensor, path).ravel()])
    if kind == "none" or factor == 1:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    betas = {name: short(found.get(f"rope.scaling.yarn_{name}")) for name in ("beta_fast", "beta_slow")}
    length = found.get("rope.scaling.original_context_length", context)
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length, **betas}


def _llama3(found: dict[str, Any], divisors: list[float]) -> dict[str, Any]:
    """The settings that give these divisors of the frequencies: Llama 3's, of which a file has no others, or the divisors themselves."""
    length: dict[str, Any] = {"original_max_position_embeddings": 8192}
    usual = {"rope_type": "llama3", "factor": max(divisors, default=1), "low_freq_factor": 1.0, "high_freq_factor": 4.0, **length}
    theta, d = short(found.get("rope.freq_base", 1e4)), 2 * len(divisors)
    if min(divisors, default=0) > 0 and usual["factor"] > 1 and type(theta) is float and theta > 0:
        f, scaled = (frequencies(d, theta, rope)[0] for rope in (None, usual))
        if np.allclose(f, scaled * divisors, rtol=1e-5, atol=0):
            return usual
    return {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "factor": 1.0, **length}
