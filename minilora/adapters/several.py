"""Several adapters on one base model: one replica of the model for each, or all of them in one batch.

models = {name: base.replica() for name in ("sql", "chat")}     # replicas share every weight: only the adapters take memory
for name, model in models.items(): ml.load_adapter(model, name)
models["sql"].forward(ids)                                      # to switch, use the other one; nothing is copied or set
ml.mixed([base, *models.values()], [1, 0, 2], offsets).forward(ids, keep=False, offsets=offsets)
"""

from collections.abc import Iterator, Sequence

import numpy as np

from minilora.backend import Array, as_like, get_xp
from minilora.functional import bounds_of
from minilora.layers import Embedding, Layer, Output, Parameter, Saved
from minilora.models.decoder import Decoder


class PerSequence(Layer):
    """y_t = f_k(x_t), k the layer for the sequence of row t.   x (T, m) -> y (T, n).

    `layers` are f_0, f_1, ...; `groups[T][k]` are the rows of f_k in an x of T rows. A layer computes its own rows alone, so the gradient
    returns to the layers row by row too, without a sum. Raises ValueError for an x whose number of rows is not in `groups`.
    """

    every_row = True  # the layer of a row follows from its position

    def __init__(self, layers: Sequence[Layer], groups: dict[int, list[Array]]) -> None:
        self.layers, self.groups = list(layers), groups

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        y: Array | None = None
        saves: list[Saved | None] = []
        for layer, rows in zip(self.layers, self._rows(x), strict=True):
            part, saved = layer.forward(x[rows], keep, need_dx) if rows.size else (None, None)
            y = self._placed(part, rows, y, len(x))
            saves.append(saved)
        return y, self.save(need_dx, saves) if keep else None

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        (saves,) = self.load(saved, need_dx)
        dx = None
        for layer, rows, s in zip(self.layers, self._rows(dy), saves, strict=True):
            part = layer.backward(dy[rows], s, need_dx) if rows.size else None  # y[rows] = f_k(x[rows])
            dx = self._placed(part, rows, dx, len(dy))
        return dx

    @staticmethod
    def _placed(part: Array | None, rows: Array, y: Array | None, T: int) -> Array | None:
        """y (T, n), made when it is None, with `part` in these rows."""
        if part is None:
            return y
        y = get_xp(part).empty((T, part.shape[1]), dtype=part.dtype) if y is None else y
        y[rows] = part
        return y

    def _rows(self, x: Array) -> list[Array]:
        """The rows of each layer, on the device of x."""
        if len(x) not in self.groups:
            raise ValueError(f"mixed: a layer got {len(x)} rows; the batch it was made for has {' or '.join(map(str, self.groups))}.")
        return [as_like(rows, x) for rows in self.groups[len(x)]]


def mixed(models: Sequence[Layer], which: Sequence[int], offsets: Sequence[int]) -> Layer:
    """A model for one batch, which computes the i-th sequence as models[which[i]] does. `offsets` (n + 1,) bound the n sequences.

    The models are replicas of one model, adapted or not, by any method. Where they are the same, all rows take part in one product; where
    they differ, each row passes through the layer of its model. Their layers are shared, not copied: training this model trains them.
    Where decoders differ in the last norm or the head, which get the labelled rows alone in `loss`, that raises ValueError: use `forward`
    and `cross_entropy`.
    Raises ValueError when the numbers do not fit, when the models are not of one kind, or when they differ in an embedding.
    """
    owners, bounds = np.asarray(which), bounds_of(offsets, int(offsets[-1]))
    if owners.shape != (len(bounds) - 1,) or owners.dtype.kind not in "iu" or not ((owners >= 0) & (owners < len(models))).all():
        raise ValueError(
            f"mixed: which is {owners.tolist()}; expected one of 0 to {len(models) - 1} for each of {len(bounds) - 1} sequences."
        )
    leaves = [dict(_leaves(model)) for model in models]
    if any(each.keys() != leaves[0].keys() for each in leaves):
        raise ValueError("mixed: the models have different layers; pass replicas of one model.")

    like = next(models[0].parameters())[1].data
    owner_of = {int(bounds[-1]): np.repeat(owners, np.diff(bounds))}
    if not isinstance(models[0], Decoder):  # the head of a classifier has a row for each sequence
        owner_of.setdefault(len(owners), owners)
    groups = {rows: [as_like(np.flatnonzero(owner == k), like) for k in range(len(models))] for rows, owner in owner_of.items()}
    mixture = models[0].replica()
    for path, first in leaves[0].items():
        layers = [each[path] for each in leaves]
        if all(_same(first, layer) for layer in layers):
            continue
        if isinstance(first, Embedding):
            raise ValueError(f"mixed: the models differ in {path}, an embedding, which cannot be mixed; are they replicas of one model?")
        mixture.replace(path, PerSequence(layers, groups))
    return mixture


def _leaves(layer: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """(path, layer) of the layers that own parameters themselves, but not of those inside them."""
    children = list(layer.children())
    if any(isinstance(child, Parameter) for _, child in children):
        yield path, layer
    else:
        for name, child in children:
            yield from _leaves(child, f"{path}.{name}" if path else name)


def _same(a: Layer, b: Layer) -> bool:
    """Whether both are of one type, with the same arrays."""
    mine, yours = [p.data for _, p in a.parameters()], [p.data for _, p in b.parameters()]
    return type(a) is type(b) and len(mine) == len(yours) and all(p is q for p, q in zip(mine, yours, strict=True))
