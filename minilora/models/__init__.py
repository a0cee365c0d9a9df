"""One model, one file, module names as in its published checkpoint. Models know nothing of LoRA."""

from minilora.models.gpt2 import GPT2, GPT2Config
from minilora.models.mlp import MLP

__all__ = ["GPT2", "MLP", "GPT2Config"]
