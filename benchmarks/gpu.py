"""All measurements on a GPU, into benchmarks/results/gpu-<device>.json.

    python -m benchmarks.gpu --call 1        what to run first: versions, launches, the GPU tests
    python -m benchmarks.gpu --call 2        GPT-2 small in bfloat16, and the toy
    python -m benchmarks.gpu --call 3        the main job by kernel, the loss by blocks of logits, compute-sanitizer
    python -m benchmarks.gpu --call 4        SmolLM2's shape in bfloat16, GPT-2 small in TF32
    python -m benchmarks.gpu --call 5        curves on both backends, MiniLM on film snippets
    python -m benchmarks.gpu [--only launches dense-bf16 ...] [--rounds 5] [--rivals eager half compile half-compile]
    python -m benchmarks.gpu --dry-run       all five calls with tiny models; without a GPU, on the fake CuPy of the tests
    python -m benchmarks.gpu --fake          only the curves, of 200 steps, on the fake CuPy
    python -m benchmarks.gpu --merge FILE    add results that were measured on another computer

A call takes at most --minutes: a measurement is not begun unless the time that it usually takes is left, and is stopped when time is up.
It needs the checkout and CuPy; torch, transformers and PEFT for the rivals. Results are written after every measurement and every
round. They never replace those of another machine, or of other versions of the libraries: these get files of their own.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import gpu_figures, gpu_jobs
from benchmarks.harness import ROOT, options, positive

RESULTS = ROOT / "benchmarks" / "results"
CALLS = {
    1: ("launches", "suite"),
    2: ("dense-bf16", "toy", "dense-bf16-compile"),
    3: ("profile", "logits", "memcheck", "racecheck"),
    4: ("completions-bf16", "dense-tf32", "completions-bf16-compile", "dense-tf32-compile"),
    5: ("curves", "snippets"),
}
ROUNDS = {4: 3, 5: 3}
EAGER, COMPILED = gpu_jobs.RIVALS[:2], gpu_jobs.RIVALS[2:]
MEASUREMENTS: dict[str, tuple[int, tuple[str, ...]]] = {  # name: seconds that it takes on an H100, and the rivals of a job
    "launches": (60, ()),
    "suite": (90, ()),
    "dense-bf16": (90, EAGER),
    "toy": (60, gpu_jobs.RIVALS),
    "dense-bf16-compile": (180, COMPILED),
    "profile": (45, ()),
    "logits": (30, ()),
    "memcheck": (120, ()),
    "racecheck": (120, ()),
    "completions-bf16": (90, EAGER),
    "dense-tf32": (60, EAGER),
    "completions-bf16-compile": (180, COMPILED),
    "dense-tf32-compile": (100, COMPILED),
    "curves": (120, ()),
    "snippets": (120, gpu_jobs.RIVALS),
}
Store = Callable[[dict[str, Any]], None]


def child(name: str, given: str) -> None:
    """One measurement, in its own process: the result, and before that what has been measured so far, goes to the file o.out."""
    o = Namespace(**json.loads(given))

    def keep(result: dict[str, Any]) -> None:
        write(Path(o.out), result)

    if o.dry:
        gpu_jobs.fake_cupy()
    if name in gpu_figures.FIGURES:
        keep(gpu_figures.FIGURES[name](o, keep))
    else:
        keep(gpu_jobs.measure(name.removesuffix("-compile"), o.rivals, o.rounds, o.dry, keep))


def measure(name: str, o: dict[str, Any], seconds: float, store: Store) -> dict[str, Any]:
    """The result of a measurement; of one that fails, or has not ended after so many seconds, what it has measured, and why it ended.

    `store` gets what has been measured so far as it comes. Whatever the measurement has started ends with it.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        out, seen, end = Path(folder) / "result.json", 0, time.monotonic() + seconds
        run = [sys.executable, "-c", "import sys; from benchmarks import gpu; gpu.child(*sys.argv[1:])", name]
        process = subprocess.Popen(
            [*run, json.dumps({**o, "seconds": seconds, "out": str(out)})],
            cwd=ROOT,
            env={**os.environ, "CUPY_TF32": "0" if name == "curves" else "1"},  # CuPy reads it at its first product only
            stdout=errors,
            stderr=errors,
            start_new_session=True,  # so that all that it starts can be ended
        )
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
                if out.is_file() and (now := out.stat().st_mtime_ns) != seen:
                    seen = now
                    store({**json.loads(out.read_text()), "unfinished": "being measured"})
        finally:
            code = process.poll()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        result: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
        if code is None:
            result["unfinished"] = f"stopped after {seconds:.0f} s"
        elif code:
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit code {code}"]
            result |= {"failed": lines[-1], "traceback": lines[-12:-1]}
        return result


