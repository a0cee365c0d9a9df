"""The folder of a study, from which an interrupted one goes on.

study.json    version, the common recipe, what each row changes, and the SHA-256 of the training data
runs.jsonl    one line for each finished run: row, seed, value (of the headline; null if it diverged), failed, trained, steps, seconds, ...
table.txt     the table, and study.png its picture
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minilora.formats.atomic import read_json, to_json, write_json, write_text
from minilora.runs.recipe import Recipe

VERSION = 1
_FREE = ("threads", "backend", "sample_bytes")  # may be another when a study is gone on with
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "row": str,
    "seed": int,
    "value": (float, int, type(None)),
    "failed": bool,
    "trained": int,
    "steps": int,
    "seconds": (float, int),
}


class StudyFolder:
    """Opens the folder of a study; `begin` makes a new one. `records` are the finished runs; `add` puts one more on disk, whole.

    Raises ValueError when the folder holds a study of another version, with another recipe or other rows of the same names, or when a
    record is damaged; FileExistsError when something else is in it.
    """

    def __init__(self, path: str | Path, recipe: Recipe, rows: dict[str, dict[str, Any]], sha256: str | None = None) -> None:
        self.path = Path(path)
        self.about, self.runs = self.path / "study.json", self.path / "runs.jsonl"
        self.picture = self.path / "study.png"
        asked = {name: value for name, value in asdict(recipe).items() if name not in _FREE}
        self.records: list[dict[str, Any]] = []
        if self.about.is_file():
            there = read_json(self.about)
            self._check(there, asked, rows)
            if there.get("sha256", sha256) != sha256:
                raise ValueError(f"{recipe.data} has changed since the runs in {self.path}; name another --out.")
            rows = {**there["rows"], **rows}
            self.records = read_records(self.runs)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(f"{self.path} is in use, and holds no study; name another folder with --out.")
        self._study = {"version": VERSION, "recipe": asked, "rows": rows, "sha256": sha256}

    def begin(self) -> None:
        """Write study.json."""
        write_json(self.about, self._study)

    def _check(self, there: dict[str, Any], asked: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
        if there.get("version") != VERSION:
            raise ValueError(f"{self.about} is of version {there.get('version')!r}, this minilora writes {VERSION}; name another --out.")
        old, old_rows = there.get("recipe"), there.get("rows")
        if not isinstance(old, dict) or not isinstance(old_rows, dict):
            raise ValueError(f"{self.about} is damaged: it has no recipe or no rows.")
        for name, value in asked.items():
            if old.get(name) != value:
                raise ValueError(f"{self.path} holds a study with {name} {old.get(name)!r}, not {value!r}; name another --out.")
        for name, change in rows.items():
            if name in old_rows and old_rows[name] != change:
                raise ValueError(f"{self.path} holds a study whose row {name!r} is {old_rows[name]}, not {change}; name another --out.")

    def add(self, record: dict[str, Any]) -> None:
        """Keep one more finished run. The file is replaced as a whole: an interruption leaves no half of a line."""
        self.records.append(record)
        write_text(self.runs, "".join(to_json(r) + "\n" for r in self.records))

    def write_table(self, text: str) -> None:
        write_text(self.path / "table.txt", text + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The finished runs in a runs.jsonl. Raises ValueError, naming the line, for one that is damaged or given twice."""
    records, seen = [], set()
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else [], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {n}: this record is damaged ({error}); remove the line to have the run repeated.") from None
        for name, kind in _FIELDS.items():
            if not isinstance(record, dict) or not isinstance(record.get(name, ...), kind):
                raise ValueError(
                    f"{path}, line {n}: this record is damaged, its {name} is no good; remove the line to have the run repeated."
                )
        if (record["row"], record["seed"]) in seen:
            raise ValueError(f"{path}, line {n}: {record['row']!r} with seed {record['seed']} is there twice; remove one of the lines.")
        seen.add((record["row"], record["seed"]))
        records.append(record)
    return records
