"""Importing a module by the name it had in an earlier version raises ModuleNotFoundError that names the new one."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

MOVED = {
    **{f"training.{name}": f"minilora.data.{name}" for name in "datasets examples records text".split()},
    **{f"training.{name}": f"minilora.optim.{name}" for name in "flat optimizers schedules".split()},
    **{f"training.{name}": f"minilora.runs.{name}" for name in "finetune plot recipe study tasks".split()},
    "family": "minilora.lora.variants, minilora.lora.init and minilora.quantization",
    "training.data": "minilora.data.batches",
    "training.evaluate_run": "minilora.runs.evaluate",
    "training.extract_run": "minilora.runs.merge",
    "training.few_sample": "minilora.training.reinitialise and minilora.optim.optimizers",
    "training.labels": "minilora.data.examples",
    "training.loraplus": "minilora.optim.optimizers",
    "training.metrics": "minilora.training.evaluate",
    "training.preconditioned": "examples/preconditioned.py",
    "training.recorded": "minilora.training.cuda_graph",
    "training.run_folder": "minilora.runs.folder",
    "training.study_folder": "minilora.runs.folder",
    "formats.run": "minilora.runs.run_file",
    "formats.partial": "minilora.formats.adapter",
    "adapters.config": "minilora.adapters.partial and minilora.adapters.bottleneck",
    "adapters.injection": "minilora.lora.injection",
}


class _Finder(MetaPathFinder):
    """The first finder: the folder of a dissolved package may still exist, with nothing but compiled files."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        package, _, old = name.partition(".")
        if package == "minilora" and old in MOVED:
            raise ModuleNotFoundError(f"{name} has moved to {MOVED[old]}.", name=name)


sys.meta_path.insert(0, _Finder())
