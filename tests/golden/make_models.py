"""Write models.safetensors: logits, loss, LoRA gradients and a short training run of small random models, by transformers and PEFT.

Needs the extra `oracle`:   python tests/golden/make_models.py
Every sequence runs alone, without padding or mask. All is float64 except the training run, which is float32.
Keys: <model>.weights.<name>, <model>.lora.<name> (PEFT's layout), <model>.grads.<name>, <model>.logits, <model>.loss, <model>.run.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("models.safetensors")
STEPS, LR = 30, 3e-3
LENGTHS = {"gpt2": [7, 1, 11, 4], "bert": [5, 9, 1, 6]}
CONFIGS = {
    "gpt2": {"vocab_size": 53, "n_positions": 13, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_inner": 20},
    "bert": {
        **{"vocab_size": 61, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20},
        **{"max_position_embeddings": 11, "type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    },
}
LORA: dict[str, dict[str, Any]] = {
    "gpt2": {"r": 3, "lora_alpha": 4, "target_modules": "all-linear"},
    "bert": {"r": 2, "lora_alpha": 6, "target_modules": "all-linear", "modules_to_save": ["classifier"]},
}


def data(name: str) -> tuple[list[np.ndarray], np.ndarray]:
    """(sequences, labels): for gpt2 one label per token (the next token, some ignored), for bert one per sequence."""
    rng = np.random.default_rng(7)
    ids = [rng.integers(0, CONFIGS[name]["vocab_size"], n) for n in LENGTHS[name]]
    if name == "bert":
        return ids, np.array([2, 0, -100, 1])
    labels = [np.append(seq[1:], -100) for seq in ids]
    labels[2][:4] = -100  # a prompt
    return ids, np.concatenate(labels)


def build(name: str) -> Any:
    """The random model, in float64, without dropout; gains and biases away from 1 and 0."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**CONFIGS[name], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0))
    else:
        off = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "num_labels": 3}
        model = BertForSequenceClassification(BertConfig(**CONFIGS[name], **off))
    model = model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.2 * torch.randn(p.shape, dtype=p.dtype)).float())  # values that are exact in float32
    return model


def adapt(model: Any, name: str) -> Any:
    """The model with PEFT's LoRA, both A and B random."""
    import torch
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT sets fan_in_fan_out and warns
        peft = get_peft_model(model, LoraConfig(**LORA[name], task_type="CAUSAL_LM" if name == "gpt2" else "SEQ_CLS"))
    peft = peft.double().eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for path, p in peft.named_parameters():
            if ".lora_" in path:
                p.copy_((0.3 * torch.randn(p.shape, dtype=p.dtype)).float())
    return peft


def run(peft: Any, name: str) -> tuple[Any, Any]:
    """(logits, loss) over all sequences, each run alone; the loss is the mean over the labelled rows."""
    import torch

    ids, labels = data(name)
    logits = torch.cat([peft(input_ids=torch.tensor(seq)[None]).logits.reshape(-1, 53 if name == "gpt2" else 3) for seq in ids])
    return logits, torch.nn.functional.cross_entropy(logits, torch.tensor(labels), ignore_index=-100)


def trained(peft: Any) -> dict[str, Any]:
    """{path in the base model: parameter} of the parameters that PEFT trains."""
    named = {path: p for path, p in peft.named_parameters() if p.requires_grad}
    return {
        path.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", ""): p
        for path, p in named.items()
    }


def golden(name: str) -> dict[str, np.ndarray]:
    """All golden arrays of one model."""
    import torch

    model = build(name)
    found = {f"weights.{path}": value.numpy().copy() for path, value in model.state_dict().items() if path != "lm_head.weight"}
    peft = adapt(model, name)
    found |= {f"lora.{path}": p.detach().numpy().copy() for path, p in trained(peft).items() if ".lora_" in path}
    logits, loss = run(peft, name)
    loss.backward()
    found |= {f"grads.{path}": p.grad.numpy().copy() for path, p in trained(peft).items()}
    found |= {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()}

    peft = peft.float()
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=LR, weight_decay=0.01)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = run(peft, name)[1]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found["run"] = np.array(losses)
    found |= {f"after.{path}": p.detach().numpy().copy() for path, p in trained(peft).items()}
    return {f"{name}.{key}": value for key, value in found.items()}


def main() -> None:
    import peft
    import torch
    import transformers
    from safetensors.numpy import save_file

    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    FILE.unlink(missing_ok=True)
    save_file(golden("gpt2") | golden("bert"), FILE, metadata={"made with": json.dumps(versions)})


if __name__ == "__main__":
    main()
