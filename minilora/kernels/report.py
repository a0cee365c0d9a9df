"""Which implementation of each operation a model uses here, and why: what `minilora info --kernels` prints."""

from typing import Any, NamedTuple

import numpy as np

from minilora.backend import Array, backend_name
from minilora.kernels import cuda, dispatch
from minilora.kernels.half import is_half


class Row(NamedTuple):
    """An operation, the implementation that ran ("numpy", "cuda" or "reference"), and the reason."""

    operation: str
    implementation: str
    why: str


def report(model: Any, tokens: int = 1024, length: int = 64) -> list[Row]:
    """The rows of one training step of a text model, on so many tokens in sequences of `length`; by size, an operation may have two.

    Runs the model forward, with its loss. The step of the optimizer is AdamW's on what is trainable. Models are found to be classifiers by
    their config's num_labels.
    """
    config = model.config
    length = min(length, config.longest_sequence)
    offsets = np.arange(0, tokens + 1, length)
    ids = np.zeros(int(offsets[-1]), dtype=np.int64)
    labels = np.zeros(len(offsets) - 1, dtype=np.int64) if getattr(config, "num_labels", None) else ids
    rows: dict[Row, None] = {}
    half = next((p.data.dtype for _, p in model.parameters() if is_half(p.data)), None)

    def observe(op: dispatch.Operation, kernel: dispatch.Kernel, args: tuple[Any, ...]) -> None:
        upcast = f"; in float32, {half} is upcast" if half and kernel.where != "cuda" and op.name != "adamw" else ""
        rows[Row(op.name, kernel.where, _why(op, kernel, args[0]) + upcast)] = None

    dispatch.observers.append(observe)
    try:
        model.loss(ids, labels, offsets)
        trained = next((p.data for _, p in model.parameters() if p.trainable), None)
        if trained is not None:
            dispatch.choose(dispatch.TABLE["adamw"], (trained,) * 4)
    finally:
        dispatch.observers.remove(observe)
    return list(rows)


def _why(op: dispatch.Operation, kernel: dispatch.Kernel, x: Array) -> str:
    if kernel.where != "reference":
        return kernel.gain
    here = "numpy" if backend_name(x) == "numpy" else "cuda"
    others = [k for k in op.kernels[:-1] if k.where == here]
    if not others:
        return f"there is no {here} kernel: it would gain nothing"
    if dispatch.PLAIN or (here == "cuda" and not cuda.ENABLED):
        return "kernels are turned off (MINILORA_KERNELS=plain)"
    return f"the {here} kernel runs where {', or '.join(k.when or 'x is of ' + ' or '.join(k.dtypes) for k in others)}"
