"""One side of a benchmark: sets itself up, warms up, then takes a round of steps for each line on standard input.

    python -m benchmarks.worker '{"workload": "dense", "side": "ours", "steps": 2, "warmup": 2, "threads": 2, "folder": ...}'

Answers each request with one line of JSON. Output of libraries goes to standard error.
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

from benchmarks import where
from benchmarks.machine import peak_memory


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    o = Namespace(**json.loads(sys.argv[1]))
    o.folder = Path(o.folder)
    try:
        workload: Any = importlib.import_module(f"benchmarks.{o.workload}")
        if o.side == "prepare":
            workload.prepare(o)
            return answer(losses=[], memory=0, loaded=0)
        memory = getattr(workload, "peak_memory", peak_memory)  # on a GPU: device memory
        steps = workload.SIDES[o.side](o)
        loaded = memory()  # before the first step
        answer(losses=list(islice(steps, o.warmup)), memory=memory(), loaded=loaded)
        for request in sys.stdin:
            if request == "where\n":
                answer(where=where.of_the_next(steps, o.threads))
                continue
            start = time.perf_counter()
            losses = list(islice(steps, o.steps))
            seconds = time.perf_counter() - start
            answer(losses=losses, seconds=seconds, memory=memory(), loaded=loaded)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {' '.join(str(error).split()):.300}")


if __name__ == "__main__":
    main()
