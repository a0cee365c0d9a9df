"""GGUF files: names, orientation, order of rotary pairs, quantized weights, tokenizer metadata, and broken files."""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import BPE, CHATML, SPECIAL, WORDS, gemma_bpe

import minilora as ml
from minilora.formats.gguf import in_halves, read_gguf, read_gguf_tokenizer
from minilora.formats.tokenizer import load_tokenizer
from minilora.models import Llama, LlamaConfig
from minilora.models.llama_config import FULL
from minilora.models.rope import frequencies

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'minilora[gguf]'")
Type = gguf.GGMLQuantizationType

IDS = np.array([1, 5, 66, 10, 0, 7, 7])
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm"}
GEMMA |= {"post_feedforward_layernorm": "post_ffw_norm"}
HEADS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 3}
VARIANTS = {
    "llama, tied": {"tie_word_embeddings": True},
    "llama, free head, biases": {"attention_bias": True, "mlp_bias": True, "rope_theta": 500.0},
    "llama, wide heads": {"head_dim": 10, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2"},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 5e5, "head_dim": 16},
    "mistral": {"model_type": "mistral"},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "yarn": {"rope_scaling": YARN},
    "qwen2, yarn with its settings": {"model_type": "qwen2", "rope_scaling": {**YARN, "beta_fast": 3.0, "beta_slow": 0.5}},
    "qwen3": {"model_type": "qwen3", "head_dim": 12},
    "qwen3, heads of 128": {"model_type": "qwen3", "head_dim": 128},  # the only ones that transformers reads
    "qwen3, biases": {"model_type": "qwen3", "head_dim": 12, "attention_bias": True},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5, "tie_word_embeddings": True},
    "gemma3": {
        **{"model_type": "gemma3_text", "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 3, "num_hidden_layers": 7},
        **{"tie_word_embeddings": True, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    },
    "gemma3, no windows": {
        **{"model_type": "gemma3_text", "query_pre_attn_scalar": 8, "sliding_window": 1, "sliding_window_pattern": 1},
        "tie_word_embeddings": True,
    },
}


def small(**options):
    """Sizes with few divisors; only quantized rows must be multiples of 32."""
    sizes = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 35, "num_hidden_layers": 2, "max_position_embeddings": 9}
    return LlamaConfig(**{**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, **options})


def random_model(config):
    model = Llama(config, rng=0)
    rng = np.random.default_rng(1)
    for _, p in model.parameters():
        p.data = (p.data + 0.2 * rng.standard_normal(p.data.shape)).astype("float32")
    return model


def interleaved(W, n_head):
    """The rows of q and k in the order of llama.cpp's converter (its `permute`)."""
    return W.reshape(n_head, 2, -1, *W.shape[1:]).swapaxes(1, 2).reshape(W.shape)


def write(path, model, kinds=(), meta=(), leave_out=(), more=()):
    """The model as llama.cpp's converter writes it. kinds: {part of a published name: Type}; meta: overriding metadata."""
    c = model.config
    a = {"mistral": "llama"}.get(c.model_type, c.model_type.removesuffix("_text"))
    writer, rope, windowed = gguf.GGUFWriter(path, a), dict(c.rope_scaling or {}), a == "gemma3" and c.sliding_window_pattern != 1
    kind = rope.pop("rope_type", None)
    more = dict(more)
    if kind == "llama3":
        more["rope_freqs.weight"] = (frequencies(c.head_dim, c.rope_theta, None)[0] / c.frequencies(FULL)[0]).astype(np.float32)
    values = {
        f"{a}.rope.scaling.type": kind if kind in ("linear", "yarn") else None,
        f"{a}.rope.scaling.factor": rope["factor"] if kind in ("linear", "yarn") else None,
        f"{a}.rope.scaling.original_context_length": rope.get("original_max_position_embeddings") if kind == "yarn" else None,
        f"{a}.rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
        f"{a}.rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
        f"{a}.attention.sliding_window": c.sliding_window if windowed else None,
        f"{a}.block_count": c.num_hidden_layers,
        f"{a}.context_length": c.max_position_embeddings,
        f"{a}.embedding_length": c.hidden_size,
        f"{a}.feed_forward_length": c.intermediate_size,
        f"{a}.attention.head_count": c.num_attention_heads,
        f"{a}.attention.head_count_kv": c.num_key_value_heads,
        f"{a}.attention.key_length": c.head_dim,
        f"{a}.attention.value_length": c.head_dim,
        f"{a}.attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        f"{a}.rope.freq_base": c.rope_theta,
        f"{a}.rope.dimension_count": c.head_dim,
        f"{a}.vocab_size": c.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(66)] + ["é"],
        "tokenizer.ggml.merges": ["t 0", "t 1"],
        "tokenizer.ggml.token_type": [3] + [1] * 66,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
        **dict(meta),
    }
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for name, value in values.items():
        if value is not None:
            add[type(value)](name, value)
    for name, value in [*state_dict(model).items(), *more.items()]:
        if name in leave_out:
            continue
        stem, _, kind = name.rpartition(".")
        if stem.startswith("model.layers."):
            number, _, part = stem.removeprefix("model.layers.").partition(".")
            stem = f"blk.{number}.{(NAMES | HEADS | (GEMMA if a == 'gemma3' else {}))[part]}"
        else:
            stem = NAMES.get(stem, stem)
        if a == "gemma3" and name.endswith("norm.weight"):
            value = value + 1
        if a in ("llama", "smollm3") and "q_proj" in name:
            value = interleaved(value, c.num_attention_heads)
        if a in ("llama", "smollm3") and "k_proj" in name:
            value = interleaved(value, c.num_key_value_heads)
        quantized = next((t for part, t in dict(kinds).items() if part in name), Type.F32)
        writer.add_tensor(f"{stem}.{kind}", gguf.quantize(np.ascontiguousarray(value), quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def state_dict(model):
    """{path: array}, Linear weights (out, in), as published."""
    return {path: p.data.T if path.endswith(("proj.weight", "lm_head.weight")) else p.data for path, p in model.parameters()}


def model_of(path):
    """The model in a file, assembled by hand."""
    raw, tensors = read_gguf(path)
    model = Llama(LlamaConfig.from_json(raw, str(path)), rng=9)
    assert {p for p, _ in model.parameters()} == tensors.keys()
    for name, p in model.parameters():
        value = tensors[name].T if name.endswith(("proj.weight", "lm_head.weight")) else tensors[name]
        assert value.shape == p.data.shape
        p.data = value
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, tmp_path):
    model = random_model(small(**VARIANTS[name]))
    path = write(tmp_path / "a.gguf", model)
    again = model_of(path)
    kind = "llama" if name == "mistral" else model.config.model_type  # for llama.cpp they are one
    assert again.config == LlamaConfig(**{**vars(model.config), "model_type": kind, "bos_token_id": 1, "eos_token_id": 2})
    for (where, p), (_, q) in zip(model.parameters(), again.parameters(), strict=True):
        compare = np.testing.assert_allclose if "gemma3" in name and where.endswith("norm.weight") else np.testing.assert_array_equal
        compare(p.data, q.data, **{"atol": 1e-7} if compare is np.testing.assert_allclose else {}, err_msg=where)
    ml.save_model(model, tmp_path / "folder")
    folder = ml.load_model(tmp_path / "folder", "numpy").forward(IDS, keep=False)[0]
    np.testing.assert_allclose(ml.load_model(path, "numpy").forward(IDS, keep=False)[0], folder, rtol=0, atol=2e-6 * np.abs(folder).max())


def test_other_divisors_of_the_frequencies(tmp_path):
    """Not Llama 3's: they are kept as they are."""
    divisors = np.array([1, 1.5, 7, 2], np.float32)
    model = random_model(small())
    path = write(tmp_path / "a.gguf", model, more={"rope_freqs.weight": divisors})
    again = model_of(path)
    np.testing.assert_allclose(again.config.frequencies(FULL)[0], model.config.frequencies(FULL)[0] / divisors)
    assert again.config.frequencies(FULL)[1] == 1
    ml.save_model(again, tmp_path / "folder")
    expected = again.forward(IDS, keep=False)[0]
    np.testing.assert_array_equal(ml.load_model(tmp_path / "folder", "numpy").forward(IDS, keep=False)[0], expected)


@pytest.mark.parametrize(
    ("meta", "expected"),
    [
        ({"rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),  # without a type, llama.cpp assumes linear
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.factor": 0.0, "rope.scale_linear": 2.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 2.0}, None),
        ({"rope.scaling.type": "yarn"}, None),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, {**YARN, "factor": 2.0, "original_max_position_embeddings": 9}),
    ],
)
def test_scaling_keys_are_read_as_llama_cpp_reads_them(meta, expected, tmp_path):
    path = write(tmp_path / "a.gguf", random_model(small()), meta={f"llama.{name}": value for name, value in meta.items()})
    assert model_of(path).config.rope_scaling == expected


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["llama, tied", "qwen2", "qwen3, heads of 128"])
def test_transformers_reads_the_same_model(name, tmp_path):
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'minilora[oracle]'")
    import torch
    import transformers

    kinds = {"q_proj.weight": Type.Q4_1, "embed": Type.Q8_0, "down": Type.F16}
    path = write(tmp_path / "a.gguf", random_model(small(**VARIANTS[name])), kinds)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)[None]).logits[0].numpy()
    logits, _ = model_of(path).forward(IDS, keep=False)
    assert abs(logits - expected).max() < 1e-5 * abs(expected).max()


