"""The command line. `flags` has the flags of every verb, `verbs` the few lines that pass them to a function of `runs`.

With --json a verb prints exactly one JSON object on standard output; everything else goes to standard error.
"""

import sys
from argparse import Namespace

from minilora.cli.flags import parse
from minilora.cli.streams import ignore_the_rest, printable
from minilora.formats.atomic import to_json

# Raised by bad input, a missing extra or a full disk, and printed in one line. Anything else is a bug and shows its traceback.
_EXPECTED = (ValueError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError)


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0, 1 after an error or a wrong answer, 130 after Ctrl-C; argparse itself exits with 2."""
    args = None
    try:
        args = parse(argv)
        with printable(exact=args.verb == "generate", go_on=args.verb != "generate"):
            return _run(args)
    except BrokenPipeError:  # `minilora generate | head` has read enough
        ignore_the_rest()
        return 0
    except (*_EXPECTED, KeyboardInterrupt) as error:  # of the flags
        with printable(exact=False, go_on=True):
            return _failed(error, args is not None and args.debug)


def _run(args: Namespace) -> int:
    try:
        from minilora.cli.verbs import VERBS  # after parsing: --help needs nothing of it

        result = VERBS[args.verb](args, lambda text: print(text, file=sys.stderr if args.json else sys.stdout, flush=True))
        if args.json and result:  # none of a rank other than 0
            print(to_json(result))
        return int(result.get("ok") is False)
    except BrokenPipeError:
        raise
    except (*_EXPECTED, KeyboardInterrupt) as error:
        if args.json and hasattr(error, "result"):
            print(to_json(error.result))
        return _failed(error, args.debug)


def _failed(error: BaseException, debug: bool) -> int:
    """Print an error in one line. Returns the exit status."""
    if isinstance(error, KeyboardInterrupt):
        print("minilora: interrupted", file=sys.stderr)
        return 130
    if debug:
        raise error
    text = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) and error.strerror and error.filename else str(error)
    print(f"minilora: error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
    return 1
