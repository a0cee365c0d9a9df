"""The model card of an adapter: the README.md that the hub shows, with the head that PEFT and the hub read."""

import json
from pathlib import Path
from typing import Any

from minilora.formats.fetch import BUNDLED
from minilora.runs.recipe import ResolvedRecipe

_TEXT = """---
{head}
---

# {title}

{method}, trained on {base} with minilora.

| | |
|---|---|
| Base model | {base} |
| Data | {data} |
| Training | {steps} steps, learning rate {lr:g} ({schedule}), seed {seed}, {dtype} |
| Trained | {trained:,} parameters, {share:.2%} of the model |

| held out | before | after |
|---|---|---|
{figures}

```python
{load}
```
"""
_PEFT = """from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained({base!r}), "path/of/this/folder")"""
_OURS = """from minilora.runs.run_file import open_model

model = open_model({base!r}, adapter="path/of/this/folder")"""


def card(plan: ResolvedRecipe, method: str, data: str, results: dict[str, Any]) -> str:
    """The text. method, data: in words. results: as in run.json."""
    classify, on_hub = plan.kind == "classify", not Path(plan.model).exists() and "/" in plan.model
    head: dict[str, Any] = {"base_model": plan.model} if on_hub else {}
    head |= {"library_name": "peft" if plan.method == "lora" else "minilora", "tags": ["minilora", plan.method]}
    head |= {"pipeline_tag": "text-classification" if classify else "text-generation"}
    ours = plan.method != "lora" or plan.model == BUNDLED
    base = plan.model if on_hub or plan.model == BUNDLED else f"path/of/{Path(plan.model).name}"
    rows = [
        (name, results["before"].get(name), after)
        for name, after in results["after"].items()
        if isinstance(after, (int, float)) and "tokens" not in name
    ]
    auto = "AutoModelForSequenceClassification" if classify else "AutoModelForCausalLM"
    return _TEXT.format(
        head="\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items()),  # JSON is YAML
        title=f"{Path(plan.model).name}, {plan.method}",
        method=method[:1].upper() + method[1:],
        base=plan.model if on_hub else f"{Path(plan.model).name} (not from the hub)",
        data=data,
        trained=results["trainable_parameters"],
        share=results["trainable_share"],
        figures="\n".join(
            f"| {name.replace('_', ' ')} | {before:.4g} | {after:.4g} |" for name, before, after in rows if before is not None
        ),
        load=(_OURS if ours else _PEFT).format(auto=auto, base=base),
        **{name: getattr(plan, name) for name in ("steps", "lr", "schedule", "seed", "dtype")},
    )
