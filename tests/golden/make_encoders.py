"""Write encoders.safetensors: RoBERTa, XLM-RoBERTa, DistilBERT and ModernBERT with a classifier, by transformers and PEFT.

Needs the extra `oracle`:   python tests/golden/make_encoders.py

As make_models.py, whose parts it uses: every sequence runs alone, and all is float64 except the training run, which is float32. Keys:
<case>|weights.<name>, |lora.<name>, |grads.<name>, |logits, |loss, |run, |after.<name>. Weights are kept in float16, where they are exact.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from make_models import LR, STEPS, trained
from safetensors.numpy import save_file
from transformers.models.modernbert import modeling_modernbert

FILE = Path(__file__).with_name("encoders.safetensors")
LENGTHS = [5, 11, 1, 6]
LABELS = np.array([2, 0, -100, 1])
_BERT: dict[str, Any] = {
    **{"vocab_size": 61, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20, "num_labels": 3},
    **{"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "initializer_range": 0.15},
}
CASES: dict[str, dict[str, Any]] = {
    "roberta": {**_BERT, "model_type": "roberta", "max_position_embeddings": 13, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    "xlm-roberta, padding elsewhere": {**_BERT, "model_type": "xlm-roberta", "max_position_embeddings": 17, "pad_token_id": 5},
    "distilbert": {
        **{"model_type": "distilbert", "vocab_size": 61, "dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 20, "num_labels": 3},
        **{"max_position_embeddings": 11, "dropout": 0, "attention_dropout": 0, "seq_classif_dropout": 0, "initializer_range": 0.15},
    },
}
_MODERN: dict[str, Any] = {
    **{"model_type": "modernbert", "vocab_size": 61, "hidden_size": 12, "num_attention_heads": 3, "num_labels": 3, "pad_token_id": 1},
    **{"num_hidden_layers": 4, "intermediate_size": 17, "max_position_embeddings": 11, "local_attention": 5, "initializer_range": 0.15},
    **{"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "attn_implementation": "sdpa"},
}
CASES["modernbert"] = _MODERN
CASES["modernbert, mean, biases, relu"] = {
    **{**_MODERN, "num_hidden_layers": 3, "local_attention": 2, "classifier_pooling": "mean", "hidden_activation": "gelu_new"},
    **dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True),
    "classifier_activation": "relu",
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    },
}
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
TARGETS = {
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
}  # PEFT refuses "all-linear", as it would adapt pre_classifier


def data(name: str) -> list[np.ndarray]:
    """The sequences of a case; the second has a padding token in it, which RoBERTa does not count."""
    sequences = [np.random.default_rng(7 + n).integers(0, CASES[name]["vocab_size"], n) for n in LENGTHS]
    sequences[1][3] = CASES[name].get("pad_token_id", 0 if name == "distilbert" else 1)
    return sequences


class Rotary64(torch.nn.Module):
    """cos and sin of position theta^(-2 i / d), in float64; transformers computes them in float32."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.d, self.parameters_of = config.hidden_size // config.num_attention_heads, config.rope_parameters

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = self.parameters_of[kind]["rope_theta"] ** (-torch.arange(0, self.d, 2, dtype=torch.float64) / self.d)
        angles = position_ids[..., None].double() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
    """apply_rotary_pos_emb of modeling_modernbert without its casts to float32."""
    cos, sin, half = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim), q.shape[-1] // 2
    q, k = (x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin for x in (q, k))
    return q, k


def build(name: str) -> Any:
    """The random model in float64; gains and biases away from 1 and 0, values exact in float16."""
    torch.manual_seed(sorted(CASES).index(name))
    model = transformers.AutoModelForSequenceClassification.from_config(transformers.AutoConfig.for_model(**CASES[name]))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.2 * torch.randn(p.shape)).half())
    if name.startswith("modernbert"):
        modeling_modernbert.apply_rotary_pos_emb = rotated
        model.model.rotary_emb = Rotary64(model.config)
    return model.double().eval()


def adapt(model: Any, name: str) -> Any:
    """The model with PEFT's LoRA, both A and B random."""
    options = {**LORA, "target_modules": next((TARGETS[key] for key in TARGETS if name.startswith(key)), "all-linear")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options)).double().eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for path, p in adapted.named_parameters():
            if ".lora_" in path:
                p.copy_((0.3 * torch.randn(p.shape)).half())
    return adapted


def run(model: Any, name: str) -> tuple[Any, Any]:
    """(logits, loss) of the sequences, each run alone."""
    logits = torch.cat([model(input_ids=torch.tensor(sequence)[None]).logits for sequence in data(name)])
    return logits, torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS), ignore_index=-100)


def golden(name: str) -> dict[str, np.ndarray]:
    """All golden arrays of a case."""
    model = build(name)
    found = {f"weights.{path}": value.half().numpy() for path, value in model.state_dict().items()}
    adapted = adapt(model, name)
    found |= {f"lora.{path}": p.detach().half().numpy() for path, p in trained(adapted).items() if ".lora_" in path}
    logits, loss = run(adapted, name)
    loss.backward()
    found |= {f"grads.{path}": p.grad.numpy().copy() for path, p in trained(adapted).items()}
    found |= {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()}

    adapted, losses = adapted.float(), []
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LR, weight_decay=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = run(adapted, name)[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found["run"] = np.array(losses)
    found |= {f"after.{path}": p.detach().numpy().copy() for path, p in trained(adapted).items()}
    return {f"{name}|{key}": value for key, value in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    arrays = {key: value for name in CASES for key, value in golden(name).items()}
    about = {"versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)}, "configs": CASES}
    save_file(arrays, FILE, metadata={"about": json.dumps(about, sort_keys=True)})


if __name__ == "__main__":
    main()
