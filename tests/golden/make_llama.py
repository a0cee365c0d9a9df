"""Write llama.safetensors: small random Llama and Qwen2 models with PEFT's LoRA, and their logits, losses and gradients.

python tests/golden/make_llama.py        (needs the extra `oracle`)

Everything is float64. transformers computes the RMS norm and the rotary angles in float32 whatever the dtype of the model; both are
replaced by float64 implementations of the same equations, as otherwise the comparison would be limited to 1e-7. Weights are rounded to
float16, which keeps the file small and is exact in the wider types.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import save_file

FILE = Path(__file__).with_name("llama.safetensors")
OFFSETS = [0, 5, 6, 13]  # three sequences of 5, 1 and 7 tokens; transformers runs each alone
_SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 24,
    "intermediate_size": 33,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.15,
    "attn_implementation": "sdpa",  # eager attention computes its softmax in float32
}
CASES: dict[str, dict[str, Any]] = {
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, free head, all biases, wide heads": {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "head_dim": 6,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rms_norm_eps": 1e-5,
    },
    "llama, adapted head": {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 3, "num_key_value_heads": 3},
    "qwen2": {
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
}


class RMSNorm64(torch.nn.Module):
    """y = weight x / sqrt(mean(x^2) + eps), in the dtype of x."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Rotary64(torch.nn.Module):
    """cos and sin of position theta^(-2 i / d), in float64."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.theta = config.rope_parameters["rope_theta"]

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = self.theta ** (-torch.arange(0, self.d, 2, dtype=torch.float64) / self.d)
        angles = position_ids[..., None].double() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def base_model(name: str, exact: bool = True) -> Any:
    """The random base model of a case, in float64; `exact` replaces the parts that transformers computes in float32."""
    torch.manual_seed(sorted(CASES).index(name))
    options = {**_SIZES, **CASES[name]}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**options))
    for path, p in model.named_parameters():
        with torch.no_grad():
            if path.endswith(("norm.weight", "bias")):  # away from 1 and 0, which hide mistakes
                p += 0.3 * torch.randn(p.shape)
            p.copy_(p.half().float())
    model = model.double().eval()
    if exact:
        decoder = model.model
        decoder.rotary_emb = Rotary64(model.config)
        decoder.norm = RMSNorm64(decoder.norm)
        for block in decoder.layers:
            block.input_layernorm = RMSNorm64(block.input_layernorm)
            block.post_attention_layernorm = RMSNorm64(block.post_attention_layernorm)
    return model


def adapted_model(name: str, exact: bool = True) -> Any:
    """The base model with LoRA of rank 3 on all linear layers (and the head, in that case), with B not zero."""
    head = ["lm_head"] if "adapted head" in name else []
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=projections + head, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base_model(name, exact), config).double()
    for path, p in model.named_parameters():
        with torch.no_grad():
            if "lora_" in path:
                p.copy_((0.2 * torch.randn(p.shape)).half().double())
    return model


def batch(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels (13,): labels are already shifted, with -100 at the end of each sequence and in some other places."""
    generator = torch.Generator().manual_seed(len(name))
    ids = torch.randint(0, _SIZES["vocab_size"], (OFFSETS[-1],), generator=generator)
    labels = torch.roll(ids, -1)
    labels[[end - 1 for end in OFFSETS[1:]] + [0, 8]] = -100
    return ids, labels


def run(model: Any, name: str) -> dict[str, torch.Tensor]:
    """Logits (13, V), the loss over all labelled rows, and the gradients of the trainable parameters by path."""
    ids, labels = batch(name)
    logits = torch.cat([model(ids[None, a:b]).logits[0] for a, b in pairwise(OFFSETS)])
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    grads = {f"grad:{_path(path)}": p.grad for path, p in model.named_parameters() if p.requires_grad}
    return {"logits": logits.detach(), "loss": loss.detach()[None], **grads}


def tensors(name: str) -> dict[str, torch.Tensor]:
    """All tensors of a case: "base:" and "lora:" weights in float16, and the results of `run` in float64."""
    ids, labels = batch(name)
    base = {f"base:{path}": p.detach().half() for path, p in base_model(name).named_parameters()}
    model = adapted_model(name)
    lora = {f"lora:{_path(path)}": p.detach().half() for path, p in model.named_parameters() if "lora_" in path}
    return {"ids": ids, "labels": labels, **base, **lora, **run(model, name)}


def _path(path: str) -> str:
    """minilora's path for PEFT's path of an adapter."""
    return path.removeprefix("base_model.model.").removesuffix(".default.weight")


def main() -> None:
    torch.set_num_threads(1)
    out = {f"{name}|{key}": value.contiguous() for name in CASES for key, value in tensors(name).items()}
    configs = {name: base_model(name).config.to_dict() for name in CASES}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    save_file(out, FILE, metadata={"about": json.dumps({"versions": versions, "configs": configs}, sort_keys=True)})


if __name__ == "__main__":
    main()
