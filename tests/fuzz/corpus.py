"""The files that mutations start from: small, whole, and made by the same code as those of the other tests."""

from __future__ import annotations

import json
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import small_tokenizers as small

import minilora as ml
from minilora.adapters import BottleneckConfig, PartialConfig
from minilora.lora.variants.vera import VeraConfig

Files = dict[str, bytes]
SIZES: dict[str, Any] = {"max_position_embeddings": 16, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}


def read_folder(folder: Path) -> Files:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def model(kind: str) -> Any:
    """A tiny model; 400 tokens suffice for every tokenizer of the corpus."""
    if kind == "gpt2":
        return ml.GPT2(ml.GPT2Config(vocab_size=400, n_positions=16, n_embd=8, n_layer=2, n_head=2), rng=0).freeze()
    if kind == "bert":
        return ml.BertClassifier(ml.BertConfig(vocab_size=400, **SIZES, intermediate_size=12, num_labels=3), rng=0).freeze()
    options: dict[str, Any] = {"qwen2": {"model_type": "qwen2"}, "tied": {"tie_word_embeddings": True}}.get(kind, {})
    if kind == "gemma3":
        options = {"model_type": "gemma3_text", "sliding_window": 3, "sliding_window_pattern": 2, "tie_word_embeddings": True}
    if kind == "yarn":
        options = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}}
    return ml.Llama(ml.LlamaConfig(vocab_size=400, **SIZES, intermediate_size=12, num_key_value_heads=1, **options), rng=0).freeze()


def models(folder: Path) -> dict[str, Files]:
    """{kind: files of a model folder}."""
    found = {}
    for kind in ("gpt2", "bert", "llama", "qwen2", "tied", "gemma3", "yarn"):
        ml.save_model(model(kind), folder / kind)
        found[kind] = read_folder(folder / kind)
    base = ml.load_model(folder / "llama", "numpy", quantize="nf4")
    ml.save_model(base, folder / "nf4")
    return found | {"nf4": read_folder(folder / "nf4")}


def adapters(folder: Path, base: Path) -> dict[str, Files]:
    """{method: files of an adapter folder}, all of the Llama in `base`."""
    lora = ml.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    configs: dict[str, Any] = {
        "lora": lora,
        "expression": replace(lora, target_modules=r".*\.(q|v)_proj", rank_pattern={"q_proj": 3}, bias="all"),
        "all-linear": replace(lora, target_modules="all-linear", exclude_modules=["gate_proj"], modules_to_save=["norm"]),
        "dora": replace(lora, use_dora=True, layers_to_transform=[0], layers_pattern="layers"),
        "vera": VeraConfig(r=4, target_modules=["o_proj"]),
        "bottleneck": BottleneckConfig(reduction_factor=4),
        "partial": PartialConfig(["norm"]),
    }
    found = {}
    for name, config in configs.items():
        adapted = ml.load_model(base, "numpy")
        ml.inject(adapted, config, rng=0)
        ml.save_adapter(adapted, folder / name)
        found[name] = read_folder(folder / name)
    return found


