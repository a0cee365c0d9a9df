"""`minilora finetune --resume RUN`: continue a run from its last checkpoint, bit for bit as if it had not been interrupted."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from minilora import tuned
from minilora.formats.atomic import read_json
from minilora.models.config_file import check_types, made
from minilora.runs import Say
from minilora.runs.finetune import finetune
from minilora.runs.recipe import ResolvedRecipe, threads_for

FREE = ("threads", "backend", "save_every", "keep")  # may be others: on one backend, none changes the result


def resume(run: str | Path, say: Say = print, **changes: Any) -> dict[str, Any]:
    """Continue the run in a folder. changes: settings; those of FREE may be new, all others must be the run's.

    A run that has no checkpoint yet starts again. Raises ValueError for a folder that holds no run, a run that has ended, a setting that
    differs, or a model or data that have changed; BlockingIOError while another process writes to the folder.
    """
    run, file = Path(run), Path(run) / "run.json"
    if not file.is_file():
        raise ValueError(f"{run} holds no run: there is no {file}.")
    record = read_json(file)
    if isinstance(record.get("results"), dict) and "after" in record["results"]:
        raise ValueError(f"{run} has ended after step {record['results'].get('steps')}; there is nothing to continue.")
    known = {field.name for field in fields(ResolvedRecipe)}
    values = record.get("configuration")
    if not isinstance(values, dict) or not known - {"lanes", "forgetting", *FREE} <= values.keys():
        raise ValueError(f"{file} is damaged, or of another version: its configuration is not complete.")
    values = {"lanes": values.get("threads", 1), **{name: value for name, value in values.items() if name in known}}
    check_types(ResolvedRecipe, values, str(file))
    for name, value in changes.items():
        value = str(Path(value).absolute()) if name in ("data", "forgetting") and value else value
        if name not in FREE and values[name] != value:
            raise ValueError(f"{run} has {name} {values[name]!r}, not {value!r}; a run continues with its own settings, or is a new one.")
    values |= {"threads": threads_for(None), **{name: value for name, value in changes.items() if name in FREE}}
    began, now = record.get("kernels", ""), tuned.kernels_in_use()
    if began != now:
        own = "OpenBLAS's own choice"
        say(f"kernels   {now or own}, but the run began with {began or own}: its last digits may differ; set OPENBLAS_CORETYPE={began}")
    with tuned.using(tuned.check(record.get("sizes", tuned.SIZES), str(file))):
        return finetune(made(ResolvedRecipe, values, str(file)), run, say, resumed=True)
