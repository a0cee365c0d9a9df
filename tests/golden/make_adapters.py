"""Write the folder peft: small base models, adapters that PEFT makes for them, their logits, and 30 training losses.

python tests/golden/make_adapters.py        (needs the extra `oracle`)

This module defines the contents of the files once; tests/test_peft.py recomputes them where torch is installed.
"""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_name("peft")
STEPS, ADAMW = 30, {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
IDS = np.random.default_rng(0).integers(0, 23, (STEPS, 2, 7))  # two sequences of 7 tokens per step; the logits are those of step 0
LABELS = np.random.default_rng(1).integers(0, 3, (STEPS, 2))  # one label per sequence, for a classifier

SIZES = {
    "gpt2": {"vocab_size": 23, "n_positions": 9, "n_embd": 12, "n_layer": 2, "n_head": 3, "bos_token_id": 0, "eos_token_id": 0}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {"vocab_size": 23, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 6}
    | {"num_key_value_heads": 3, "max_position_embeddings": 9, "tie_word_embeddings": False, "attention_bias": True},
    "bert": {"vocab_size": 23, "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 2, "num_attention_heads": 3}
    | {"max_position_embeddings": 9, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
SIZES["tied llama"] = SIZES["llama"] | {"tie_word_embeddings": True, "attention_bias": False}

TASK = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "tied llama": "CAUSAL_LM", "bert": "SEQ_CLS"}
NAMES = {  # list of blocks, two linear layers, a norm, a module that contains linear layers, a full path
    "gpt2": ("h", "c_attn", "c_fc", "ln_f", "mlp", "transformer.h.0.attn.c_attn"),
    "llama": ("layers", "q_proj", "up_proj", "norm", "mlp", "model.layers.0.self_attn.q_proj"),
    "bert": ("layer", "query", "intermediate.dense", "embeddings.LayerNorm", "intermediate", "bert.encoder.layer.0.attention.self.query"),
}
NAMES["tied llama"] = NAMES["llama"]
EMBEDDING = {"gpt2": "wte", "llama": "embed_tokens", "tied llama": "embed_tokens", "bert": "word_embeddings"}
GOLDEN = ("all linear layers", "patterns", "bias all", "modules with linear layers whole", "expression, rsLoRA", "layers by pattern")


def options(kind: str) -> dict[str, dict]:
    """{case: fields of LoraConfig, for PEFT and minilora} for a kind of model."""
    blocks, q, up, norm, part, whole = NAMES[kind]
    usual = {"r": 2, "lora_alpha": 8, "task_type": TASK[kind], "target_modules": [q, up], "fan_in_fan_out": kind == "gpt2"}
    result = {
        "names": {},
        "all linear layers": {"target_modules": "all-linear", "r": 3},
        "expression, rsLoRA": {"target_modules": rf".*\.{blocks}\.1\..*({q}|{up})", "use_rslora": True, "lora_alpha": 3},
        "patterns": {"rank_pattern": {q: 4, rf"{blocks}\.0\..*{up}": 1}, "alpha_pattern": {rf"^.*\.1\..*{up}": 5, q: 1}, "r": 3},
        "patterns, rsLoRA": {"rank_pattern": {whole: 5}, "alpha_pattern": {up: 3}, "use_rslora": True},
        "bias all": {"bias": "all"},
        "bias lora_only": {"bias": "lora_only"},
        "bias all, a norm whole": {"bias": "all", "modules_to_save": [norm]},
        "a norm whole": {"modules_to_save": [norm]},
        "modules with linear layers whole": {"modules_to_save": [part], "target_modules": [q]},
        "what is whole is not adapted": {"modules_to_save": [part], "target_modules": "all-linear", "bias": "lora_only"},
        "exclude a name": {"target_modules": "all-linear", "exclude_modules": [up]},
        "exclude an expression": {"target_modules": "all-linear", "exclude_modules": rf".*\.0\..*{q}"},
        "exclude from an expression": {"target_modules": rf".*({q}|{up})", "exclude_modules": [whole]},
        "one layer": {"layers_to_transform": 1},
        "layers": {"layers_to_transform": [0], "target_modules": [up, q]},
        "layers by pattern": {"layers_to_transform": [1], "layers_pattern": blocks},
        "layers by patterns, a whole path": {
            "layers_to_transform": [1],
            "layers_pattern": ["blocks", blocks],
            "target_modules": [up, whole],
        },
        "gaussian": {"init_lora_weights": "gaussian"},
        "B not zero": {"init_lora_weights": False},
        "dropout": {"lora_dropout": 0.3},
        "DoRA": {"use_dora": True},
        "DoRA, rsLoRA, patterns, bias": {"use_dora": True, "use_rslora": True, "rank_pattern": {q: 4}, "bias": "lora_only"},
        "no task": {"task_type": None},
    }
    result["embedding adapted"] = {"target_modules": [EMBEDDING[kind], q], "r": 3}
    if kind == "bert":
        result["no task, all linear layers"] = {"task_type": None, "target_modules": "all-linear"}
        result["the head by name"] = {"task_type": None, "modules_to_save": ["classifier"], "target_modules": "all-linear"}
        result["pooler whole, bias all"] = {"modules_to_save": ["pooler"], "bias": "all"}
        result["pooler adapted, embeddings whole"] = {"target_modules": ["pooler.dense"], "modules_to_save": ["word_embeddings"]}
        result["a query whole, by half its name"] = {"modules_to_save": ["elf.query"], "target_modules": ["key"]}
    if kind == "llama":
        result["embeddings and head whole"] = {"modules_to_save": ["embed_tokens", "lm_head"]}
        result["head adapted"] = {"target_modules": [q, "lm_head"]}
        result["norms by half their name"] = {"modules_to_save": ["layernorm"]}
    if kind == "gpt2":
        result["positions whole"] = {"modules_to_save": ["wpe"]}
    if kind == "tied llama":
        result = {
            what: result[what]
            for what in ("names", "all linear layers", "bias all, a norm whole", "modules with linear layers whole", "embedding adapted")
        }
    return {what: usual | fields for what, fields in result.items()}


def slug(what: str) -> str:
    """The folder name of a case."""
    return re.sub(r"\W+", "-", what)


def quietly(function, *args, **kwargs):
    """Call a function of torch, transformers or PEFT without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def base(kind: str):
    """A transformers model with fixed random weights."""
    import torch
    import transformers

    names = {"gpt2": "GPT2{}", "llama": "Llama{}", "tied llama": "Llama{}", "bert": "Bert{}"}
    heads = {"gpt2": "LMHeadModel", "llama": "ForCausalLM", "tied llama": "ForCausalLM", "bert": "ForSequenceClassification"}
    config = getattr(transformers, names[kind].format("Config"))(**SIZES[kind])
    model = quietly(getattr(transformers, names[kind].format(heads[kind])), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_gain = p.ndim == 1 and name.endswith("weight")
            p.copy_(0.3 * torch.randn(p.shape, generator=generator) + is_gain)
    return model.eval()


def adapted(kind: str, fields: dict, seed: int | None = 5):
    """A PEFT model of `base(kind)`, with all trainable parameters perturbed at random unless seed is None."""
    import peft
    import torch

    torch.manual_seed(1)  # initial values of the adapter
    model = quietly(peft.get_peft_model, base(kind), quietly(peft.LoraConfig, **copy.deepcopy(fields)))
    generator = torch.Generator().manual_seed(seed or 0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and seed is not None:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def logits(model, ids: np.ndarray = IDS[0]) -> np.ndarray:
    """(2, labels), or (14, vocabulary) of the packed sequences."""
    import torch

    with torch.no_grad():
        out = quietly(model, input_ids=torch.from_numpy(ids)).logits
    return out.reshape(-1, out.shape[-1]).numpy()


def losses(model, optimizer=None) -> np.ndarray:
    """Losses before each of STEPS steps of AdamW or of another torch optimizer."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, result = optimizer or torch.optim.AdamW(trained, **ADAMW), []
    for ids, labels in zip(torch.from_numpy(IDS), torch.from_numpy(LABELS), strict=True):
        out = quietly(model, input_ids=ids).logits
        if out.ndim == 3:  # the next token
            out, labels = out[:, :-1].reshape(-1, out.shape[-1]), ids[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(out, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(loss.item())
    return np.array(result)


def main() -> None:
    from safetensors.numpy import save_file

    shutil.rmtree(FOLDER, ignore_errors=True)
    for kind in ("gpt2", "llama", "bert"):
        quietly(base(kind).save_pretrained, FOLDER / kind / "base")
        expected = {"base": logits(base(kind))}
        for what, fields in options(kind).items():
            if what in GOLDEN:
                model = adapted(kind, fields)
                quietly(model.save_pretrained, FOLDER / kind / slug(what))
                expected[slug(what)] = logits(model)
        start = adapted(kind, options(kind)["all linear layers"], seed=None)
        quietly(start.save_pretrained, FOLDER / kind / "start")
        expected["losses"] = losses(start)
        save_file(expected, FOLDER / kind / "expected.safetensors")
    for stray in [*FOLDER.rglob("README.md"), *FOLDER.rglob("generation_config.json")]:
        stray.unlink()
    for path in FOLDER.rglob("adapter_config.json"):  # PEFT writes sets in arbitrary order
        config = json.loads(path.read_text())
        config["target_modules"] = (
            config["target_modules"] if isinstance(config["target_modules"], str) else sorted(config["target_modules"])
        )
        path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
