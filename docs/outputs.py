"""Fill in what commands print: `python docs/outputs.py FILE.md` runs every sh block that an output block follows, and writes that block."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"```sh\n([^`]*)```\n```\n(.*?)```\n", re.DOTALL)
WIDTH = "130"  # columns


def printed(commands: str) -> str:
    """What the commands of a block print, one after the other."""
    out = []
    for line in commands.strip().splitlines():
        program, *argv = shlex.split(line)
        assert program == "minilora", line
        run = [sys.executable, "-m", "minilora", *argv]
        out.append(subprocess.run(run, env=os.environ | {"COLUMNS": WIDTH}, capture_output=True, text=True, check=True).stdout)
    return "".join(out)


def filled(page: str) -> str:
    """The page with the output of today."""
    return BLOCK.sub(lambda block: f"```sh\n{block[1]}```\n```\n{printed(block[1])}```\n", page)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(filled(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
