"""All benchmarks of speed and memory on this CPU, one after the other, into benchmarks/results/cpu-<processor>.json.

    python -m benchmarks.cpu [--only dense toy ...] [--rounds 5] [--threads 2] [--no-compile] [--random] [--out FILE]

The file holds the JSON of each benchmark, which names the machine, under its name; those that are not run now stay. Nothing is kept of a
benchmark during which other work kept the machine busy. The exit code is 1 if any benchmark fails or is not kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, options
from benchmarks.machine import slug
from benchmarks.report import DISTURBED

RUNS = {
    "dense": ["dense"],
    "dense-all": ["dense", "--targets", "all"],
    "classification": ["classification"],
    "completions": ["completions", "--no-compile"],  # torch.compile does not finish: shapes change with every batch
    "epochs": ["epochs"],
    "toy": ["toy"],
    "straight": ["straight"],
    "start": ["start"],
    "generation": ["generation"],
    "full_vs_lora_step": ["full_vs_lora_step"],
    "full_vs_lora_step-all": ["full_vs_lora_step", "--targets", "all"],
    "growth": ["growth"],
}


def main() -> int:
    args = options(
        __doc__,
        **{
            "only": {"nargs": "+", "choices": list(RUNS), "default": list(RUNS), "help": "benchmarks to run"},
            "no-compile": {"action": "store_true", "help": "leave out torch.compile"},
            "random": {"action": "store_true", "help": "random weights instead of SmolLM2's"},
            "out": {"type": Path, "default": ROOT / "benchmarks" / "results" / f"cpu-{slug()}.json", "help": "the file to write"},
        },
    )
    failed: list[str] = []
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name in args.only:
        print(f"\n== {name}", flush=True)
        code, result = run(RUNS[name], args)
        busy = ((result or {}).get("busy_cores_between_turns") or {"median": 0})["median"] > DISTURBED
        failed += [name] if code or busy else []
        if result is not None and not busy:
            results[name] = result
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{len(args.only) - len(failed)} of {len(args.only)} passed; {args.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


def run(command: list[str], args: Any) -> tuple[int, dict[str, Any] | None]:
    """(exit code, JSON of the last line or None). The other lines are printed."""
    more: list[str] = []
    if command[0] != "growth":  # growth has its own defaults
        more = ["--rounds", str(args.rounds), "--threads", str(args.threads)] + ["--no-compile"] * args.no_compile
    more += ["--random"] * (args.random and command[0] in ("completions", "generation"))
    result = None
    with subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:], *more], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                result = json.loads(line)
            else:
                print(line, end="", flush=True)
    return process.returncode, result


if __name__ == "__main__":
    sys.exit(main())
