"""Importing a module by the name it had in an earlier version raises ModuleNotFoundError that names the new one."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

_KEPT_NAME = {  # (old package, new package): modules
    ("training", "data"): "datasets examples labels records text",
    ("training", "optim"): "flat loraplus optimizers preconditioned schedules",
    ("training", "runs"): "finetune plot recipe study study_folder tasks",
}
_RENAMED = {
    "family": "lora.variants, minilora.lora.init and minilora.quantization",
    "training.data": "data.batches",
    "training.evaluate_run": "runs.evaluate",
    "training.extract_run": "runs.extract",
    "training.run_folder": "runs.folder",
    "formats.run": "runs.run_file",
    "formats.partial": "formats.adapter",
    "adapters.config": "adapters.partial and minilora.adapters.bottleneck",
    "adapters.injection": "lora.injection",
}
MOVED = {f"{old}.{name}": f"{new}.{name}" for (old, new), names in _KEPT_NAME.items() for name in names.split()} | _RENAMED


class _Finder(MetaPathFinder):
    """The first finder: the folder of a dissolved package may still exist, with nothing but compiled files."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        package, _, old = name.partition(".")
        if package == "minilora" and old in MOVED:
            raise ModuleNotFoundError(f"{name} has moved to minilora.{MOVED[old]}.", name=name)


sys.meta_path.insert(0, _Finder())