def test_the_order_of_rotary_pairs_is_restored_only_where_it_was_changed():
    W = np.arange(24.0).reshape(12, 2)
    np.testing.assert_array_equal(in_halves(interleaved(W, 3), 3), W)
    assert (interleaved(W, 3) != W).any()


def test_quantized_weights_are_close_to_their_source(tmp_path):
    """Each value is within half a step of the source: the step is range / 15 (Q4_1) or largest / 127 (Q8_0) of 32 values."""
    model = random_model(small())
    kinds = {"q_proj.weight": Type.Q4_1, "gate_proj.weight": Type.Q4_1, "k_proj.weight": Type.Q8_0, "embed": Type.Q8_0, "down": Type.F16}
    _, tensors = read_gguf(write(tmp_path / "a.gguf", model, kinds))
    for name, source in state_dict(model).items():
        assert tensors[name].dtype == np.float32
        kind = next((t for part, t in kinds.items() if part in name), Type.F32)
        if kind == Type.F32:
            np.testing.assert_array_equal(tensors[name], source)
        elif kind == Type.F16:
            np.testing.assert_array_equal(tensors[name], source.astype(np.float16))
        else:  # a row of 32 is one block
            step = np.ptp(source, axis=1) / 15 if kind == Type.Q4_1 else abs(source).max(axis=1) / 127
            error = abs(tensors[name] - source).max(axis=1)
            assert (error <= 0.51 * step + 2e-3 * abs(source).max(axis=1)).all()  # and the rounding of the step to float16
            assert error.max() > 0


