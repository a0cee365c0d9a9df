"""The folder of a run: its configuration, measurements and results."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from minilora.formats.atomic import to_json, write_json, write_text


def check_free(path: str | Path, note: str = "") -> Path:
    """The path, if nothing or an empty folder is there. Raises FileExistsError otherwise."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is in use{note}; name another folder with --out, or remove it first.")
    return path


class RunFolder:
    """The paths inside a run folder, and functions that write its files.

    run.json        the configuration, the names of the classes, the SHA-256 of the training data, and the results
    metrics.jsonl   one line a step: step, loss, lr, grad_norm, tokens. No times: the same run writes the same file
    samples.txt     texts that the model generated before and after
    adapter/        adapter_config.json, adapter_model.safetensors       (all methods but full)
    model/          config.json, model.safetensors                       (method full)
    base/           the quantized model that the adapter fits            (method lora initialised with LoftQ)
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
        check_free(folder).mkdir(parents=True, exist_ok=True)
        return cls(folder)

    def write_run(
        self, configuration: dict[str, Any], results: dict[str, Any], labels: list[str] | None, trained_on: dict[str, Any]
    ) -> None:
        write_json(self.run, {"configuration": configuration, "labels": labels, "trained_on": trained_on, "results": results})

    def write_metrics(self, records: Iterable[dict[str, Any]]) -> None:
        """All records so far. The file is replaced as a whole, so it never ends in the middle of a line."""
        write_text(self.metrics, "".join(to_json(record) + "\n" for record in records))

    def write_samples(self, prompt: str, before: str, after: str) -> None:
        write_text(self.samples, f"# prompt\n{prompt}\n\n# before\n{prompt}{before}\n\n# after\n{prompt}{after}\n")
