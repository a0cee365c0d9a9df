"""What suits this processor: measured once by `minilora doctor --tune` (runs/tune.py) and kept in a file, never guessed from a name.

    kernels   OpenBLAS's kernels for products, "" for those that it chooses itself; they must be named before NumPy is loaded
    shard     tokens that a lane computes at a time (training/replicas.py)
    block     elements that an elementwise operation takes at a time (kernels/numpy/blocks.py)
    logits    logits that exist at a time (kernels/numpy/losses.py)

Each changes the order of sums, and so the last digits of a result. run.json names those of a run. One that is resumed keeps its sizes, and
says so where the kernels are others.
"""

import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZES = {"shard": 768, "block": 2**17, "logits": 2**20}  # where nothing has been measured: the best on a Zen 4
sizes = dict(SIZES)
kernels, applied = "", False  # applied: whether they and the sizes come from the file


def path() -> Path:
    """The file, which MINILORA_TUNED may name; MINILORA_TUNED=/dev/null: nothing that was measured is used."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return Path(os.environ.get("MINILORA_TUNED") or caches / "minilora" / "tuned.json")


def processor() -> str:
    """Name, family and model of the processor, and its widest vectors."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    numbers = [fields.get(key, "?") for key in (("cpu family", "model") if "cpu family" in fields else ("CPU implementer", "CPU part"))]
    vectors = [v for v in ("avx512f", "avx2", "sve", "asimd") if v in (fields.get("flags") or fields.get("Features", "")).split()]
    return f"{name}, family {numbers[0]} model {numbers[1]}, {vectors[0] if vectors else 'no avx2'}" if fields else name


def kernels_in_use() -> str:
    """OPENBLAS_CORETYPE, which the user may have set; "" for OpenBLAS's own choice."""
    return os.environ.get("OPENBLAS_CORETYPE", "")


def check(found: Any, where: str) -> dict[str, int]:
    """The sizes in `found`. Raises ValueError, naming `where`, for what is not a size."""
    if not isinstance(found, dict):
        raise ValueError(f"{where}: sizes is {found!r}, which is not an object.")
    wrong = [name for name, size in found.items() if name not in SIZES or type(size) is not int or not 1 <= size <= 2**30]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} is {found[wrong[0]]!r}, which is not a size of {', '.join(SIZES)}.")
    return found


@contextmanager
def using(changed: dict[str, int]) -> Iterator[None]:
    """Compute with other sizes inside the `with`."""
    before = dict(sizes)
    sizes.update(changed)
    try:
        yield
    finally:
        sizes.update(before)


def apply() -> None:
    """Take what the file says, if it was measured on this processor. One that is damaged is named on standard error, and ignored."""
    global kernels, applied
    if not os.path.isfile(path()):  # False, too, in a folder that may not be read
        return
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.keys() < {"processor", "kernels", "sizes"}:
            raise ValueError(f"{path()} lacks the processor, the kernels or the sizes.")
        if found["processor"] != processor():
            return
        measured = check(found["sizes"], str(path()))
        if not isinstance(found["kernels"], str) or not found["kernels"].isalnum() | (found["kernels"] == ""):
            raise ValueError(f"{path()}: kernels is {found['kernels']!r}, which is not the name of OpenBLAS's kernels.")
    except (ValueError, RecursionError, OSError) as error:
        why = f"{path()} is not valid JSON" if isinstance(error, (json.JSONDecodeError, RecursionError)) else str(error).rstrip(".")
        print(f"{why}; the usual sizes are used: run minilora doctor --tune again.", file=sys.stderr)
        return
    sizes.update(measured)
    kernels, applied = found["kernels"], True
    if kernels and "numpy" not in sys.modules:
        os.environ.setdefault("OPENBLAS_CORETYPE", kernels)
