"""The command line. `flags` has the flags of every verb, `verbs` the few lines that pass them to a function of `runs`.

With --json a verb prints exactly one JSON object on standard output; everything else goes to standard error.
"""

from __future__ import annotations

import os
import sys

from minilora.cli.flags import parse
from minilora.formats.atomic import to_json

# Raised by bad input, a missing extra or a full disk, and printed in one line. Anything else is a bug and shows its traceback.
_EXPECTED = (ValueError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError)


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0, 1 after an error, 130 after Ctrl-C; argparse itself exits with 2."""
    debug = False
    try:
        args = parse(argv)
        debug = args.debug
        from minilora.cli.verbs import VERBS  # after parsing: --help needs nothing of it

        result = VERBS[args.verb](args, lambda text: print(text, file=sys.stderr if args.json else sys.stdout, flush=True))
        if args.json:
            print(to_json(result))
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        print("minilora: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `minilora generate | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _EXPECTED as error:
        if debug:
            raise
        if "--json" in (sys.argv if argv is None else argv) and hasattr(error, "result"):
            print(to_json(error.result))
        text = f"{error.strerror} ({error.filename})" if isinstance(error, OSError) and error.strerror and error.filename else str(error)
        print(f"minilora: error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
        return 1
