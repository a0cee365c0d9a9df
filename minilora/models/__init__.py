"""One model, one file, module names as in its published checkpoint; registry.py lists the architectures. Models know nothing of LoRA."""

from minilora.models.attention import Attention, KVCache
from minilora.models.bert import BertConfig
from minilora.models.classifier import BertClassifier
from minilora.models.decoder import Decoder
from minilora.models.gpt2 import GPT2, Block, FeedForward, GPT2Config
from minilora.models.llama import Llama, LlamaConfig
from minilora.models.mlp import MLP
