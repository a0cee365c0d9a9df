"""minilora: a minimal, autograd-free engine that fine-tunes neural networks with low-rank adaptation.

Every gradient is written by hand, checked by finite differences, and runs unchanged on NumPy and CuPy.
Importing it loads nothing heavier than NumPy: everything else is loaded at its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from minilora import tuned

if TYPE_CHECKING:
    from minilora.adapters import BottleneckConfig, BottleneckLinear, PartialConfig, combine, extract, input_roots, mixed
    from minilora.backend import choose_backend, seed, to_backend, to_numpy
    from minilora.checking.gradcheck import assert_gradients, gradcheck
    from minilora.formats.adapter import load_adapter, save_adapter
    from minilora.formats.checkpoint import load_model, save_model
    from minilora.functional.losses import cross_entropy, mse
    from minilora.layers import (
        GELU,
        Dropout,
        Embedding,
        Layer,
        LayerNorm,
        Linear,
        Parameter,
        ReLU,
        RMSNorm,
        Sequential,
        SiLU,
        Tanh,
    )
    from minilora.lora import LoraConfig, LoRALinear, disabled, factorize, inject, merge, unmerge
    from minilora.lora.variants.vera import VeraConfig
    from minilora.models import GPT2, MLP, Attention, BertClassifier, BertConfig, Block, GPT2Config, KVCache, Llama, LlamaConfig
    from minilora.models.generate import generate
    from minilora.optim.flat import clip_grad_norm
    from minilora.optim.optimizers import SGD, Adam, AdamW, create_loraplus_optimizer
    from minilora.optim.schedules import schedule
    from minilora.quantization.quantize import quantize_model

__version__ = "0.1.0"
tuned.apply()  # before NumPy is loaded

_HOME = {
    "adapters": "BottleneckConfig BottleneckLinear PartialConfig combine extract input_roots mixed",
    "backend": "choose_backend seed to_backend to_numpy",
    "quantization.quantize": "quantize_model",
    "lora.variants.vera": "VeraConfig",
    "formats.adapter": "load_adapter save_adapter",
    "formats.checkpoint": "load_model save_model",
    "functional.losses": "cross_entropy mse",
    "checking.gradcheck": "assert_gradients gradcheck",
    "layers": "GELU Dropout Embedding Layer LayerNorm Linear Parameter RMSNorm ReLU Sequential SiLU Tanh",
    "lora": "LoRALinear LoraConfig disabled factorize inject merge unmerge",
    "models": "Attention BertClassifier BertConfig Block GPT2 MLP GPT2Config KVCache Llama LlamaConfig",
    "models.generate": "generate",
    "optim.flat": "clip_grad_norm",
    "optim.optimizers": "SGD Adam AdamW create_loraplus_optimizer",
    "optim.schedules": "schedule",
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605  (a list of str, made from the table above)


def __getattr__(name: str) -> Any:
    """Load a public name at its first use."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"minilora.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
