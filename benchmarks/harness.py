"""Two or more sides do the same work, each in its own process, in turn: minilora and its rivals.

A side is a function of the options that sets itself up and returns an iterator; each `next` takes one optimizer step and returns its
loss. A worker (worker.py) takes `warmup` steps, then a round of `steps` steps on request, and idles in between. The order of the
sides is reversed from one round to the next, so that drift of the machine affects all alike. The result is the ratio of seconds
within a round, ours / theirs: median and range. If the losses differ, the benchmark fails.
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
PAUSE = 0.3  # seconds before a turn: waiting threads spin for a while
Side = Callable[[argparse.Namespace], Iterator[float]]

# By default, memory that torch frees in a step returns to the system and costs page faults in the next step. These settings keep it.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**26)}
RIVALS = {
    "eager": "torch and PEFT as installed",
    "malloc": "the same, with a tuned C allocator",
    "compile": "the same, with torch.compile",
}
ENVIRONMENT = {"malloc": MALLOC, "compile": MALLOC}


class Failed(Exception):
    """A side could not be set up or failed; the message says why."""


class Worker:
    """One side in its own process, and its measurements. start: seconds from process start to the end of the warm-up."""

    def __init__(self, workload: str, side: str, options: Mapping[str, Any]) -> None:
        self.measured = Measured(side)
        threads = {f"{name}_NUM_THREADS": str(options["threads"]) for name in ("OMP", "OPENBLAS", "MKL")}
        compiled = {"PYTHONDONTWRITEBYTECODE": ""}  # a checkout starts as what pip installs, which it compiles
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (`stop` closes it)
        self._pause()
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps({**options, "workload": workload, "side": side})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **threads, **compiled, **ENVIRONMENT.get(side, {})},
        )
        self._read()
        self.start = time.perf_counter() - start

    def round(self) -> None:
        """Request one round of steps and add its time to `measured`."""
        self._pause()
        answer = self._request("go")
        self.measured.seconds.append(answer["seconds"])

    def where(self) -> None:
        """Ask where the time of a step goes (where.py)."""
        self.measured.where = self._request("where")["where"]

    def stop(self) -> None:
        """Close standard input, which ends the process."""
        self.process.communicate()
        self.errors.close()

    def _pause(self) -> None:
        busy = busy_cores(PAUSE)
        self.measured.others += [] if busy is None else [busy]

    def _request(self, what: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{what}\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended; `_read` says why
            pass
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_error()}
        if "error" in answer:
            self.stop()
            raise Failed(f"{self.measured.side}: {answer['error']}")
        if "losses" in answer:
            self.measured.losses += answer["losses"]
            self.measured.memory, self.measured.loaded = answer["memory"], answer["loaded"]
        return answer

    def _last_error(self) -> str:
        self.process.wait()
        self.errors.seek(0)
        if self.process.returncode == -9:
            return "the process was killed, as the system does when memory runs out; choose smaller batches, or fewer sides"
        return (self.errors.read().strip().splitlines() or [f"the process ended with exit code {self.process.returncode}"])[-1]


def options(doc: str, rounds: int = 5, threads: int = 2, **own: dict[str, Any]) -> argparse.Namespace:
    """Parse the command line. own: further options, {name: keywords of add_argument}."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=rounds, help="number of measured rounds")
    parser.add_argument("--threads", type=positive, default=threads, help="threads of each side")
    for name, keywords in own.items():
        parser.add_argument(f"--{name}", **keywords)
    return parser.parse_args()


def positive(text: str) -> int:
    """Parse a positive integer of the command line."""
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

    A round is `steps` steps, after `warmup` untimed steps. tolerance: largest difference of losses relative to the first loss; None:
    losses are not compared. fresh: every turn is a new process, timed from its start to the end of the warm-up. words: the names of a
    step and of its value in the table.
    """
    own["steps"] = {"type": positive, "default": steps, "help": "steps per round"}
    own["no-compile"] = {"action": "store_true", "help": "leave out torch.compile"}
    args = options(doc, **own)
    names = [name for name in sides if not (args.no_compile and "compile" in name)]
    work = "one process" if fresh else f"{args.steps} {words[0]}s"
    print(f"{doc.splitlines()[0]}\n{args.threads} threads, {args.rounds} rounds of {work}")
    with tempfile.TemporaryDirectory() as folder:
        settings = {**vars(args), "warmup": warmup, "folder": folder}
        try:
            prepare(workload, settings)
            measured = turns_of_processes(workload, names, settings) if fresh else turns(workload, names, settings, where=True)
        except Failed as failed:
            print(f"benchmarks.{workload}: {failed}", file=sys.stderr)
            return 1
    result = summary(measured, 1 if fresh else args.steps, tolerance)
    show({**heading(workload, args), "steps": args.steps, **result}, RIVALS, words)
    return 0 if result["ok"] else 1


def heading(workload: str, args: argparse.Namespace) -> dict[str, Any]:
    """The first fields of the line of JSON."""
    command = shlex.join(["python", "-m", f"benchmarks.{workload}", *sys.argv[1:]])
    return {"benchmark": workload, "command": command, "machine": describe(), "rounds": args.rounds, "threads": args.threads}


def prepare(workload: str, settings: Mapping[str, Any]) -> None:
    """Run the workload's `prepare` in its own process: it writes model and data to the folder."""
    try:
        Worker(workload, "prepare", settings).stop()
    except Failed as failed:
        raise Failed(f"{failed}" + (" (pip install 'minilora[oracle]')" if "No module named" in str(failed) else "")) from None


def turns(workload: str, names: Sequence[str], settings: Mapping[str, Any], where: bool = False) -> list[Measured]:
    """Measure all sides, one process each. A rival that cannot be set up is reported and left out. where: ask the first, at the end."""
    workers = []
    for name in names:
        try:
            workers.append(Worker(workload, name, settings))
        except Failed as failed:
            if name == names[0]:
                raise
            print(f"left out: {failed}", flush=True)
    for i in range(settings["rounds"]):
        for worker in workers[:: 1 if i % 2 == 0 else -1]:
            worker.round()
    if where:
        workers[0].where()
    for worker in workers:
        worker.stop()
    return [worker.measured for worker in workers]


def turns_of_processes(workload: str, names: Sequence[str], settings: Mapping[str, Any]) -> list[Measured]:
    """As `turns`, with a new process for each turn. The first round reads the files from disk and is not counted."""
    last: dict[str, Measured] = {}
    for i in range(-1, settings["rounds"]):
        for name in names[:: 1 if i % 2 == 0 else -1]:
            worker = Worker(workload, name, settings)
            worker.stop()
            if i >= 0:
                worker.measured.seconds = [*(last[name].seconds if i > 0 else []), worker.start]
            last[name] = worker.measured
    return [last[name] for name in names]
