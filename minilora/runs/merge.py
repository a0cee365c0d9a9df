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
    model: str | Path,
    out: str | Path,
    adapter: str | Path | None = None,
    dtype: str = STORED,
    allow_other_weights: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, float]:
    """Write the merged model of a run or adapter folder to a new folder `out`. Returns {path: largest change of a weight}.

    dtype: of the result; by default that of the base's files.
    Raises ValueError when there is no adapter, FileExistsError when `out` is in use.
    """
    out = check_free(out)
    if adapter is None and base_of(model)[1] is None:
        raise ValueError(f"{model} has no adapter to merge.")
    merged = open_model(model, "numpy", adapter, "float32", allow_other_weights)  # computed in float32, whatever the run's dtype
    if isinstance(adaptation(merged).config, PartialConfig):  # trained without an adapter
        before = adaptation(merged).base_values
        changes = {name: float(abs(p.data - before[name]).max()) for name, p in merged.parameters() if name in before}
    else:
        changes = merge(merged)
    save_model(merged, out, dtype)
    say(f"merged {len(changes)} adapters into {out}; the largest change of a weight is {max(changes.values()):.3g}")
    if still := [name for name, change in changes.items() if change == 0]:
        note(f"warning: {len(still)} adapters are still zero, {still[0]} first: was anything trained?")
    return changes
