"""What published checkpoints contain that models made by the current libraries do not."""

import json

import pytest
from small_tokenizers import sentencepiece_bpe

import minilora as ml
from minilora.formats.tokenizer import load_tokenizer
from minilora.models import Llama, LlamaConfig
from minilora.runs.export import export

SIZES = {"vocab_size": 67, "hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
SIZES |= {"num_hidden_layers": 3, "max_position_embeddings": 40}


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_integer_theta(tmp_path, model_type):
    """Qwen3-0.6B has "rope_theta": 1000000, and gemma-3-1b-it too: not a size, though it is an integer above every size of the tensors."""
    more = {"sliding_window": 5} if model_type == "gemma3_text" else {}
    config = LlamaConfig(model_type=model_type, **SIZES, **more, rope_theta=1e6)
    ml.save_model(Llama(config, rng=0), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"rope_theta": 1000000, "rope_scaling": None} | ({"rope_local_base_freq": 10000} if more else {})
    del raw["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ml.load_model(tmp_path, "numpy").config.rope_theta == 1e6


def test_gemma_with_hidden_act():
    """transformers' Gemma3TextConfig has hidden_activation only; files that came from Gemma 2's say the same under hidden_act too."""
    raw = {"model_type": "gemma3_text", **SIZES, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    config = LlamaConfig.from_json(raw)
    assert "hidden_act" not in config.to_json()
    with pytest.raises(ValueError, match="hidden_activation 'silu'; supported: gelu_pytorch_tanh"):
        LlamaConfig.from_json({**raw, "hidden_activation": "silu"})


@pytest.mark.parametrize("model_type", ["mistral", "smollm3", "llama"])
def test_class_of_tokenizer(tmp_path, model_type):
    """Mistral-7B-v0.3 names LlamaTokenizer, and transformers reads its tokenizer.json as it is."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'minilora[oracle]'")
    sentencepiece_bpe().save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path, None)
    for text in ("", "the cat", "  the  cat ", "<s>the cat</s> the mat", " <s> the </s>"):
        assert ours.encode(text).tolist() == theirs(text)["input_ids"], text


def test_export_without_suffix(tmp_path):
    """Every reader of minilora knows a GGUF file by its suffix, so that another name could not be loaded again."""
    with pytest.raises(ValueError, match=r"must end in \.gguf"):
        export("pydoc", "gguf", tmp_path / "adapter")
