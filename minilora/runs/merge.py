"""`minilora merge`: fold an adapter into its model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minilora.adapters import PartialConfig
from minilora.data.records import note
from minilora.formats.checkpoint import STORED, save_model
from minilora.lora import adaptation, merge
from minilora.runs.folder import check_free
from minilora.runs.run_file import base_of, open_model


def merge_run(
    path: str | Path,
    out: str | Path,
    adapter: str | Path | None = None,
    dtype: str = STORED,
    allow_other_weights: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Write the merged model of a run or adapter folder to a new folder `out`. Returns {path: largest change of a weight}.

    dtype: of the result; by default that of the base's files. Parameters that were trained without an adapter are compared with the base.
    Raises ValueError when there is no adapter, FileExistsError when `out` is in use.
    """
    out = check_free(out)
    if adapter is None and base_of(path)[1] is None:
        raise ValueError(f"{path} has no adapter to merge.")
    model = open_model(path, "numpy", adapter, "float32", allow_other_weights)  # merging is computed in float32, whatever the run's dtype
    if isinstance(adaptation(model).config, PartialConfig):
        before = adaptation(model).base_values
        changes = {name: float(abs(p.data - before[name]).max()) for name, p in model.parameters() if name in before}
    else:
        changes = merge(model)
    save_model(model, out, dtype)
    say(f"merged {len(changes)} adapters into {out}; the largest change of a weight is {max(changes.values()):.3g}")
    if still := [name for name, change in changes.items() if change == 0]:
        note(f"warning: {len(still)} adapters are still zero, {still[0]} first: was anything trained?")
    return changes
