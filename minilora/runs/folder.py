"""The folder that a run leaves behind: what it was asked, what it measured, what it made."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from minilora.formats.atomic import to_json, write_json, write_text


class RunFolder:
    """Paths inside a run folder, and the writing of its records.

    run.json        the configuration, the names of the classes, what tells the training data again, and results when there are any
    metrics.jsonl   one line a step: step, loss, lr, grad_norm, tokens. No times: the same run gives the same file
    samples.txt     what the model wrote before and after
    adapter/        adapter_config.json, adapter_model.safetensors       (all methods but full)
    model/          config.json, model.safetensors                       (method full)
    base/           the quantized model that the adapter fits              (method lora that begins with LoftQ)
    curves.png      the picture, if matplotlib is installed
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.run, self.metrics = self.path / "run.json", self.path / "metrics.jsonl"
        self.samples, self.curves = self.path / "samples.txt", self.path / "curves.png"
        self.adapter, self.model, self.base = self.path / "adapter", self.path / "model", self.path / "base"

    @classmethod
    def create(cls, path: str | Path | None, method: str) -> RunFolder:
        """A new folder: `path`, or the first free runs/<method>-<n>.

        Raises FileExistsError when `path` is in use, OSError when it cannot be made.
        """
        if path is None:
            folder = next(f for n in count(1) if not (f := Path("runs") / f"{method}-{n}").exists())
        else:
            folder = Path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} is in use; name another run folder with --out, or remove it first.")
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def write_run(
        self, configuration: dict[str, Any], results: dict[str, Any], labels: list[str] | None, trained_on: dict[str, Any]
    ) -> None:
        write_json(self.run, {"configuration": configuration, "labels": labels, "trained_on": trained_on, "results": results})

    def write_metrics(self, records: Iterable[dict[str, Any]]) -> None:
        """All records so far, whole: the file is replaced, never cut off in the middle of a line."""
        write_text(self.metrics, "".join(to_json(record) + "\n" for record in records))

    def write_samples(self, prompt: str, before: str, after: str) -> None:
        write_text(self.samples, f"# prompt\n{prompt}\n\n# before\n{prompt}{before}\n\n# after\n{prompt}{after}\n")
