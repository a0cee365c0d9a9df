"""What a decoder remembers between the tokens that it generates."""

from __future__ import annotations

from collections.abc import Callable

from minilora.backend import Array, get_xp

Extend = Callable[[Array, Array], tuple[Array, Array]]  # `KVCache.extend` for one layer


class KVCache:
    """The keys and values, in each layer, of the `length` tokens of one sequence that `model.decode(ids, cache)` has read.

    A new token then costs one row of products instead of a forward over the whole sequence. The arrays grow by `block` tokens at a
    time. To forget the last tokens, lower `length`; the next ones overwrite them.
    """

    def __init__(self, block: int = 256) -> None:
        self.block, self.length = block, 0
        self._kept: dict[int, tuple[Array, Array]] = {}  # layer: keys and values, (capacity, n_kv_head d) each

    def extend(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Append k and v (t, n_kv_head d) of new tokens to those of this layer; returns all, (length + t, n_kv_head d), as views.

        The model adds t to `length` once all its layers have been extended.
        """
        end = self.length + k.shape[0]
        keys, values = (self._with_room(old, new, end) for old, new in zip(self._kept.get(layer, (None, None)), (k, v), strict=True))
        self._kept[layer] = keys, values
        keys[self.length : end], values[self.length : end] = k, v
        return keys[:end], values[:end]

    def _with_room(self, old: Array | None, new: Array, end: int) -> Array:
        """`old`, or a longer copy of it if it has fewer than `end` rows."""
        if old is not None and old.shape[0] >= end:
            return old
        grown = get_xp(new).empty((-(-end // self.block) * self.block, new.shape[1]), dtype=new.dtype)
        if old is not None:
            grown[: self.length] = old[: self.length]
        return grown