def test_other_dtypes_and_mapped_arrays(tmp_path):
    path = write(tmp_path / "a.gguf", random_model(small()))
    _, tensors = read_gguf(path, "float64")
    assert {t.dtype for t in tensors.values()} == {np.dtype("float64")}
    _, tensors = read_gguf(path)
    assert not tensors["model.norm.weight"].flags.writeable  # a view into the file


def test_tokenizer_metadata(tmp_path):
    path = write(tmp_path / "a.gguf", random_model(small()))
    rows, vocabulary = read_gguf_tokenizer(path)
    assert rows == 67
    assert vocabulary["tokens"][:2] == ["t0", "t1"]
    assert vocabulary["tokens"][66] == "é"
    assert vocabulary["merges"] == ["t 0", "t 1"]
    assert vocabulary["token_type"] == [3] + [1] * 66
    assert (vocabulary["bos_token_id"], vocabulary["eos_token_id"]) == (1, 2)
    assert vocabulary["chat_template"] == "{{ messages }}"
    assert vocabulary["add_bos_token"] is True
    assert (vocabulary["model"], vocabulary["pre"]) == ("gpt2", "smollm")


# -- broken and unsupported files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, 3, 10, 20, 100, 0.1, 0.3, 0.6, 0.9, -1])
def test_a_truncated_file(part, tmp_path):
    path = write(tmp_path / "a.gguf", random_model(small(num_hidden_layers=1)))
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    with pytest.raises(ValueError, match=r"a\.gguf is not a readable GGUF file"):
        read_gguf(path)


