"""Llama and Qwen2 models in GGUF files, llama.cpp's format: weights (quantized or not), sizes and tokenizer in one file."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OFF = """expert_count expert_used_count attention.sliding_window attention.scale attention.clamp_kqv attention.max_alibi_bias
    attn_logit_softcapping final_logit_softcapping logit_scale residual_scale embedding_scale use_parallel_residual"""
_PLAIN = {**dict.fromkeys(_OFF.split(), 0), "attention.causal": True, "rope.scaling.attn_factor": 1}  # options at what is computed here
_READ = set(
    """attention.head_count attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon block_count
    embedding_length feed_forward_length context_length vocab_size rope.freq_base rope.dimension_count rope.scale_linear rope.scaling.type
    rope.scaling.factor rope.scaling.original_context_length rope.scaling.finetuned tensor_data_layout""".split()
)
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass
class GGUFTokenizer:
    """What a GGUF file says about its tokenizer; ids are None where it names none.

    `kind` is "gpt2" for a byte-level BPE and "llama" for a SentencePiece model (with no merges); `pre` names the way text is
    split beforehand; `token_types` has 3 for special tokens.
    """

    tokens: list[str]
    merges: list[str]
    token_types: list[int]
    bos: int | None
    eos: int | None
    unk: int | None
    chat_template: str | None
    add_bos: bool
    kind: str = "gpt2"
    pre: str = "default"
    ends: tuple[int, ...] = ()  # of a turn and of a message, beside eos


def read_gguf(path: str | Path, dtype: Any = "float32") -> tuple[dict[str, Any], dict[str, np.ndarray], GGUFTokenizer]:
    """(config as in config.json, {path as in transformers: array}, tokenizer) of a GGUF file.

    Weights are dequantized one by one into `dtype` and left as published, (out, in); what the file holds in `dtype` already is
    mapped, not copied. The head is missing where it is tied to the embedding. In files of the architecture "llama" the rows
    of q and k are in the order for interleaved rotary positions, and are put back into that for halves (functional/rotary.py).

    Raises FileNotFoundError; ImportError without the extra `gguf`; ValueError when the file is cut off or no GGUF, for an
    architecture other than llama and qwen2, options or a quantization that are not supported, and missing or unknown tensors.
    """
    path = Path(path)
    meta, stored = _open(path)
    config = _config(meta, {tensor.name: tensor for tensor in stored}, path)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for tensor in stored:
        name = _published(tensor.name, config["num_hidden_layers"], path)
        value = _dequantized(tensor, path)
        projection = name.split(".")[-2]
        if config["model_type"] == "llama" and projection in heads:
            if len(value) % (2 * heads[projection]):
                raise ValueError(f"{path}: {tensor.name} has {len(value)} rows, which {heads[projection]} heads of pairs do not divide.")
            value = in_halves(value, heads[projection])
        tensors[name] = np.asarray(value, dtype)
    return config, tensors, _tokenizer(meta, path)


def read_gguf_tokenizer(path: str | Path) -> tuple[int, GGUFTokenizer]:
    """(rows of the embedding, tokenizer) of a GGUF file, without its weights. Raises as `read_gguf`."""
    path = Path(path)
    meta, stored = _open(path)
    return _config(meta, {tensor.name: tensor for tensor in stored}, path)["vocab_size"], _tokenizer(meta, path)


def in_halves(W: np.ndarray, n_head: int) -> np.ndarray:
    """Rows of a projection of q or k (H d, m), or its bias (H d,), from interleaved order to that of halves.

    Within a head, the pairs (0, 1), (2, 3), ... become (0, d / 2), (1, d / 2 + 1), ...
    """
    heads = W.reshape(n_head, -1, 2, *W.shape[1:])  # (H, d / 2, 2, m)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(W.shape)


def _open(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """(metadata, the library's tensors) of a file. Raises FileNotFoundError, ImportError, or ValueError for what is no GGUF file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        import gguf
    except ImportError:
        raise ImportError(f"reading {path} needs the gguf library: pip install 'minilora[gguf]'.") from None

    class Reader(gguf.GGUFReader):  # notices when the file ends before what its header announces
        def _get(self, offset: int, dtype: Any, count: int = 1, *args: Any, **kwargs: Any) -> np.ndarray:
            self.data = np.asarray(self.data)  # type: ignore[assignment]  # slices of a memmap take twice as long
            values = super()._get(offset, dtype, count, *args, **kwargs)
            if len(values) < count:  # NumPy cuts a slice short in silence, and a length that lies would be followed to its end
                raise ValueError("it ends before what its header announces")
            return values

    try:
        with np.errstate(all="raise"):  # sizes that overflow
            reader = Reader(path)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the library raises whatever its parsing runs into
        raise ValueError(f"{path} is not a readable GGUF file: it is cut off, or something else ({error}).") from None
    if reader.byte_order == "S":
        raise ValueError(f"{path} is a GGUF file of the other byte order; convert it to this machine's.")
    return meta, list(reader.tensors)


def _config(meta: dict[str, Any], shapes: dict[str, Any], path: Path) -> dict[str, Any]:
    """The metadata of the model as transformers' config.json. Raises ValueError for what is not supported."""
    architecture = meta.get("general.architecture")
    if architecture not in tuple(_CLASSES):
        raise ValueError(f"{path} is of architecture {architecture!r:.80}; supported: {', '.join(_CLASSES)}.")
    nothing, number = object(), (int, float)

    def get(name: str, kind: type | tuple[type, ...], default: Any = nothing) -> Any:
        value = meta.get(f"{architecture}.{name}", default)
        if value is nothing:
            raise ValueError(f"{path} has no {architecture}.{name} in its metadata.")
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{path}: {architecture}.{name} is {str(value)[:60]}, which is not supported.")
        return value

    n_head, hidden = get("attention.head_count", int), get("embedding_length", int)
    if n_head < 1 or hidden < 1:
        raise ValueError(f"{path}: {architecture} has {n_head} heads for {hidden} features; both must be at least 1.")
    head_dim = get("attention.key_length", int, hidden // n_head)
    if get("rope.dimension_count", int, head_dim) != head_dim or get("attention.value_length", int, head_dim) != head_dim:
        raise ValueError(f"{path}: only a part of each head is turned, or values are of another size; that is not supported.")
    kind = get("rope.scaling.type", str, "linear")  # llama.cpp takes it to be so where a factor is given alone
    factors = [get(name, number, 1) or 1 for name in ("rope.scaling.factor", "rope.scale_linear")]  # and 0 to be none
    if kind not in ("none", "linear") or (kind == "linear" and factors != [1, 1]) or "rope_freqs.weight" in shapes:
        raise ValueError(f"{path}: its rotary positions are scaled (rope.scaling), which is not supported.")
    for name, plain in _PLAIN.items():
        if (value := meta.get(f"{architecture}.{name}", plain)) != plain:
            raise ValueError(f"{path}: {architecture}.{name} is {value!s:.60}, which is not supported.")
    known = _READ | _PLAIN.keys()
    if unknown := sorted(name for name in meta if name.startswith(f"{architecture}.") and name.partition(".")[2] not in known):
        print(f"{path}: not known here, and without effect: {', '.join(unknown):.300}.", file=sys.stderr)
    if "token_embd.weight" not in shapes or len(shapes["token_embd.weight"].shape) != 2:
        raise ValueError(f"{path} misses the tensor 'token_embd.weight', or it is no matrix.")

    config: dict[str, Any] = {
        "model_type": architecture,
        "architectures": [_CLASSES[architecture]],
        "vocab_size": int(shapes["token_embd.weight"].shape[-1]),  # GGUF counts dimensions from the last
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": n_head,
        "num_key_value_heads": get("attention.head_count_kv", int, n_head),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length", int),
        "rms_norm_eps": _short(get("attention.layer_norm_rms_epsilon", number)),
        "rope_theta": _short(get("rope.freq_base", number, 10000.0)),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    for name in ("bos_token_id", "eos_token_id"):
        config[name] = meta.get(f"tokenizer.ggml.{name}")

    biased = []
    if architecture == "qwen2" or config["attention_bias"]:
        biased += ["attn_q", "attn_k", "attn_v"] + ["attn_output"] * (architecture == "llama")
    if config.get("mlp_bias"):
        biased += ["ffn_gate", "ffn_up", "ffn_down"]
    wanted = ["output_norm.weight"]
    for i in range(config["num_hidden_layers"]):
        wanted += [f"blk.{i}.{name}.weight" for name in _BLOCK] + [f"blk.{i}.{name}.bias" for name in biased]
        if wanted[-1] not in shapes:  # a block count that lies ends here
            break
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise ValueError(f"{path} misses the tensor {missing[0]!r}.")
    return config


def _short(value: float) -> float:
    """The shortest number that is this float32: 1e-5, where float64 would say 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _published(name: str, n_layer: int, path: Path) -> str:
    """GGUF's name of a tensor as transformers has it. Raises ValueError for one that no Llama has."""
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if kind == "weight" and stem in _TOP:
        return f"{_TOP[stem]}.weight"
    if block and kind in ("weight", "bias") and block[2] in _BLOCK and int(block[1]) < n_layer:
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{kind}"
    raise ValueError(f"{path} has a tensor {name!r}, which is not part of a model that is supported.")


def _dequantized(tensor: Any, path: Path) -> np.ndarray:
    """A tensor in floating point, (out, in); float32 unless the file holds float16, which is widened."""
    import gguf

    try:
        value = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"{path}: {tensor.name} is quantized as {tensor.tensor_type.name}, which is not supported ({error}).") from None
    if value.ndim not in (1, 2):
        raise ValueError(f"{path}: {tensor.name} is no matrix and no vector, but of shape {value.shape}.")
    return np.asarray(value)


def _tokenizer(meta: dict[str, Any], path: Path) -> GGUFTokenizer:
    def get(name: str, default: Any = None) -> Any:
        return meta.get(f"tokenizer.ggml.{name}", default)

    tokens = get("tokens")
    if not isinstance(tokens, list):
        raise ValueError(f"{path} has no tokenizer: tokenizer.ggml.tokens is missing.")
    return GGUFTokenizer(
        tokens,
        get("merges", []),
        get("token_type", [1] * len(tokens)),
        get("bos_token_id"),
        get("eos_token_id"),
        get("unknown_token_id"),
        meta.get("tokenizer.chat_template"),
        bool(get("add_bos_token", False)),
        get("model", "gpt2"),
        get("pre", "default"),
        tuple(id for name in ("eot", "eom") if (id := get(f"{name}_token_id")) is not None),
    )
