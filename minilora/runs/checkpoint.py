"""Checkpoints: all that a run needs to continue bit for bit as if it had not been interrupted.

RUN/checkpoints/step-00000100/
state.json          version, step, what the state depends on, and the SHA-256 of the other file
state.safetensors   parameters, moments, and initial values that a fresh start would compute again

A checkpoint is written to a folder of another name, synchronised with the disk, and renamed: it is there completely or not at all.
The position in the data is the number of batches taken, since batches and dropout masks are functions of the seed.
"""

import hashlib
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minilora.backend import as_like, get_xp, to_numpy
from minilora.data.records import note
from minilora.formats.atomic import put_in_place, read_json, temporary_of, write_json
from minilora.formats.tensors import map_tensors, write_tensors
from minilora.lora import adaptation, lora_layers
from minilora.lora.registry import METHODS, load
from minilora.models.config_file import check_types, made
from minilora.optim.optimizers import AdamW
from minilora.quantization.residual import Offset
from minilora.training.loss_scale import LossScale

VERSION = 1
_MOMENTS = ("m", "v")


@dataclass
class State:
    """What a checkpoint says. `tensors` are in a file of their own."""

    version: int = VERSION
    step: int = 0
    updates: int = 0  # of the optimizer: fewer than steps where float16 overflowed
    batches: int = 0  # taken from the data
    seconds: float = 0.0
    tokens: int = 0
    loss_scale: dict[str, Any] | None = None
    method: dict[str, Any] | None = None  # the configuration of the adapter, with what its initialiser found in the data
    parameters: dict[str, list[int]] = field(default_factory=dict)  # {path: shape} in the order of the flat buffer
    base: str = ""  # fingerprint of the model's weights before training
    data: str = ""  # SHA-256 of the training data
    before: dict[str, Any] = field(default_factory=dict)  # the figures before training, and the sample
    sha256: str = ""  # of state.safetensors
    tensors: dict[str, np.ndarray] = field(default_factory=dict)


def method_of(model: Any) -> dict[str, Any] | None:
    """The configuration of the model's adapter, for a State; None without one."""
    config = adaptation(model).config
    return None if config is None else {"peft_type": config.peft_type, **asdict(config)}


def capture(model: Any, optimizer: AdamW, scale: LossScale | None, **about: Any) -> State | None:
    """The state after a step; None when a parameter is not finite: such a state is worth nothing. about: other fields of State."""
    flat = optimizer.flat
    if not bool(get_xp(flat.data).isfinite(flat.data).all()):
        return None
    tensors = {"data": flat.data, **{name: getattr(optimizer, name) for name in _MOMENTS}}
    if getattr(optimizer, "initial", None) is not None:
        tensors["initial"] = optimizer.initial
    for path, layer in lora_layers(model):
        if getattr(layer, "offset", None) is not None:
            tensors |= {f"{path}.offset_A": layer.offset.A, f"{path}.offset_B": layer.offset.B}
    return State(
        updates=optimizer.t,
        loss_scale=None if scale is None else asdict(scale),
        parameters={path: list(p.data.shape) for path, p in zip(flat.paths, flat.parameters, strict=True)},
        tensors={name: to_numpy(value) for name, value in tensors.items()},
        **about,
    )


def adapter_config(method: dict[str, Any]) -> Any:
    """The configuration of a checkpoint, which draws nothing and reads no data: what it would find is in the checkpoint."""
    values = {name: value for name, value in method.items() if name != "peft_type"}
    if values.get("init_lora_weights", True) != "loftq":
        values = {name: True if name == "init_lora_weights" else value for name, value in values.items()}
    values = {name: value for name, value in values.items() if name not in ("eva_config", "lora_ga_config")}
    return load(METHODS[method["peft_type"]])(**values)


def restore(state: State, model: Any, optimizer: AdamW, scale: LossScale | None, where: str) -> None:
    """Put the state into a model prepared in the same way. Raises ValueError when it is of another model."""
    flat = optimizer.flat
    here = {path: list(p.data.shape) for path, p in zip(flat.paths, flat.parameters, strict=True)}
    if here != state.parameters:
        odd = next(path for path in [*here, *state.parameters] if here.get(path) != state.parameters.get(path))
        raise ValueError(f"{where}: {odd} has shape {state.parameters.get(odd)} there and {here.get(odd)} here (None: it is not trained).")
    targets = {"data": flat.data, **{name: getattr(optimizer, name) for name in _MOMENTS}}
    if getattr(optimizer, "initial", None) is not None:
        targets["initial"] = optimizer.initial
    for name, array in targets.items():
        array[...] = as_like(state.tensors[name], array)
    for path, layer in lora_layers(model):
        if f"{path}.offset_A" in state.tensors:
            A, B = (as_like(state.tensors[f"{path}.offset_{name}"], flat.data) for name in "AB")
            layer.offset = Offset(A, B, layer.scaling)
    optimizer.t = state.updates
    if scale is not None and state.loss_scale is not None:
        scale.__dict__.update(state.loss_scale)


def write(run: Path, state: State, kind: str = "step", keep: int = 1) -> None:
    """Write a checkpoint of a kind, "step" or "best", and remove all but the last `keep`. Raises OSError; the others are then left."""
    folder = run / "checkpoints" / f"{kind}-{state.step:08d}"
    aside = temporary_of(folder)
    try:
        aside.mkdir(parents=True)
        write_tensors(aside / "state.safetensors", state.tensors)
        about = {name: value for name, value in vars(state).items() if name != "tensors"}
        about["sha256"] = _sha256(aside / "state.safetensors")
        write_json(aside / "state.json", about)
        shutil.rmtree(folder, ignore_errors=True)  # there is one of this step only if it is damaged
        put_in_place(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in checkpoints(run, kind)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(run: Path, kind: str = "step") -> list[Path]:
    """The checkpoints of a run, the last one last."""
    return sorted((run / "checkpoints").glob(f"{kind}-????????"))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read(folder: Path) -> State:
    """Raises ValueError, naming the file, for a checkpoint that is damaged or of another version."""
    where, file = folder / "state.json", folder / "state.safetensors"
    record = read_json(where)
    if record.get("version") != VERSION:
        raise ValueError(f"{where} is of version {record.get('version')!r}, this minilora reads {VERSION}; use the one that wrote it.")
    check_types(State, record, str(where))
    state: State = made(State, record, str(where))
    if not file.is_file() or _sha256(file) != state.sha256:
        raise ValueError(f"{file} is damaged: its SHA-256 is not the one in state.json.")
    state.tensors = map_tensors(file)[0]
    return state


def read_last(run: Path, kind: str = "step") -> State | None:
    """The last good checkpoint of a run; None if there is none. A damaged one is named, and the one before it is taken.

    Raises ValueError when all are damaged.
    """
    folders = checkpoints(run, kind)
    for folder in reversed(folders):
        try:
            return read(folder)
        except (ValueError, OSError) as error:
            note(f"{error} It is left out.")
    if folders:
        raise ValueError(f"{run}: no checkpoint can be read; start the run again with another --out.")
    return None
