"""The folders of runs and studies.

A run:
run.json        the configuration, the names of the classes, the SHA-256 of the training data, and the results
metrics.jsonl   one line a step: step, loss, lr, grad_norm, tokens. No times: the same run writes the same file
norms.jsonl     the names of the trained parameters; then, for at most 101 steps: step, and of each parameter the norms of its gradient
                before clipping (grad_norms) and of its values before the update (norms)
confusion.json  before and after: how many held-out texts of class i were taken for class j         (task classify)
samples.txt     texts that the model generated before and after
adapter/        adapter_config.json, adapter_model.safetensors       (all methods but full)
model/          config.json, model.safetensors                       (method full)
base/           the quantized model that the adapter fits            (method lora initialised with LoftQ)
curves.png      the picture, if matplotlib is installed

A study, which continues from there when it was interrupted:
study.json      version, the common recipe, the changes of each row, and the SHA-256 of the training data
runs.jsonl      one line a finished run: row, seed, value (of the headline; null if it diverged), failed, trained, steps, seconds, ...
table.txt       the table
study.png       its picture
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from minilora.formats.atomic import read_json, to_json, write_json, write_text
from minilora.runs.recipe import Recipe

VERSION = 1
_FREE = ("threads", "backend", "sample_bytes")  # may differ when a study is continued
_RENAMED = {"pull": "l2_sp"}  # fields of studies written before
_REMOVED = {"optimizer": "adamw"}  # with the only value left
_NUMBER = float | int
_FIELDS = {"row": str, "seed": int, "value": _NUMBER | None, "failed": bool, "trained": int, "steps": int, "seconds": _NUMBER}


def check_free(path: str | Path, note: str = "") -> Path:
    """The path, if nothing or an empty folder is there. Raises FileExistsError otherwise."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is in use{note}; name another folder with --out, or remove it first.")
    return path


def new_folder(path: str | Path | None, method: str) -> Path:
    """`path`, or the first free runs/<method>-<n>, as a new folder. Raises FileExistsError when `path` is in use."""
    numbered = (Path("runs") / f"{method}-{n}" for n in count(1))
    folder = check_free(next(f for f in numbered if not f.exists()) if path is None else path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """All records so far, one JSON object a line. The file is replaced as a whole, so it never ends in the middle of a line."""
    write_text(path, "".join(to_json(record) + "\n" for record in records))


class StudyFolder:
    """Opens the folder of a study; `begin` makes a new one. `records` are the finished runs; `add` writes one more.

    Raises ValueError when the folder holds a study of another version, with another recipe or other rows of the same names, or a damaged
    record; FileExistsError when it holds something else.
    """

    def __init__(self, path: str | Path, recipe: Recipe, rows: dict[str, dict[str, Any]], sha256: str | None = None) -> None:
        self.path = Path(path)
        self.about, self.runs = self.path / "study.json", self.path / "runs.jsonl"
        requested = {name: value for name, value in asdict(recipe).items() if name not in _FREE}
        self.records: list[dict[str, Any]] = []
        if self.about.is_file():
            there = read_json(self.about)
            rows = {**self._check(there, requested, rows), **rows}
            if there.get("sha256", sha256) != sha256:
                raise ValueError(f"{recipe.data} has changed since the runs in {self.path}; name another --out.")
            self.records = read_records(self.runs)
        else:
            check_free(self.path, ", and holds no study")
        self._study = {"version": VERSION, "recipe": requested, "rows": rows, "sha256": sha256}

    def begin(self) -> None:
        """Write study.json."""
        write_json(self.about, self._study)

    def add(self, record: dict[str, Any]) -> None:
        """Keep one more finished run."""
        self.records.append(record)
        write_lines(self.runs, self.records)

    def _check(self, there: dict[str, Any], requested: dict[str, Any], rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The rows of the study in the folder. Raises ValueError when it is another study."""
        if there.get("version") != VERSION:
            raise ValueError(f"{self.about} is of version {there.get('version')!r}, this minilora writes {VERSION}; name another --out.")
        old, old_rows = there.get("recipe"), there.get("rows")
        if not isinstance(old, dict) or not isinstance(old_rows, dict):
            raise ValueError(f"{self.about} is damaged: it has no recipe or no rows.")
        old, *changes = ({_RENAMED.get(name, name): value for name, value in each.items()} for each in (old, *old_rows.values()))
        old_rows = dict(zip(old_rows, changes, strict=True))
        for name, value in (requested | {name: value for name, value in _REMOVED.items() if name in old}).items():
            if old.get(name) != value:
                raise ValueError(f"{self.path} holds a study with {name} {old.get(name)!r}, not {value!r}; name another --out.")
        for name, change in rows.items():
            if old_rows.get(name, change) != change:
                raise ValueError(f"{self.path} holds a study whose row {name!r} is {old_rows[name]}, not {change}; name another --out.")
        return old_rows


def read_records(path: Path) -> list[dict[str, Any]]:
    """The finished runs in a runs.jsonl. Raises ValueError, naming the line, for a damaged record or a second one of the same run."""
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], start=1):
        damaged = f"{path}, line {n}: this record is damaged"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{damaged} ({error}); remove the line to repeat the run.") from None
        for name, kind in _FIELDS.items():
            if not isinstance(record, dict) or not isinstance(record.get(name, ...), kind):
                raise ValueError(f"{damaged}, its {name} is not valid; remove the line to repeat the run.")
        if (run := (record["row"], record["seed"])) in records:
            raise ValueError(f"{path}, line {n}: {run[0]!r} with seed {run[1]} is there twice; remove one of the lines.")
        records[run] = record
    return list(records.values())
