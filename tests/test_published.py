"""What published checkpoints contain that models made by the current libraries do not."""

import json

import pytest

import minilora as ml
from minilora.models import Llama, LlamaConfig

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
