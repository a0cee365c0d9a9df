"""A long run, and many restarts: memory, handles and threads must stay flat.

    python -m benchmarks.soak [--steps 10000] [--restarts 1000]       docs/soak.png, then the figures

The long run takes --steps steps of the bundled model, with checkpoints, held-out measurements, dropout and its records; /proc says once a
second what its process holds. The other run is stopped --restarts times: it is continued, takes at least one step, receives SIGTERM, and so
on to its end; its adapter, metrics and last checkpoint must equal those of a run that nobody stopped, and no restart may leave more files
than the first one. Linux.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.killed import left_by
from benchmarks.machine import describe

FLAGS = "--window 16 --batch-size 2 --eval-bytes 256 --sample-bytes 0 --lora-dropout 0.1 --lanes 2 --keep 2".split()
NAMES = ("memory, MB", "handles", "threads")
PAGE = os.sysconf("SC_PAGE_SIZE")


def start(*flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "minilora", "finetune", *flags]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def held(pid: int) -> tuple[float, int, int] | None:
    """(resident memory in MB, open handles, threads) of a process; None when it has ended."""
    proc = Path(f"/proc/{pid}")
    try:
        resident = int((proc / "statm").read_text().split()[1]) * PAGE / 1e6
        return resident, len(os.listdir(proc / "fd")), len(os.listdir(proc / "task"))
    except (OSError, IndexError):
        return None


def steps_in(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def long_run(run: Path, steps: int) -> list[tuple[float, ...]]:
    """[(step, memory, handles, threads), ...], one a second."""
    process, rows = start("--steps", str(steps), "--save-every", "100", "--eval-every", "200", *FLAGS, "--out", str(run)), []
    with tqdm(total=steps, unit="step", desc="long run", dynamic_ncols=True) as bar:
        while process.poll() is None:
            time.sleep(1)
            step, now = steps_in(run), held(process.pid)
            bar.update(step - bar.n)
            if now is not None and step > 0:
                rows.append((step, *now))
    if process.returncode or steps_in(run) != steps:
        raise RuntimeError(f"the long run ended with status {process.returncode} after {steps_in(run)} steps.")
    return rows


def restarts(folder: Path, times: int) -> tuple[list[tuple[float, ...]], list[str]]:
    """([(restart, peak memory, handles, threads), ...] of each process, files that differ from those of a run nobody stopped)."""
    whole, run, steps = folder / "whole", folder / "run", 5 * times
    flags = ("--steps", str(steps), "--save-every", "1000000", *FLAGS)
    if start(*flags, "--out", str(whole)).wait():
        raise RuntimeError("the run that nobody stops failed.")
    rows: list[tuple[float, ...]] = []
    files = 0
    for number in tqdm(range(times + 1), unit="restart", desc="restarts", dynamic_ncols=True):
        process = start(*flags, "--out", str(run)) if number == 0 else start("--resume", str(run))
        begun, most, stopped = steps_in(run), (0.0, 0, 0), False
        while process.poll() is None:
            most = tuple(max(pair) for pair in zip(most, held(process.pid) or most, strict=True))  # type: ignore[assignment]
            if number < times and not stopped and begun < steps_in(run):
                process.send_signal(signal.SIGTERM)
                stopped = True
            time.sleep(0.005)
        if process.returncode and not stopped:
            raise RuntimeError(f"restart {number} ended with status {process.returncode}.")
        rows.append((number, *most))
        there = sum(1 for _ in run.rglob("*"))
        files = files or there
        if number < times and there > files + 3:  # one checkpoint more, of --keep 2: a folder and two files
            raise RuntimeError(f"restart {number} left {there} files, the first one {files}.")
    expected, found = left_by(whole), left_by(run)
    final = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    return rows, sorted(name for name in final if not name.startswith("checkpoints/") or f"{steps:08d}" in name)


def rest(rows: list[tuple[float, ...]]) -> list[str]:
    """Of each figure: its median in the second and the last tenth, and its highest value."""
    table, tenth = np.array(rows), max(1, len(rows) // 10)
    figures = [(np.median(table[tenth : 2 * tenth, i]), np.median(table[-tenth:, i]), table[:, i].max()) for i in (1, 2, 3)]
    return [f"{name}: {a:.1f}, at the end {b:.1f}, at most {c:.1f}" for name, (a, b, c) in zip(NAMES, figures, strict=True)]


def draw(file: Path, parts: dict[str, list[tuple[float, ...]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(NAMES), len(parts), figsize=(9, 5), sharex="col", squeeze=False)
    for column, (title, rows) in enumerate(parts.items()):
        table = np.array(rows)
        for i, name in enumerate(NAMES):
            axis: Any = axes[i][column]
            axis.plot(table[:, 0], table[:, i + 1], color="#3465a4", linewidth=1)
            axis.set_ylim(0, 1.25 * table[:, i + 1].max())
            axis.grid(alpha=0.3)
            axis.set_ylabel(name if column == 0 else "")
        axes[0][column].set_title(f"{title}s" if title == "step" else "most in each restarted process")
        axes[-1][column].set_xlabel(title)
    axes[0][0].set_title("one process")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--restarts", type=int, default=1_000)
    parser.add_argument("--picture", type=Path, default=Path("docs/soak.png"))
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="minilora-soak-"))
    try:
        one = long_run(folder / "long", args.steps)
        many, differ = restarts(folder, args.restarts)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    draw(args.picture, {"step": one, "restart": many})
    print("\n".join([describe()["cpu"], f"{args.steps:,} steps", *rest(one), f"{args.restarts:,} restarts", *rest(many)]))
    print(f"different: {', '.join(differ)}" if differ else "adapter, metrics and last checkpoint equal those of a run that nobody stopped")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
