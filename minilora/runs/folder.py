"""The folder of a run.

run.json        the configuration, the names of the classes, the SHA-256 of the training data, and the results
metrics.jsonl   one line a step: step, loss, lr, grad_norm, tokens. No times: the same run writes the same file
samples.txt     texts that the model generated before and after
adapter/        adapter_config.json, adapter_model.safetensors       (all methods but full)
model/          config.json, model.safetensors                       (method full)
base/           the quantized model that the adapter fits            (method lora initialised with LoftQ)
curves.png      the picture, if matplotlib is installed
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from minilora.formats.atomic import to_json, write_text


def check_free(path: str | Path, note: str = "") -> Path:
    """The path, if nothing or an empty folder is there. Raises FileExistsError otherwise."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is in use{note}; name another folder with --out, or remove it first.")
    return path


def new_folder(path: str | Path | None, method: str) -> Path:
    """`path`, or the first free runs/<method>-<n>, as a new folder. Raises FileExistsError when `path` is in use."""
    numbered = (Path("runs") / f"{method}-{n}" for n in count(1))
    folder = check_free(next(f for f in numbered if not f.exists()) if path is None else path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """All records so far, one JSON object a line. The file is replaced as a whole, so it never ends in the middle of a line."""
    write_text(path, "".join(to_json(record) + "\n" for record in records))
