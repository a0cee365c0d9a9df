"""One case: make the files, read them, and say how it ended. A worker does many, in a process of its own.

Time is the processor time of this process, so that a busy machine changes nothing; memory is the peak of resident pages above what was
there before the case and the size of its files.
"""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from .formats import Format, all_formats

SECONDS, BYTES = 2.0, 64 * 2**20
ADDRESS_SPACE = 2**30  # above what the worker has: a larger request ends in a MemoryError, or ends the process
EXPECTED = (ValueError, OSError)


def files_of(form: Format, seed: int, index: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(all files, those that were changed) of a case."""
    rng = random.Random(f"{seed}/{form.name}/{index}")
    files = rng.choice(form.seeds)
    changed = form.mutation(rng, files)
    if rng.random() < 0.02:  # a file that is not there
        names = [name for name in files if name != "seed"]
        files = {name: data for name, data in files.items() if name != rng.choice(names)}
    return files, changed


def run_case(form: Format, folder: Path, files: dict[str, bytes], changed: dict[str, bytes]) -> tuple[str, str]:
    """(how it ended, about it): "accepted", "refused", or a failure."""
    for file in folder.iterdir():
        file.unlink()
    for name, data in (files | changed).items():
        (folder / name).write_bytes(data)
    size = sum(map(len, (files | changed).values()))
    base, began, errors = _reset_peak(), time.process_time(), io.StringIO()
    ended, about = "accepted", ""
    try:
        with contextlib.redirect_stderr(errors):
            value = form.read(folder)
        used, seconds = _peak() - base - size, time.process_time() - began
    except EXPECTED as error:
        used, seconds = _peak() - base - size, time.process_time() - began
        text = str(error)
        names = (str(folder), *files, *form.also)
        ended, about = ("refused", "") if any(name in text for name in names) else ("names no file", _where(error))
        del error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of a library in Rust is no Exception
        used, seconds = _peak() - base - size, time.process_time() - began
        ended, about = type(error).__name__, _where(error)
        del error
    if seconds > SECONDS:
        return "time", f"{seconds:.1f} s; {ended} {about}"
    if used > BYTES:
        return "memory", f"{used / 2**20:.0f} MB; {ended} {about}"
    if ended == "accepted":
        try:
            with contextlib.redirect_stderr(errors):
                form.check(folder, value)
        except BaseException as error:
            return "wrong value", _where(error)
    return ended, about


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = next((f for f in reversed(frames) if "/minilora/" in f.filename), frames[-1])
    last = frames[-1]
    return (
        f"{Path(ours.filename).name}:{ours.lineno} ({Path(last.filename).name}:{last.lineno}) {type(error).__name__}: {str(error)[:150]!r}"
    )


def _reset_peak() -> int:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _peak()


def _peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def serve(seed: int, place: str) -> None:
    """Read jobs "format first last" on standard input, and write what they found as a line of JSON each."""
    warnings.simplefilter("ignore")
    formats, answer = all_formats(), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries in Rust print of their panics is not looked at
    os.dup2(1, 2)
    with open("/proc/self/statm") as file:
        resource.setrlimit(resource.RLIMIT_AS, (int(file.read().split()[0]) * mmap.PAGESIZE + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(place, "r+b") as file:
        now = mmap.mmap(file.fileno(), 8)
    folder = Path(tempfile.mkdtemp(prefix="minilora-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        answer.write("ready\n")
        answer.flush()
        for line in sys.stdin:
            name, first, last = line.split()
            result: dict[str, Any] = {"counts": Counter(), "failures": [], "seconds": 0.0}
            for i in range(int(first), int(last)):
                struct.pack_into("<q", now, 0, i)
                files, changed = files_of(formats[name], seed, i)
                if name == "gguf":
                    files = {}
                ended, about = run_case(formats[name], folder, files, changed)
                result["counts"][ended] += 1
                if ended not in ("accepted", "refused"):
                    result["failures"].append((i, ended, about))
            answer.write(json.dumps(result) + "\n")
            answer.flush()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
