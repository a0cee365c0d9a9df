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
tensorboard/    events, with --log tensorboard
checkpoints/    the last state of training, and the best one, from which --resume continues (checkpoint.py)
.lock           the process that writes to the folder (interrupt.py)

A study, which continues from there when it was interrupted:
study.json      version, the common recipe, the changes of each row, and the SHA-256 of the training data
runs.jsonl      one line a finished run: row, seed, value (of the headline; null if it diverged), failed, trained, steps, seconds, ...
table.txt       the table
study.png       its picture
"""

import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from minilora.data.records import note, read_records
from minilora.formats.atomic import is_temporary, read_json, to_json, write_json, write_text
from minilora.models.config_file import fits
from minilora.runs.recipe import Recipe

VERSION = 1
_FREE = ("threads", "backend", "sample_bytes", "save_every", "keep")  # may differ when a study is continued
_NUMBER = float | int
_FIELDS = {"row": str, "seed": int, "value": _NUMBER | None, "failed": bool, "trained": int, "steps": int, "seconds": _NUMBER}


def check_free(path: str | Path, note: str = "") -> Path:
    """The path, if nothing or an empty folder is there. Raises FileExistsError otherwise."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(not (each.name == ".lock" or is_temporary(each)) for each in path.iterdir())):
        raise FileExistsError(f"{path} is in use{note}; name another folder with --out, or remove it first.")
    return path


def new_folder(path: str | Path | None, method: str) -> Path:
    """`path`, or the first free runs/<method>-<n>, as a new folder. Raises FileExistsError when `path` is in use."""
    numbered = (Path("runs") / f"{method}-{n}" for n in count(1))
    folder = check_free(next(f for f in numbered if not f.exists()) if path is None else path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clean(folder: Path) -> None:
    """Remove what was being written when an earlier process ended."""
    for path in [path for path in folder.rglob(".*") if is_temporary(path)]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


class Lines:
    """A file with one JSON object a line, which grows by `add`. Each line is flushed.

    When the disk is full, the records are kept, and `add` tries again: a disk that is full for a while costs nothing. `sync` writes what
    is missing, and raises OSError when it cannot.
    """

    def __init__(self, path: Path, records: list[dict[str, Any]]) -> None:
        self.path, self.records = path, records
        self.file: Any = None
        self.sync()

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        try:
            if self.file is not None:
                self.file.write(to_json(record) + "\n")
                self.file.flush()
                return
        except OSError as error:
            note(f"{self.path} cannot be written ({error.strerror}); training goes on, and it is written as soon as that is possible.")
        self.close()  # it may end in the middle of a line

    def sync(self) -> None:
        """Write everything, unless it is there."""
        if self.file is None:
            write_lines(self.path, self.records)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed by `close`)

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):
                self.file.close()
            self.file = None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of such a file, up to the first line that is not whole."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or not isinstance(record.get("step", 0), int):
            break
        records.append(record)
    return records


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
            if there.get("version") != VERSION:
                raise ValueError(
                    f"{self.about} is of version {there.get('version')!r}, this minilora writes {VERSION}; name another --out."
                )
            old, old_rows = there.get("recipe"), there.get("rows")
            if not isinstance(old, dict) or not isinstance(old_rows, dict):
                raise ValueError(f"{self.about} is damaged: it has no recipe or no rows.")
            for what, ours, theirs in (("", requested, old), ("row ", rows, {**rows, **old_rows})):
                for name, value in ours.items():
                    if theirs.get(name, value) != value:  # an older study lacks newer settings
                        wrong = f"{what}{name} {theirs.get(name)!r}, not {value!r}"
                        raise ValueError(f"{self.path} holds a study with {wrong}; name another --out.")
            if there.get("sha256", sha256) != sha256:
                raise ValueError(f"{recipe.data} has changed since the runs in {self.path}; name another --out.")
            self.records, rows = self._finished(), {**old_rows, **rows}
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

    def _finished(self) -> list[dict[str, Any]]:
        """The records of runs.jsonl. Raises ValueError, naming the line, for a damaged one or a second one of the same run."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for n, record in read_records(self.runs) if self.runs.is_file() else ():
            wrong = next((name for name, kind in _FIELDS.items() if not fits(record.get(name, ...), kind)), None)
            if wrong or (run := (record["row"], record["seed"])) in found:
                what = f"its {wrong} is not valid" if wrong else f"{run[0]!r} with seed {run[1]} is there twice"
                raise ValueError(f"{self.runs}, line {n}: {what}; remove the line to repeat the run.")
            found[run] = record
        return list(found.values())


def lanes_of(study: Path) -> int:
    """The number of lanes of the study in a folder, on which its results depend; 0 where there is none."""
    recipe = read_json(study / "study.json").get("recipe") if (study / "study.json").is_file() else None
    lanes = recipe.get("lanes", 0) if isinstance(recipe, dict) else 0
    return lanes if isinstance(lanes, int) else 0
