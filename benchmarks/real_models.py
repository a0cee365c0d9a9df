"""Shared by the measurements on published models: minilora's command line, and the peak memory of training with minilora and PEFT.

    python -m benchmarks.real_models minilora|peft MODEL BATCHES.npz '{"r": 8, ...}'

trains on the batches of a file in a process that does nothing else, and prints one JSON object: peak memory and losses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

LR = 5e-4  # memory does not depend on it


def minilora(*argv: Any) -> dict[str, Any]:
    """Run a verb and return the JSON object that it prints. Exits with the message of the verb if it fails."""
    return _json([sys.executable, "-m", "minilora", *map(str, argv), "--json"])


def compare_peaks(model: Path, batches: list[Any], lora: dict[str, Any], folder: Path, same: Path | None = None) -> dict[str, Any]:
    """Peak memory in bytes of the same steps by minilora on `model` and by PEFT on `same`, the same weights in a folder for transformers.

    `lora` are fields that both LoraConfigs have. The losses of the first step must agree.
    """
    named = {f"{name}{i}": getattr(b, name) for i, b in enumerate(batches) for name in ("ids", "labels", "offsets")}
    np.savez(folder / "batches.npz", **named)
    result = {
        who: _json([sys.executable, "-m", "benchmarks.real_models", who, path, folder / "batches.npz", json.dumps(lora)])
        for who, path in (("minilora", model), ("peft", same or model))
    }
    first = [result[who]["losses"][0] for who in result]
    if abs(first[0] - first[1]) > 1e-3:
        raise SystemExit(f"the first losses of minilora and PEFT differ: {first[0]}, {first[1]}")
    peaks = {who: result[who]["peak_bytes"] for who in result}
    return {**peaks, "ratio": peaks["minilora"] / peaks["peft"], "first_loss": first, "steps": len(batches)}


def _json(command: list[Any]) -> dict[str, Any]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# -- run in a separate process -------------------------------------------------------------------------------------------------


def train_here(path: str, batches: list[dict[str, np.ndarray]], lora: dict[str, Any]) -> list[float]:
    import minilora as ml
    from minilora.data.batches import Batch
    from minilora.training.loop import train

    model = ml.load_model(path, "numpy")
    ml.inject(model, ml.LoraConfig(**lora), rng=0)
    per_sequence = not hasattr(model, "decode")
    steps = train(
        model,
        ml.AdamW(model.parameters(), LR),
        (Batch(**b, per_sequence=per_sequence) for b in batches),
        len(batches),
        lambda step: 1.0,
        threads=2,
    )
    return [step.loss for step in steps]


def train_with_peft(path: str, batches: list[dict[str, np.ndarray]], lora: dict[str, Any]) -> list[float]:
    import peft
    import torch
    import transformers

    torch.set_num_threads(2)
    torch.manual_seed(0)
    task = transformers.AutoModelForSequenceClassification if lora["task_type"] == "SEQ_CLS" else transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.from_pretrained(path)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0  # as in minilora
    model = peft.get_peft_model(task.from_pretrained(path, config=config, dtype=torch.float32), peft.LoraConfig(**lora)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LR, weight_decay=0)
    more = {} if lora["task_type"] == "SEQ_CLS" else {"use_cache": False}
    losses = []
    for batch in batches:
        rows = np.split(batch["ids"], batch["offsets"][1:-1])
        pad = lambda parts, with_: torch.nn.utils.rnn.pad_sequence(  # noqa: E731
            [torch.from_numpy(part) for part in parts], batch_first=True, padding_value=with_
        )
        mask = pad([np.ones_like(row) for row in rows], 0)
        logits = model(input_ids=pad(rows, 0), attention_mask=mask, **more).logits
        labels = batch["labels"]
        if lora["task_type"] == "SEQ_CLS":
            loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        else:  # labels are already shifted
            labels = pad(np.split(labels, batch["offsets"][1:-1]), -100)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def peak_bytes() -> int:
    """Peak resident memory of this process. (ru_maxrss would include the parent.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    who, path, file, lora = sys.argv[1:]
    stored = np.load(file)
    batches = [{name: stored[f"{name}{i}"] for name in ("ids", "labels", "offsets")} for i in range(len(stored) // 3)]
    losses = {"minilora": train_here, "peft": train_with_peft}[who](path, batches, json.loads(lora))
    print(json.dumps({"peak_bytes": peak_bytes(), "losses": losses}))
