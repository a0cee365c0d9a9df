"""Arrays that count the matrix products they take part in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class _Count:
    """`flops`: those of the matrix products so far."""

    flops = 0


class Counted(np.ndarray):
    """An array that counts the matrix products it takes part in."""

    count = _Count()
    is_ones = False  # of an array that np.ones made: a product with it is a sum over rows

    def __array_finalize__(self, source: Any) -> None:
        self.is_ones = getattr(source, "is_ones", False)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        plain = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
        if out is not None:
            options["out"] = tuple(x.view(np.ndarray) if isinstance(x, Counted) else x for x in out)
        result = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul and method == "__call__":
            a, b = plain
            ones = b.ndim > 1 and b.shape[-1] == 1 and bool((b == 1).all())  # a sum over rows
            if a.ndim > 1 and b.ndim > 1 and not ones:
                Counted.count.flops += 2 * result.size * a.shape[-1]
        if out is not None:
            return out[0]
        return result.view(Counted) if isinstance(result, np.ndarray) else result


@contextmanager
def counting(model: Any) -> Iterator[_Count]:
    """The FLOPs of what the model runs inside the `with`, on NumPy: `.flops`. Pass floating inputs as `x.view(Counted)`."""
    names = "empty zeros ones full empty_like zeros_like ones_like concatenate ascontiguousarray where stack".split()
    before = {name: getattr(np, name) for name in names}
    data = [(p, p.data) for _, p in model.parameters()]

    def counted(make: Any) -> Any:
        def made(*args: Any, **options: Any) -> Any:
            array = make(*args, **options).view(Counted)
            array.is_ones = make.__name__ == "ones" and array.shape[-1:] == (1,)
            return array

        return made

    Counted.count = count = _Count()
    try:
        for name, make in before.items():
            setattr(np, name, counted(make))
        for p, array in data:
            p.data = array.view(Counted)
        yield count
    finally:
        for name, make in before.items():
            setattr(np, name, make)
        for p, array in data:
            p.data = array
