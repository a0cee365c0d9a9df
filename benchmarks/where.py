"""Where the time of a step goes: its floor, which is its matrix products alone, and what stands beside them.

    floor        every matrix product of the step once more: the same operands, in the same order, on the same threads, nothing else
    kinds        processor time of all threads in each kind of operation, less that of its products
    python       processor time outside of operations: layers, checks, what is saved
    waiting      of a thread for another, and for the GIL: the wall time of all threads, less their processor time
    page faults  first writes to new pages, at this machine's price of one; part of the kinds above

The same step is run several times on the same batch, its floor in between, so that drift of the machine affects both. It is the forward
and backward pass of a step (clipping, AdamW and the next batch are not in it), and the whole step where the loop of training is not used.
"""

from __future__ import annotations

import mmap
import resource
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

ROUNDS = 5
KINDS = {
    "linear": "linear and LoRA",
    "attention": "attention",
    "cross_entropy": "loss",
    "norm": "norms",
    "gelu": "activations",
    "silu": "activations",
    "swiglu": "activations",
    "relu": "activations",
    "tanh": "activations",
    "adamw": "optimizer",
}
Product = tuple[str, np.ndarray, np.ndarray, np.ndarray]  # (kind, a, b, room for a @ b)


class Watched(np.ndarray):
    """An array that reports the products of matrices it takes part in, and whose results do the same."""

    report: Callable[[np.ndarray, np.ndarray], None]  # set by `products`

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **options: Any) -> Any:
        inputs = tuple(_plain(x) for x in inputs)
        if out is not None:
            options["out"] = tuple(_plain(x) for x in out)
        if ufunc is np.matmul and min(x.ndim for x in inputs) > 1 and inputs[1].shape[-1] > 1:  # not a sum over rows
            Watched.report(*inputs)
        result = getattr(ufunc, method)(*inputs, **options)
        return result.view(Watched) if isinstance(result, np.ndarray) else result


def _plain(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Watched) else x


@contextmanager
def operations(around: Callable[[str, Callable[..., Any], Any, Any], Any]) -> Iterator[None]:
    """Call around(kind, f, args, options) in place of f(*args, **options), for every implementation that minilora.kernels chooses."""
    from minilora.kernels import dispatch

    def wrapped(kind: str, f: Callable[..., Any] | None) -> Callable[..., Any] | None:
        return f and (lambda *args, **options: around(kind, f, args, options))

    def candidates(op: dispatch.Operation, *of: Any) -> tuple[dispatch.Kernel, ...]:
        kind = next((kind for part, kind in KINDS.items() if part in op.name), "other operations")
        chosen = original(op, *of)
        return tuple(k._replace(forward=wrapped(kind, k.forward), backward=wrapped(kind, k.backward)) for k in chosen)

    original = dispatch._candidates
    try:
        dispatch._candidates = candidates
        forget(dispatch)
        yield
    finally:
        dispatch._candidates = original
        forget(dispatch)


def forget(dispatch: Any) -> None:
    """Choose the implementations of every operation anew."""
    for op in dispatch.TABLE.values():
        op.found.clear()


