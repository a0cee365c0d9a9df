"""Fake cupy.cuda.nccl: groups of sends and receives between the processes of mpiexec, carried by MPI when the group ends.

Stricter than NCCL: outside a group nothing may be sent, the identifier must be that of rank 0, and sizes must agree.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np

available = True
NCCL_FLOAT32, NCCL_FLOAT64 = 7, 8
_TYPES = {NCCL_FLOAT32: np.float32, NCCL_FLOAT64: np.float64}
_group: list[Any] | None = None


def get_unique_id() -> bytes:
    return os.urandom(128)


def groupStart() -> None:
    global _group
    assert _group is None
    _group = []


def groupEnd() -> None:
    global _group
    from mpi4py import MPI

    requests, statuses = [], []
    for comm, sends, buffer, rank in _group or []:
        requests.append(comm.Isend(buffer, rank) if sends else comm.Irecv(buffer, rank))
        statuses.append((sends, buffer.nbytes))
    found = [MPI.Status() for _ in requests]
    MPI.Request.Waitall(requests, found)
    for (sends, size), status in zip(statuses, found, strict=True):
        assert sends or status.count == size
    _group = None


class NcclCommunicator:
    """The parts that minilora uses: NcclCommunicator(size, id, rank).send and .recv(pointer, count, type, peer, stream)."""

    def __init__(self, ndev: int, commId: bytes, rank: int) -> None:
        from mpi4py import MPI

        assert isinstance(commId, bytes)
        assert len(commId) == 128
        assert len(set(MPI.COMM_WORLD.allgather(commId))) == 1
        self.comm = MPI.COMM_WORLD.Dup()
        assert (self.comm.Get_size(), self.comm.Get_rank()) == (ndev, rank)

    def send(self, sendbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._add(True, sendbuf, count, datatype, peer)

    def recv(self, recvbuf: int, count: int, datatype: int, peer: int, stream: int) -> None:
        self._add(False, recvbuf, count, datatype, peer)

    def _add(self, sends: bool, pointer: int, count: int, datatype: int, peer: int) -> None:
        assert _group is not None
        dtype = np.dtype(_TYPES[datatype])
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
        _group.append((self.comm, sends, np.frombuffer(memory, dtype), peer))
