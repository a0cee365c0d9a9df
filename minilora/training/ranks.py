"""Data parallelism over processes, by MPI: `mpiexec -n 4 minilora finetune ...`. A rank computes a contiguous block of the lanes of a step.

Every rank prepares the same model, takes the same batches and makes the same updates. Once a step the ranks meet:

    meeting     every rank sends the losses of its lanes to rank 0, which answers with those of all lanes, or that training ends
    all-to-all  a rank sums the lanes of its block as far as the tree goes within it; rank j receives the j-th part of all these sums,
                and finishes the tree (replicas.py)
    all-gather  of the finished parts: the gradient (n,) is then the same on all ranks, whatever their number

On GPUs, NCCL carries the gradients (nccl.py), and a rank computes one lane.

Each rank sends and receives about 2 n numbers a step, as in an all-reduce, whose order of summation MPI leaves open (docs/scale.md).
A wait ends after MINILORA_WAIT seconds (1800) with an error that names the ranks that are missing; an error of one rank ends all.
"""

import atexit
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
from threadpoolctl import threadpool_info

from minilora import __version__
from minilora.backend import Array, get_xp
from minilora.data.records import note
from minilora.training.nccl import Nccl, take_gpu

_RANK = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")  # MPICH and Intel MPI, Slurm, Open MPI
_SIZE = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
_EXPECTED = (ValueError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError, KeyboardInterrupt)  # need no traceback


class Stopped(Exception):
    """Rank 0 has ended training."""


