"""The command line: argparse, and for each verb a few lines onto functions that Python users call too."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# What bad input, a missing extra or a full disk raise: told in one line. Anything else is a bug and shows its traceback.
_TOLD = (ValueError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError)


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0, 1 after an error, 130 after Ctrl-C; argparse itself exits with 2."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("minilora: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minilora generate | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _TOLD as error:
        if args.debug:
            raise
        name = f" ({error.filename})" if isinstance(error, OSError) and error.filename and error.strerror else ""
        text = error.strerror if name and isinstance(error, OSError) else str(error)
        print(f"minilora: error: {text or type(error).__name__}{name}", file=sys.stderr)
        return 1


def _finetune(args: argparse.Namespace) -> None:
    from dataclasses import fields

    from minilora.training.finetune import Recipe, finetune

    given = {field.name: getattr(args, field.name) for field in fields(Recipe) if getattr(args, field.name, None) is not None}
    finetune(Recipe(**given), args.out)


def _generate(args: argparse.Namespace) -> None:
    from minilora.formats.run import open_model
    from minilora.models.generate import generate
    from minilora.training.text import decode, encode

    model = open_model(args.model, args.backend)
    print(args.prompt, end="", flush=True)
    pending: list[int] = []
    for token in generate(model, encode(args.prompt), args.bytes, args.temperature, args.seed):
        pending.append(token)
        text = decode(pending)
        if not text.endswith("\ufffd") or len(pending) > 3:  # a character of UTF-8 has up to four bytes
            print(text, end="", flush=True)
            pending.clear()
    print(decode(pending))


def _merge(args: argparse.Namespace) -> None:
    from minilora.formats.run import merge_run

    changes = merge_run(args.run_folder, args.out)
    still = [path for path, change in changes.items() if change == 0]
    print(f"merged {len(changes)} adapters into {args.out}; the largest change of a weight is {max(changes.values()):.3g}")
    if still:
        print(f"warning: {len(still)} adapters are still zero, {still[0]} first: was anything trained?", file=sys.stderr)


def _info(args: argparse.Namespace) -> None:
    from minilora.formats.run import describe

    print(describe(args.model))


def _gradcheck(args: argparse.Namespace) -> None:
    from minilora.backend import choose_backend
    from minilora.checking.catalogue import check_all

    backend, wrong, count = choose_backend(args.backend), 0, 0
    print(f"{'what':<36} {'gradients':>9} {'worst error':>12}")
    for name, report in check_all(backend):
        print(f"{name:<36} {len(report.entries):>9} {report.worst:>12.1e}  {'ok' if report.ok else 'WRONG'}", flush=True)
        count, wrong = count + 1, wrong + (not report.ok)
        if not report.ok:
            print(report)
    if wrong:
        raise ArithmeticError(f"{wrong} of {count} backward passes disagree with finite differences.")
    print(f"all {count} agree with central differences in float64, relative error below 1e-07")


def _parser() -> argparse.ArgumentParser:
    from minilora import __version__

    parser = argparse.ArgumentParser(prog="minilora", description="Low-rank adaptation with every gradient written by hand.")
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(required=True, metavar="finetune | generate | merge | info | gradcheck")
    where = {"choices": ("auto", "numpy", "cupy"), "default": "auto", "help": "where to compute (default: auto)"}

    p = verbs.add_parser("finetune", help="adapt a model to a text; without arguments, the bundled model to Python source")
    p.add_argument("--model", help="folder of a byte-level GPT-2 (default: the bundled one, pydoc)")
    p.add_argument("--data", metavar="PATH", help="a text file or a folder of them (default: the standard library's source)")
    p.add_argument("--method", choices=("lora", "full"), help="what to train (default: lora)")
    p.add_argument("--r", "--rank", type=int, metavar="R", help="rank of the adapters (default: 8)")
    p.add_argument("--lora-alpha", "--alpha", type=float, metavar="ALPHA", help="the update is scaled by alpha / r (default: 16)")
    p.add_argument("--target-modules", type=_names, metavar="NAMES", help="names separated by commas, or all-linear (the default)")
    p.add_argument("--lr", type=float, help="peak learning rate (default: tuned for the method)")
    p.add_argument("--schedule", choices=("constant", "linear", "cosine"), help="shape of the learning rate (default: cosine)")
    p.add_argument("--warmup", type=int, metavar="STEPS", help="steps of linear warm-up (default: 10)")
    p.add_argument("--weight-decay", type=float, metavar="X", help="decoupled weight decay (default: 0)")
    p.add_argument("--clip", type=float, metavar="NORM", help="largest gradient norm (default: 1)")
    p.add_argument("--steps", type=int, help="optimizer steps (default: 200)")
    p.add_argument("--batch-size", type=int, metavar="N", help="windows a batch (default: 8)")
    p.add_argument("--accumulate", type=int, metavar="N", help="batches a step (default: 1)")
    p.add_argument("--window", type=int, metavar="BYTES", help="bytes a window (default: 256)")
    p.add_argument("--eval-bytes", type=int, metavar="BYTES", help="held-out bytes to measure on (default: 65536)")
    p.add_argument("--seed", type=int, help="seed of initial weights, batches and samples (default: 0)")
    p.add_argument("--threads", type=int, metavar="N", help="replicas, one thread each (default: the cores, at most 8)")
    p.add_argument("--sample-bytes", type=int, metavar="N", help="length of the samples (default: 240)")
    p.add_argument("--out", metavar="FOLDER", help="a new run folder (default: runs/METHOD-N)")
    p.add_argument("--backend", **where)  # type: ignore[arg-type]
    p.set_defaults(run=_finetune)

    p = verbs.add_parser("generate", help="let a model, or what a run made, write on")
    p.add_argument("model", nargs="?", default="pydoc", help="run folder, model folder, or pydoc (default)")
    p.add_argument("--prompt", default="def ", help="text to go on from (default: 'def ')")
    p.add_argument("--bytes", type=int, default=400, metavar="N", help="how much to write (default: 400)")
    p.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest byte (default: 0.7)")
    p.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    p.add_argument("--backend", **where)  # type: ignore[arg-type]
    p.set_defaults(run=_generate)

    p = verbs.add_parser("merge", help="fold the adapter of a run into its model")
    p.add_argument("run_folder", type=Path, help="a run folder, or an adapter folder")
    p.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder for the merged model")
    p.set_defaults(run=_merge)

    p = verbs.add_parser("info", help="what is in a model or a run folder")
    p.add_argument("model", nargs="?", default="pydoc", help="run folder, adapter folder, model folder, or pydoc (default)")
    p.set_defaults(run=_info)

    p = verbs.add_parser("gradcheck", help="check every gradient of this package by finite differences")
    p.add_argument("--backend", **where)  # type: ignore[arg-type]
    p.set_defaults(run=_gradcheck)
    return parser


def _names(text: str) -> str | list[str]:
    return text if text == "all-linear" else [name for name in text.split(",") if name]


if __name__ == "__main__":
    sys.exit(main())
