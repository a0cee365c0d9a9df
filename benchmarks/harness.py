"""Two or more sides do the same work, each in a process of its own, in turn: this project and its rivals.

A side is a function of the options that sets itself up and returns an iterator: each `next` takes one optimizer step and gives its
loss. A worker (worker.py) takes `warmup` steps, then a round of `steps` steps whenever it is told to, and idles meanwhile. The order
of the sides turns round from one round to the next, so that what drifts on the machine hits all alike. Told are the ratios of
seconds within a round, ours / theirs: their median, and how far they spread. If the losses differ, the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import busy_cores, describe
from benchmarks.report import Measured, show, summary

ROOT = Path(__file__).parent.parent
PAUSE = 0.3  # seconds before a turn: threads that wait for work spin a while
Side = Callable[[argparse.Namespace], Iterator[float]]

# What torch frees in a step goes back to the system by default, and comes again as page faults. With these settings it is kept.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}
RIVALS = {
    "eager": "torch and PEFT as installed",
    "malloc": "the same, the C library's allocator tuned",
    "compile": "the same, under torch.compile",
}
ENVIRONMENT = {"malloc": MALLOC, "compile": MALLOC}


class Failed(Exception):
    """A side could not be set up, or broke down; the message says why."""


class Worker:
    """One side in a process of its own, and what was `measured` of it. start: seconds from its start to the end of its warm-up."""

    def __init__(self, workload: str, side: str, options: Mapping[str, Any]) -> None:
        self.measured = Measured(side)
        threads = {f"{name}_NUM_THREADS": str(options["threads"]) for name in ("OMP", "OPENBLAS", "MKL")}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (`stop` closes it)
        self._pause()
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps({**options, "workload": workload, "side": side})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **threads, **ENVIRONMENT.get(side, {})},
        )
        self._read()
        self.start = time.perf_counter() - begun

    def round(self) -> None:
        """Let it take one round of steps."""
        self._pause()
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.measured.seconds.append(self._read()["seconds"])

    def stop(self) -> None:
        """Let it end: it does when there is nothing more to read."""
        self.process.communicate()
        self.errors.close()

    def _pause(self) -> None:
        busy = busy_cores(PAUSE)
        self.measured.others += [] if busy is None else [busy]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        told = json.loads(line) if line else {"error": self._last_words()}
        if "error" in told:
            self.stop()
            raise Failed(f"{self.measured.side}: {told['error']}")
        self.measured.losses += told["losses"]
        self.measured.memory, self.measured.loaded = told["memory"], told["loaded"]
        return told

    def _last_words(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        return (self.errors.read().strip().splitlines() or [f"it ended with exit code {self.process.returncode}"])[-1]


def options(doc: str, rounds: int = 5, threads: int = 2, **own: dict[str, Any]) -> argparse.Namespace:
    """The command line. `own`: further options, {name: keywords of add_argument}."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=rounds, help="how often each side has its turn")
    parser.add_argument("--threads", type=positive, default=threads, help="of each side")
    for name, keywords in own.items():
        parser.add_argument(f"--{name}", **keywords)
    return parser.parse_args()


def positive(text: str) -> int:
    """A number on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be an integer of at least 1")
    return int(text)


def compare(
    workload: str,
    doc: str,
    sides: Mapping[str, Side],
    *,
    steps: int,
    warmup: int = 2,
    tolerance: float | None = 1e-4,
    fresh: bool = False,
    words: tuple[str, str] = ("step", "losses"),
    **own: dict[str, Any],
) -> int:
    """Measure the first of `sides` against the others; print a table and a line of JSON. Returns the exit code.

    A round is `steps` steps, after `warmup` steps that are not timed. Losses may differ by `tolerance` of the first one; None: by
    anything. fresh: every turn is a new process, timed from its start to the end of the warm-up. words: what a step and its value are.
    """
    own["steps"] = {"type": positive, "default": steps, "help": "steps a round"}
    own["no-compile"] = {"action": "store_true", "help": "leave out torch.compile"}
    args = options(doc, **own)
    names = [name for name in sides if not (args.no_compile and "compile" in name)]
    print(
        f"{doc.splitlines()[0]}\n{args.threads} threads, {args.rounds} rounds of " + ("a process" if fresh else f"{args.steps} {words[0]}s")
    )
    with tempfile.TemporaryDirectory() as folder:
        given = {**vars(args), "warmup": warmup, "folder": folder}
        try:
            prepare(workload, given)
            measured = (turns_of_processes if fresh else turns)(workload, names, given)
        except Failed as failed:
            print(f"benchmarks.{workload}: {failed}", file=sys.stderr)
            return 1
    told = summary(measured, 1 if fresh else args.steps, tolerance)
    show({**heading(workload, args), "steps": args.steps, **told}, RIVALS, words)
    return 0 if told["ok"] else 1


def heading(workload: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the line of JSON begins with."""
    command = shlex.join(["python", "-m", f"benchmarks.{workload}", *sys.argv[1:]])
    return {"benchmark": workload, "command": command, "machine": describe(), "rounds": args.rounds, "threads": args.threads}


def prepare(workload: str, given: Mapping[str, Any]) -> None:
    """Let the workload write its model and data into the folder, in a process of its own."""
    try:
        Worker(workload, "prepare", given).stop()
    except Failed as failed:
        raise Failed(f"{failed}" + (" (pip install 'minilora[oracle]')" if "No module named" in str(failed) else "")) from None


def turns(workload: str, names: Sequence[str], given: Mapping[str, Any]) -> list[Measured]:
    """All rounds of all sides, one process each. A rival that cannot be set up is named and left out."""
    workers = []
    for name in names:
        try:
            workers.append(Worker(workload, name, given))
        except Failed as failed:
            if name == names[0]:
                raise
            print(f"left out: {failed}", flush=True)
    for i in range(given["rounds"]):
        for worker in workers[:: 1 if i % 2 == 0 else -1]:
            worker.round()
    for worker in workers:
        worker.stop()
    return [worker.measured for worker in workers]


def turns_of_processes(workload: str, names: Sequence[str], given: Mapping[str, Any]) -> list[Measured]:
    """The same with a new process at each turn. The first ones, which read files from the disk, do not count."""
    last: dict[str, Measured] = {}
    for i in range(-1, given["rounds"]):
        for name in names[:: 1 if i % 2 == 0 else -1]:
            worker = Worker(workload, name, given)
            worker.stop()
            if i >= 0:
                worker.measured.seconds = [*(last[name].seconds if i > 0 else []), worker.start]
            last[name] = worker.measured
    return [last[name] for name in names]