class Ranks:
    """The processes of a run; `rank` is the number of this one, `size` that of all.

    interruption   where `requested` says that a signal asks this rank to stop (runs/interrupt.py)
    over           training has ended on all ranks: what fails now is this rank's own affair
    """

    def __init__(self, mpi: Any) -> None:
        self.mpi, self.comm, self.status = mpi, mpi.COMM_WORLD, mpi.Status()
        self.gradients = self.comm.Dup()  # so that they are not taken for messages
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        self.nccl: Nccl | None = None
        self.limit = float(os.environ.get("MINILORA_WAIT", 1800))
        self.interruption: Any = SimpleNamespace(requested=False)
        self.over = False
        self.sent: list[Any] = []  # requests, which hold their buffers until these have left

    def on_gpus(self, together: bool = True) -> None:
        """From here on this rank computes on a GPU: one of its own if all work together, and then exchanges gradients by NCCL."""
        take_gpu(self.comm.Split_type(self.mpi.COMM_TYPE_SHARED).Get_rank(), f"rank {self.rank}" if together else "")
        if together:
            self.nccl = Nccl(self.rank, self.size, lambda mine: self.meet("the start", mine, lambda every: every[0]), self._wait)

    def blocks(self, lanes: int) -> list[range]:
        """The lanes of every rank."""
        return [range(lanes * rank // self.size, lanes * (rank + 1) // self.size) for rank in range(self.size)]

    def meet(self, where: str, message: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """decide([the message of every rank]), computed by rank 0 and sent to all. Messages and answers are JSON.

        where: in words. Raises TimeoutError, naming the ranks that are missing.
        """
        if self.rank:
            self._send(0, message)
            return self._receive([0], where, 2 * self.limit)[0]  # rank 0 is the first to report a rank that is missing
        others = range(1, self.size)
        answer = decide([json.loads(json.dumps(message)), *self._receive(others, where, self.limit)])
        for rank in others:
            self._send(rank, answer)
        return answer

    def greet(self, about: Mapping[str, Any], lanes: int) -> None:
        """Raise ValueError, naming the rank and the difference, unless `about` and versions are the same on all, and all have a lane."""
        blas = [[each["internal_api"], each.get("architecture")] for each in threadpool_info() if each["user_api"] == "blas"]

        def compare(greetings: list[Any]) -> None:
            if self.size > lanes:
                raise ValueError(f"{self.size} ranks share only {lanes} lanes; begin a run with --lanes {self.size}, or start fewer ranks.")
            for rank, (same, kernels) in enumerate(greetings):
                for name, value in greetings[0][0].items():
                    if same.get(name) != value:
                        raise ValueError(f"rank {rank} has {name} {same.get(name)!r}, rank 0 has {value!r}; all ranks need the same.")
                if kernels != greetings[0][1]:
                    note(f"rank {rank} has the BLAS kernels {kernels}, rank 0 {greetings[0][1]}: they round differently.")

        self.meet("the start", [{"minilora": __version__, "numpy": np.__version__, **about}, blas], compare)

    def losses(self, mine: Sequence[Any], step: int) -> list[Any]:
        """The losses of all lanes from those of this rank's; None for one without labels. Raises Stopped when rank 0 has ended training."""

        def decide(messages: list[Any]) -> list[Any]:
            self.interruption.requested |= any(message["stop"] for message in messages)
            return [loss for message in messages for loss in message["losses"]]

        plain = [None if loss is None else [float(loss), loss.dtype.str] for loss in mine]
        answer = self.meet(f"step {step}", {"losses": plain, "stop": self.interruption.requested}, decide)
        if answer is None:
            raise Stopped
        return [None if loss is None else np.dtype(loss[1]).type(loss[0]) for loss in answer]

    def add(self, rows: dict[int, Array], lanes: int, total: Array) -> None:
        """total (n,) = the sum of all lanes. rows: {lane: gradient (n,)} of this rank; they are overwritten, `total` may be one of them."""
        xp, cuts = get_xp(total), [total.size * rank // self.size for rank in range(self.size + 1)]
        starts = [list(add_by_tree(dict.fromkeys(block, 0), block.stop, lanes)) for block in self.blocks(lanes)]
        rows = add_by_tree(rows, self.blocks(lanes)[self.rank].stop, lanes)
        exchange = self._exchange if self.nccl is None else self.nccl.exchange
        received = [xp.empty((len(each), cuts[self.rank + 1] - cuts[self.rank]), total.dtype) for each in starts]
        exchange([xp.stack([row[a:b] for row in rows.values()]) for a, b in pairwise(cuts)], received)
        slices = dict(zip((lane for each in starts for lane in each), (part for parts in received for part in parts), strict=True))
        finished = add_by_tree(slices, lanes, lanes)[0]
        exchange([finished] * self.size, [total[a:b] for a, b in pairwise(cuts)])

    def end(self, kind: type[BaseException] | None) -> None:
        """Training has ended here, by an exception of this kind or as planned: meet once more, unless only this rank has failed."""
        together = kind is None or issubclass(kind, GeneratorExit | ArithmeticError)  # closed by its caller; diverged on all ranks
        if together:
            self.meet("the end", {"losses": [], "stop": False}, lambda _: None)
        self.over = together or kind is Stopped

    def fail(self, error: BaseException, to: TextIO) -> None:
        """Report an error, and end all ranks."""
        if self.rank:
            time.sleep(1)  # what fails on all ranks is for rank 0 to report
        if not isinstance(error, _EXPECTED):
            traceback.print_exception(error, file=to)
        print(f"minilora: error: rank {self.rank}: {' '.join(str(error).split()) or type(error).__name__}", file=to, flush=True)
        time.sleep(0.5)  # until mpiexec has read it
        self.comm.Abort(1)

    def _send(self, rank: int, message: Any) -> None:
        self.sent = [request for request in self.sent if not request.Test()]
        self.sent.append(self.comm.Isend(json.dumps(message).encode(), rank))

    def _receive(self, ranks: Sequence[int], where: str, limit: float) -> list[Any]:
        """A message from each of the ranks."""
        received: dict[int, Any] = {}

        def all_there() -> bool:
            for rank in set(ranks) - received.keys():
                if (message := self.comm.Improbe(rank, status=self.status)) is not None:
                    text = bytearray(self.status.count)
                    message.Recv(text)
                    received[rank] = json.loads(text)
            return len(received) == len(ranks)

        if not _within(limit, all_there):
            missing = ", ".join(str(rank) for rank in ranks if rank not in received)
            raise TimeoutError(f"rank {missing} did not arrive at {where} within {limit:g} s.")
        return [received[rank] for rank in ranks]

    def _exchange(self, send: Sequence[np.ndarray], receive: Sequence[np.ndarray]) -> None:
        """Send send[j] to rank j, and receive receive[j] from it, for all j."""
        requests = [self.gradients.Irecv(each, rank) for rank, each in enumerate(receive)]
        requests += [self.gradients.Isend(each, rank) for rank, each in enumerate(send)]
        self._wait(lambda: self.mpi.Request.Testall(requests))

    def _wait(self, done: Callable[[], bool]) -> None:
        if not _within(self.limit, done, rest=False):
            raise TimeoutError(f"the exchange of gradients did not end within {self.limit:g} s: a rank or the network hangs.")


def _within(limit: float, done: Callable[[], bool], rest: bool = True) -> bool:
    """Wait until done(), for `limit` seconds at most, return whether it is. rest: sleep meanwhile; a large message moves in done() only."""
    begun = time.monotonic()
    while not done():
        waited = time.monotonic() - begun
        if waited > limit:
            return False
        time.sleep(min(waited / 100, 0.01) if rest and waited > 1e-3 else 0)
    return True


def add_by_tree(rows: dict[int, Any], end: int, lanes: int) -> dict[int, Any]:
    """Sum neighbours, then two such sums, and so on, ((0 + 1) + (2 + 3)) + ..., as far as the lanes before `end` reach.

    rows: {first lane: the sum of the lanes below a node of the tree}; they are overwritten. Returns the nodes left, of all {0: sum}.
    """
    step = 1
    while step < lanes:
        for i in [i for i in rows if i % (2 * step) == 0 and i + step in rows and min(i + 2 * step, lanes) <= end]:
            rows[i] += rows.pop(i + step)
        step *= 2
    return rows


@contextmanager
def joined() -> Iterator[Ranks | None]:
    """The ranks that mpiexec started; None where this process is alone. All but rank 0 are silent. An error of one ends all of them."""
    ranks, shown = _find(), sys.stderr
    if ranks is None:
        yield None
        return
    try:
        with ExitStack() as held:
            if ranks.rank:
                nowhere = held.enter_context(open(os.devnull, "w"))
                held.enter_context(redirect_stdout(nowhere))
                held.enter_context(redirect_stderr(nowhere))
            yield ranks
    except BaseException as error:
        if not ranks.over:
            ranks.fail(error, shown)
        raise


def _find() -> Ranks | None:
    """Raises ImportError without mpi4py; RuntimeError when mpiexec is not that of the library, to which each process would seem alone."""
    rank = next((int(os.environ[name]) for name in _RANK if name in os.environ), None)
    size = max((int(os.environ[name]) for name in _SIZE if name in os.environ), default=0)
    if rank is None or size == 1:
        return None
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # a library may end the process there
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"mpiexec started this process, which needs: pip install mpi4py mpich ({error}).") from None
    library = MPI.Get_library_version().split(",")[0].split("\n")[0].strip("\0 ")
    if library.startswith("Open MPI") or "OMPI_COMM_WORLD_RANK" not in os.environ:
        if not MPI.Is_initialized():
            MPI.Init_thread()
            atexit.register(MPI.Finalize)
        if MPI.COMM_WORLD.Get_size() > 1:
            return Ranks(MPI)
        if not (rank or size):
            return None
    raise RuntimeError(
        f"mpiexec started {size or 'several'} processes, but belongs to another MPI than the library here, {library}; use its own."
    )