def test_every_single_wrong_byte_of_the_header_is_read_or_refused(tmp_path):
    """Never another exception, and never a hang. Wrong lengths are among them."""
    path = write(tmp_path / "a.gguf", random_model(small(num_hidden_layers=1)), meta={"tokenizer.ggml.tokens": ["a"] * 67})
    content = path.read_bytes()
    end = content.index(b"output_norm.weight") + 60
    messages = []
    for at in np.random.default_rng(0).choice(end, 150, replace=False):
        path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        try:
            read_gguf(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert [message for message in messages if "a.gguf" not in message] == []


def test_a_wrong_length_is_refused(tmp_path):
    """An array of 2^61 numbers in a file of a few kilobytes."""
    path = write(tmp_path / "a.gguf", random_model(small(num_hidden_layers=1)))
    content = path.read_bytes()
    at = content.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8
    assert struct.unpack_from("<Q", content, at)[0] == 67
    path.write_bytes(content[:at] + struct.pack("<Q", 2**61) + content[at + 8 :])
    with pytest.raises(ValueError, match="is not a readable GGUF file"):
        read_gguf(path)


def test_files_of_another_format(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"{}" * 100)
    with pytest.raises(ValueError, match="is not a readable GGUF file"):
        read_gguf(path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*b\.gguf"):
        read_gguf(tmp_path / "b.gguf")


def test_without_the_library(tmp_path, monkeypatch):
    path = write(tmp_path / "a.gguf", random_model(small()))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'minilora\[gguf\]'"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta": {"llama.block_count": 3}}, r"'model\.layers\.2\.\w+\.weight' \(9 tensors in all\)"),
        ({"meta": {"llama.block_count": 2**31}}, "num_hidden_layers must be a positive integer, got 2147483648"),
        ({"meta": {"llama.block_count": 10**6}}, "num_hidden_layers is 1000000, but"),
        ({"meta": {"llama.block_count": 1}}, r"has a tensor 'blk\.1\.\w+\.weight', which is not part"),
        ({"meta": {"llama.block_count": None}}, r"has no llama\.block_count"),
        ({"meta": {"llama.block_count": "two"}}, "num_hidden_layers must be a positive integer, got 'two'"),
        ({"meta": {"llama.attention.head_count": 0}}, "num_attention_heads must be a positive integer, got 0"),
        ({"meta": {"llama.attention.head_count": [4, 4]}}, r"num_attention_heads must be a positive integer, got \[4, 4\]"),
        ({"meta": {"llama.rope.scaling.type": "longrope"}}, r"rope\.scaling\.type is 'longrope'; supported: none, linear, yarn"),
        ({"meta": {"llama.rope.scaling.factor": -2.0}}, "factor is -2.0, which does not fit"),
        ({"meta": {"llama.rope.scaling.attn_factor": 2.0}}, r"rope\.scaling\.attn_factor is 2\.0"),
        ({"meta": {"llama.rope.scaling.yarn_ext_factor": 0.0}}, r"rope\.scaling\.yarn_ext_factor is 0\.0"),
        ({"meta": {"llama.attention.sliding_window": 5}}, r"attention\.sliding_window is 5"),
        ({"meta": {"llama.attention.causal": False}}, r"attention\.causal is False"),
        ({"meta": {"llama.rope.dimension_count": 4}}, "rotary embeddings of part of a head"),
        ({"meta": {"llama.expert_count": 8}}, "expert_count is 8"),
        ({"meta": {"general.architecture": ["llama"]}}, "is of architecture"),
        ({"leave_out": ["model.embed_tokens.weight"], "more": {"token_embd.weight": np.ones(4, np.float32)}}, "or it is not a matrix"),
        ({"meta": {"llama.attention.head_count": 3, "llama.attention.head_count_kv": 3}}, "rows, not a multiple of 2 x 3 heads"),
        ({"meta": {"tokenizer.ggml.tokens": None}}, "has no tokenizer"),
        ({"leave_out": ["model.norm.weight"]}, r"'model\.norm\.weight' \(1 tensors in all\)"),
        ({"leave_out": ["model.layers.1.mlp.up_proj.weight"]}, r"'model\.layers\.1\.mlp\.up_proj\.weight' \(1 tensors in all\)"),
        ({"leave_out": ["model.embed_tokens.weight"]}, r"lacks the tensor 'token_embd\.weight'"),
        ({"more": {"rope_freqs.weight": np.ones(3, np.float32)}}, "short_factor has 3 numbers; a head of 8 features needs 4"),
        ({"more": {"rope_freqs.weight": np.array([1, 2, -1, 3], np.float32)}}, "short_factor is .*, which does not fit"),
        (
            {"more": {"rope_freqs.weight": np.ones(4, np.float32)}, "meta": {"llama.rope.scaling.factor": 2.0}},
            r"rope_freqs\.weight together with rope\.scaling\.factor",
        ),
        ({"more": {"extra.weight": np.ones(4, np.float32)}}, r"has a tensor 'extra\.weight', which is not part"),
    ],
)
def test_unsupported_settings_are_refused(changes, message, tmp_path):
    path = write(tmp_path / "a.gguf", random_model(small()), **changes)
    with pytest.raises(ValueError, match=rf"a\.gguf.*{message}"):
        ml.load_model(path, "numpy")


