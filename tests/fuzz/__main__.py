"""Run many cases: `python -m tests.fuzz --cases 1000000 --seed 0 [--format NAME] [--jobs N] [--table docs/fuzz.md]`.

A case is a function of the seed, the format and its number: `--format NAME --only NUMBER` repeats one, shows its traceback, and leaves its
files. The exit status is 1 when a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .formats import all_formats
from .worker import files_of

CHUNK = 100
LIMIT = 6.0  # seconds of processor time after which a case is ended; from 2 on it has failed
ROOT = Path(__file__).parent.parent.parent


class Worker:
    """A process that runs cases. `run` gives the result of a chunk; a case that ends the process, or does not end, is a failure."""

    def __init__(self, seed: int) -> None:
        self.seed, self.place = seed, tempfile.NamedTemporaryFile(prefix="minilora-at-")  # noqa: SIM115
        self.place.write(bytes(8))
        self.place.flush()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.fuzz.worker", str(self.seed), self.place.name]
        limited = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "RUST_BACKTRACE": "0",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process: Any = subprocess.Popen(command, cwd=ROOT, env=limited, **pipes)
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError("a worker did not start")

    def run(self, name: str, first: int, last: int) -> Iterator[dict[str, Any]]:
        while first < last:
            self.hung, stop = "", threading.Event()
            watcher = threading.Thread(target=self.watch, args=(stop,))
            watcher.start()
            try:
                self.process.stdin.write(f"{name} {first} {last}\n")
                self.process.stdin.flush()
                answer = self.process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            stop.set()
            watcher.join()
            if answer:
                yield json.loads(answer)
                return
            at, status = self.at(), self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            what = (self.hung, "it did not end") if self.hung else ("the process ended", f"status {status}")
            self.start()
            if at > first:
                yield from self.run(name, first, at)  # those before it, once more: their results are lost
            yield {"counts": {what[0]: 1}, "failures": [(at, *what)]}
            first = at + 1

    def at(self) -> int:
        with open(self.place.name, "rb") as file:
            return struct.unpack("<q", file.read(8))[0]

    def watch(self, stop: threading.Event) -> None:
        seen, began, looks = -1, 0.0, 0
        while not stop.wait(0.25):
            at, cpu = self.at(), _cpu(self.process.pid)
            if at != seen:
                seen, began, looks = at, cpu, 0
            elif cpu - began > LIMIT or (looks := looks + 1) > 480:  # not by the clock: someone may stop these processes for a while
                self.hung = "time"
                self.process.kill()
                return

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.place.close()


def _cpu(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run(cases: int, seed: int = 0, names: list[str] | None = None, jobs: int = 2, first: int = 0, quiet: bool = False) -> dict[str, Any]:
    """{format: {"counts": {how it ended: cases}, "failures": [(number, how, about), ...]}} of `cases` cases, shared by weight."""
    formats = all_formats()
    chosen = {name: formats[name] for name in names or formats}
    total = sum(form.weight for form in chosen.values())
    share = {name: max(1, round(cases * form.weight / total)) for name, form in chosen.items()}
    chunks = [(name, a, min(a + CHUNK, first + n)) for name, n in share.items() for a in range(first, first + n, CHUNK)]
    chunks.sort(key=lambda chunk: (chunk[1] - first) / share[chunk[0]])  # all formats advance together
    found: dict[str, Any] = defaultdict(lambda: {"counts": Counter(), "failures": []})
    lock, left = threading.Lock(), iter(chunks)
    bar = tqdm(total=sum(share.values()), unit="case", dynamic_ncols=True, disable=quiet, mininterval=2)

    def work() -> None:
        worker = Worker(seed)
        while (chunk := _next(left, lock)) is not None:
            for result in worker.run(*chunk):
                with lock:
                    found[chunk[0]]["counts"].update(result["counts"])
                    found[chunk[0]]["failures"] += result["failures"]
                    for number, how, about in result["failures"] if not quiet else ():
                        bar.write(f"{chunk[0]} {number}: {how}: {about}", file=sys.stderr)
                    bar.update(sum(result["counts"].values()))
                    bar.set_postfix(failures=sum(len(each["failures"]) for each in found.values()))
        worker.close()

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    bar.close()
    return {name: found[name] for name in chosen}


def _next(left: Iterator[Any], lock: threading.Lock) -> Any:
    with lock:
        return next(left, None)


def table(found: dict[str, Any]) -> str:
    """Markdown: cases of each format, and how they ended."""
    lines = ["| format | cases | refused | accepted | failed |", "|---|---:|---:|---:|---:|"]
    sums = Counter()
    for name, each in found.items():
        counts = Counter(each["counts"])
        row = {
            "cases": counts.total(),
            "refused": counts.pop("refused", 0),
            "accepted": counts.pop("accepted", 0),
            "failed": counts.total(),
        }
        row["failed"] = counts.total()
        sums.update(row)
        lines.append(f"| {name} | {row['cases']:,} | {row['refused']:,} | {row['accepted']:,} | {row['failed']:,} |")
    lines.append(f"| all | {sums['cases']:,} | {sums['refused']:,} | {sums['accepted']:,} | {sums['failed']:,} |")
    return "\n".join(lines)


def write_table(file: Path, text: str) -> None:
    """Replace the table in a Markdown file."""
    before, _, rest = file.read_text(encoding="utf-8").partition("| format |")
    after = rest.partition("\n\n")[2]
    file.write_text(f"{before}{text}\n\n{after}", encoding="utf-8")


def failures(found: dict[str, Any]) -> str:
    """The failures, one line a kind."""
    kinds: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    texts = {}
    for name, each in found.items():
        for number, how, about in each["failures"]:
            key = (name, how, about.partition(" ")[0] if how not in ("time", "memory") else "")
            kinds[key].append(number)
            texts.setdefault(key, about)
    ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
    return "\n".join(f"{len(n):6} {name}: {how}: {texts[name, how, at]}   e.g. {n[:4]}" for (name, how, at), n in ordered)


def only(name: str, seed: int, number: int) -> None:
    form = all_formats()[name]
    files, changed = files_of(form, seed, number)
    folder = Path(tempfile.gettempdir()) / f"fuzz-{name}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file, data in ((files if name != "gguf" else {}) | changed).items():
        (folder / file).write_bytes(data)
    print(f"{folder}: changed {', '.join(changed)}")
    try:
        value = form.read(folder)
        print(f"accepted: {value!r:.2000}")
        form.check(folder, value)
    except BaseException:
        traceback.print_exc()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each format: go on where another run ended")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--format", action="append", choices=list(all_formats()))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", type=int, metavar="NUMBER")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="such files of other runs, whose numbers are added in --table")
    parser.add_argument("--table", type=Path, help="write the table into this file, docs/fuzz.md")
    args = parser.parse_args()
    if args.only is not None:
        only(args.format[0], args.seed, args.only)
        return 0
    began = time.monotonic()
    found = run(args.cases, args.seed, args.format, args.jobs, args.first)
    print(table(found))
    print(f"\nseed {args.seed}, from case {args.first}, {(time.monotonic() - began) / 60:.0f} minutes, {args.jobs} processes")
    if text := failures(found):
        print("\n" + text)
    if args.json:
        args.json.write_text(json.dumps(found))
    if args.table:
        for file in args.add:
            for name, each in json.loads(file.read_text()).items():
                found[name]["counts"].update(each["counts"])
        write_table(args.table, table(found))
    return 1 if text else 0


if __name__ == "__main__":
    sys.exit(main())
