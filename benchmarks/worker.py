"""One side of a benchmark: sets itself up, warms up, then takes a round of steps for each line on standard input.

    python -m benchmarks.worker '{"workload": "dense", "side": "ours", "steps": 2, "warmup": 2, "threads": 2, "folder": ...}'

Answers each time with one line of JSON; what libraries print goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_memory


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**told: object) -> None:
        answers.write(json.dumps(told) + "\n")
        answers.flush()

    o = Namespace(**json.loads(sys.argv[1]))
    o.folder = Path(o.folder)
    try:
        workload: Any = importlib.import_module(f"benchmarks.{o.workload}")
        if o.side == "prepare":
            workload.prepare(o)
            return tell(losses=[], memory=0, loaded=0)
        memory = getattr(workload, "peak_memory", peak_memory)  # on a GPU it is the device's
        steps = workload.SIDES[o.side](o)
        loaded = memory()  # before the first step
        tell(losses=list(islice(steps, o.warmup)), memory=memory(), loaded=loaded)
        for _ in sys.stdin:
            begun = time.perf_counter()
            losses = list(islice(steps, o.steps))
            seconds = time.perf_counter() - begun
            tell(losses=losses, seconds=seconds, memory=memory(), loaded=loaded)
    except Exception as error:
        tell(error=f"{type(error).__name__}: {' '.join(str(error).split()):.300}")


if __name__ == "__main__":
    main()