def products(step: Callable[[], Any]) -> list[list[Product]]:
    """The products of a step in order, for each thread that made some. Those of one shape share the room for their results."""
    found: dict[int, list[Product]] = defaultdict(list)
    rooms: dict[Any, np.ndarray] = {}
    kind = threading.local()

    def report(a: np.ndarray, b: np.ndarray) -> None:
        thread, shape = threading.get_ident(), (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        if (key := (thread, shape, a.dtype)) not in rooms:
            rooms[key] = np.empty(shape, a.dtype)
        found[thread].append((kind.now, a, b, rooms[key]))

    def around(name: str, f: Callable[..., Any], args: Any, options: Any) -> Any:
        kind.now = name
        watched = (x.view(Watched) if isinstance(x, np.ndarray) and x.ndim > 1 else x for x in args)
        result = f(*watched, **options)
        return tuple(map(_plain, result)) if type(result) is tuple else _plain(result)

    Watched.report = report
    with operations(around):
        step()
    return list(found.values())


def repeat(made: list[Product], spent: dict[str, float]) -> None:
    """Every product once more. Adds the processor time of each kind to `spent`."""
    now, start = made[0][0], time.thread_time()
    for kind, a, b, room in made:
        if kind != now:
            spent[now] += time.thread_time() - start
            now, start = kind, time.thread_time()
        np.matmul(a, b, out=room)
    spent[now] += time.thread_time() - start


def where(step: Callable[[], Any], threads: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """What a step costs beyond its floor, and where that goes.

    step: takes the same step each time it is called, on at most `threads` threads. Returns medians of `rounds` rounds, in seconds, and
    shares of the wall time of all threads, which add up to 1 (page faults are a part of the others).
    """
    times = 1 + int(0.1 / seconds(step))
    wall, processor, faults, operations_of = timed(step, rounds * times)  # before operands are kept, which is not part of a step
    made = products(step)
    threads = min(threads, len(made))
    floors, steps, products_of = [], [], [defaultdict[str, float](float) for _ in made]
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(len(made)) as pool:
        for _ in range(rounds):
            floors.append(seconds(lambda: [list(pool.map(repeat, made, products_of)) for _ in range(times)]) / times)
            steps.append(seconds(lambda: [step() for _ in range(times)]) / times)
    all_threads = threads * wall
    cost = {kind: sum(each[kind] for each in products_of) for kind in sorted(operations_of)}
    shares = {"products": sum(cost.values()), **{kind: operations_of[kind] - cost[kind] for kind in cost}}
    shares |= {"python": processor - sum(operations_of.values()), "waiting": all_threads - processor}
    return {
        "seconds": wall / (rounds * times),
        "floor_seconds": statistics.median(floors),
        "over_floor": statistics.median(a / b for a, b in zip(steps, floors, strict=True)),
        "shares": {name: value / all_threads for name, value in shares.items()},
        "page_faults": {"a step": faults / (rounds * times), "share": faults * price_of_a_fault() / all_threads},
    }


def timed(step: Callable[[], Any], rounds: int) -> tuple[float, float, int, dict[str, float]]:
    """(wall time, processor time of all threads, page faults, processor time of each kind of operation) of `rounds` steps."""
    spent: dict[tuple[int, str], float] = defaultdict(float)
    inside = threading.local()

    def around(kind: str, f: Callable[..., Any], args: Any, options: Any) -> Any:
        if getattr(inside, "an_operation", False):
            return f(*args, **options)
        inside.an_operation, start = True, time.thread_time()
        try:
            return f(*args, **options)
        finally:
            inside.an_operation = False
            spent[threading.get_ident(), kind] += time.thread_time() - start

    with operations(around):
        start = time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(rounds):
            step()
        end = time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kinds = {kind for _, kind in spent}
    wall, processor, faults = (b - a for a, b in zip(start, end, strict=True))
    return wall, processor, int(faults), {kind: sum(cost for (_, k), cost in spent.items() if k == kind) for kind in kinds}


def seconds(f: Callable[[], Any]) -> float:
    """The wall time of a call."""
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def price_of_a_fault(size: int = 2**26) -> float:
    """Seconds that the first write to a page takes, its zeroing by the system included."""
    with mmap.mmap(-1, size) as memory:
        start = time.perf_counter()
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1
        return (time.perf_counter() - start) / (size // mmap.PAGESIZE)


def of_processes(replicas: Any, batches: Any, seed: Any) -> dict[str, Any]:
    """`where` for a step on several processes: each measures its own lanes, while the others do. They wait for the slowest."""
    from minilora.training.processes import Copies, answer

    replicas.gradients(batches, seed)  # fills the cache of the outputs of frozen blocks, which is not part of a step
    shards, count = replicas.shards(batches)
    tasks = [replicas._task(worker, shards) for worker in range(replicas.workers)]

    def work(worker: int) -> dict[str, Any]:
        return where(lambda: replicas._run(*tasks[worker], count, seed), 1)

    with Copies(replicas.workers - 1, work) as copies:
        others = [copies.ask(worker) for worker in range(1, replicas.workers)]
        each = [work(0), *map(answer, others)]
    wall = statistics.median(seconds(lambda: replicas.gradients(batches, seed)) for _ in range(4 * ROUNDS))
    shares = {kind: sum(one["seconds"] * one["shares"][kind] for one in each) / (wall * len(each)) for kind in each[0]["shares"]}
    floor, faults = max(one["floor_seconds"] for one in each), [one["page_faults"] for one in each]
    return {
        "seconds": wall,
        "floor_seconds": floor,
        "over_floor": wall / floor,
        "shares": shares | {"waiting": 1 - sum(share for kind, share in shares.items() if kind != "waiting")},
        "page_faults": {"a step": sum(f["a step"] for f in faults), "share": sum(f["share"] for f in faults) / len(each)},
    }


def of_the_next(steps: Iterator[float], threads: int) -> dict[str, Any]:
    """`where` for the gradients of the next step, or the whole step where the training loop is not used."""
    from minilora.training.replicas import Replicas

    original, found = Replicas.gradients, dict[str, Any]()

    def gradients(self: Replicas, *args: Any) -> Any:
        Replicas.gradients = original  # type: ignore[method-assign]
        found.update(of_processes(self, *args[:2]) if self.copied else where(lambda: original(self, *args), threads))
        return original(self, *args)

    Replicas.gradients = gradients  # type: ignore[method-assign]
    try:
        next(steps)
    finally:
        Replicas.gradients = original  # type: ignore[method-assign]
    return found or where(lambda: next(steps), threads)


def text(found: dict[str, Any]) -> str:
    """The same in three lines."""
    shares = sorted(found["shares"].items(), key=lambda item: (item[0] != "products", -item[1]))
    faults = found["page_faults"]
    return (
        f"floor: its products alone take {1e3 * found['floor_seconds']:.4g} ms; a step takes {found['over_floor']:.3f} times as long\n"
        f"where it goes: {', '.join(f'{name} {share:.1%}' for name, share in shares)}\n"
        f"of these, page faults: {faults['a step']:,.0f} a step, {faults['share']:.1%}"
    )
