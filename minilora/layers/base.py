"""Parameter and Layer: the contract that every layer, block and model keeps.

    y, saved = layer.forward(x, keep=True, need_dx=True)
    dx = layer.backward(dy, saved, need_dx=True)

- `saved` belongs to the call, not to the layer. A layer may be applied twice, or evaluated during training.
- keep=False is inference: nothing is saved, and dropout is off.
- need_dx says whether backward will compute the gradient of x. Without it, and with nothing trainable below, nothing is computed
  and nothing is saved.
- Gradients of activations are returned, gradients of parameters are added to `p.grad` (the first write assigns).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

from minilora.backend import Array, backend_name, to_backend

Self = TypeVar("Self", bound="Layer")


class Parameter:
    """An array that may be trained: `data`, `grad` (None until a backward has written it) and `trainable`.

    `home` is its part of the flat gradient buffer, once an optimizer has made one (docs/flat-buffer.md). `changes` counts, over the whole
    process, how often a parameter was made, frozen or unfrozen, and a layer replaced: until then, layers remember what is trainable below
    them, since a lookup in every call would add a third to the Python time of a step.
    """

    __slots__ = ("_trainable", "data", "grad", "home")
    changes = 0

    def __init__(self, data: Array, trainable: bool = True) -> None:
        self.data = data
        self.grad: Array | None = None
        self.home: Array | None = None
        self.trainable = trainable

    @property
    def trainable(self) -> bool:
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = bool(value)
        Parameter.changes += 1
        if not value:  # a frozen parameter has no gradient array at all
            self.grad = self.home = None

    def add_grad(self, g: Array | None) -> None:
        """grad += g; the first write after `zero_grad` assigns, so nothing is filled with zeros. None is a gradient not needed."""
        if g is None:
            return
        if not self._trainable:
            raise RuntimeError("a gradient was computed for a frozen parameter.")
        if g.shape != self.data.shape or g.dtype != self.data.dtype:
            raise ValueError(f"the gradient is {g.dtype} of shape {g.shape}, its parameter {self.data.dtype} of shape {self.data.shape}.")
        if self.grad is not None:
            self.grad += g
        elif self.home is not None:
            self.home[...] = g
            self.grad = self.home
        else:
            self.grad = g

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:  # without the gradient
        return Parameter(copy.deepcopy(self.data, memo), self._trainable)

    def __repr__(self) -> str:
        return f"Parameter(shape={tuple(self.data.shape)}, dtype={self.data.dtype}, trainable={self.trainable})"


def needed(**names: bool) -> set[str]:
    """The names whose value is true: which gradients a backward is to compute."""
    return set(filter(names.get, names))


class Saved(NamedTuple):
    """What one forward call leaves for its backward, and the conditions under which it was chosen."""

    flags: tuple[bool, ...]
    need_dx: bool
    values: tuple[Any, ...]


Output = tuple[Array, Saved | None]  # y, and what backward reads


class Layer:
    """Base of everything that owns parameters. Parameters and sub-layers are found by walking the attributes."""

    every_row = False  # True for a layer that cannot run on a selection of the rows of its input
    _known_flags: tuple[int, tuple[bool, ...]] | None = None  # Parameter.changes, and what `_flags` returned then

    def forward(self, x: Array, keep: bool = True, need_dx: bool = True) -> Output:
        raise NotImplementedError(f"{type(self).__name__} has no forward.")

    def backward(self, dy: Array, saved: Saved | None, need_dx: bool = True) -> Array | None:
        raise NotImplementedError(f"{type(self).__name__} has no backward.")

    def children(self) -> Iterator[tuple[str, Any]]:
        """(name, Parameter or Layer) of the direct attributes; a list of layers gives "name.0", "name.1", ..."""
        for name, value in list(vars(self).items()):  # a list: another thread may set _known_flags meanwhile
            if isinstance(value, (Parameter, Layer)):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{i}", v) for i, v in enumerate(value) if isinstance(v, (Parameter, Layer)))

    def modules(self, prefix: str = "") -> Iterator[tuple[str, Layer]]:
        """(dotted path, layer) of every layer below and including this one, whose path is ""."""
        yield prefix, self
        for name, child in self.children():
            if isinstance(child, Layer):
                yield from child.modules(f"{prefix}.{name}" if prefix else name)

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(dotted path, parameter), each parameter once; the path is its name in the published checkpoint."""
        seen: set[int] = set()
        for path, layer in self.modules():
            for name, child in layer.children():
                if isinstance(child, Parameter) and id(child) not in seen:
                    seen.add(id(child))
                    yield (f"{path}.{name}" if path else name), child

    def replace(self, path: str, new: Layer) -> None:
        """Set the layer at a dotted path ("h.0.attn.c_attn"; a number is an index into a list)."""
        *parents, name = path.split(".")
        owner: Any = self
        for part in parents:
            owner = owner[int(part)] if isinstance(owner, list) else getattr(owner, part)
        if isinstance(owner, list):
            owner[int(name)] = new
        else:
            setattr(owner, name, new)
        Parameter.changes += 1

    @property
    def trainable(self) -> bool:
        """Whether any parameter here or below is trainable."""
        return True in self._flags()

    def freeze(self: Self) -> Self:
        """Freeze every parameter: no gradient is computed, and nothing is saved for one."""
        for _, p in self.parameters():
            p.trainable = False
        return self

    def unfreeze(self: Self) -> Self:
        """The reverse of `freeze`."""
        for _, p in self.parameters():
            p.trainable = True
        return self

    def zero_grad(self) -> None:
        """Clear all gradients; the next backward assigns."""
        for _, p in self.parameters():
            p.grad = None

    def to(self: Self, backend: str | None = None, dtype: Any = None) -> Self:
        """Move the parameters to a backend ("numpy", "cupy") and/or a floating dtype, without their gradients.

        Make the optimizer afterwards: it keeps references to the arrays that it was made from.
        """
        for _, p in self.parameters():
            p.data = to_backend(p.data, backend or backend_name(p.data), dtype)
            p.grad = p.home = None
        return self

    def replica(self: Self) -> Self:
        """A copy of the structure that shares every array of weights and owns its gradients (and nothing else)."""
        values = [v for _, layer in self.modules() for v in vars(layer).values()]
        arrays = [p.data for _, p in self.parameters()] + [v for v in values if hasattr(v, "dtype")]
        return copy.deepcopy(self, memo={id(a): a for a in arrays})  # deepcopy finds them in its memo: already "copied"

    def save(self, need_dx: bool, *values: Any) -> Saved:
        """Pack what backward will read. A value that it will not need is None."""
        return Saved(self._flags(), need_dx, values)

    def load(self, saved: Saved | None, need_dx: bool) -> tuple[Any, ...]:
        """Unpack what `save` packed. Raises RuntimeError when it does not fit this call."""
        if saved is None:
            raise RuntimeError(f"{type(self).__name__}.backward: nothing was saved; call forward with keep=True.")
        if need_dx and not saved.need_dx:
            raise RuntimeError(f"{type(self).__name__}.backward: need_dx=True, but forward was called with need_dx=False.")
        if saved.flags != self._flags():
            raise RuntimeError(f"{type(self).__name__}.backward: a parameter was frozen or unfrozen since forward; run forward again.")
        return saved.values

    def _flags(self) -> tuple[bool, ...]:
        """`trainable` of every parameter here and below."""
        known = self._known_flags
        if known is None or known[0] != Parameter.changes:
            known = self._known_flags = (Parameter.changes, tuple(p.trainable for _, p in self.parameters()))
        return known[1]

    def __repr__(self) -> str:
        lines = [f"  {path}: {tuple(p.data.shape)} {p.data.dtype}{'' if p.trainable else ' frozen'}" for path, p in self.parameters()]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"]) if lines else f"{type(self).__name__}()"
