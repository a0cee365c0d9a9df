"""Write checkpoints with an interruption at each system call in turn; calls.c is loaded into this process.

LD_PRELOAD=calls.so python save.py calls.so FOLDER       prints one line of JSON: {mode: number of system calls}, and what went wrong
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from itertools import count
from pathlib import Path

import numpy as np

from minilora.runs import checkpoint
from minilora.runs.checkpoint import State

MODES = {"kill before": 1, "kill after": 2, "no space": 3, "input/output error": 4, "short write": 5}


def state(step: int) -> State:
    return State(step=step, tensors={name: np.full(50_000, step, np.float32) for name in ("data", "m", "v")})


def problem(run: Path, calls: ctypes.CDLL, mode: int, number: int) -> tuple[int, str]:
    """(the number of calls of a save that came to its end, or 0; what is wrong with the checkpoints afterwards)."""
    shutil.rmtree(run, ignore_errors=True)
    checkpoint.write(run, state(1))
    if (child := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        calls.arm(mode, number)
        try:
            checkpoint.write(run, state(2))
        except OSError:
            os._exit(7)
        done = calls.disarm()
        os._exit(0 if number > done else 6)  # 6: the call was reached, and made no difference
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = checkpoint.read_last(run)
    if found is None or found.step not in (1, 2) or not all((value == found.step).all() for value in found.tensors.values()):
        return status, "neither the old state nor the new one is there"
    if status in (0, 6) and found.step != 2:
        return status, "the save came to its end without the new state"
    checkpoint.write(run, state(3))
    return status, "" if checkpoint.read_last(run).step == 3 else "a later save does not take its place"  # type: ignore[union-attr]


def main() -> None:
    calls, run = ctypes.CDLL(sys.argv[1]), Path(sys.argv[2]) / "run"
    tried, wrong = {}, []
    for name, mode in MODES.items():
        for number in count(1):
            status, what = problem(run, calls, mode, number)
            if what:
                wrong.append(f"{name}, call {number}: {what}")
            if status == 0:
                break
        tried[name] = number - 1
    print(json.dumps({"calls": tried, "wrong": wrong}))


if __name__ == "__main__":
    main()
