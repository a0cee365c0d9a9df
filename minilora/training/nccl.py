"""The exchange of gradients between GPUs, by NCCL. MPI starts the ranks and introduces them to each other (ranks.py)."""

from collections.abc import Callable, Sequence
from typing import Any

from minilora.backend import Array, import_cupy

_TYPES = {"float32": "NCCL_FLOAT32", "float64": "NCCL_FLOAT64"}


class Nccl:
    """`exchange(send, receive)` sends send[j] to rank j and receives receive[j] from it, for all ranks j; arrays are contiguous.

    share    gives rank 0's value to all ranks
    wait     wait(done) returns once done() is true, or raises TimeoutError

    Raises ImportError where CuPy has no NCCL.
    """

    def __init__(self, rank: int, size: int, share: Callable[[Any], Any], wait: Callable[[Callable[[], bool]], None]) -> None:
        self.cuda, self.wait = import_cupy().cuda, wait
        self.nccl = self.cuda.nccl
        if not self.nccl.available:
            raise ImportError("several ranks on GPUs need NCCL, which this CuPy lacks: pip install nvidia-nccl-cu12, or -cu13.")
        own = self.nccl.get_unique_id()  # bytes, or a tuple in older versions
        self.comm = self.nccl.NcclCommunicator(size, type(own)(share(list(own))), rank)

    def exchange(self, send: Sequence[Array], receive: Sequence[Array]) -> None:
        stream = self.cuda.get_current_stream()
        self.nccl.groupStart()
        for rank, (out, into) in enumerate(zip(send, receive, strict=True)):
            for call, array in ((self.comm.send, out), (self.comm.recv, into)):
                call(array.data.ptr, array.size, getattr(self.nccl, _TYPES[array.dtype.name]), rank, stream.ptr)
        self.nccl.groupEnd()
        event = stream.record()
        self.wait(lambda: event.done)


def take_gpu(number: int, own: str = "") -> None:
    """Use the GPU of this number, counted around. own: who needs one alone; raises ValueError when there are too few."""
    cuda = import_cupy().cuda
    devices = cuda.runtime.getDeviceCount()
    if own and number >= devices:
        raise ValueError(f"{own} needs a GPU of its own, and its computer has {devices}; start fewer ranks, or add --backend numpy.")
    cuda.Device(number % devices).use()  # of all arrays from here on