def tokenizers(folder: Path) -> dict[str, Files]:
    """{kind: files of a tokenizer folder}."""
    kinds: dict[str, tuple[Any, dict[str, Any] | None, dict[str, Any]]] = {
        "plain": (small.library_bpe(), None, {}),
        "gpt2": (small.byte_level_bpe(), {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, {}),
        "qwen2": (
            small.byte_level_bpe(),
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "eos_token": "<|im_end|>",
                "chat_template": small.CHATML,
                "extra_special_tokens": ["<s>"],
            },
            {"generation_config": {"eos_token_id": [0, 2]}, "special_tokens_map": {"bos_token": {"content": "<s>", "lstrip": True}}},
        ),
        "llama": (small.sentencepiece_bpe(), {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>"}, {}),
        "bert": (small.bert_wordpiece(), {"tokenizer_class": "BertTokenizer", "do_lower_case": True}, {"added_tokens": {"<new>": 201}}),
        "xlm": (small.xlm_roberta(), {"tokenizer_class": "XLMRobertaTokenizer", "add_prefix_space": True}, {}),
    }
    decoder = {"0": {"content": "<|endoftext|>", "special": True}, "340": {"content": "<tool>", "normalized": True}}
    kinds["decoder"] = (small.byte_level_bpe(), {"added_tokens_decoder": decoder, "model_max_length": 16, "unk_token": None}, {})
    found = {}
    for name, (library, settings, more) in kinds.items():
        small.write_tokenizer(folder / name, library, settings, **more)
        found[name] = read_folder(folder / name)
    return found


# ---- GGUF: the structure, and its bytes --------------------------------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_PACK = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def _string(text: Any, length: int | None = None) -> bytes:
    data = text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", (len(data) if length is None else length) % 2**64) + data


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _string(value)
    if kind == ARRAY:
        inner, count, items = value if isinstance(value, tuple) else (U8, 1, [1])
        return struct.pack("<IQ", inner, count % 2**64) + b"".join(_value(inner, item) for item in items)
    if kind in (F32, F64):
        return struct.pack("<" + _PACK[kind], value if isinstance(value, float) else 1.5)
    size = struct.calcsize(_PACK.get(kind, "I"))
    return ((value if isinstance(value, int) else 7) % 256**size).to_bytes(size, "little")


def gguf_bytes(about: dict[str, Any]) -> bytes:
    """The file of a structure {version, tensors: count, fields: count, meta: [(name, kind, value)], infos: [...], data}."""
    out = [b"GGUF", struct.pack("<IQQ", about["version"], about["tensors"] % 2**64, about["fields"] % 2**64)]
    for name, kind, value in about["meta"]:
        out += [_string(name), struct.pack("<I", kind), _value(kind, value)]
    for name, dims, count, kind, offset in about["infos"]:
        out += [_string(name), struct.pack("<I", count), *(struct.pack("<Q", n % 2**64) for n in dims)]
        out.append(struct.pack("<IQ", kind, offset % 2**64))
    header = b"".join(out)
    return header + bytes(-len(header) % 32) + about["data"]


def gguf_adapter() -> dict[str, Any]:
    """The structure of an adapter of rank 2 for the model "llama" of `models`: q and v of its one block."""
    meta = [("general.type", STRING, "adapter"), ("general.architecture", STRING, "llama"), ("adapter.type", STRING, "lora")]
    meta.append(("adapter.lora.alpha", F32, 4.0))
    rng, infos, data = np.random.default_rng(0), [], b""
    for name, rows in (("attn_q", 8), ("attn_v", 4)):
        for part, dims in (("a", (8, 2)), ("b", (2, rows))):
            infos.append((f"blk.0.{name}.weight.lora_{part}", list(dims), 2, 0, len(data)))
            data += rng.normal(size=dims[0] * dims[1]).astype("<f4").tobytes()
            data += bytes(-len(data) % 32)
    return {"version": 3, "tensors": len(infos), "fields": len(meta), "meta": meta, "infos": infos, "data": data}


def mlx_adapter(folder: Path, base: Path) -> Files:
    """The same adapter as a folder of mlx-lm."""
    from minilora.formats.adapter import factors
    from minilora.formats.mlx import write_mlx

    adapted = ml.load_model(base, "numpy")
    ml.inject(adapted, ml.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), rng=0)
    write_mlx(folder, factors(adapted), 1, None)
    return read_folder(folder)


def gguf_encoder(name: str) -> dict[str, Any]:
    """The structure of a small encoder with its tokenizer: a model_type."""
    kind, n_heads, d, ff = "modern-bert" if name == "modernbert" else "bert", 2, 32, 24
    made = {"bert": small.bert_wordpiece, "xlm-roberta": small.xlm_roberta_normalized, "modernbert": small.modernbert_bpe}
    library = made[name]()
    raw, added = json.loads(library.to_str())["model"], library.get_added_tokens_decoder()
    tokens = [str(library.id_to_token(i)) for i in range(library.get_vocab_size())]
    n, types = len(tokens), [3 if i in added and added[i].special else 4 if i in added else 1 for i in range(library.get_vocab_size())]
    sizes = {"block_count": 1, "context_length": 16, "embedding_length": d, "feed_forward_length": ff, "attention.head_count": n_heads}
    meta = [("general.architecture", STRING, kind), *((f"{kind}.{key}", U32, value) for key, value in sizes.items())]
    meta += [(f"{kind}.attention.layer_norm_epsilon", F32, 1e-5), (f"{kind}.attention.causal", BOOL, 0), (f"{kind}.pooling_type", U32, 1)]
    meta += [(f"{kind}.classifier.output_labels", ARRAY, (STRING, 3, ["x", "y", "z"]))]
    around = {"bert": (2, 3, 1, 0, 4), "xlm-roberta": (0, 2, 3, 1, n - 1), "modernbert": (1, 2, 3, 0, n - 2)}[name]
    marks = zip(("bos", "seperator" if name == "bert" else "eos", "unknown", "padding", "mask"), around, strict=True)
    meta += [(f"tokenizer.ggml.{mark}_token_id", U32, id) for mark, id in marks]
    if name == "bert":
        tokens = [t if types[i] == 3 else t[2:] if t.startswith("##") else "\u2581" + t for i, t in enumerate(tokens)]
    if name == "xlm-roberta":
        meta += [("tokenizer.ggml.scores", ARRAY, (F32, n, [float(score) for _, score in raw["vocab"]]))]
        meta += [("tokenizer.ggml.precompiled_charsmap", ARRAY, (U8, len(small.CHARSMAP), list(small.CHARSMAP)))]
    if name == "modernbert":
        merges = [" ".join(pair) for pair in raw["merges"]]
        meta += [("tokenizer.ggml.pre", STRING, "modern-bert"), ("tokenizer.ggml.merges", ARRAY, (STRING, len(merges), merges))]
        meta += [(f"{kind}.attention.sliding_window", U32, 4), (f"{kind}.attention.sliding_window_pattern", U32, 3)]
    model = {"bert": "bert", "xlm-roberta": "t5", "modernbert": "gpt2"}[name]
    meta += [("tokenizer.ggml.model", STRING, model), ("tokenizer.ggml.tokens", ARRAY, (STRING, n, tokens))]
    meta += [("tokenizer.ggml.token_type", ARRAY, (I32, n, types))]
    if name == "modernbert":
        shapes = {"token_embd.weight": (n, d), "token_embd_norm.weight": (d,), "output_norm.weight": (d,), "blk.0.ffn_norm.weight": (d,)}
        shapes |= {"blk.0.attn_qkv.weight": (3 * d, d), "blk.0.attn_output.weight": (d, d), "blk.0.ffn_up.weight": (2 * ff, d)}
        shapes |= {"blk.0.ffn_down.weight": (d, ff)}
    else:
        rows = {"token_embd": n, "position_embd": 16, "token_types": 2}
        shapes = {f"{key}.weight": (value, d) for key, value in rows.items()}
        sides = {**dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (d, d)), "ffn_up": (ff, d), "ffn_down": (d, ff)}
        sides |= dict.fromkeys(("attn_output_norm", "layer_output_norm"), (d,))
        for key, shape in {"token_embd_norm": (d,), **{f"blk.0.{part}": shape for part, shape in sides.items()}}.items():
            shapes |= {f"{key}.weight": shape, f"{key}.bias": shape[:1]}
    shapes |= {"cls.output.weight": (3, d), "cls.output.bias": (3,)}
    return _with_tensors(meta, shapes)


