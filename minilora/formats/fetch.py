"""Locating a model: the bundled one, a folder, or an id on the hub; reading its tensors; and noting where it came from."""

import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from minilora.formats import extra
from minilora.formats.atomic import read_json
from minilora.formats.gguf import gguf_model_type
from minilora.formats.gguf_header import read_header
from minilora.formats.tensors import map_tensors, stored_dtypes
from minilora.layers import Layer

BUNDLED = "pydoc"  # the model inside the package: load_model("pydoc")
_OWN_FOLDERS = ("runs", "studies")  # where runs are written: not organisations on the hub
_SUFFIXES = (".safetensors", ".gguf", ".json", ".bin", ".pt", ".pth", ".ckpt")


def model_folder(name: str | Path = BUNDLED, download: bool = True) -> Path:
    """The folder of a model: a path, the bundled model by name, or the local snapshot of an id "org/name" on the hub.

    download=False only looks in the hub's local cache; use it for names that come from files.
    Raises FileNotFoundError when there is no such folder, or no config.json in it; ImportError without huggingface_hub.
    """
    if is_hub_id(name):
        return _snapshot(str(name), download)
    folder = Path(__file__).parent.parent / "data" / BUNDLED if str(name) == BUNDLED else Path(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no model at {name}: expected a folder with config.json and model.safetensors, a .gguf file, "
            f'an id on the hub ("org/name"), or {BUNDLED!r}.'
        )
    return folder


def is_hub_id(name: str | Path) -> bool:
    """Whether this is "org/name" on the hub: not a path below an existing folder "org", and not a file name."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return False
    first = name.partition("/")[0]
    return first not in _OWN_FOLDERS and not Path(first).exists() and Path(name).suffix not in _SUFFIXES


def read_weights(folder: Path, bfloat16: Any = None) -> dict[str, np.ndarray]:
    """{name: array} of a folder's safetensors files, as `map_tensors`. Raises FileNotFoundError or ValueError."""
    return {name: value for file in weight_files(folder) for name, value in map_tensors(file, bfloat16)[0].items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that an index names, which must be beside it and hold the tensors that it lists.

    Raises FileNotFoundError or ValueError.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        pickled = sorted(p.name for suffix in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{suffix}"))
        if pickled:
            raise ValueError(f"{folder} has only a pickled checkpoint ({pickled[0]}), which is not supported; convert it to safetensors.")
        raise FileNotFoundError(f"there is no file {folder}/model.safetensors, nor model.safetensors.index.json.")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map.")
    for name in places.values():
        if not isinstance(name, str) or name in ("", ".", "..") or PureWindowsPath(name).name != name or not name.isprintable():
            raise ValueError(f"{index} names the file {name!r:.80}, which is not the plain name of a file in its folder.")
    shards = {folder / name: stored_dtypes(folder / name) for name in dict.fromkeys(places.values())}
    for file, held in shards.items():
        listed = {name for name, place in places.items() if place == file.name}
        if odd := listed ^ held.keys():
            where = "is not there" if min(odd) in listed else "is there, but not in the index"
            raise ValueError(f"{index} and {file.name} differ: {min(odd)!r:.80} {where}.")
    return list(shards)


def model_type_of(name: str) -> str | None:
    """The model_type of a model at hand, None where it is not; nothing is downloaded."""
    try:
        if name.endswith(".gguf"):
            return gguf_model_type(*read_header(Path(name)))
        kind = read_json(model_folder(name, download=False) / "config.json").get("model_type")
    except (OSError, ValueError, ImportError):
        return None
    return kind if isinstance(kind, str) else None


def _snapshot(hub_id: str, download: bool) -> Path:
    """The local snapshot of a model on the hub."""
    hub = extra("huggingface_hub", "hf", f"there is no folder {hub_id}, and fetching it from the hub")
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(hub.snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["*/*"], local_files_only=not download))
    except Exception as error:  # no network, unknown name, no permission: classes of several libraries
        if not download:
            raise FileNotFoundError(f"there is no folder {hub_id}, and it is not in the hub's local cache.") from None
        why = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(f"there is no folder {hub_id}, and it cannot be fetched from the hub: {why:.300}") from None
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{hub_id} on the hub has no config.json; is it a model?")
    return folder


@dataclass(frozen=True)
class Origin:
    """Where a model came from: `load_model` notes it on the model, `save_model` and `save_adapter` write it down.

    source: the folder or file. hub_id: the id, if the hub was named by one. drawn: paths of the modules that no file held, which were
    initialised at random; an adapter takes them along.
    """

    source: str | None = None
    hub_id: str | None = None
    drawn: tuple[str, ...] = ()


def origin(model: Layer) -> Origin:
    """The Origin of a model, its attribute `origin`; an empty one for a model that was not loaded."""
    return getattr(model, "origin", None) or Origin()
