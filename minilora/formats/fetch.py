"""Where a model lies: the bundled one, a folder, or an id of the hub; and the tensors of its files as they are there."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath

import numpy as np

from minilora.formats.atomic import read_json
from minilora.formats.tensors import map_tensors, stored_dtypes

BUNDLED = "pydoc"  # the model inside the package: load_model("pydoc")
_OWN_FOLDERS = ("runs", "studies")  # of runs: never an organisation on the hub
_OF_FILES = (".safetensors", ".gguf", ".json", ".bin", ".pt", ".pth", ".ckpt")


def model_folder(name: str | Path = BUNDLED, download: bool = True) -> Path:
    """The folder of a model: the bundled one by its name, a path, or what huggingface_hub has fetched for an id "org/name".

    download=False: an id is looked up in the hub's local cache, and never fetched. That is for names that come out of files.
    Raises FileNotFoundError when there is no such folder, or no config.json in it; ImportError when huggingface_hub is missing.
    """
    if is_hub_id(name):
        return _snapshot(str(name), download)
    folder = Path(__file__).parent.parent / "data" / BUNDLED if str(name) == BUNDLED else Path(name)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no model at {name}: wanted a folder with config.json and model.safetensors, a .gguf file, "
            f'an id of the hub ("org/name"), or {BUNDLED!r}.'
        )
    return folder


def is_hub_id(name: str | Path) -> bool:
    """Does this look like "org/name", with nothing of the sort on disk? With a folder "org", or the name of a file, it is a slip."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        return False
    first = name.partition("/")[0]
    return first not in _OWN_FOLDERS and not Path(first).exists() and Path(name).suffix not in _OF_FILES


def read_weights(folder: Path) -> dict[str, np.ndarray]:
    """{name: array} of a folder's safetensors files, mapped. Raises FileNotFoundError or ValueError."""
    return {name: value for file in weight_files(folder) for name, value in map_tensors(file)[0].items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that an index names. Raises FileNotFoundError or ValueError."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        return _shards(index)
    pickled = sorted(p.name for suffix in ("bin", "pt", "pth", "ckpt") for p in folder.glob(f"*.{suffix}"))
    if pickled:
        raise ValueError(f"{folder} has only a pickled checkpoint ({pickled[0]}), which is not read; convert it to safetensors.")
    raise FileNotFoundError(f"there is no file {folder}/model.safetensors, nor model.safetensors.index.json.")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, each of which must lie beside it and hold what the index says."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index} has no weight_map.")
    for name in places.values():
        if not isinstance(name, str) or name in ("", ".", "..") or PureWindowsPath(name).name != name:
            raise ValueError(f"{index} names the file {name!r:.80}, which is not a plain name of a file in its folder.")
    shards = {file: stored_dtypes(file) for file in dict.fromkeys(index.parent / name for name in places.values())}
    for file, held in shards.items():
        listed = {name for name, place in places.items() if place == file.name}
        if listed != held.keys():
            odd = min(listed ^ held.keys())
            where = "is not there" if odd in listed else "is there, but not in the index"
            raise ValueError(f"{index} and {file.name} differ: {odd!r:.80} {where}.")
    return list(shards)


def _snapshot(hub_id: str, download: bool) -> Path:
    """The local snapshot of a model on the hub."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"there is no folder {hub_id}, and to fetch it from the hub takes huggingface_hub: pip install 'minilora[hf]'."
        ) from error
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["*/*"], local_files_only=not download))
    except Exception as error:  # no network, offline, no such name, no permission: each has a class of its own, some from other libraries
        if not download:
            raise FileNotFoundError(f"there is no folder {hub_id}, nor is it in the hub's local cache.") from None
        why = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(f"there is no folder {hub_id}, and the hub did not give it: {why:.300}") from None
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{hub_id} on the hub has no config.json; is it a model?")
    return folder
