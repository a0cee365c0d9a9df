"""Write relatives.safetensors: small random relatives of Llama with PEFT's LoRA, and their logits, losses and gradients.

python tests/golden/make_relatives.py        (needs the extra `oracle`)

As make_llama.py, whose dtypes and replacements these are: every part that transformers computes in float32 is replaced by the same in
float64. The frequencies of scaled rotary embeddings are transformers' own, computed in float64.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers import modeling_rope_utils

FILE = Path(__file__).with_name("relatives.safetensors")
OFFSETS = [0, 5, 6, 29]  # the last sequence is beyond the windows, and beyond the original length of 8
SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 18,
    "intermediate_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "max_position_embeddings": 32,
    "initializer_range": 0.15,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "sdpa",  # eager attention computes its softmax in float32
}
_ORIGINAL = {"original_max_position_embeddings": 8, "rope_theta": 100.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, **_ORIGINAL}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]


def _llama(**rope: Any) -> dict[str, Any]:
    return {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 2, "rope_parameters": rope, "head_dim": 12}


CASES: dict[str, dict[str, Any]] = {
    "llama3": _llama(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=3.0, **_ORIGINAL),
    "linear": _llama(rope_type="linear", factor=3.0, rope_theta=500.0),
    "dynamic": _llama(rope_type="dynamic", factor=2.0, rope_theta=50.0),
    "yarn": _llama(**_YARN),
    "yarn, all settings": _llama(**_YARN, beta_fast=2.0, beta_slow=0.5, mscale=0.7, mscale_all_dim=0.3, truncate=False),
    "yarn, attention factor": _llama(**_YARN, attention_factor=1.3),
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3, biases, windows": {
        **{"model_type": "qwen3", "attention_bias": True, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    },
    "qwen2, windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3, "layer_types": _LAYERS[:2]},
    "mistral": {"model_type": "mistral", "sliding_window": 4},
    "mistral, no window": {"model_type": "mistral", "sliding_window": None},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 3, "no_rope_layer_interval": 2},
    "smollm3, windows, biases": {
        **{"model_type": "smollm3", "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 5},
        **{"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    },
    "gemma3": {
        **{"model_type": "gemma3_text", "num_hidden_layers": 3, "layer_types": _LAYERS, "sliding_window": 7, "query_pre_attn_scalar": 7},
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
    },
    "gemma3, biases": {
        **{"model_type": "gemma3_text", "sliding_window_pattern": 2, "sliding_window": 4, "attention_bias": True},
        "query_pre_attn_scalar": 10,
    },
}
IN_FILE = ("llama3", "yarn", "qwen3", "mistral", "smollm3", "gemma3")  # one of each; the others are compared live


class Norm64(torch.nn.Module):
    """An RMS norm in the dtype of x."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        self.offset = float(type(norm).__name__ == "Gemma3RMSNorm")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.offset + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Rotary64(torch.nn.Module):
    """transformers' rotary embedding with its frequencies in float64."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def tables(self, rope: dict[str, Any], kind: str | None, x: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor = 1.0
        if rope["rope_type"] == "default":
            d = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
            frequencies = rope["rope_theta"] ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        else:
            here, wide = modeling_rope_utils.torch, SimpleNamespace(**vars(torch))
            wide.float = wide.float32 = torch.float64
            modeling_rope_utils.torch = wide
            try:
                frequencies, factor = modeling_rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.config, layer_type=kind)
            finally:
                modeling_rope_utils.torch = here
        assert frequencies.dtype == torch.float64
        angles = places[..., None].double() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        rope = self.config.rope_parameters
        return self.tables(rope if layer_type is None else rope[layer_type], layer_type, x, position_ids)


def base_model(name: str, exact: bool = True) -> Any:
    """The random base model of a case, in float64; `exact` replaces the parts that transformers computes in float32."""
    torch.manual_seed(sorted(CASES).index(name))
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**{**SIZES, **CASES[name]}))
    for path, p in model.named_parameters():
        with torch.no_grad():
            if path.endswith(("norm.weight", "bias")):  # away from 1 and 0, which hide mistakes
                p += 0.3 * torch.randn(p.shape)
            p.copy_(p.half().float())
    model = model.double().eval()
    if exact:
        for path, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                model.set_submodule(path, Norm64(module))
        model.model.rotary_emb = Rotary64(model.config)
        if "gemma" in name:
            model.model.embed_tokens.embed_scale = torch.tensor(model.config.hidden_size, dtype=torch.float64) ** 0.5
    return model


def adapted_model(name: str, exact: bool = True) -> Any:
    """The base model with LoRA of rank 3 on all linear layers but the head, with B not zero."""
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=projections, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base_model(name, exact), config).double()
    for path, p in model.named_parameters():
        with torch.no_grad():
            if "lora_" in path:
                p.copy_((0.2 * torch.randn(p.shape)).half().double())
    return model


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels (29,): labels are already shifted, with -100 at the end of each sequence and in some other places."""
    generator = torch.Generator().manual_seed(len(name))
    ids = torch.randint(0, SIZES["vocab_size"], (OFFSETS[-1],), generator=generator)
    labels = torch.roll(ids, -1)
    labels[[end - 1 for end in OFFSETS[1:]] + [0, 8]] = -100
    return ids, labels


def run(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Logits (29, V), the loss over all labelled rows, and the gradients of the trainable parameters by path."""
    ids, labels = batch(name)
    logits = torch.cat([model(ids[None, a:b], use_cache=False).logits[0] for a, b in pairwise(OFFSETS)])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    grads = {f"grad:{path_of(path)}": p.grad for path, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), "loss": loss.detach()[None], **grads}


def tensors(name: str) -> dict[str, torch.Tensor]:
    """All tensors of a case: "base:" and "lora:" weights in float16, and the results of `run` in float64."""
    ids, labels = batch(name)
    base = {f"base:{path}": p.detach().half() for path, p in base_model(name).named_parameters()}
    model = adapted_model(name)
    lora = {f"lora:{path_of(path)}": p.detach().half() for path, p in model.named_parameters() if "lora_" in path}
    return {"ids": ids, "labels": labels, **base, **lora, **run(model, name)}


def path_of(path: str) -> str:
    """minilora's path for PEFT's path of an adapter."""
    return path.removeprefix("base_model.model.").removesuffix(".default.weight")


def main() -> None:
    torch.set_num_threads(1)
    out = {f"{name}|{key}": value.contiguous() for name in IN_FILE for key, value in tensors(name).items()}
    configs = {name: base_model(name).config.to_dict() for name in IN_FILE}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    save_file(out, FILE, metadata={"about": json.dumps({"versions": versions, "configs": configs}, sort_keys=True)})


if __name__ == "__main__":
    main()