def test_another_architecture_is_refused(tmp_path):
    path = write(tmp_path / "a.gguf", random_model(small()))
    path.write_bytes(path.read_bytes().replace(b"llama", b"gemma"))
    with pytest.raises(ValueError, match="is of architecture 'gemma'; supported: llama, qwen2, qwen3, smollm3, gemma3"):
        read_gguf(path)


def test_an_unsupported_quantization_is_refused(tmp_path):
    """Q8_1 is for intermediate results; the library only knows its name."""
    path = write(tmp_path / "a.gguf", random_model(small()), kinds={"embed": Type.Q8_0})
    content = path.read_bytes()
    at = content.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    assert struct.unpack_from("<I", content, at)[0] == Type.Q8_0
    path.write_bytes(content[:at] + struct.pack("<I", Type.Q8_1) + content[at + 4 :])
    with pytest.raises(ValueError, match=r"a\.gguf: token_embd\.weight is quantized as Q8_1, which is not supported"):
        read_gguf(path)


def test_the_model_trains_with_adapters(tmp_path):
    """Read-only views of a file suffice for frozen weights."""
    model = model_of(write(tmp_path / "a.gguf", random_model(small())))
    ml.inject(model, ml.LoraConfig(r=2), rng=0)
    labels = np.append(IDS[1:], -100)
    optimizer = ml.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        loss, saved = model.loss(IDS, labels)
        optimizer.zero_grad()
        model.loss_backward(saved)
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.BF16])
def test_adapters_move_between_a_quantized_file_and_its_source(kind, tmp_path, capsys):
    source = random_model(small())
    ml.save_model(source, tmp_path / "folder")
    path = write(tmp_path / "a.gguf", source, kinds={"self_attn": kind})
    for first, second in ((path, tmp_path / "folder"), (tmp_path / "folder", path)):
        model = ml.load_model(first, "numpy")
        ml.inject(model, ml.LoraConfig(r=2, init_lora_weights=False), rng=0)
        ml.save_adapter(model, tmp_path / "adapter")
        capsys.readouterr()
        other = ml.load_model(second, "numpy")
        ml.load_adapter(other, tmp_path / "adapter")
        assert "it was trained on another copy of this base" in capsys.readouterr().err
        expected = model.forward(IDS, keep=False)[0]
        assert np.abs(other.forward(IDS, keep=False)[0] - expected).max() < 0.3 * np.abs(expected).max()
    with pytest.raises(ValueError, match="with other weights"):
        ml.load_adapter(ml.Llama(source.config, rng=77), tmp_path / "adapter")


def test_a_merged_model_includes_its_tokenizer(tmp_path):
    vocabulary = json.loads(BPE.library.to_str())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    meta = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["merges"]],
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
    model = ml.load_model(write(tmp_path / "m.gguf", random_model(small(vocab_size=len(tokens))), meta=meta), "numpy")
    ml.inject(model, ml.LoraConfig(r=2, init_lora_weights=False))
    ml.merge(model)
    ml.save_model(model, tmp_path / "merged")
    tokenizer, text = load_tokenizer(tmp_path / "merged", len(tokens)), "the cat sat 2024<|end|>"
    assert tokenizer.encode(text).tolist() == BPE.encode(text).tolist()
    assert (tokenizer.stop_ids, tokenizer.chat_template) == ({0}, CHATML)


