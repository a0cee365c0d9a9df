"""The work that a GPU would have received: `with count() as c: ...; c.launches, c.syncs, c.products`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Counts:
    """Counts of one `with count()` block.

    launches   kernels: one per elementwise operation, reduction, product, copy, gather or scatter; a view launches nothing
    syncs      times the host waits: get, item, float, int, bool, tolist, printing, and everything whose size only the
               device knows (nonzero, boolean masks)
    to_device  copies of host arrays to the device; the host does not wait for them
    to_host    copies to the host; each is also a sync
    bytes      total size of these copies
    products   shapes of the results of all matrix products, in order, so that a test can check which products were formed
    """

    launches: int = 0
    syncs: int = 0
    to_device: int = 0
    to_host: int = 0
    bytes: int = 0
    products: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def transfers(self) -> int:
        """Copies in both directions."""
        return self.to_device + self.to_host


_open: list[Counts] = []


@contextmanager
def count() -> Iterator[Counts]:
    """Count the work inside the block; blocks may be nested."""
    _open.append(Counts())
    try:
        yield _open[-1]
    finally:
        _open.pop()


def note(**counts: int | list[tuple[int, ...]]) -> None:
    """Add to every open count, as in note(launches=1)."""
    for c in _open:
        for name, value in counts.items():
            setattr(c, name, getattr(c, name) + value)