def gguf(name: str = "llama") -> dict[str, Any]:
    """The structure of a small model with its tokenizer. "scaled": a llama with rope_freqs."""
    kind = "llama" if name == "scaled" else name
    tokens = sorted(small.library_bpe().get_vocab().items(), key=lambda each: each[1])
    merges = [" ".join(pair) for pair in json.loads(small.library_bpe().to_str())["model"]["merges"]]
    n, d, ff = len(tokens), 32, 24
    meta = [("general.architecture", STRING, kind), ("general.file_type", U32, 0)]
    sizes = {"block_count": 1, "context_length": 16, "embedding_length": d, "feed_forward_length": ff, "attention.head_count": 2}
    sizes |= {"attention.head_count_kv": 1, "vocab_size": n, "rope.dimension_count": 16}
    sizes |= {"attention.key_length": 16, "attention.sliding_window": 4} if kind == "gemma3" else {}
    meta += [(f"{kind}.{name}", U32, value) for name, value in sizes.items()]
    meta += [(f"{kind}.attention.layer_norm_rms_epsilon", F32, 1e-5), (f"{kind}.rope.freq_base", F32, 10000.0)]
    meta += [("tokenizer.ggml.model", STRING, "gpt2"), ("tokenizer.ggml.pre", STRING, "smollm")]
    meta += [("tokenizer.ggml.tokens", ARRAY, (STRING, n, [token for token, _ in tokens]))]
    meta += [("tokenizer.ggml.merges", ARRAY, (STRING, len(merges), merges))]
    meta += [("tokenizer.ggml.token_type", ARRAY, (I32, n, [3] * 3 + [1] * (n - 3)))]
    meta += [("tokenizer.ggml.bos_token_id", U32, 0), ("tokenizer.ggml.eos_token_id", U32, 0), ("tokenizer.ggml.add_bos_token", BOOL, 1)]
    meta += [("tokenizer.chat_template", STRING, small.CHATML)]
    shapes = {"token_embd": (n, d), "output_norm": (d,), "blk.0.attn_norm": (d,), "blk.0.ffn_norm": (d,)}
    shapes |= {"blk.0.attn_q": (d, d), "blk.0.attn_k": (16, d), "blk.0.attn_v": (16, d), "blk.0.attn_output": (d, d)}
    shapes |= {"blk.0.ffn_gate": (ff, d), "blk.0.ffn_up": (ff, d), "blk.0.ffn_down": (d, ff)}
    if kind == "gemma3":
        norms = {"attn_q_norm": 16, "attn_k_norm": 16, "post_attention_norm": d, "post_ffw_norm": d}
        shapes |= {f"blk.0.{part}": (size,) for part, size in norms.items()}
    if name == "scaled":
        meta += [("llama.rope.scaling.type", STRING, "none"), ("llama.rope.scaling.factor", F32, 2.0)]
        shapes["rope_freqs"] = (8,)
    return _with_tensors(meta, {f"{name}.weight": shape for name, shape in shapes.items()})


def _with_tensors(meta: list[Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The structure of a file with random tensors."""
    rng, infos, data = np.random.default_rng(0), [], b""
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype("<f4")
        values = abs(values) + 1 if name == "rope_freqs.weight" else values
        half = name == "blk.0.ffn_up.weight"
        infos.append((name, list(shape[::-1]), len(shape), 1 if half else 0, len(data)))
        data += (values.astype("<f2") if half else values).tobytes()
        data += bytes(-len(data) % 32)
    return {"version": 3, "tensors": len(infos), "fields": len(meta), "meta": meta, "infos": infos, "data": data}
