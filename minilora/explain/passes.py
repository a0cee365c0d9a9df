"""The passes that are explained: one text, forward and backward, with LoRA and fully trained; and the places in them."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minilora import kernels as K
from minilora.adapters import inject
from minilora.backend import Array
from minilora.checking.catalogue_pairs import pairs
from minilora.checking.trace import Call, trace
from minilora.explain.code import PYTHONS
from minilora.formats.adapter import load_adapter
from minilora.functional import AdamStep
from minilora.layers import Dropout, Layer
from minilora.lora import LoraConfig, lora_layers
from minilora.models.decoder import Decoder
from minilora.runs.run_file import open_base, tokenizer_of

R, ALPHA, STD = 8, 16, 0.02  # of a fresh LoRA, and the standard deviation of its B
TEXT = "def add(a, b):"


class Passes(NamedTuple):
    """A step that trains the adapters (calls, float32), and one that trains everything (full)."""

    model: Any
    note: str
    base: set[int]  # the ids of the model's own parameters
    pieces: list[str]
    ids: Array
    labels: Array
    loss: float
    calls: list[Call]  # in float64, with arrays
    float32: dict[Call, Call]  # the same call in float32, for what it costs
    full: list[Call]  # in float32


def passes(name: str | Path, text: str = TEXT) -> Passes:
    """Run a text through the model of a path. Raises ValueError for a text that does not fit it, and as the loaders do."""
    model, adapter = open_base(name, "numpy", dtype="float32")
    tokenizer = tokenizer_of(name, model.config.vocab_size)
    ids = tokenizer.encode_prompt(text) if isinstance(model, Decoder) else tokenizer.encode(text)
    longest = model.config.longest_sequence
    if len(ids) > longest:
        raise ValueError(f"the text has {len(ids)} tokens, and {name} takes {longest} at most; give a shorter --text.")
    if len(ids) < 2:
        raise ValueError(f"--text must have two tokens or more, as the loss is that of the next token; this has {len(ids)}.")
    ids, labels = (ids[:-1], ids[1:]) if isinstance(model, Decoder) else (ids, np.zeros(1, dtype=np.int64))
    full = _traced(model.unfreeze(), ids, labels, arrays=False)[1]
    base = {id(p) for _, p in model.parameters()}
    note = _adapt(model, adapter)
    counted = _traced(model, ids, labels, arrays=False)[1]
    loss, calls = _traced(model.to(dtype="float64"), ids, labels, arrays=True)
    pieces, float32 = [tokenizer.decode([i]) for i in ids.tolist()], dict(zip(calls, counted, strict=True))
    return Passes(model, note, base, pieces, ids, labels, float(loss), calls, float32, full)


def _traced(model: Any, ids: Array, labels: Array, arrays: bool) -> tuple[Any, list[Call]]:
    """The loss, and the calls of a pass in both directions, without dropout."""
    for _, layer in model.modules():
        if isinstance(layer, Dropout):
            layer.p = 0.0
    model.zero_grad()
    with trace(model, arrays) as calls:
        loss, saved = model.loss(ids, labels)
        model.loss_backward(saved)
    return loss, calls


def _adapt(model: Any, adapter: Any) -> str:
    """Give the model its adapter, or a fresh one. Returns a sentence about it."""
    if adapter is not None:
        load_adapter(model, adapter)
        return f"The adapter is that of {adapter}, without dropout."
    task = "CAUSAL_LM" if isinstance(model, Decoder) else "SEQ_CLS"
    inject(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type=task), rng=0)
    rng = np.random.default_rng(0)
    for _, layer in lora_layers(model):
        layer.lora_B.data = (STD * rng.standard_normal(layer.lora_B.data.shape)).astype(layer.lora_B.data.dtype)
    return (
        f"A fresh LoRA (r = {R}, alpha = {ALPHA}) is on every linear layer; its B was moved from zero to N(0, {STD}^2), "
        "because with B = 0, where training starts, dA is zero."
    )


def find(place: str, run: Passes) -> tuple[str, Call]:
    """The full name of a place, and its call; of an operation that the model does not call, an example's.

    Raises ValueError, with the nearest names, for a place that is not there.
    """
    name = "lora_linear" if place == "lora" else place
    if calls := [c for c in run.calls if c.name == name and c.is_operation]:
        call = max(calls, key=lambda c: sum(g is not None for g in (c.grads or {}).values()))  # the first with most gradients
        return call.place, call
    if place == "lora":
        raise ValueError("this model has no LoRA layer; name another place.")
    if name in K.TABLE:
        return name, example(name)
    paths = [path for path, _ in run.model.modules() if path]
    known = [*paths, *dict.fromkeys(c.place for c in run.calls if c.is_operation)]
    ends = [p for p in known if f".{p}".endswith(f".{place}")]
    if place not in ends and len(ends) != 1:
        near = ends[:3] or get_close_matches(place, [*paths, *(p.partition(".")[2] for p in paths), *K.TABLE, "lora"], 3, 0.3) or paths[:3]
        raise ValueError(f"there is no {place} in this model, and no operation of that name; the nearest are {', '.join(near)}.")
    path = place if place in ends else ends[0]
    mine = [c for c in run.calls if c.place == path and c.during == "forward"]
    if not mine:
        raise ValueError(f"{path} is not called in a step of this model; name a place above or below it.")
    return path, next((c for c in mine if c.order is not None), mine[0])


def example(name: str) -> Call:
    """A call of an operation on small random arrays."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 5))
    pair, value = next(((pair, value) for key, pair, value, _ in list(pairs(rng)) if key.partition(",")[0] == name), (Layer(), x))
    with trace(pair, arrays=True) as calls:
        if name == "dropout_mask":
            K.dropout_mask(x, x.shape, 0.4, 11)
        elif name == "adamw":
            K.adamw(x[0].copy(), x[1].copy(), x[2] / 9, x[3] ** 2 / 9, 1.0, 1.0, AdamStep(1e-3, 0.01, 0.9, 0.999, 0.1, 0.001, 1e-8, True))
        elif name in PYTHONS:
            getattr(K, name)(x, x[::-1])
        else:
            y, saved = pair.forward(value)
            pair.backward(rng.standard_normal(y.shape), saved)
    return next(c for c in calls if c.name == name)
