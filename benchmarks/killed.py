"""kill -9 at random moments of a run: what the resumed run leaves must equal what the uninterrupted one leaves, bit for bit.

    python -m benchmarks.killed [--runs 200] [--seed 0]

Each run is killed twice at a random moment of its whole life, from the start of the process to its end, and continued with a random
number of threads. Compared: adapter, metrics, norms, samples, and the last checkpoint with the optimizer's state, its seconds left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLAGS = "--steps 12 --window 32 --batch-size 4 --eval-bytes 2048 --sample-bytes 8 --save-every 3 --lanes 2 --lora-dropout 0.1".split()
KILLS = 2


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "minilora", "finetune", *flags]


def left_by(run: Path) -> dict[str, str]:
    """{file: SHA-256} of a run folder, without times."""
    left = {}
    for file in sorted(run.rglob("*")):
        if file.is_file() and file.name not in ("run.json", ".lock", "curves.png"):
            content = file.read_bytes()
            if file.name == "state.json":
                content = json.dumps({k: v for k, v in json.loads(content).items() if k != "seconds"}).encode()
            left[str(file.relative_to(run))] = hashlib.sha256(content).hexdigest()
    return left


def killed_and_continued(run: Path, rng: random.Random, seconds: float, env: dict[str, str]) -> str:
    """Start a run, kill it, continue it, ... to its end. Returns what the last process said if it failed."""
    for kills in range(KILLS + 1):
        fresh = not (run / "run.json").is_file()
        flags = [*FLAGS, "--out", str(run)] if fresh else ["--resume", str(run), "--threads", str(rng.choice((1, 2)))]
        process = subprocess.Popen(command(*flags), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            said, _ = process.communicate(timeout=rng.uniform(0, seconds) if kills < KILLS else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            continue
        return said if process.returncode and "has ended" not in said else ""
    return "not reached"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, env, differ = random.Random(args.seed), {**os.environ, "OMP_NUM_THREADS": "1"}, 0
    with tempfile.TemporaryDirectory() as name:
        whole, run = Path(name) / "whole", Path(name) / "run"
        begun = time.monotonic()
        subprocess.run(command(*FLAGS, "--out", str(whole)), env=env, check=True, capture_output=True)
        seconds, expected = time.monotonic() - begun, left_by(whole)
        for number in range(1, args.runs + 1):
            said = killed_and_continued(run, rng, seconds, env)
            found = left_by(run)
            if said or found != expected:
                differ += 1
                names = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
                print(f"run {number}: {', '.join(names)} {said[-500:]}", flush=True)
            shutil.rmtree(run)
            if number % 10 == 0:
                print(f"{number} runs, {KILLS} kills each, {len(expected)} files: {differ} differ", flush=True)
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
