"""Reading and writing safetensors files, with errors that name the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minilora.formats.atomic import write_file


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({name: array}, metadata) of a safetensors file.

    Raises FileNotFoundError, or ValueError when the file is cut off, is something else, or holds a dtype NumPy has not.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="np") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}).") from None


def write_tensors(path: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all. By default the metadata is format=pt, which transformers asks for.

    Give at most one entry of metadata: the library writes several in an order that changes from run to run.
    """
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    write_file(path, lambda temporary: save_file(contiguous, temporary, metadata=metadata or {"format": "pt"}))
