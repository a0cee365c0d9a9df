"""The verbs of `minilora exercise`: files in the student's folder, and beside them progress.json, how far the student has come."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minilora.exercises.examine import examine
from minilora.exercises.template import Exercise, code, exercises, introduction
from minilora.formats.atomic import read_json, write_json, write_text
from minilora.runs import Say

Progress = dict[str, dict[str, Any]]  # {exercise: {"solved": bool, "hints": number shown}}


def exercise(
    action: str, name: str = "", out: str = "exercises", force: bool = False, notebook: bool = False, limit: float = 60, *, say: Say
) -> dict[str, Any]:
    """list, start, check, hint or solution. name: an exercise, its number or a file; by default the next one that is not solved.

    Raises ValueError for an exercise that does not exist, FileExistsError where `start` would overwrite a file, FileNotFoundError where
    there is none to check.
    """
    file = Path(name) if name.endswith((".py", ".ipynb")) else None
    folder = file.parent if file else Path(out)
    progress = _read(folder, say)
    if action == "list":
        return _list(progress, say)
    chosen = _choose(file.stem if file else name, progress)
    state = progress.setdefault(chosen.name, {"solved": False, "hints": 0})
    if action == "start":
        return _start(chosen, folder, force, notebook, say)
    if action == "solution":
        sources = {blank.house.__qualname__: inspect.getsource(blank.house) for blank in chosen.write}
        say("\n".join(f"# {blank.where()}\n{source}" for blank, source in zip(chosen.write, sources.values(), strict=True)))
        return {"exercise": chosen.name, "solution": sources}
    if action == "hint":
        state["hints"] = min(state["hints"] + 1, 3)
        hints = chosen.three_hints()[: state["hints"]]
        say("\n\n".join(f"Hint {i} of 3. {hint.strip()}" for i, hint in enumerate(hints, 1)))
        result: dict[str, Any] = {"exercise": chosen.name, "hints": hints}
    else:
        path = file or _file(chosen, folder)
        wrong = _check(chosen, path, limit, say)
        state["solved"] = not wrong
        following = next((e for e in exercises().values() if not progress.get(e.name, {}).get("solved")), None)
        onward = f"Next: minilora exercise start {following.name}" if following else "All exercises are solved."
        say(f"{path}: {wrong or f'right. {onward}'}")
        result = {"exercise": chosen.name, "ok": not wrong, "wrong": wrong}
    write_json(folder / "progress.json", progress)
    return result


def check_here(name: str, names: dict[str, Any]) -> None:
    """For a notebook, `check_here("linear", globals())`: print what is wrong with the function that was defined there."""
    progress, wrong = _read(Path(), print), examine(exercises()[name], names)
    progress.setdefault(name, {"hints": 0})["solved"] = not wrong
    write_json("progress.json", progress)
    print(wrong or f"{name} is right.")


def _read(folder: Path, say: Say) -> Progress:
    """The progress kept in a folder. A damaged file is set aside under another name."""
    path = folder / "progress.json"
    if not path.exists():
        return {}
    try:
        progress = read_json(path)
        if all(isinstance(s, dict) and {**s, "solved": 0, "hints": 0}.keys() == s.keys() for s in progress.values()):
            return progress
        reason = f"{path} is not a progress file."
    except ValueError as error:
        reason = str(error)
    aside = next(p for i in range(1, 10**6) if not (p := folder / f"progress.damaged-{i}.json").exists())
    path.rename(aside)
    say(f"{reason} It is kept as {aside}, and a new one is begun; `minilora exercise check NAME` adds what is solved.")
    return {}


def _choose(name: str, progress: Progress) -> Exercise:
    """The exercise of this name, number or file name; without one, the next that is not solved, or the first."""
    known = exercises()
    if not name:
        return next((e for e in known.values() if not progress.get(e.name, {}).get("solved")), next(iter(known.values())))
    for e in known.values():
        if name in (e.name, e.stem, e.stem[:2], e.stem[:2].lstrip("0")):
            return e
    near = get_close_matches(name, known, cutoff=0.5) or [other for other in known if name in other]
    hint = f"did you mean {' or '.join(near)}?" if near else "`minilora exercise list` names them."
    raise ValueError(f"there is no exercise {name!r}; {hint}")


def _file(chosen: Exercise, folder: Path) -> Path:
    """The answer: the Python file or the notebook, whichever was changed last."""
    files = [path for end in ("py", "ipynb") if (path := folder / f"{chosen.stem}.{end}").is_file()]
    if not files:
        raise FileNotFoundError(f"{folder / chosen.stem}.py does not exist; `minilora exercise start {chosen.name}` writes it.")
    return max(files, key=lambda path: path.stat().st_mtime)


def _list(progress: Progress, say: Say) -> dict[str, Any]:
    result = {}
    for e in exercises().values():
        state = result[e.name] = {"title": e.title, "solved": False, "hints": 0, **progress.get(e.name, {})}
        hints = f", hints: {state['hints']}" if state["hints"] else ""
        say(f"{'x' if state['solved'] else ' '} {e.stem[:2]} {e.name:<16} {e.title}{hints}")
    say(f"{sum(state['solved'] for state in result.values())} of {len(result)} are solved (x).")
    return result


def _start(chosen: Exercise, folder: Path, force: bool, notebook: bool, say: Say) -> dict[str, Any]:
    path = folder / f"{chosen.stem}.{'ipynb' if notebook else 'py'}"
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists, and may hold your answer; --force overwrites it.")
    text, blocks = introduction(chosen), code(chosen)
    write_text(path, _notebook(chosen, text, blocks) if notebook else "\n\n\n".join([f'"""{text}\n"""\n\n{blocks[0]}', *blocks[1:]]) + "\n")
    say(f"{path}: write {', '.join(b.house.__qualname__ for b in chosen.write)}, then run `minilora exercise check {path}`.")
    return {"exercise": chosen.name, "file": str(path)}


def _notebook(chosen: Exercise, text: str, blocks: list[str]) -> str:
    """nbformat 4.5. The last cell checks."""
    check = f'from minilora.exercises import check_here\n\ncheck_here("{chosen.name}", globals())'
    code_cell: dict[str, Any] = {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": []}
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "metadata": {}, "source": text}]
    cells += [{**code_cell, "source": block} for block in [*blocks, check]]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": [{"id": f"cell-{i}", **cell} for i, cell in enumerate(cells)], "metadata": {"kernelspec": kernel}}
    return json.dumps({**book, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def _check(chosen: Exercise, path: Path, limit: float, say: Say) -> str:
    """`examine` in a process of its own, which may take `limit` seconds. What the file prints is passed on, up to 2,000 characters."""
    with tempfile.TemporaryDirectory() as temporary:
        answer, result, printed = (Path(temporary) / name for name in ("answer.py", "result", "printed"))
        if path.suffix == ".ipynb":
            try:
                sources = ["".join(cell["source"]) for cell in read_json(path)["cells"] if cell["cell_type"] == "code"]
            except (TypeError, KeyError):
                raise ValueError(f"{path} is not a notebook of nbformat 4.") from None
            answer.write_text("\n\n".join(source for source in sources if "check_here(" not in source), encoding="utf-8")
        else:
            answer = path.absolute()
            if not path.is_file():
                raise FileNotFoundError(f"there is no file {path}; `minilora exercise start {chosen.name}` writes one.")
        run = [sys.executable, "-c", "from minilora.exercises.examine import main; main()", chosen.name, str(answer), str(result)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with printed.open("w") as output:
            try:
                status = subprocess.run(run, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=env, timeout=limit).returncode
            except subprocess.TimeoutExpired:
                return f"the check did not end within {limit:g} seconds; is there a loop without an end? --limit gives it more time."
        with printed.open(errors="replace") as output:
            if text := output.read(2000).rstrip():
                say(text)
        return result.read_text(encoding="utf-8") if result.exists() else f"the file ended Python with status {status} during the check."