def place(folder: Path, machine: dict[str, Any]) -> Path:
    """The file of a machine: gpu-<device>.json, or the first of gpu-<device>-2.json, ... that is not another's."""
    words = re.split(r"[\s-]+", machine["device"].lower().removeprefix("nvidia "))
    ends = next((i + 1 for i, word in enumerate(words) if any(c.isdigit() for c in word)), len(words))
    name, n = "gpu-" + "-".join(words[:ends]), 1
    while (path := folder / f"{name}{f'-{n}' if n > 1 else ''}.json").is_file() and json.loads(path.read_text())["machine"] != machine:
        n += 1
    return path


def add(path: Path, machine: dict[str, Any], results: dict[str, Any]) -> None:
    """Put results into a file, beside what it holds."""
    before = json.loads(path.read_text()) if path.is_file() else {}
    write(path, {**before, "machine": machine, "results": {**before.get("results", {}), **results}})


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def call(names: Sequence[str], args: Namespace, rounds: int) -> int:
    """Measure these, within args.minutes. Returns the exit code: 1 if something fails, is cut off or is not begun."""
    end = time.monotonic() + 60 * args.minutes
    o = {"dry": args.dry_run, "rounds": rounds, "steps": 3 if args.dry_run else 200}
    about = measure("versions", o, 60 * args.minutes, lambda result: None)
    if "machine" not in about:
        print(f"benchmarks.gpu: {about.get('failed') or about['unfinished']}", file=sys.stderr)
        return 1
    machine, commit = about.pop("machine"), _commit()
    path = place(args.out, machine)
    add(path, machine, {"versions": {**about, "commit": commit}})
    print(json.dumps({**machine, **about}), flush=True)
    bad = []
    for name in names:
        usual, rivals = MEASUREMENTS[name]
        left = end - time.monotonic()
        if left < usual:
            print(f"{name}: not begun, as {left:.0f} s are left and it takes {usual}", flush=True)
            bad.append(name)
            continue
        chosen = [rival for rival in rivals if rival in args.rivals]
        if rivals and not chosen:
            print(f"{name}: left out, as --rivals has none of {', '.join(rivals)}", flush=True)
            continue
        head = {"commit": commit, **({"rounds": rounds} if rivals else {})}
        result = measure(name, o | {"rivals": chosen}, min(left, 3 * usual), lambda result: add(path, machine, {name: head | result}))  # noqa: B023
        add(path, machine, {name: head | result})
        if {"failed", "unfinished"} & result.keys() or result.get("exit_code") or result.get("ok") is False:
            bad.append(name)
        print(f"{name}: {json.dumps(result)[:2000]}", flush=True)
    print(f"{path}" + (f"; failed or unfinished: {', '.join(bad)}" if bad else ""))
    return int(bool(bad))


def _commit() -> str | None:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return run.stdout.strip() or None


def main() -> int:
    args = options(
        __doc__,
        **{
            "call": {"type": int, "choices": CALLS, "help": "which of the five calls, each of some minutes"},
            "only": {"nargs": "+", "choices": MEASUREMENTS, "default": list(MEASUREMENTS), "help": "measurements to run, without --call"},
            "rivals": {
                "nargs": "+",
                "choices": gpu_jobs.RIVALS,
                "help": "rivals to run (default: all); half: adapters in half precision",
            },
            "minutes": {"type": positive, "help": "the time for a call (default: 9; without --call 60)"},
            "out": {"type": Path, "help": "the folder to write to (default: benchmarks/results; in a dry run one that is removed)"},
            "dry-run": {"action": "store_true", "help": "all calls, or --call, with tiny models; the only rival is eager"},
            "fake": {"action": "store_true", "help": "only the curves, on the fake CuPy of the tests; needs no GPU"},
            "merge": {"type": Path, "metavar": "FILE", "help": "add the results of this file to those of its machine"},
        },
    )
    if args.fake:
        gpu_jobs.fake_cupy(always=True)
        print(json.dumps(gpu_figures.curves(Namespace(dry=True, steps=200), lambda result: None), indent=1))
        return 0
    if args.merge:
        other = json.loads(args.merge.read_text())
        path = place(args.out or RESULTS, other["machine"])
        add(path, other["machine"], other["results"])
        print(path)
        return 0
    args.rivals = args.rivals or (("eager",) if args.dry_run else gpu_jobs.RIVALS)
    args.minutes = args.minutes or (9 if args.call or args.dry_run else 60)
    with tempfile.TemporaryDirectory() as folder:
        args.out = args.out or (Path(folder) if args.dry_run else RESULTS)
        calls = [args.call] if args.call else list(CALLS) if args.dry_run else []
        if not calls:
            return call(args.only, args, args.rounds)
        return max([call(CALLS[n], args, min(args.rounds, ROUNDS.get(n, args.rounds), 1 if args.dry_run else 99)) for n in calls])


if __name__ == "__main__":
    sys.exit(main())