def test_gemmas_tokenizer_is_the_one_that_the_file_was_made_from(tmp_path):
    """SentencePiece without merges: the ids of the original, and of transformers' conversion where it is installed."""
    raw, rng = json.loads(gemma_bpe().to_str()), np.random.default_rng(0)
    raw["model"]["vocab"]["▁▁"] = len(raw["model"]["vocab"])  # which the file has as two spaces
    raw["model"]["merges"].append(["▁", "▁"])
    library = type(gemma_bpe()).from_str(json.dumps(raw))
    tokens, special = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get), {token["content"] for token in raw["added_tokens"]}
    meta = {
        "model": "llama",
        "pre": "default",
        "tokens": ["  " if token == "▁▁" else token for token in tokens],
        "scores": [-float(i) for i in range(len(tokens))],
        "merges": None,
        "token_type": [3 if token in special else 6 if token.startswith("<0x") else 1 for token in tokens],
        **{"eos_token_id": 1, "bos_token_id": 2, "unknown_token_id": 3, "add_space_prefix": False, "add_bos_token": None},
    }
    meta = {"tokenizer.chat_template": None, **{f"tokenizer.ggml.{name}": value for name, value in meta.items()}}
    sizes = {**VARIANTS["gemma3"], "vocab_size": len(tokens), "num_hidden_layers": 1}
    path = write(tmp_path / "a.gguf", random_model(small(**sizes)), meta=meta)
    letters = [*"the catsnmo,ï☃日 \n<>0x▁", *special]
    texts = ["".join(rng.choice(letters, n)) for n in rng.integers(0, 60, 300)] + [WORDS[0], "  two  spaces", "<0x0A>"]
    ml.save_model(ml.load_model(path, "numpy"), tmp_path / "saved")
    read, again = load_tokenizer(path, None), load_tokenizer(tmp_path / "saved", None)
    for text in texts:
        ids = library.encode(text).ids
        assert read.encode(text).tolist() == again.encode(text).tolist() == ids, text
        assert read.decode(ids) == library.decode(ids, skip_special_tokens=False), text
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed: pip install 'minilora[oracle]'")
    for theirs in ({"gguf_file": "a.gguf"}, {"subfolder": "saved"}):
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path, **theirs)
        assert [read.encode(text).tolist() for text in texts] == [auto(text)["input_ids"] for text in texts]


def test_sentencepiece_of_llama_2_and_mistral_has_its_own_ids(tmp_path):
    """A space before the text, and after each special token. Expected ids: the library sentencepiece's (make_sentencepiece.py)."""
    golden = json.loads((Path(__file__).parent / "golden" / "sentencepiece.json").read_text(encoding="utf-8"))
    tokens, ids = golden["tokens"], golden["ids"]
    known = {"model": "llama", "tokens": tokens, "scores": golden["scores"], "token_type": golden["token_type"], "merges": None}
    known |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True, "pre": "default"}
    meta = {"tokenizer.chat_template": None, **{f"tokenizer.ggml.{name}": value for name, value in known.items()}}
    sizes = {**VARIANTS["mistral"], "vocab_size": len(tokens), "num_hidden_layers": 1}
    ml.save_model(ml.load_model(write(tmp_path / "a.gguf", random_model(small(**sizes)), meta=meta), "numpy"), tmp_path / "saved")
    for read in (load_tokenizer(tmp_path / "a.gguf", None), load_tokenizer(tmp_path / "saved", None)):
        assert {text: read.encode(text).tolist() for text in ids} == {text: [1, *each] for text, each in ids.items()}
        assert all(read.decode(each) == text for text, each in ids.items() if "▁" not in text)
        assert read.encode("the cat</s> a").tolist() == [1, *ids["the cat"], 2, *ids[" a"]]


def test_an_unreadable_tokenizer_is_reported_as_missing(tmp_path, capsys):
    model = ml.load_model(write(tmp_path / "m.gguf", random_model(small()), meta={"tokenizer.ggml.model": "plamo2"}), "numpy")
    ml.save_model(model, tmp_path / "out")
    assert "out has no readable tokenizer: " in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
